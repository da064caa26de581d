"""A program in a process of its own that takes no more than it may: the side of the server.

For what strangers send as a program of some kind, a chat template or a grammar. The program reads
requests and writes answers over pipes, each as JSON behind its length, and sets limits on its own
memory and processor time before it reads anything. Here it is started when it is first needed,
ended when it breaks a limit, and replaced for the next request.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from server.inputs.bounded_program import PREFIX_BYTES

START_S: Final = 30.0  # allowed for the interpreter to start on a busy machine
_PIPE_BYTES: Final = 1 << 16
_ROOT: Final = Path(__file__).parents[2]


class _ProgramEnded(Exception):
    """The process has ended; ``because`` says what of."""

    def __init__(self, because: str) -> None:
        super().__init__(because)


class BoundedProcess:
    """One process, started when it is first needed. Safe to share between threads, which take
    turns.

    Args:
        program: Its file.
        memory_bytes: Address space that it may have; its only argument.
        cpu_s: Processor time for one request, to be told to whoever broke it; the program itself
            ends by it.
        answer_bytes: The longest answer.
        greeting: Makes what a new process is sent before its first request, if anything.
    """

    def __init__(
        self,
        program: Path,
        *,
        memory_bytes: int,
        cpu_s: float,
        answer_bytes: int,
        greeting: Callable[[], bytes] | None = None,
    ) -> None:
        self._program = program
        self._memory_bytes = memory_bytes
        self._cpu_s = cpu_s
        self._answer_bytes = answer_bytes
        self._greeting = greeting
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._used = 0  # requests that the present process has answered

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Mapping[str, Any], deadline: float | None) -> dict[str, Any]:
        """The program's answer, or ``{"exceeded": what}`` for a limit that it broke.

        Args:
            request: Values that JSON has.
            deadline: As ``time.monotonic()`` counts.

        Raises:
            RecursionError: The request is nested too deeply.
            TimeoutError: The deadline passed.
        """
        raw = json.dumps(request).encode()
        with self._lock:
            return self._answer(raw, deadline)

    def close(self) -> None:
        """End the process; a later call starts another."""
        with self._lock:
            self._end()

    def _answer(self, raw: bytes, deadline: float | None) -> dict[str, Any]:
        while True:
            if self._child is None or self._child.poll() is not None:
                self._start()
            used, self._used = self._used, self._used + 1
            try:
                answer: dict[str, Any] = json.loads(self._exchange(raw, deadline))
            except _ProgramEnded as error:
                self._end()
                if not used:
                    self._start()  # while nobody waits for it
                    return {"exceeded": str(error)}
            except TimeoutError:
                self._end()
                raise
            else:
                if "exceeded" not in answer or not used:
                    return answer
                self._end()
            # What others have left in the process is not held against this request.

    def _start(self) -> None:
        self._end()
        self._used = 0
        kept = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        places = [str(_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-B", str(self._program), str(self._memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            # Keys and places of the server stay out of it.
            env={**environment, "PYTHONPATH": os.pathsep.join(places)},
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        os.set_blocking(self._child.stdin.fileno(), False)
        os.set_blocking(self._child.stdout.fileno(), False)
        if self._greeting is not None:
            with suppress(_ProgramEnded, TimeoutError):  # the request that follows finds out
                self._exchange(self._greeting(), None)

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        child.wait()

    def _exchange(self, raw: bytes, deadline: float | None) -> bytes:
        """Send a request and read its answer.

        Raises:
            TimeoutError: The deadline passed.
            _ProgramEnded: The process ended.
        """
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        # Where the caller has none: the processor time is bounded, and a busy machine has others.
        until = deadline if deadline is not None else time.monotonic() + START_S
        source, sink = child.stdout.fileno(), child.stdin.fileno()
        left = memoryview(len(raw).to_bytes(PREFIX_BYTES) + raw)
        got = bytearray()
        polled = select.poll()
        polled.register(source, select.POLLIN)
        polled.register(sink, select.POLLOUT)
        while True:
            wait = until - time.monotonic()
            ready = dict(polled.poll(wait * 1000)) if wait > 0 else {}
            if not ready:
                raise TimeoutError
            if sink in ready and left:
                try:
                    left = left[os.write(sink, left[:_PIPE_BYTES]) :]
                except BrokenPipeError:
                    raise _ProgramEnded(self._why(child)) from None
                if not left:
                    polled.unregister(sink)
            if source in ready:
                piece = os.read(source, _PIPE_BYTES)
                if not piece:
                    raise _ProgramEnded(self._why(child))
                got += piece
                if len(got) >= PREFIX_BYTES:
                    length = int.from_bytes(got[:PREFIX_BYTES])
                    if length > self._answer_bytes:
                        raise _ProgramEnded(f"an answer of more than {self._answer_bytes} bytes")
                    if len(got) >= PREFIX_BYTES + length:
                        return bytes(got[PREFIX_BYTES:])

    def _why(self, child: subprocess.Popen[bytes]) -> str:
        """What a process that closed its pipe ended of."""
        try:
            status = child.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        if status == -signal.SIGPROF:
            return f"more than {self._cpu_s:g} s of processor time"
        return f"its process ended with {status}"
