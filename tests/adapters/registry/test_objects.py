"""Calls of an object store: what they do, and that each of them has an end."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StoreUnavailable
from adapters.registry import objects
from adapters.registry.objects import AWAY_PAUSE_S, Objects
from adapters.residency.low_priority import step_back
from tests.stand import object_store
from tests.stand.object_store import ObjectStore, in_folder
from tests.stand.waits import until


class Breakable:
    """The file system in a folder, which fails or hangs when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.files = in_folder(folder)
        self.fault: Exception | None = None
        self.faulty = ""  # how the name of what fails ends
        self.hangs = False
        self.hanging = ""  # how the name of what hangs ends
        self.calls: list[str] = []

    @property
    def asked(self) -> int:
        return len(self.calls)

    def __getattr__(self, name: str) -> Any:
        work = getattr(self.files, name)

        async def call(*arguments: Any, **more: Any) -> Any:
            self.calls.append(name)
            while self.hangs and name.endswith(self.hanging):
                await asyncio.sleep(0.01)
            if self.fault is not None and name.endswith(self.faulty):
                raise self.fault
            return await work(*arguments, **more)

        return call if name.startswith("_") else work

    async def set_session(self) -> None:
        pass


class Made:
    """Objects over a file system that can break, on a clock that is turned by hand."""

    def __init__(self, folder: Path) -> None:
        self.now = 100.0
        self.files = Breakable(folder)
        self.objects = Objects(
            "s3://bucket/p", open_files=lambda: self.files, clock=lambda: self.now
        )


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    found = Made(tmp_path)
    yield found
    found.objects.close()


@pytest.fixture(scope="module")
def real() -> Iterator[ObjectStore]:
    if (missing := object_store.why_not()) is not None:
        pytest.skip(missing)
    with object_store.object_store() as store:
        yield store


@pytest.fixture(params=["folder", "s3"])
def each(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Objects]:
    """Objects in a folder, and in a real store."""
    if request.param == "folder":
        found = Objects("s3://bucket/p", open_files=lambda: in_folder(tmp_path))
    else:
        store: ObjectStore = request.getfixturevalue("real")
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        found = Objects(f"s3://adapters/{request.node.name}", endpoint=store.endpoint)
    yield found
    found.close()


def test_what_is_put_is_there_until_it_is_deleted(each: Objects, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(3 << 20))
    assert each.facts("versions/a") is None
    assert each.listed("versions") == {}
    each.put("versions/a", source)
    each.put("versions/b", b"bytes")
    each.put("versions/b", b"other bytes")
    each.put("held/a", b"")
    found = each.listed("versions")
    assert {name: one.nbytes for name, one in found.items()} == {"a": 3 << 20, "b": 11}
    facts = each.facts("held/a")
    assert facts is not None
    assert facts.nbytes == 0
    assert 0 <= facts.changed - found["a"].changed < 60
    each.get("versions/a", target)
    assert target.read_bytes() == source.read_bytes()
    each.delete("versions/a")
    each.delete("versions/a")
    assert set(each.listed("versions")) == {"b"}
    with pytest.raises(FileNotFoundError):
        each.get("versions/a", target)


def test_a_folder_is_no_object(each: Objects) -> None:
    each.put("versions/a", b"x")
    assert each.facts("versions") is None


def test_a_call_that_gets_no_answer_ends(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "CALL_S", 0.05)
    monkeypatch.setattr(objects, "LOOK_S", 0.05)
    made.objects.put("a", b"x")
    made.files.hangs = True
    calls: tuple[Callable[[], object], ...] = (
        lambda: made.objects.facts("a"),
        lambda: made.objects.put("a", b"y"),
        lambda: made.objects.delete("a"),
    )
    for call in calls:
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert caught.value.found == "TimeoutError"
        assert caught.value.fix
        made.now += AWAY_PAUSE_S


