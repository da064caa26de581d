"""The mistakes that can be seen without torch, told before it is loaded: all of them at once.

Loading torch and transformers takes seconds to tens of seconds; a mistyped path must not wait for
that. What is found right here is checked again where it is used.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from server.edge.admit.key_file import read_key_file
from server.edge.admit.keys import keyring_of
from server.edge.processes.failed_start import StartFailed
from server.settings import Settings, SettingsFault

DATA_DIR_LOCK_FILE: Final = "server.lock"
ARCHIVE_ENDS: Final = (".zip", ".tar", ".tar.gz", ".tgz")
_ADAPTER_CONFIG: Final = "adapter_config.json"
_COUNT_S: Final = 2.0
_OTLP_MODULE: Final = "opentelemetry.exporter.otlp.proto.http"
# In a process of its own: a driver that is asked keeps files open, and forks would inherit them.
_COUNT_DEVICES: Final = (
    "import ctypes as c; d = c.CDLL('libcuda.so.1'); n = c.c_int(0); "
    "r = d.cuInit(0) or d.cuDeviceGetCount(c.byref(n)); print(-r if r else n.value)"
)


def check_before_loading(settings: Settings) -> None:
    """Look at everything that a person is likely to have mistyped.

    Raises:
        StartFailed: With every fault that was found.
    """
    checks: tuple[Callable[[], None], ...] = (
        lambda: _check_data_dir(settings.data_dir),
        lambda: check_port(settings.host, settings.port),
        lambda: _look_at_base(settings.base),
        lambda: _check_template(settings.chat_template),
        lambda: _check_device(settings.device),
        lambda: check_callers(settings),
        *((lambda one=one: _check_source(*one)) for one in settings.adapters),
    )
    found: list[StartFailed] = []
    for check in checks:
        try:
            check()
        except StartFailed as fault:
            found += fault.faults
    if found:
        found[0].others = tuple(found[1:])
        raise found[0]


def check_callers(settings: Settings) -> None:
    """Look at what concerns keys, traces and the store, on one machine and in a cluster.

    Raises:
        StartFailed: With the first fault, or all of the keys file.
    """
    _check_tracing(settings.otel_endpoint)
    _check_store(settings.store_url)
    _check_key_file(settings)


def check_port(host: str, port: int) -> None:
    """Raise StartFailed when nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartFailed(
                f"port {port} on {host} cannot be used",
                found=error.strerror,
                expected="a port that nobody listens on",
                fix="choose another with --port, or stop the other server",
            ) from None


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One server per data folder: two would clear each other's running state.

    Raises:
        StartFailed: It cannot be used, or another server has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / DATA_DIR_LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartFailed(
            f"data_dir {folder} cannot be used",
            found=error.strerror,
            expected="a folder that this user may write to",
            fix="choose another with --data-dir",
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartFailed(
                f"data_dir {folder} is in use by another server",
                expected="a folder of its own for each server",
                fix="choose another with --data-dir",
            ) from None
        yield
    finally:
        os.close(handle)


def _check_data_dir(folder: Path) -> None:
    made = not folder.exists()
    with exclusive(folder):
        pass
    if made:  # nothing is left of a start that fails
        (folder / DATA_DIR_LOCK_FILE).unlink(missing_ok=True)
        folder.rmdir()


def _look_at_base(base: str | None) -> None:
    """A folder is looked into; what may be a hub id is asked for later."""
    if base is None:
        return
    folder = Path(base).expanduser()
    if folder.is_dir():
        _check_base_folder(folder)
        return
    looks_local = base.count("/") > 1 or base.startswith((".", "/", "~")) or folder.exists()
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        raise StartFailed(
            "the base model's folder does not exist",
            found=f"--base {base}" + (", which is a file" if folder.exists() else ""),
            expected="a folder with config.json and safetensors, or a hub id such as org/name",
            fix=_nearest(folder) or "check the path given to --base",
        )


def _check_base_folder(folder: Path) -> None:
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    if (folder / _ADAPTER_CONFIG).is_file() and not any(
        one.name.startswith("model") for one in weights
    ):
        raise StartFailed(
            "the base model is an adapter",
            found=f"--base {folder}, with {_ADAPTER_CONFIG}",
            expected="a folder with config.json and model.safetensors",
            fix=f"--adapter NAME={folder}, and the base of that adapter as --base",
        )
    try:
        told = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise StartFailed(
            "the base model has no config.json",
            found=f"--base {folder}",
            expected="a folder made by save_pretrained, with config.json and model.safetensors",
            fix="point --base at the folder that holds config.json",
        ) from None
    except (OSError, ValueError) as error:
        raise StartFailed(
            "the base model's config.json cannot be read",
            found=f"{folder / 'config.json'}: {str(error)[:200]}",
            expected="JSON",
            fix="download the base again",
        ) from None
    if not isinstance(told, dict):
        raise StartFailed(
            "the base model's config.json is no object",
            found=str(folder / "config.json"),
            expected="the configuration that save_pretrained writes",
        )
    if not weights:
        others = [one.name for one in folder.iterdir() if one.suffix in {".bin", ".pt", ".gguf"}]
        raise StartFailed(
            "the base model has no weights in safetensors",
            found=f"--base {folder}"
            + (f", with {', '.join(sorted(others)[:3])}" if others else ""),
            expected="model.safetensors, or shards of it with their index",
            fix="save it again with save_pretrained, which writes safetensors",
        )


def _check_template(path: Path | None) -> None:
    if path is not None and not path.is_file():
        raise StartFailed(
            "the file of the chat template is not there",
            found=f"--chat-template {path}",
            expected="a file with a Jinja template",
            fix=_nearest(path) or "check the path",
        )


def _check_tracing(endpoint: str | None) -> None:
    if endpoint is None:
        return
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
        raise StartFailed(
            "otel_endpoint is no URL",
            found=f"--otel-endpoint {endpoint}",
            expected="such as http://collector:4318/v1/traces",
        )
    try:
        found = importlib.util.find_spec(_OTLP_MODULE) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise StartFailed(
            "traces need packages that are not installed",
            found=f"--otel-endpoint {endpoint}, and no {_OTLP_MODULE}",
            expected="the extra otel",
            fix="pip install 'hira-server[otel]'",
        )


def _check_store(url: str | None) -> None:
    if url is not None and importlib.util.find_spec("s3fs") is None:
        raise StartFailed(
            "an object store needs packages that are not installed",
            found=f"--store-url {url}, and no s3fs",
            expected="the extra s3",
            fix="pip install 'hira-server[s3]'",
        )


def _check_key_file(settings: Settings) -> None:
    if settings.keys_file is None:
        return
    try:
        keyring_of(settings, read_key_file(settings.keys_file))
    except SettingsFault as fault:
        found = [
            StartFailed(one.text, found=one.found, expected=one.expected, fix=one.fix)
            for one in fault.faults
        ]
        found[0].others = tuple(found[1:])
        raise found[0] from None


def _check_source(name: str, source: str) -> None:
    """What ``--adapter`` names on this machine; what lies elsewhere is fetched later."""
    if "://" in source:
        return
    path = Path(source)
    if path.is_dir() and not (path / _ADAPTER_CONFIG).is_file():
        inner = sorted(one.parent for one in path.glob(f"*/{_ADAPTER_CONFIG}"))
        raise StartFailed(
            f"adapter {name}: its folder holds no {_ADAPTER_CONFIG}",
            found=source,
            expected="the folder that PEFT's save_pretrained wrote",
            fix=f"perhaps --adapter {name}={inner[0]}" if inner else "check the path",
        )
    if not path.is_dir():
        raise StartFailed(
            f"adapter {name}: its folder does not exist",
            found=source + (", which is a file" if path.exists() else ""),
            expected="a folder, hf://org/repo or s3://bucket/folder",
            fix="unpack the archive first"
            if path.name.endswith(ARCHIVE_ENDS)
            else _nearest(path) or "check the path",
        )


def _check_device(device: str) -> None:
    """Whether CUDA was asked for and cannot be there. In doubt torch decides, later."""
    if device != "cuda":
        return
    reason = "this torch was built for the CPU only" if not _torch_has_cuda() else _no_device()
    if reason is not None:
        raise StartFailed(
            "there is no CUDA device",
            found=reason,
            expected="a CUDA device, because --device cuda was given",
            fix="install a driver and a CUDA build of torch, or use --device cpu",
        )


def _torch_has_cuda() -> bool:
    """As torch's own note of its build says, read without loading torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return True
    try:
        told = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return True
    built = re.findall(r"^(?:cuda|hip)\b[^=\n]*=\s*(.+)$", told, flags=re.MULTILINE)
    return not built or any(value.strip() != "None" for value in built)


def _no_device() -> str | None:
    """Why the driver has no device, or None where it has one or does not say."""
    try:
        asked = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _COUNT_DEVICES],
            capture_output=True,
            text=True,
            timeout=_COUNT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if "cannot open shared object file" in asked.stderr:
        # An AMD card has its own driver.
        return None if Path("/dev/kfd").exists() else "no CUDA driver (libcuda.so.1)"
    told = asked.stdout.strip()
    if told == "0":
        return "a driver that shows no device (CUDA_VISIBLE_DEVICES?)"
    return f"a driver that answers with error {told[1:]}" if told.startswith("-") else None


def _nearest(path: Path) -> str | None:
    """The entry beside a path that is not there whose name is most like it."""
    import difflib

    try:
        names = [one.name for one in path.expanduser().parent.iterdir()]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None
