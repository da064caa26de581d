"""An object store over fsspec, as the bytes of adapters need it: few calls, and each has an end.

A call that gets no answer ends after a stated time. While the store is away, calls are refused at
once, but for one a second that first finds out, by a short look, whether it is back: a thread that
waits for a store in vain reads nothing else. Every call is noted, for metrics.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from adapters.errors import StoreUnavailable

STORE_CONNECT_S: Final = 2.0
SILENCE_S: Final = 5.0  # between two pieces of an answer
CALL_S: Final = 7.0  # of a call that moves no bytes
LOOK_S: Final = 3.0  # of the look that finds out whether a store is back
SLOWEST_BYTES_PER_S: Final = 1 << 20  # a transfer gets CALL_S and a second for each of these
OPENING_S: Final = 30.0  # of calls of a process before the first that works: it looks up keys
AWAY_PAUSE_S: Final = 1.0  # after a call without an answer, until another is tried
NOTES_KEPT: Final = 10_000
# Of this machine's file, which a transfer reads or writes. What a store refuses has no such number.
_LOCAL_ERRNOS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}

Operation = Literal["put", "get", "look", "list", "delete"]
Outcome = Literal["ok", "missing", "error", "hit", "miss"]
T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreNote:
    """One thing that happened, for metrics.

    Args:
        operation: Of the object store; ``cache`` for a look into the cache on this disk.
        outcome: ``hit`` or ``miss`` of the cache; of the object store the others.
        seconds: That it took; 0 for the cache.
        nbytes: That were moved.
    """

    operation: Operation | Literal["cache"]
    outcome: Outcome
    seconds: float = 0.0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """What a store says of an object.

    Args:
        nbytes: Its size.
        changed: When it was written, by the store's clock, in seconds since 1970.
    """

    nbytes: int
    changed: float


class Objects:
    """The objects below one address. Safe in many threads, and after a fork.

    Args:
        url: ``s3://bucket/prefix``.
        endpoint: Of a store that is not Amazon's; None for what the environment says.
        open_files: Makes fsspec's asynchronous file system, for a store of another kind.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint: str | None = None,
        open_files: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url.rstrip("/")
        self._root = self.url.partition("://")[2]
        self._open_files = open_files or (lambda: _s3(endpoint))
        self._clock = clock
        self._lock = threading.Lock()
        self._asker: _Asker | None = None
        self._failed_at: float | None = None  # since the last call that was answered
        self._tries_again = False  # one call is finding out whether the store is back
        self._refusal_told = False  # in the log, since the last call that was not refused
        self._reason = ""
        self._notes: deque[StoreNote] = deque(maxlen=NOTES_KEPT)

    def open(self) -> None:
        """Import and start what calls need, in a thread with the priority of this one.

        The first call does so otherwise, which may be one of a thread that gives way to others.
        Nothing is asked of the store, and nothing raised: calls tell what is wrong.
        """
        try:
            self._asker_here().open()
        except Exception as error:  # noqa: BLE001  # the calls tell what is wrong
            logger.warning("The adapter store %s cannot be opened yet: %r", self.url, error)

    def facts(self, name: str) -> ObjectFacts | None:
        """Of one object; None where there is none.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        try:
            told = self._call("look", lambda files: files._info(self._path(name)))
        except FileNotFoundError:
            return None
        return None if told.get("type") == "directory" else _object_facts(told)

    def put(self, name: str, source: Path | bytes) -> None:
        """Write an object, whole or not at all; it is there for everybody when this returns.

        Raises:
            StoreUnavailable: The store does not answer, or refuses.
            OSError: ``source`` cannot be read.
        """
        path = self._path(name)
        if isinstance(source, bytes):
            self._call("put", lambda files: files._pipe_file(path, source), len(source))
        else:
            size = source.stat().st_size
            self._call("put", lambda files: files._put_file(str(source), path), size)

    def get(self, name: str, target: Path) -> None:
        """Read an object into a file.

        Raises:
            FileNotFoundError: There is none.
            StoreUnavailable: The store does not answer, or refuses.
            OSError: ``target`` cannot be written: a full disk, for one.
        """
        found = self.facts(name)
        if found is None:
            raise FileNotFoundError(name)
        path = self._path(name)
        self._call("get", lambda files: files._get_file(path, str(target)), found.nbytes)

    def listed(self, folder: str) -> dict[str, ObjectFacts]:
        """Every object below ``folder``, by its name there.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        below = self._path(folder)
        try:
            told = self._call("list", lambda files: files._find(below, detail=True), 64 << 20)
        except FileNotFoundError:
            return {}
        start = len(below) + 1
        return {path[start:]: _object_facts(one) for path, one in told.items() if len(path) > start}

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens where there is none.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        try:
            self._call("delete", lambda files: files._rm_file(self._path(name)))
        except FileNotFoundError:
            return

    def note(self, note: StoreNote) -> None:
        """Add to what ``take_notes`` tells."""
        self._notes.append(note)

    def take_notes(self) -> list[StoreNote]:
        """What happened since the last call, oldest first."""
        found = []
        while self._notes:
            found.append(self._notes.popleft())
        return found

    def close(self) -> None:
        """Let go of every connection and of the thread; a later call makes new ones."""
        with self._lock:
            asker, self._asker = self._asker, None
        if asker is not None and asker.pid == os.getpid():
            asker.close()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _call(self, operation: Operation, ask: Callable[[Any], Awaitable[T]], nbytes: int = 0) -> T:
        if self._must_look_first():
            self._look()
        began = time.perf_counter()
        outcome: Outcome = "error"
        try:
            answer = self._asker_here().run(ask, CALL_S + nbytes / SLOWEST_BYTES_PER_S)
            outcome = "ok"
        except Exception as error:
            # To write where there is no bucket is no matter of one object.
            if isinstance(error, FileNotFoundError) and operation != "put":
                outcome = "missing"
                raise
            if operation in {"put", "get"} and _is_of_local_file(error):
                raise  # it says nothing about the store
            if isinstance(error, PermissionError):  # an answer, about this object
                self._answered()
                if not self._refusal_told:
                    self._refusal_told = True
                    logger.error(
                        "The adapter store %s refuses to %s: %r", self.url, operation, error
                    )
                raise _call_refused(error) from error
            self._failed(error)
            raise self._away() from error
        finally:
            if outcome == "error":
                self._tries_again = False
            else:
                self._answered()
                self._refusal_told = False
            taken_s = time.perf_counter() - began
            moved = nbytes if outcome == "ok" and operation in {"put", "get"} else 0
            self.note(StoreNote(operation, outcome, taken_s, moved))
        return answer

    def _must_look_first(self) -> bool:
        """Whether this call is the one that finds out if the store is back; others are refused."""
        with self._lock:
            if self._failed_at is None:
                return False
            if not self._tries_again and self._clock() - self._failed_at >= AWAY_PAUSE_S:
                self._tries_again = True
                return True
        raise self._away()

    def _look(self) -> None:
        """Ask for next to nothing, whatever the call: an upload would keep all others waiting."""
        began = time.perf_counter()
        outcome: Outcome = "error"
        try:
            path = self._path("clock")
            self._asker_here().run(lambda files: files._info(path), LOOK_S)
            outcome = "ok"
        except FileNotFoundError:
            outcome = "missing"
        except PermissionError:
            outcome = "ok"  # an answer; the call itself says what it may not
        except Exception as error:
            self._failed(error)
            raise self._away() from error
        finally:
            if outcome == "error":
                self._tries_again = False
            self.note(StoreNote("look", outcome, time.perf_counter() - began))
        self._answered()

    def _failed(self, error: Exception) -> None:
        with self._lock:
            began = self._failed_at is None
            self._failed_at, self._tries_again = self._clock(), False
            self._reason = type(error).__name__
        if began:
            logger.error("The adapter store %s does not answer: %r", self.url, error)

    def _answered(self) -> None:
        with self._lock:
            was_away = self._failed_at is not None
            self._failed_at, self._tries_again = None, False
        if was_away:
            logger.warning("The adapter store %s answers again", self.url)

    def _away(self) -> StoreUnavailable:
        return StoreUnavailable(
            "The adapter store cannot be reached now.",
            found=self._reason,
            expected=f"an answer within {CALL_S:g} s",
            fix="Try again in a few seconds; if it stays so, the operator must look at it.",
        )

    def _asker_here(self) -> _Asker:
        with self._lock:
            if self._asker is None or self._asker.pid != os.getpid():
                self._asker = _Asker(self._open_files)
            return self._asker


