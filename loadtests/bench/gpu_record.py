"""The newest figures of a GPU in the pages: ``docs/measured-gpu.json``, and what is made of it.

README.md and docs/measured.md each have a place for them between two marks. Where there is no file,
these places say that no GPU was measured; a test holds them to what is written here.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loadtests.bench.report_tables import as_page, goal_table

ROOT: Final = Path(__file__).parents[2]
RECORD: Final = "docs/measured-gpu.json"
README: Final = "README.md"
MEASURED: Final = "docs/measured.md"
_BEGIN: Final = "<!-- gpu figures, by `python -m loadtests.bench gpu --record` -->"
_END: Final = "<!-- end of gpu figures -->"
_NONE: Final = {
    README: "There is no table of a GPU yet: what was written for GPUs since one was at hand\n"
    "was not measured ([docs/measured.md](docs/measured.md#on-a-gpu) has the command).",
    MEASURED: "There is no table of a GPU yet: none was at hand since static steps were written.",
}


def record(told: Mapping[str, Any], root: Path = ROOT) -> None:
    """Write the figures of a run, and the pages anew.

    Args:
        told: As ``Report.as_json`` gives it.
        root: Of the project.

    Raises:
        SystemExit: It is no run on a GPU.
    """
    if told["dry run"] or not told["figures"] or "driver" not in told["machine"]:
        raise SystemExit("Nothing was measured on a GPU, so nothing is recorded.")
    dated = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), **told}
    (root / RECORD).write_text(json.dumps(dated, indent=2) + "\n", encoding="utf-8")
    for page in _NONE:
        path = root / page
        path.write_text(
            with_figures(page, path.read_text(encoding="utf-8"), dated), encoding="utf-8"
        )


def recorded(root: Path = ROOT) -> dict[str, Any] | None:
    """The newest figures; None where no GPU was measured."""
    path = root / RECORD
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def with_figures(page: str, text: str, told: Mapping[str, Any] | None) -> str:
    """``text`` of a page with what is known of a GPU in its place.

    Raises:
        SystemExit: The page has no place for it.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"{page} has no place for figures: {_BEGIN} ... {_END}")
    return f"{before}{begin}\n{_told_on(page, told)}\n{end}{after}"


def _told_on(page: str, told: Mapping[str, Any] | None) -> str:
    if told is None:
        return _NONE[page]
    if page == MEASURED:
        return f"Measured on {told['date']}.\n\n{as_page(told).rstrip()}"
    machine = told["machine"]
    versions = ", ".join(f"{name} {one}" for name, one in machine["versions"].items() if one)
    where = f"driver {machine['driver']}, CUDA {machine['cuda']}, {versions}"
    lines = [
        f"On one {machine['gpu']} ({where}), {told['date']}; both sides of a ratio in one run:",
        "",
        *goal_table(told),
    ]
    return "\n".join(lines)
