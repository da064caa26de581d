"""`hira adapters`: list, show, add, remove and pin adapters of a running server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from server.cli.client import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    UrlOption,
    ask,
    exit_on_error,
    fail,
    key_or_local_admin_key,
    print_json,
    reach,
    show_table,
)

adapters_app = typer.Typer(help="The adapters of a running server.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
SENT_AT_ONCE_BYTES = 1 << 18
PAGE = 500
# As in adapters.intake.archive.WANTED, which takes torch along.
SENT_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "README.md",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "chat_template.jinja",
    "tokenizer_config.json",
    "generation_config.json",
    *(f"{n}_Pooling/config.json" for n in (1, 2, 3)),
    *(f"{n}_Pooling.json" for n in (1, 2, 3)),
)


@adapters_app.command("list")
def list_adapters(
    prefix: Annotated[str, typer.Option(help="Names that begin so.")] = "",
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List all adapters."""
    rows: list[dict[str, Any]] = []
    with reach(url, key_or_local_admin_key(key)) as client:
        while True:
            params = {"prefix": prefix, "offset": len(rows), "limit": PAGE}
            page = ask(client, "GET", "/admin/adapters", params=params).json()
            rows += page["adapters"]
            if len(rows) >= page["total"] or not page["adapters"]:
                break
    if as_json:
        print_json(rows)
        return
    columns = ("name", "method", "task", "ranks", "bytes", "residency", "pinned", "requests")
    show_table(columns, [[_cell(name, row[name]) for name in columns] for row in rows])


@adapters_app.command("show")
def show_adapter(
    name: NameArgument,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one adapter."""
    with reach(url, key_or_local_admin_key(key)) as client:
        row = ask(client, "GET", _path(name)).json()
    _print_record(row, as_json)


@adapters_app.command()
def add(
    name: NameArgument,
    path: Annotated[
        str, typer.Argument(help="A folder or archive here, or a source with --remote.")
    ],
    *,
    remote: Annotated[
        bool,
        typer.Option(help="PATH is a source that the server reads: a folder there, hf://, s3://."),
    ] = False,
    replace: Annotated[bool, typer.Option(help="Replace the adapter of this name.")] = False,
    pinned: Annotated[bool, typer.Option(help="Keep it on the device.")] = False,
    preload: Annotated[bool, typer.Option(help="Bring it to the device now.")] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Register an adapter: upload its files, or let the server fetch them."""
    fields: dict[str, Any] = {"replace": replace, "pinned": pinned, "preload": preload}
    with reach(url, key_or_local_admin_key(key)) as client:
        if remote:
            body = {"name": name, "source": path, **fields}
            answer = ask(client, "POST", "/admin/adapters", json=body)
        else:
            files = files_of(Path(path))
            texts = {"name": name, **{one: str(value).lower() for one, value in fields.items()}}
            content_type, length, body_chunks = _multipart(texts, files)
            answer = client.post(
                "/admin/adapters",
                content=_shown(body_chunks, length),
                headers={"Content-Type": content_type, "Content-Length": str(length)},
            )
            exit_on_error(answer)
    _print_record(answer.json(), as_json)


@adapters_app.command()
def remove(name: NameArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = None) -> None:
    """Remove an adapter; requests that run finish."""
    with reach(url, key_or_local_admin_key(key)) as client:
        ask(client, "DELETE", _path(name))


@adapters_app.command()
def pin(
    name: NameArgument,
    off: Annotated[bool, typer.Option("--off", help="Unpin it.")] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep an adapter on the device, or let it go again."""
    with reach(url, key_or_local_admin_key(key)) as client:
        answer = ask(client, "PATCH", _path(name), json={"pinned": not off})
    _print_record(answer.json(), as_json)


def _path(name: str) -> str:
    return f"/admin/adapters/{quote(name, safe='')}"


def files_of(path: Path) -> dict[str, Path]:
    """What to upload of a folder, or the archive itself, by the name that it is sent under."""
    if path.is_file():
        if not path.name.endswith(ARCHIVES):
            fail(f"{path} is neither a folder nor one of {', '.join(ARCHIVES)}")
        return {path.name: path}
    if not (path / "adapter_config.json").is_file():
        fail(f"{path} holds no adapter_config.json")
    return {name: path / name for name in SENT_FILES if (path / name).is_file()}


def _multipart(fields: dict[str, str], files: dict[str, Path]) -> tuple[str, int, Iterator[bytes]]:
    """A multipart body that is read from disk as it is sent, and its exact length."""
    boundary = os.urandom(16).hex()
    parts: list[bytes | Path] = []
    for name, value in fields.items():
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(f"{head}{value}\r\n".encode())
    for name, file in files.items():
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="files"; '
            f'filename="{name}"\r\nContent-Type: application/octet-stream\r\n\r\n'.encode()
        )
        parts += [file, b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode())
    length = sum(len(part) if isinstance(part, bytes) else part.stat().st_size for part in parts)

    def chunks() -> Iterator[bytes]:
        for part in parts:
            if isinstance(part, bytes):
                yield part
                continue
            with part.open("rb") as file:
                while chunk := file.read(SENT_AT_ONCE_BYTES):
                    yield chunk

    return f"multipart/form-data; boundary={boundary}", length, chunks()


def _shown(chunks: Iterator[bytes], length: int) -> Iterator[bytes]:
    """The same chunks, with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        yield from chunks
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("upload", total=length)
        for chunk in chunks:
            yield chunk
            progress.advance(task, len(chunk))


def _print_record(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(row)
        return
    show_table(("field", "value"), [[name, _cell(name, value)] for name, value in row.items()])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "bytes":
        return f"{value / (1 << 20):.2f} MiB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "ranks" and isinstance(value, list) and value:
        low, high = min(value), max(value)
        return str(low) if low == high else f"{low} to {high}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    return str(value)
