"""The documentation names what there is: packages, settings, error codes, metrics, files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from server.edge.service import RELOADABLE
from server.errors import TABLE
from server.settings import Settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(DOCS.glob("*.md")),
)
README_LINES_MAX = 150


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def packages() -> set[str]:
    found = {path.parent for top in ("adapters", "server") for path in (ROOT / top).rglob("*.py")}
    return {f"{path.relative_to(ROOT).as_posix()}/" for path in found}


def rows(text: str) -> list[list[str]]:
    """The cells of every line of every table."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ]


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one).strip().lower().replace(" ", "-") for one in headings}


def package_rows() -> dict[str, list[str]]:
    found = [row for row in rows(page("structure.md")) if re.match(r"`\w+(/\w+)*/`$", row[0])]
    return {row[0].strip("`"): row for row in found}


def defined_in(package: str) -> set[str]:
    """Names that the modules of a package define at their top, packages below it left out."""
    names = set()
    for path in (ROOT / package).glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {one.id for one in node.targets if isinstance(one, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def test_the_map_has_a_row_for_every_package_and_for_no_other() -> None:
    assert set(package_rows()) == packages()


def test_packages_in_the_text_of_the_map_exist() -> None:
    named = set(re.findall(r"`((?:adapters|server)/(?:\w+/)*)`", page("structure.md")))
    assert named == packages()


@pytest.mark.parametrize("package", sorted(packages()))
def test_public_names_in_the_map_are_defined_in_their_package(package: str) -> None:
    names = set(re.findall(r"`(\w+)`", package_rows()[package][3]))
    assert names
    assert names <= defined_in(package)


def test_every_setting_has_a_row_and_every_row_a_setting() -> None:
    section = page("operate.md").split("## Settings", 1)[1].split("\n## ", 1)[0]
    named = [name for row in rows(section) for name in re.findall(r"^`(\w+)`$", row[0])]
    assert sorted(named) == sorted(Settings.model_fields)


def test_settings_that_are_read_again_are_named() -> None:
    at_once = page("operate.md").split("take effect at once:", 1)[1].split("All others", 1)[0]
    assert set(re.findall(r"`(\w+)`", at_once)) == set(RELOADABLE)


def test_every_error_code_has_a_row_with_its_status_and_every_row_a_code() -> None:
    section = page("api.md").split("## Error codes", 1)[1].split("\n## ", 1)[0]
    named = {row[0].strip("`"): row[1] for row in rows(section) if row[0].startswith("`")}
    assert named == {code: str(row.status) for code, row in TABLE.items()}


def test_every_metric_has_a_row_and_every_row_a_metric() -> None:
    section = page("operate.md").split("## Metrics", 1)[1].split("\n## ", 1)[0]
    named = {row[0].strip("`").removesuffix("_total") for row in rows(section)} - {"metric"}
    source = (ROOT / "server" / "metrics.py").read_text(encoding="utf-8")
    there = {name.removesuffix("_total") for name in re.findall(r'"(hira_\w+)"', source)}
    assert len(there) > 20
    assert named == there


def test_names_that_the_map_of_changes_gives_for_a_file_are_defined_in_it() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    given = re.findall(r"`([\w/]+\.py)` \(([^)]*)\)", text)
    named = [(file, name) for file, inside in given for name in re.findall(r"`(\w+)`", inside)]
    assert len(named) > 5
    for file, name in named:
        modules = [one for top in ("adapters", "server") for one in (ROOT / top).rglob("*.py")]
        sources = [one.read_text() for one in modules if one.as_posix().endswith(f"/{file}")]
        assert any(re.search(rf"\b(def|class) {name}\b", one) for one in sources), f"{file}: {name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_pages_name_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]+)#?([^)]*)\)", text):
        target = path.parent / link
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}#{anchor}"
    for name in re.findall(r"`((?:adapters|server|tests|loadtests|docs)/[\w/.]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_the_readme_is_short_and_links_every_page() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES_MAX
    missing = [one.name for one in PAGES[1:] if f"{one.relative_to(ROOT).as_posix()})" not in text]
    assert missing == []
