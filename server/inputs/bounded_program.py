"""What a program of ``server.inputs.bounded_child`` is made of: its limits, and its pipes.

It imports nothing but the standard library, so that such a program starts in a fraction of a
second and holds nothing of the server's.

    request, answer    4 bytes, the length, big-endian; then so much JSON
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

PREFIX_BYTES: Final = 4  # the length of a request or an answer
OPEN_FILES: Final = 16


@contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """The kernel ends this process when it has computed for so long; waiting does not count."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def _bound(memory_bytes: int) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
    ):
        resource.setrlimit(what, (most, most))


def _read_exactly(pipe: BinaryIO, count: int) -> bytes:
    raw = pipe.read(count)
    if len(raw) < count:
        sys.exit(0)  # the server has ended, or has no use for this process
    return raw


def answer_requests(
    answer: Callable[[Mapping[str, Any]], Mapping[str, Any]], memory_bytes: int
) -> None:
    """Answer requests on the standard input until it ends.

    Args:
        answer: From a request to its answer. The request says in ``cpu_s`` how much processor time
            it may take: with more, this process is ended.
        memory_bytes: Address space that this process may have from now on. Where that is not
            enough the answer says so, and the process ends.
    """
    _bound(memory_bytes)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            length = int.from_bytes(_read_exactly(requests, PREFIX_BYTES))
            request = json.loads(_read_exactly(requests, length))
            with _processor_time(float(request["cpu_s"])):
                told = json.dumps(answer(request)).encode()
            lost = False
        except MemoryError:
            # What is left of the memory is not to be relied on.
            told, lost = b'{"exceeded": "more memory than it may have"}', True
        answers.write(len(told).to_bytes(PREFIX_BYTES) + told)
        answers.flush()
        if lost:
            sys.exit(1)
