"""The commands that talk to a running server, and how they reach it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.layout import FAILED, fail, print_fault

if TYPE_CHECKING:
    import httpx

URL_HELP = "Where the server is; also HIRA_URL."
KEY_HELP = "A key; also HIRA_KEY. The admin key of a local server is in DATA_DIR/admin.key."
UrlOption = Annotated[str, typer.Option("--url", envvar="HIRA_URL", help=URL_HELP)]
KeyOption = Annotated[str | None, typer.Option("--key", envvar="HIRA_KEY", help=KEY_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AdapterOption = Annotated[str | None, typer.Option("--adapter", "-a", help="The adapter's name.")]

DEFAULT_URL = "http://127.0.0.1:8000"
LOCAL_KEY_FILE = Path("hira-data/admin.key")


def add_client_commands(app: typer.Typer) -> None:
    app.command()(predict)
    app.command()(generate)


def predict(
    texts: Annotated[list[str], typer.Argument(help="One or more texts.")],
    *,
    adapter: AdapterOption = None,
    top_k: Annotated[int | None, typer.Option(help="Answers per text.")] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify texts, tokens, or fill masks with a running server."""
    body = {"inputs": texts, "parameters": {} if top_k is None else {"top_k": top_k}}
    with reach(url, key) as client:
        answers = ask(client, "POST", "/predict", json=body, params=_adapter_query(adapter)).json()
    if as_json:
        print_json(answers)
        return
    for text, rows in zip(texts, answers, strict=True):
        print(text)
        for row in rows if isinstance(rows, list) else [rows]:
            shown = row.get("label") or row.get("entity_group") or row.get("token_str") or ""
            word = f"  {row['word']}" if "word" in row else ""
            print(f"  {row.get('score', 0.0):.4f}  {shown}{word}")


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    *,
    adapter: AdapterOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="Sample; without: greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text with a running server, word by word as it comes."""
    parameters: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if temperature is not None:
        parameters["temperature"] = temperature
    if seed is not None:
        parameters["seed"] = seed
    body = {"inputs": prompt, "parameters": parameters}
    with reach(url, key) as client:
        if as_json:
            body["parameters"] = {**parameters, "details": True}
            print_json(
                ask(client, "POST", "/generate", json=body, params=_adapter_query(adapter)).json()
            )
            return
        with client.stream(
            "POST", "/generate_stream", json=body, params=_adapter_query(adapter)
        ) as answer:
            exit_on_error(answer)
            for event in _events(answer):
                if "error" in event:
                    fail(event["error"])
                if not event["token"]["special"]:
                    print(event["token"]["text"], end="", flush=True)
        print()


@contextmanager
def reach(url: str, key: str | None) -> Iterator[httpx.Client]:
    """A client of the server at ``url``; what cannot be reached ends the command with a line."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=None) as client:
            yield client
    except httpx.ConnectError:
        fail(f"no server answers at {url}; start one with: hira serve")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"the server at {url} cannot be used: {error or type(error).__name__}")


def ask(client: httpx.Client, method: str, path: str, **arguments: Any) -> httpx.Response:
    """One call; an error response ends the command with what it says."""
    answer = client.request(method, path, **arguments)
    exit_on_error(answer)
    return answer


def exit_on_error(answer: httpx.Response) -> None:
    """End the command when the response is an error."""
    if answer.is_success:
        return
    answer.read()
    try:
        problem = answer.json()
    except ValueError:
        fail(f"HTTP {answer.status_code}: {answer.text[:200]}")
    for one in problem.get("problems") or [problem]:
        print_fault(f"{one.get('code', '')}: {one.get('detail', one)}", one)
    raise SystemExit(FAILED)


def key_or_local_admin_key(key: str | None) -> str | None:
    """The key that was given, else that of a server that was started in this folder."""
    if key is None and os.access(LOCAL_KEY_FILE, os.R_OK):
        return LOCAL_KEY_FILE.read_text(encoding="ascii").strip()
    return key


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show_table(columns: tuple[str, ...], rows: list[list[str]]) -> None:
    """A table on a terminal; columns apart by tabs for other programs."""
    if not sys.stdout.isatty():
        for row in [list(columns), *rows]:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, header_style="bold", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _adapter_query(adapter: str | None) -> dict[str, str]:
    return {} if adapter is None else {"adapter": adapter}


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data:"):
            yield json.loads(line.removeprefix("data:"))
