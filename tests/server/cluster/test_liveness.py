"""Whether the process of a replica is there, and which requests it has."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra cluster is not installed: no ray")

from server.cluster.liveness import Placed, greets

# A server without services, in a process of its own that never lets another Python thread run.
BUSY_SERVER = """
import asyncio, ctypes, sys
from grpc import aio

async def main():
    server = aio.server()
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    print("started", flush=True)
    ctypes.PyDLL(None).sleep(60)

asyncio.run(main())
"""


def test_a_process_that_is_busy_answers_and_one_that_is_stopped_or_gone_does_not() -> None:
    assert ctypes.PyDLL(None).getpid() == os.getpid()  # what keeps Python's lock there works here
    child = subprocess.Popen([sys.executable, "-c", BUSY_SERVER], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        address = f"127.0.0.1:{int(child.stdout.readline())}"
        assert child.stdout.readline() == b"started\n"
        assert asyncio.run(greets(address, 30.0))
        child.send_signal(signal.SIGSTOP)
        assert not asyncio.run(greets(address, 0.2))
        child.kill()
        child.wait()
        began = time.monotonic()
        assert not asyncio.run(greets(address, 30.0))
        assert time.monotonic() - began < 30.0  # a refusal is an answer: nothing is waited for
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_a_request_is_where_it_was_sent_last_until_it_ends() -> None:
    placed = Placed()
    one, two = (made("one"), made("two"))
    placed.put("r1", one)
    placed.put("r2", one)
    placed.put("r1", two)
    assert placed.where("r1") is two
    assert {who.name: set(what) for who, what in placed.by_replica().items()} == {
        "one": {"r2"},
        "two": {"r1"},
    }
    placed.take("r1")
    placed.take("r1")
    placed.take("unknown")
    assert placed.where("r1") is None
    assert list(placed.by_replica()) == [one]


def test_a_replica_without_requests_need_not_be_heard() -> None:
    placed = Placed()
    one = made("one")
    placed.put("r1", one)
    assert time.monotonic() - one.heard < 60
    one.heard = 0.0
    placed.put("r2", one)
    assert one.heard == 0.0  # it has had one all the time
    placed.take("r1")
    placed.take("r2")
    placed.put("r3", one)
    assert one.heard > 0.0


class Made:
    """A replica, as far as it is heard."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.heard = 0.0


def made(name: str) -> Any:
    return Made(name)
