"""The first steps of a base: what cannot answer, or answers otherwise, ends the start by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from server.base.plan import BaseModelError
from server.encoding.batch import Rows
from server.engine.engine import Engine
from server.generation.forward import Logits, PagedForward
from tests.stand import families, tiny_bases

SERVED = ("llama", "bert", "distilbert")
REFUSED = ("bloom", "gptj", "mpt", "falcon", "gpt_oss", "t5")


@pytest.mark.parametrize("family", [*SERVED, *REFUSED])
def test_a_family_is_exact_or_ends_the_start_with_one_line(family: str, tmp_path: Path) -> None:
    architecture = families.known()[family][-1]
    row = families.judge(family, architecture, tmp_path)
    assert row.outcome == ("served" if family in SERVED else "refused"), row
    if family in REFUSED:
        assert architecture in row.detail or "Encoder-decoder" in row.detail
        assert "\n" not in row.detail


def rows() -> list[families.Row]:
    """Those of the committed table."""
    found = []
    for line in families.TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 4 and cells[0] not in ("family", "---"):
            found.append(families.Row(*cells))
    return found


def test_the_table_names_every_family_and_class() -> None:
    wanted = [(family, one) for family, classes in families.known().items() for one in classes]
    assert [(row.family, row.architecture) for row in rows()] == wanted


def test_every_family_of_the_table_is_exact_refused_or_has_a_reason() -> None:
    for row in rows():
        assert row.outcome in ("served", "refused", "not makeable"), row
        assert row.detail, row
        if row.outcome == "served":
            assert float(row.detail.rpartition(": ")[2]) < families.BOUND, row


@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_a_base_whose_padding_changes_answers_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Rows._tokens

    def with_padding_in_front(self: Rows, items: Any) -> Any:
        made = real(self, items)
        made.arguments["input_ids"] = made.arguments["input_ids"].flip(1)
        return made

    base = tiny_bases.base_folder(tmp_path, kind)
    monkeypatch.setattr(Rows, "_tokens", with_padding_in_front)
    with pytest.raises(BaseModelError, match=r"first steps went wrong.*beside longer.*differ by"):
        Engine.build(tiny_bases.options(base, tmp_path / "store", modulation="expand"))


def test_a_lane_that_continues_otherwise_than_the_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PagedForward.__call__

    def shifted(self: PagedForward, parts: Any) -> Any:
        made = real(self, parts)
        return Logits(torch.roll(made.last, 1, -1), made.prompt)

    base = tiny_bases.base_folder(tmp_path, "llama")
    monkeypatch.setattr(PagedForward, "__call__", shifted)
    with pytest.raises(BaseModelError, match=r"LlamaForCausalLM.*log-probabilities.*differ by"):
        Engine.build(tiny_bases.options(base, tmp_path / "store", modulation="expand"))


def test_an_idle_engine_has_nothing_left_of_its_first_steps(tmp_path: Path) -> None:
    base = tiny_bases.base_folder(tmp_path, "llama")
    options = tiny_bases.options(base, tmp_path / "store", modulation="expand")
    state = torch.get_rng_state()
    engine = Engine.build(options)
    assert not engine.has_work()
    snapshot = engine.snapshot()
    assert not any(snapshot.queue_depth.values())
    assert (snapshot.kv_blocks["used"], snapshot.kv_blocks["cached"]) == (0, 0)
    assert torch.equal(torch.get_rng_state(), state)
    engine.close()
