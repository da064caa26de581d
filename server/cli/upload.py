"""An adapter's files as one form, read as they are sent."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

from server.cli.layout import fail
from server.cli.manifest import ARCHIVES

if TYPE_CHECKING:
    import httpx2

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


def sent_form(
    client: httpx2.Client, fields: Mapping[str, str], path: Path, *, shown: bool = False
) -> httpx2.Response:
    """Send an adapter's files as a form.

    Args:
        client: Of the server.
        fields: Texts of the form.
        path: A folder or an archive.
        shown: With a progress bar on a terminal.
    """
    files = files_of(path)
    with ExitStack() as opened:
        parts = [
            ("files", (sent, opened.enter_context(file.open("rb")))) for sent, file in files.items()
        ]
        form = client.build_request("POST", "/admin/adapters", data=dict(fields), files=parts)
        body = _shown(form) if shown else cast(Iterable[bytes], form.stream)
        return client.post(form.url, content=iter(body), headers=_form_headers(form))


def files_of(path: Path) -> dict[str, Path]:
    """What to upload of a folder, or the archive itself, by the name that it is sent under."""
    if path.is_file():
        if not path.name.endswith(ARCHIVES):
            fail(f"{path} is neither a folder nor one of {', '.join(ARCHIVES)}")
        return {path.name: path}
    if not (path / "adapter_config.json").is_file():
        fail(f"{path} holds no adapter_config.json")
    return {name: path / name for name in SENT_FILES if (path / name).is_file()}


def _form_headers(form: httpx2.Request) -> dict[str, str]:
    return {name: form.headers[name] for name in ("Content-Type", "Content-Length")}


def _shown(form: httpx2.Request) -> Iterator[bytes]:
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