@pytest.mark.parametrize("fault", [OSError(5, "gone"), ValueError("what")])
def test_while_the_store_is_away_one_call_a_second_asks_it(made: Made, fault: Exception) -> None:
    made.objects.put("a", b"x")
    made.files.fault = fault
    before = made.files.asked
    for _ in range(5):
        with pytest.raises(StoreUnavailable):
            made.objects.facts("a")
    assert made.files.asked == before + 1
    made.now += AWAY_PAUSE_S / 2
    with pytest.raises(StoreUnavailable):
        made.objects.facts("a")
    assert made.files.asked == before + 1
    made.now += AWAY_PAUSE_S
    for _ in range(5):
        with pytest.raises(StoreUnavailable):
            made.objects.facts("a")
    assert made.files.asked == before + 2
    made.files.fault = None
    made.now += AWAY_PAUSE_S
    for _ in range(5):
        assert made.objects.facts("a") is not None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_an_error_of_the_local_file_says_nothing_about_the_store(
    made: Made, tmp_path: Path, number: int
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x")
    made.objects.put("a", source)
    made.files.fault = OSError(number, "here")
    calls: tuple[tuple[str, Callable[[], object]], ...] = (
        ("_put_file", lambda: made.objects.put("a", source)),
        ("_get_file", lambda: made.objects.get("a", target)),
    )
    for made.files.faulty, call in calls:
        with pytest.raises(OSError, match="here") as caught:
            call()
        assert caught.value.errno == number
        assert made.objects.facts("a") is not None


def test_an_object_that_may_not_be_read_does_not_make_the_store_away(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    made.objects.put("a", b"x")
    made.files.fault, made.files.faulty = PermissionError("Access Denied"), "_rm_file"
    for _ in range(2):
        with pytest.raises(StoreUnavailable) as caught:
            made.objects.delete("a")
        assert caught.value.found == "PermissionError"
        assert caught.value.fix
        assert made.objects.facts("a") is not None
    caplog.clear()
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            made.objects.delete("a")
    assert caplog.text.count("refuses to delete") == 1


def test_others_are_refused_while_one_finds_out_whether_the_store_is_back(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "CALL_S", 60.0)
    made.files.fault = OSError()
    with pytest.raises(StoreUnavailable):
        made.objects.facts("a")
    made.now += AWAY_PAUSE_S
    made.files.fault, made.files.hangs = None, True
    before = made.files.asked
    prober = threading.Thread(target=lambda: made.objects.facts("a"))
    prober.start()
    until(lambda: made.files.asked == before + 1)
    with pytest.raises(StoreUnavailable):
        made.objects.facts("a")
    made.files.hangs = False
    prober.join()
    assert made.objects.facts("a") is None


def test_a_large_upload_finds_out_by_a_short_look_whether_the_store_is_back(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "LOOK_S", 0.05)
    large = tmp_path / "large"
    large.write_bytes(bytes(1000))
    made.objects.put("a", b"x")
    made.files.fault = OSError()
    with pytest.raises(StoreUnavailable):
        made.objects.facts("a")
    made.files.fault, made.files.hangs = None, True
    made.now += AWAY_PAUSE_S
    with pytest.raises(StoreUnavailable):
        made.objects.put("large", large)
    assert made.files.calls[-1] == "_info"
    # It is back, and the upload, which takes its time, keeps nobody out.
    made.now += AWAY_PAUSE_S
    made.files.hanging = "_put_file"
    upload = threading.Thread(target=lambda: made.objects.put("large", large))
    upload.start()
    until(lambda: made.files.calls[-1] == "_put_file")
    assert made.objects.facts("a") is not None
    made.files.hangs = False
    upload.join()
    assert made.objects.facts("large") is not None


def test_a_missing_object_says_nothing_about_the_store(made: Made, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        made.objects.get("a", tmp_path / "target")
    assert made.objects.facts("a") is None
    made.objects.put("a", b"x")
    # But where nothing can be written there is no bucket.
    made.files.fault = FileNotFoundError("the bucket")
    with pytest.raises(StoreUnavailable):
        made.objects.put("a", b"x")


def test_calls_are_noted_once(made: Made, tmp_path: Path) -> None:
    made.objects.put("a", b"xyz")
    made.objects.get("a", tmp_path / "target")
    made.objects.facts("b")
    made.files.fault = OSError()
    with pytest.raises(StoreUnavailable):
        made.objects.delete("a")
    told = [(one.operation, one.outcome, one.nbytes) for one in made.objects.take_notes()]
    assert told == [
        ("put", "ok", 3),
        ("look", "ok", 0),
        ("get", "ok", 3),
        ("look", "missing", 0),
        ("delete", "error", 0),
    ]
    assert made.objects.take_notes() == []


def ask_in_a_child(ask: Callable[[], object], told: Any) -> None:
    told.put(ask())


def test_a_process_that_was_forked_asks_for_itself(tmp_path: Path) -> None:
    here = Objects("s3://bucket/p", open_files=lambda: in_folder(tmp_path))
    here.put("a", b"x")
    here.close()
    fork = multiprocessing.get_context("fork")
    told = fork.Queue()
    child = fork.Process(
        target=ask_in_a_child, args=(lambda: here.facts("a") is not None, told), daemon=True
    )
    child.start()
    assert told.get(timeout=60) is True
    child.join()
    assert here.facts("a") is not None
    here.close()


def test_the_first_call_is_not_late_for_what_it_has_to_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "CALL_S", 0.5)

    def slow() -> Any:
        time.sleep(0.6)  # as imports do where another takes the processor
        return Breakable(tmp_path)

    found = Objects("s3://bucket/p", open_files=slow)
    assert found.facts("a") is None
    found.close()


def test_many_that_wait_for_the_opening_wait_as_long_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "OPENING_S", 1.0)
    tried = []

    class Hanging(Breakable):
        async def set_session(self) -> None:
            tried.append(1)
            await asyncio.Event().wait()

    found = Objects("s3://bucket/p", open_files=lambda: Hanging(tmp_path))
    with ThreadPoolExecutor(6) as pool:
        ended = [pool.submit(found.facts, "a") for _ in range(6)]
        refused = [type(one.exception(timeout=60)) for one in ended]
    assert refused == [StoreUnavailable] * 6
    assert len(tried) < 6  # those behind it did not each begin anew
    found.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority is the whole process's")
def test_a_loader_s_low_priority_is_not_that_of_all_later_calls(tmp_path: Path) -> None:
    opened: list[int] = []

    def open_files() -> Any:
        opened.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return Breakable(tmp_path)

    found = Objects("s3://bucket/p", open_files=open_files)
    found.open()

    def load() -> None:
        step_back()
        assert found.facts("a") is None

    loader = threading.Thread(target=load)
    loader.start()
    loader.join()
    assert opened == [os.getpriority(os.PRIO_PROCESS, threading.get_native_id())]
    found.close()


def test_what_cannot_be_opened_is_told_by_the_calls(caplog: pytest.LogCaptureFixture) -> None:
    def refuses() -> Any:
        raise ValueError("no such profile")

    found = Objects("s3://bucket/p", open_files=refuses)
    found.open()
    assert "no such profile" in caplog.text
    with pytest.raises(StoreUnavailable):
        found.facts("a")
    found.close()


def test_a_store_that_is_gone_or_hangs_is_away_and_comes_back(
    real: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in real.environment.items():
        monkeypatch.setenv(name, value)
    found = Objects("s3://adapters/broken", endpoint=real.endpoint)
    found.put("a", b"x")

    def answers() -> bool:
        try:
            return found.facts("a") is not None
        except StoreUnavailable:
            return False

    with real.hung():
        assert not answers()
    until(answers)
    real.kill()
    assert not answers()
    real.start()
    until(answers)
    wrong = Objects("s3://no-such-bucket/p", endpoint=real.endpoint)
    with pytest.raises(StoreUnavailable):
        wrong.put("a", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    stranger = Objects("s3://adapters/broken", endpoint=real.endpoint)
    with pytest.raises(StoreUnavailable):
        stranger.facts("a")
    for one in (found, wrong, stranger):
        one.close()
