"""Workers of Ray that the tests fork: a start that fails holds up no other, and nothing is left."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.stand.forked_ray import use_forks


def test_a_start_that_fails_holds_up_no_other_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_end: list[Callable[[], object]] = []

    def register(act: Callable[..., object], *given: Any, **named: Any) -> None:
        at_end.append(partial(act, *given, **named))

    asked: list[list[str]] = []

    def fork(told: dict[str, Any], fds: Sequence[int]) -> int:
        asked.append(told["arguments"][2:])
        if len(asked) == 1:
            raise OSError("no more processes")
        return os.getpid()

    monkeypatch.setattr(sys, "executable", sys.executable)
    monkeypatch.setattr(atexit, "register", register)
    use_forks(fork)
    for name in ("first.py", "second.py"):
        command = [sys.executable, "/of/ray/setup_worker.py", "--language=PYTHON", name]
        assert subprocess.run(command, timeout=60, check=False).returncode == 0
    assert asked == [["first.py"], ["second.py"]]
    assert "no more processes" in capsys.readouterr().err
    folder = Path(sys.executable).parent
    assert folder.is_dir()
    for act in at_end:
        act()
    assert not folder.exists()
