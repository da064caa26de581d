"""What is done to the server: processes killed and stopped, the database and the disk taken away,
files damaged, crowds that leave.

Each break returns when its harm is over; the caller waits for the recovery.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2
import psutil

from loadtests.chaos.operators import Content, fault_in, upload
from loadtests.connection import Connection, Lost, encoded
from loadtests.servers import Server
from loadtests.stage import TEXTS

GONE_S: Final = 15.0  # for the processes of a killed server to be gone
SETTLE_S: Final = 8.0  # for the work of clients that are gone to end
VICTIM: Final = "chaos-victim"
WORKER_MARK: Final = "spawn_main"


@dataclass
class Target:
    """What is broken.

    Args:
        server: Replaced when it was killed as a whole.
        start_again: Starts it on the same data and port.
        small_disk: Whether the data folder is on a disk that can be filled without harm to others.
        victim: A content whose stored files are damaged.
        crowd: How many clients may have work of their own in the engine at a time.
        hang_s: After how long the server replaces a process that gives no sign of life.
        setup_s: After how long it replaces a worker that hangs in its set-up; None: it never does.
    """

    server: Server
    start_again: Callable[[], Server]
    small_disk: bool
    victim: Content
    crowd: int
    hang_s: float
    setup_s: float | None
    rng: random.Random
    admin: Mapping[str, str]
    tolerance: float
    faults: list[str]

    @property
    def port(self) -> int:
        return self.server.port


async def kill_worker(target: Target) -> None:
    _signal(target.server.worker_pid(), signal.SIGKILL)


async def stop_worker_for_a_moment(target: Target) -> None:
    pid = target.server.worker_pid()
    _signal(pid, signal.SIGSTOP)
    await asyncio.sleep(2.0)
    _signal(pid, signal.SIGCONT)


async def stop_worker_for_good(target: Target) -> None:
    """It must be found silent, killed and replaced."""
    pid = target.server.worker_pid()
    _signal(pid, signal.SIGSTOP)
    await _replaced(target, pid, target.hang_s + 20.0, "a stopped worker")


async def stop_worker_in_setup(target: Target) -> None:
    """Its successor is stopped before it is ready, and must be replaced in its turn."""
    before = target.server.worker_pid()
    _signal(before, signal.SIGKILL)
    until, stopped = time.monotonic() + 30.0, None
    while stopped is None and time.monotonic() < until:
        await asyncio.sleep(0.02)
        for one in psutil.Process(target.server.process.pid).children():
            if one.pid != before and _is_worker(one):
                stopped = one.pid
                await asyncio.sleep(0.5)
                _signal(stopped, signal.SIGSTOP)
                break
    if stopped is not None and target.setup_s is not None:
        await _replaced(target, stopped, target.setup_s + 30.0, "a worker stopped in its set-up")
    elif stopped is not None:
        await asyncio.sleep(60.0)
        if psutil.pid_exists(stopped):
            target.faults.append("a worker stopped in its set-up was never replaced")
            _signal(stopped, signal.SIGKILL)


async def kill_http_process(target: Target) -> None:
    """Long streams are under way; those of the dead process must not run on for nobody."""
    body = {"inputs": "The king", "parameters": {"max_new_tokens": 200}}
    raw = encoded("/generate_stream?adapter=hira-wiki", body)
    connections, tasks = [], []
    for _ in range(6):
        try:
            connection = await Connection.open(target.port)
        except (OSError, TimeoutError):
            continue
        connections.append(connection)
        tasks.append(asyncio.ensure_future(connection.ask(raw)))
    await asyncio.sleep(0.5)
    roles = {role: pid for role, pid in target.server.roles().items() if role.startswith("http-")}
    if roles:
        _signal(target.rng.choice(sorted(roles.values())), signal.SIGKILL)
    for connection in connections:
        connection.abort()
    await asyncio.gather(*tasks, return_exceptions=True)
    until, depth = time.monotonic() + SETTLE_S, float("inf")
    while time.monotonic() < until and depth > target.crowd:
        await asyncio.sleep(0.5)
        depth = await asyncio.to_thread(_depth, target.server.url)
    if depth > target.crowd:
        target.faults.append(
            f"{depth:.0f} requests in the engine for at most {target.crowd} clients, "
            f"{SETTLE_S:g} s after an HTTP process died"
        )


async def stop_http_process_for_a_moment(target: Target) -> None:
    roles = [pid for role, pid in target.server.roles().items() if role.startswith("http-")]
    if not roles:
        return
    pid = target.rng.choice(sorted(roles))
    _signal(pid, signal.SIGSTOP)
    await asyncio.sleep(2.0)
    _signal(pid, signal.SIGCONT)


async def kill_everything(target: Target) -> None:
    """SIGKILL of the main process: nothing of it may stay, and the same data serve again."""
    main = psutil.Process(target.server.process.pid)
    family = [main, *main.children(recursive=True)]
    main.kill()
    await asyncio.to_thread(target.server.process.wait)
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, GONE_S)
    if alive:
        target.faults.append(f"{len(alive)} processes outlive the main one by {GONE_S:g} s")
        for one in alive:
            one.kill()
    target.server = await asyncio.to_thread(target.start_again)


async def lock_database(target: Target) -> None:
    """Another writer holds the registry for longer than a statement waits."""
    with closing(
        sqlite3.connect(target.server.data_dir / "registry.sqlite", isolation_level=None)
    ) as other:
        try:
            other.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            return  # busy at this moment
        await asyncio.sleep(8.0)
        other.execute("ROLLBACK")


async def fill_disk(target: Target) -> None:
    if not target.small_disk:
        return
    ballast = target.server.data_dir.parent / "ballast"

    def fill() -> None:
        file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
        try:
            while True:
                os.write(file, bytes(4096))
        except OSError:
            return
        finally:
            os.close(file)

    try:
        for _ in range(5):
            await asyncio.to_thread(fill)
            await asyncio.sleep(1.0)
    finally:
        ballast.unlink(missing_ok=True)


async def damage_store(target: Target) -> None:
    await _harm_victim(target, _flip_a_byte)


async def delete_from_store(target: Target) -> None:
    await _harm_victim(target, shutil.rmtree)


async def crowd_leaves(target: Target) -> None:
    """A hundred clients begin a stream and hang up."""
    body = {"inputs": "In the morning", "parameters": {"max_new_tokens": 64}}
    raw = encoded("/generate_stream?adapter=hira-shakespeare", body)

    async def one() -> None:
        try:
            connection = await Connection.open(target.port)
            asked = asyncio.ensure_future(connection.ask(raw))
            await asyncio.sleep(0.2 + 0.5 * target.rng.random())
            connection.abort()
            await asyncio.gather(asked, return_exceptions=True)
        except (OSError, TimeoutError):
            return

    await asyncio.gather(*(one() for _ in range(100)))


BREAKS: Final[tuple[Callable[[Target], Awaitable[None]], ...]] = (
    kill_worker,
    stop_worker_for_a_moment,
    stop_worker_for_good,
    stop_worker_in_setup,
    kill_http_process,
    stop_http_process_for_a_moment,
    kill_everything,
    lock_database,
    fill_disk,
    damage_store,
    delete_from_store,
    crowd_leaves,
)


async def _harm_victim(target: Target, harm: Callable[[Path], None]) -> None:
    """Damage one adapter's files: that one may fail, by name; it never answers wrongly."""
    raw = upload(VICTIM, target.victim.tar, target.admin)
    asked = encoded(f"/predict?adapter={VICTIM}", {"inputs": TEXTS[0]})
    for step in ("before", "harmed", "healed"):
        try:
            async with asyncio.timeout(60.0):
                connection = await Connection.open(target.port)
                if step == "harmed":
                    harm(target.server.data_dir / "store" / "versions" / target.victim.version)
                else:
                    reply = await connection.ask(raw)
                    if reply.status not in {200, 201}:
                        target.faults.append(f"{VICTIM}, {step}: {reply.code()}")
                reply = await connection.ask(asked)
                connection.abort()
        except (Lost, OSError, TimeoutError) as error:
            target.faults.append(f"{VICTIM}, {step}: {type(error).__name__} {error}")
            return
        fault = None
        if reply.status == 200:
            fault = fault_in(reply, target.victim, TEXTS[0], target.tolerance)
        elif step != "harmed" or reply.code() not in {
            "422 corrupt_file",
            "404 adapter_not_found",
            "503 adapter_quarantined",
        }:
            fault = reply.code()
        if fault is not None:
            target.faults.append(f"{VICTIM}, {step}: {fault}")


def _flip_a_byte(folder: Path) -> None:
    tensors = folder / "adapter_model.safetensors"
    tensors.chmod(0o600)
    with tensors.open("r+b") as file:
        file.seek(tensors.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x40]))


async def _replaced(target: Target, pid: int | None, within_s: float, what: str) -> None:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if pid is None or not psutil.pid_exists(pid) or _is_zombie(pid):
            return
        await asyncio.sleep(0.1)
    target.faults.append(f"{what} was not replaced within {within_s:g} s")
    _signal(pid, signal.SIGKILL)


def _is_worker(one: psutil.Process) -> bool:
    try:
        return any(WORKER_MARK in part for part in one.cmdline())
    except psutil.NoSuchProcess:
        return False


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _signal(pid: int | None, number: int) -> None:
    if pid is None:
        return
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _depth(url: str) -> float:
    """Requests that wait or run in the engine, as it says itself."""
    try:
        lines = httpx2.get(f"{url}/metrics", timeout=10).text.splitlines()
    except httpx2.HTTPError:
        return float("inf")
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("hira_queue_depth{")
    )
