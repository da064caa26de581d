"""`hira adapters`: list, show, add, remove and pin adapters of a running server."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast
from urllib.parse import quote

import typer

from server.cli.client import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    UrlOption,
    ask,
    exit_on_error,
    key_or_local_admin_key,
    print_json,
    reach,
    show_table,
)
from server.cli.layout import fail

if TYPE_CHECKING:
    import httpx

adapters_app = typer.Typer(help="The adapters of a running server.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
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
    "additional_chat_templates/tool_use.jinja",
    "tool_use.jinja",
    "tokenizer_config.json",
    "tokenizer.json",
    "added_tokens.json",
    "generation_config.json",
    "hira_conversation.json",
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
            with ExitStack() as opened:
                parts = [
                    ("files", (sent, opened.enter_context(file.open("rb"))))
                    for sent, file in files.items()
                ]
                form = client.build_request("POST", "/admin/adapters", data=texts, files=parts)
                answer = client.post(form.url, content=_shown(form), headers=_form_headers(form))
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


def _form_headers(form: httpx.Request) -> dict[str, str]:
    return {name: form.headers[name] for name in ("Content-Type", "Content-Length")}


def _shown(form: httpx.Request) -> Iterator[bytes]:
    """The body of a request, its files read as it is sent, with a progress bar on a terminal."""
    chunks = cast(Iterable[bytes], form.stream)
    if not sys.stderr.isatty():
        yield from chunks
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("upload", total=int(form.headers["Content-Length"]))
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
