"""Method x layer x task: every answer of the engine against float64, and the table that says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.stand import coverage, coverage_table
from tests.stand.coverage import FAMILIES, METHODS, STAGES, TABLE, layers_of
from tests.stand.coverage_adapters import TASKS

pytest.importorskip("peft", reason="PEFT is an extra of the project (train)")
pytest.importorskip("PIL", reason="Pillow is an extra of the project (vision)")

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the bases and adapters, which all storages of a family share."""
    return tmp_path_factory.mktemp("coverage")


@pytest.mark.parametrize(("family", "storage"), STAGES, ids=["-".join(one) for one in STAGES])
def test_every_answer_equals_float64(family: str, storage: str, root: Path) -> None:
    cells = coverage.run(family, storage, root / f"of {family}")
    worst = {(one.method, one.layer, one.task): one.error for one in cells if one.error > 0}
    assert len(worst) == len(cells), "an answer without any rounding is one that was not computed"
    assert max(worst.values()) < coverage_table.BOUND, worst
    assert {one.task for one in cells} == set(FAMILIES[family])
    assert {one.layer for one in cells} - {"none"} == set(layers_of(family))


def rows() -> dict[tuple[str, str], dict[str, str]]:
    """The figures of the committed table."""
    found = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(TASKS) + 2 and cells[0] in METHODS:
            found[cells[0], cells[1]] = dict(zip(TASKS, cells[2:], strict=True))
    return found


def test_the_table_has_no_empty_cell_without_a_reason() -> None:
    table = rows()
    assert list(table) == coverage_table.rows_of()
    for (method, layer), cells in table.items():
        for task, cell in cells.items():
            served = is_served(method, layer, task)
            if served:
                assert float(cell) < coverage_table.BOUND, (method, layer, task)
            else:
                assert cell == coverage_table.reason(method, layer, task)
                assert f"\n{cell} " in TABLE.read_text()


def is_served(method: str, layer: str, task: str) -> bool:
    """Whether any stage has such an adapter."""
    if method == "base":
        return task in ("fill-mask", "text-generation", "feature-extraction")
    if method == "QLoRA" and layer in ("Embedding", "Conv2d"):
        return False
    return any(task in tasks and layer in layers_of(family) for family, tasks in FAMILIES.items())


def test_the_tests_that_the_table_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", TABLE.read_text())
    assert len(named) >= 5
    for path, test in named:
        text = (ROOT / path).read_text()
        assert f"def {test}(" in text if test else text, (path, test)
