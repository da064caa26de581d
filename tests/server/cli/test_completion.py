"""Completion in a shell, which typer brings: commands, options and choices are offered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.stand.live import environment

SCRIPT = "import sys; sys.argv[0] = 'hira'\nfrom server.cli.entry import main; main()"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("hira com", {"compare"}),
        ("hira adapters ", {"list", "show", "add", "remove", "pin"}),
        ("hira serve --quanti", {"--quantization"}),
        ("hira compare --quantization ", {"nf4", "fp4", "int8"}),
    ],
)
def test_what_is_typed_is_completed(typed: str, offered: set[str], tmp_path: Path) -> None:
    words = typed.split(" ")
    asked = {
        "_HIRA_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=environment(tmp_path) | asked,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert offered <= set(done.stdout.split()), done.stderr
