"""A PostgreSQL of one's own on a free port, which can be stopped, hung and started again.

For tests of the registry over the network. It is there only where the programs of PostgreSQL and
the extra ``postgres`` are installed; ``why_not`` says what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROGRAMS: Final = ("initdb", "pg_ctl", "postgres")
USER: Final = "postgres"  # as whom it runs where the tests run as root, which it refuses
PATIENCE_S: Final = 120


def why_not() -> str | None:
    """What is missing for a PostgreSQL here; None where nothing is."""
    missing = [one for one in PROGRAMS if _program(one) is None]
    if missing:
        return f"PostgreSQL is not installed: no {', '.join(missing)}"
    if importlib.util.find_spec("psycopg") is None:
        return "the extra postgres is not installed: no psycopg"
    if os.geteuid() == 0 and not _has_user():
        return f"root may not run PostgreSQL, and there is no user {USER}"
    return None


@dataclass(frozen=True)
class Postgres:
    """A running PostgreSQL.

    Args:
        folder: Of its data.
        port: Of 127.0.0.1.
    """

    folder: Path
    port: int

    @property
    def url(self) -> str:
        """As SQLAlchemy has it."""
        return f"postgresql+psycopg://{USER}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder}"
        log = str(self.folder / "log")
        _run("pg_ctl", "start", "-w", "-D", str(self.folder), "-l", log, "-o", options)

    def stop(self) -> None:
        """End it at once, with every connection."""
        _run("pg_ctl", "stop", "-m", "immediate", "-D", str(self.folder))

    @contextmanager
    def hung(self) -> Iterator[None]:
        """Stop it without an end: connections are there, and nothing answers."""
        _signal(self.folder, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(self.folder, signal.SIGCONT)


@contextmanager
def postgres(encoding: str = "UTF8") -> Iterator[Postgres]:
    """A new PostgreSQL whose databases have texts in ``encoding``, gone after the block.

    Not in a test's own folder: pytest closes those to other users, such as the one it runs as.
    """
    folder = Path(tempfile.mkdtemp(prefix="hira-postgres-"))
    if os.geteuid() == 0:
        shutil.chown(folder, USER)
    try:
        options = ("-U", USER, "-A", "trust", "-E", encoding, "--no-sync")
        _run("initdb", "-D", str(folder), *options)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        made = Postgres(folder, port)
        made.start()
        try:
            yield made
        finally:
            if (folder / "postmaster.pid").exists():
                made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str | None:
    found = shutil.which(name)
    if found is not None:
        return found
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(versions[-1]) if versions else None


def _has_user() -> bool:
    import pwd

    try:
        pwd.getpwnam(USER)
    except KeyError:
        return False
    return True


def _run(program: str, *arguments: str) -> None:
    path = _program(program)
    assert path is not None
    done = subprocess.run(
        [path, *arguments],
        user=USER if os.geteuid() == 0 else None,
        cwd="/",
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, f"{program}: status {done.returncode}"


def _signal(folder: Path, number: signal.Signals) -> None:
    """To the first process and all that it has made."""
    import psutil

    first = psutil.Process(int((folder / "postmaster.pid").read_text().split()[0]))
    for one in (first, *first.children(recursive=True)):
        one.send_signal(number)
