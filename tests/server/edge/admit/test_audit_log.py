"""The audit log: whole lines from many processes, a bound on its size, and no line by halves."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from server.edge.admit.audit_log import AUDIT_FILES, AuditLog, audit_log_of
from server.settings import load_settings


def rows(folder: Path) -> list[dict[str, object]]:
    return [
        json.loads(line)
        for file in sorted(folder.glob("audit.jsonl*"))
        for line in file.read_text().splitlines()
    ]


def test_several_processes_write_whole_lines_and_turn_the_file_over(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", 40_000)
    context = multiprocessing.get_context("fork")

    def write(process: int) -> None:
        for number in range(100):
            log.write({"process": process, "number": number, "text": "x" * (number % 50)})

    children = [context.Process(target=write, args=(one,)) for one in range(4)]
    for one in children:
        one.start()
    for one in children:
        one.join(60)
        assert one.exitcode == 0
    assert {(one["process"], one["number"]) for one in rows(tmp_path)} == {
        (process, number) for process in range(4) for number in range(100)
    }
    assert len(list(tmp_path.glob("audit.jsonl*"))) > 1


def test_its_files_stay_within_the_bound(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", 8_000)
    for number in range(500):
        log.write({"number": number, "text": "x" * 40})
    files = list(tmp_path.glob("audit.jsonl*"))
    assert len(files) == AUDIT_FILES
    assert sum(one.stat().st_size for one in files) <= 8_000
    assert rows(tmp_path)[0]["number"] != 0
    assert max(int(str(one["number"])) for one in rows(tmp_path)) == 499


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that is full."""
    log = AuditLog(tmp_path / "audit.jsonl", 1 << 20)
    log.write({"number": 1})
    size = (tmp_path / "audit.jsonl").stat().st_size
    context = multiprocessing.get_context("fork")

    def fail() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, size + 5))
        with pytest.raises(OSError):  # noqa: PT011  # whatever the kernel calls it
            log.write({"number": 2})

    child = context.Process(target=fail)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert rows(tmp_path) == [{"number": 1}]
    log.write({"number": 3})
    assert [one["number"] for one in rows(tmp_path)] == [1, 3]


def test_the_settings_say_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def made(**flags: object) -> AuditLog | None:
        return audit_log_of(load_settings({"data_dir": tmp_path, **flags}))

    assert made(audit_log="off") is None
    own, named = made(), made(audit_log=str(tmp_path / "x" / "audit.jsonl"))
    assert own is not None
    assert own.place == tmp_path / "audit.jsonl"
    assert named is not None
    named.write({"a": 1})
    assert rows(tmp_path / "x") == [{"a": 1}]
    assert os.stat(tmp_path / "x" / "audit.jsonl").st_mode & 0o777 == 0o600
    told = made(audit_log="stdout")
    assert told is not None
    told.write({"a": "ä"})
    assert capsys.readouterr().out == '{"a": "ä"}\n'
