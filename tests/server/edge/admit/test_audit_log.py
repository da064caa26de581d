"""The audit log: whole lines from many processes, a bound on its size, and no line by halves."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import signal
from pathlib import Path

import pytest

from server.edge.admit.audit_log import AUDIT_FILES, AuditLog, audit_log_of, audit_time
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


def test_a_surrogate_of_a_path_does_not_keep_a_call_out_of_the_log(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", 1 << 20)
    log.write({"path": "\ud800"})
    assert rows(tmp_path) == [{"path": "?"}]


def test_a_line_is_on_the_disk_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel is asked for, in order: the line, then that it lies on the disk."""
    asked: list[str] = []
    write, sync = os.write, os.fsync

    def written(handle: int, content: bytes) -> int:
        asked.append("write")
        return write(handle, content)

    def synced(handle: int) -> None:
        asked.append("sync")
        sync(handle)

    monkeypatch.setattr(os, "write", written)
    monkeypatch.setattr(os, "fsync", synced)
    AuditLog(tmp_path / "audit.jsonl", 1 << 20).write({"number": 1})
    assert asked == ["write", "sync"]


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", 1 << 20)
    log.write({"number": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: write(handle, content[:5]))
    with pytest.raises(OSError, match="whole line"):
        log.write({"number": 2})
    monkeypatch.undo()
    assert rows(tmp_path) == [{"number": 1}]


def test_a_file_is_turned_over_before_it_is_too_large(tmp_path: Path) -> None:
    line = len(json.dumps({"number": 1})) + 1
    log = AuditLog(tmp_path / "audit.jsonl", AUDIT_FILES * 2 * line)
    for number in range(3):
        log.write({"number": number})
    held = [(tmp_path / name).read_text() for name in ("audit.jsonl.1", "audit.jsonl")]
    assert [[json.loads(one)["number"] for one in text.splitlines()] for text in held] == [
        [0, 1],
        [2],
    ]


def test_times_have_milliseconds_and_a_zone() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", audit_time())