class _Asker:
    """A thread with an event loop, on which a file system of fsspec lives."""

    def __init__(self, open_files: Callable[[], Any]) -> None:
        self.pid = os.getpid()
        self._open_files = open_files
        self._files: Any = None
        self._opening = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="store", daemon=True)
        self._thread.start()

    def run(self, ask: Callable[[Any], Awaitable[T]], within_s: float) -> T:
        """Ask, from any other thread; TimeoutError after ``within_s`` seconds, and those of the
        opening where this is the first call."""

        async def bounded() -> T:
            files = await self._opened()
            async with asyncio.timeout(within_s):
                return await ask(files)

        return self._wait(bounded())

    def open(self) -> None:
        self._wait(self._opened())

    def close(self) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _opened(self) -> Any:
        async with asyncio.timeout(OPENING_S), self._opening:  # whoever waits, waits no longer
            if self._files is None:
                files = self._open_files()
                if hasattr(files, "set_session"):
                    await files.set_session()
                self._files = files
        return self._files

    async def _close(self) -> None:
        others = [one for one in asyncio.all_tasks() if one is not asyncio.current_task()]
        for one in others:
            one.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        client = getattr(self._files, "_s3", None)
        if client is not None:
            await client.__aexit__(None, None, None)


def _s3(endpoint: str | None) -> Any:
    """s3fs on this thread's loop, with bounds of time and no retries of its own."""
    import s3fs

    files = s3fs.S3FileSystem(
        endpoint_url=endpoint,
        asynchronous=True,
        loop=asyncio.get_running_loop(),
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": STORE_CONNECT_S,
            "read_timeout": SILENCE_S,
            "retries": {"total_max_attempts": 2, "mode": "standard"},
        },
    )
    files.retries = 1  # beside those of the client
    return files


def _is_of_local_file(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _LOCAL_ERRNOS


def _call_refused(error: PermissionError) -> StoreUnavailable:
    return StoreUnavailable(
        "The adapter store refuses this call.",
        found=type(error).__name__,
        expected="keys that may list, read, write and delete below its prefix",
        fix="The operator must look at the keys of the store and at its rules.",
    )


def _object_facts(told: dict[str, Any]) -> ObjectFacts:
    changed = told.get("LastModified") or told.get("created") or told.get("mtime") or 0.0
    seconds = changed.timestamp() if isinstance(changed, datetime) else float(changed)
    return ObjectFacts(int(told["size"]), seconds)
