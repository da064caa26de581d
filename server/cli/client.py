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
    import httpx2

URL_HELP = "Where the server is; also HIRA_URL."
KEY_HELP = "A key; also HIRA_KEY. The admin key of a local server is in DATA_DIR/admin.key."
UrlOption = Annotated[str, typer.Option("--url", envvar="HIRA_URL", help=URL_HELP)]
KeyOption = Annotated[str | None, typer.Option("--key", envvar="HIRA_KEY", help=KEY_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AdapterOption = Annotated[str | None, typer.Option("--adapter", "-a", help="The adapter's name.")]

DEFAULT_URL = "http://127.0.0.1:8000"
LOCAL_KEY_FILE = Path("hira-data/admin.key")
PAGE = 500


def add_client_commands(app: typer.Typer) -> None:
    for command in (predict, generate, chat):
        app.command(rich_help_panel="Ask a running server")(command)
    app.command("embed", rich_help_panel="Ask a running server")(embed_texts)


def predict(
    texts: Annotated[list[str], typer.Argument(help="One or more texts.")],
    *,
    adapter: AdapterOption = None,
    top_k: Annotated[int | None, typer.Option(help="Answers per text.")] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify texts, tokens, or fill masks with a running server.

    Example:

      hira predict "A fine film." --adapter imdb
    """
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
    """Continue a text with a running server, word by word as it comes.

    Example:

      hira generate "The king" --adapter hira-shakespeare --max-new-tokens 40
    """
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


def embed_texts(
    texts: Annotated[list[str], typer.Argument(help="One or more texts.")],
    *,
    adapter: AdapterOption = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn texts into vectors with a running server; for other programs, a vector in JSON a line.

    Example:

      hira embed "A fine film." "A dull one." --adapter imdb > vectors.jsonl
    """
    with reach(url, key) as client:
        body = {"inputs": texts}
        vectors = ask(client, "POST", "/embed", json=body, params=_adapter_query(adapter)).json()
    if as_json:
        print_json(vectors)
    elif not sys.stdout.isatty():
        for vector in vectors:
            print(json.dumps(vector))
    else:
        for text, vector in zip(texts, vectors, strict=True):
            first = " ".join(f"{one:+.4f}" for one in vector[:6])
            print(f"{text}\n  {len(vector)} numbers: {first} ...")


def chat(
    *,
    adapter: AdapterOption = None,
    system: Annotated[str | None, typer.Option(help="What is said before all else.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of an answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(help="Sample; without: as the adapter or the base says.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Talk with a running server; /reset begins anew, /exit or Ctrl-D ends.

    Example:

      hira chat --adapter my-assistant --system "Answer in one sentence."
    """
    opening = [{"role": "system", "content": system}] if system else []
    said = list(opening)
    with reach(url, key) as client:
        model = adapter or ask(client, "GET", "/v1/models").json()["data"][0]["id"]
        while True:
            try:
                text = input("you  ").strip() if sys.stdin.isatty() else input().strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if text in {"/exit", "/quit"}:
                return
            if text == "/reset":
                said = list(opening)
                continue
            if not text:
                continue
            said.append({"role": "user", "content": text})
            body: dict[str, Any] = {
                "model": model,
                "messages": said,
                "max_tokens": max_tokens,
                "stream": True,
            }
            if temperature is not None:
                body["temperature"] = temperature
            answer = "".join(_spoken(client, body))
            said.append({"role": "assistant", "content": answer})


def _spoken(client: httpx2.Client, body: dict[str, Any]) -> Iterator[str]:
    """The parts of an answer, printed as they come."""
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        exit_on_error(answer)
        for event in _events(answer):
            if "error" in event:
                fail(str(event["error"].get("message", event["error"])))
            for choice in event.get("choices", ()):
                part = choice.get("delta", {}).get("content") or ""
                print(part, end="", flush=True)
                yield part
    print()


@contextmanager
def reach(url: str, key: str | None) -> Iterator[httpx2.Client]:
    """A client of the server at ``url``; what cannot be reached ends the command with a line."""
    import httpx2

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx2.Client(base_url=url, headers=headers, timeout=None) as client:
            yield client
    except httpx2.ConnectError:
        fail(f"no server answers at {url}; start one with: hira serve")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        fail(f"the server at {url} cannot be used: {error or type(error).__name__}")


def ask(client: httpx2.Client, method: str, path: str, **arguments: Any) -> httpx2.Response:
    """One call; an error response ends the command with what it says."""
    answer = client.request(method, path, **arguments)
    exit_on_error(answer)
    return answer


def exit_on_error(answer: httpx2.Response) -> None:
    """End the command when the response is an error."""
    if answer.is_success:
        return
    for one in problems_of(answer):
        print_fault(f"{one.get('code', '')}: {one.get('detail', one)}", one)
    raise SystemExit(FAILED)


def problems_of(answer: httpx2.Response) -> list[dict[str, Any]]:
    """What an error response says is wrong: each with its code, detail, found, expected and fix."""
    answer.read()
    try:
        problem = answer.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        fail(f"HTTP {answer.status_code}: {answer.text[:200]}")
    if isinstance(problem.get("error"), dict):  # as OpenAI words it
        told = problem["error"]
        return [{"code": told.get("code"), "detail": told.get("message"), "field": told["param"]}]
    several: list[dict[str, Any]] = problem.get("problems") or [problem]
    return several


def every_adapter(client: httpx2.Client, prefix: str = "") -> list[dict[str, Any]]:
    """The records of all adapters of a server whose names begin so."""
    rows: list[dict[str, Any]] = []
    while True:
        params: dict[str, Any] = {"prefix": prefix, "offset": len(rows), "limit": PAGE}
        page = ask(client, "GET", "/admin/adapters", params=params).json()
        rows += page["adapters"]
        if len(rows) >= page["total"] or not page["adapters"]:
            return rows


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


def _events(answer: httpx2.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        told = line.removeprefix("data:").strip()
        if line.startswith("data:") and told != "[DONE]":
            yield json.loads(told)
