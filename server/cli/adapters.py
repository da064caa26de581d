"""`hira adapters`: list, show, add, remove, pin and roll back adapters of a running server, name
them otherwise, and try new versions on a share of the traffic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from server.cli.apply import apply_manifest, tell_manifest_faults
from server.cli.client import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    UrlOption,
    ask,
    every_adapter,
    exit_on_error,
    key_or_local_admin_key,
    print_json,
    reach,
    show_table,
)
from server.cli.layout import MISUSED, fail
from server.cli.manifest import ADAPTER_NAME, ManifestFaults, is_adapter, manifest_of
from server.cli.upload import sent_form

adapters_app = typer.Typer(help="The adapters of a running server.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]


@adapters_app.command("list")
def list_adapters(
    prefix: Annotated[str, typer.Option(help="Names that begin so.")] = "",
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List all adapters."""
    with reach(url, key_or_local_admin_key(key)) as client:
        rows = every_adapter(client, prefix)
    if as_json:
        print_json(rows)
        return
    columns: tuple[str, ...] = (
        "name",
        "method",
        "task",
        "ranks",
        "bytes",
        "residency",
        "pinned",
        "requests",
    )
    # Columns that few servers need.
    columns += tuple(one for one in ("aliases", "canary") if any(row.get(one) for row in rows))
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
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME PATH | PATH...",
            help="A name and a folder, an archive or a source; or several folders or archives, "
            "each registered under its own name.",
        ),
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
    """Register adapters: upload their files, or let the server fetch one.

    Several paths are registered together: all of them, or none.

    Examples:

      hira adapters add imdb ./runs/imdb --pinned

      hira adapters add runs/*
    """
    if len(what) == 2 and ADAPTER_NAME.fullmatch(what[0]):
        if "/" not in what[1] and all(map(is_adapter, map(Path, what))) and what[0] != what[1]:
            fail(
                "two folders, or a name and a folder?",
                found=f"{what[0]} and {what[1]}, which are both adapters here",
                fix=f"./{what[0]} ./{what[1]} for both; {what[0]} ./{what[1]} for one",
                status=MISUSED,
            )
    elif not remote and (len(what) > 2 or all(is_adapter(Path(one)) for one in what)):
        _add_many(what, url, key, replace=replace, pinned=pinned)
        return
    if len(what) != 2:
        fail(
            "a name and a path are needed, or paths of adapters",
            found=" ".join(what)[:200],
            fix="hira adapters add NAME PATH",
            status=MISUSED,
        )
    name, path = what
    fields: dict[str, Any] = {"replace": replace, "pinned": pinned, "preload": preload}
    with reach(url, key_or_local_admin_key(key)) as client:
        if remote:
            body = {"name": name, "source": path, **fields}
            answer = ask(client, "POST", "/admin/adapters", json=body)
        else:
            texts = {"name": name, **{one: str(value).lower() for one, value in fields.items()}}
            answer = sent_form(client, texts, Path(path), shown=True)
            exit_on_error(answer)
    _print_record(answer.json(), as_json)


def _add_many(paths: list[str], url: str, key: str | None, *, replace: bool, pinned: bool) -> None:
    # A pattern of the shell finds logs and notes beside the adapters.
    adapters = [Path(one) for one in paths if is_adapter(Path(one)) or not Path(one).exists()]
    left_out = sorted(set(paths) - set(map(str, adapters)))
    if left_out:
        print(f"left out, no adapters: {', '.join(left_out[:8])}", file=sys.stderr)
    try:
        wanted = manifest_of(adapters, pinned or None)
    except ManifestFaults as wrong:
        tell_manifest_faults(wrong, url, key)
    with reach(url, key_or_local_admin_key(key)) as client:
        apply_manifest(client, wanted, replace=replace)


@adapters_app.command()
def remove(name: NameArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = None) -> None:
    """Remove an adapter; requests that run finish."""
    with reach(url, key_or_local_admin_key(key)) as client:
        ask(client, "DELETE", _path(name))


@adapters_app.command()
def history(
    name: NameArgument,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every version that a name was on, the newest first.

    What is kept can be rolled back to.

    Example:

      hira adapters history imdb
    """
    with reach(url, key_or_local_admin_key(key)) as client:
        told = ask(client, "GET", f"{_path(name)}/versions").json()
    if as_json:
        print_json(told)
        return
    columns = ("number", "version", "at", "act", "bytes", "kept", "source")
    rows = [[_version_cell(one, column) for column in columns] for one in told["versions"]]
    show_table(columns, rows)


@adapters_app.command()
def rollback(
    name: NameArgument,
    version: Annotated[
        str | None,
        typer.Argument(
            help="That the name was on, or its first six digits; without: the one before.",
        ),
    ] = None,
    *,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a name back on a version that it was on before.

    When this returns, no new request is answered by the version that it left. Rolling back once
    more goes further back.

    Examples:

      hira adapters rollback imdb

      hira adapters rollback imdb 3f9a1c
    """
    body = {} if version is None else {"version": version}
    with reach(url, key_or_local_admin_key(key)) as client:
        row = ask(client, "POST", f"{_path(name)}/rollback", json=body).json()
    if as_json:
        print_json(row)
        return
    print(f"{name} is on {row['version']}; it was on {row['before']}")


@adapters_app.command()
def alias(
    alias: Annotated[
        str | None, typer.Argument(help="Another name for an adapter; without: list all.")
    ] = None,
    name: Annotated[str | None, typer.Argument(help="The adapter that it points to.")] = None,
    *,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away.")] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give an adapter another name, move that to another adapter, or list all.

    Requests for an alias are answered by the adapter that it points to.

    Examples:

      hira adapters alias production imdb-v7

      hira adapters alias production --remove

      hira adapters alias
    """
    misused = remove or name is not None if alias is None else remove == (name is not None)
    if misused:
        fail("an alias and an adapter are needed, or an alias and --remove", status=MISUSED)
    with reach(url, key_or_local_admin_key(key)) as client:
        if alias is None:
            told = ask(client, "GET", "/admin/aliases").json()
        elif remove:
            ask(client, "DELETE", f"/admin/aliases/{quote(alias, safe='')}")
            return
        else:
            path = f"/admin/aliases/{quote(alias, safe='')}"
            told = ask(client, "PUT", path, json={"adapter": name}).json()
    if as_json:
        print_json(told)
    elif alias is None:
        show_table(("alias", "adapter"), [list(pair) for pair in told["aliases"].items()])
    else:
        before = f"; it pointed to {told['before']}" if told["before"] else ""
        print(f"{alias} points to {told['adapter']}{before}")


@adapters_app.command()
def canary(
    name: NameArgument,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[VERSION | PATH]",
            help="A version that the name was on or that is staged, or the folder or archive of a "
            "new one; without: the present canary.",
        ),
    ] = None,
    *,
    share: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Of the requests for the name, 0 to 100."),
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="Put the name on the canary's version.")
    ] = False,
    abort: Annotated[
        bool, typer.Option("--abort", help="End it: the name's version answers everybody.")
    ] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try another version on a share of a name's requests, then promote or abort it.

    Answers say in X-Adapter-Version and X-Adapter-Arm who gave them.

    Examples:

      hira adapters canary imdb ./runs/imdb-new --share 10

      hira adapters canary imdb --share 50

      hira adapters canary imdb --promote
    """
    if sum((share is not None, promote, abort)) != 1 or (what is not None and share is None):
        fail(
            "one of --share, --promote and --abort is needed; a version goes with --share",
            fix="hira adapters canary --help",
            status=MISUSED,
        )
    path = f"{_path(name)}/canary"
    with reach(url, key_or_local_admin_key(key)) as client:
        if promote:
            row = ask(client, "POST", f"{path}/promote").json()
        elif abort:
            row = ask(client, "DELETE", path).json()
        else:
            version = what
            if what is not None and Path(what).exists():
                fields = {"name": name, "stage": "true"}
                staged = sent_form(client, fields, Path(what), shown=True)
                exit_on_error(staged)
                version = staged.json()["version"]
            body = {"version": version, "share": share}
            row = ask(client, "PUT", path, json=body).json()
    if as_json:
        print_json(row)
        return
    told = f"{name} is on {row['version']}"
    if row["canary"] is not None:
        told += f"; {row['canary']['share']:g} % of its requests go to {row['canary']['version']}"
    print(told)


def _version_cell(entry: dict[str, Any], column: str) -> str:
    match column:
        case "version":
            return f"{entry['version']}{' *' if entry['current'] else ''}"
        case "at":
            return str(entry["at"])[:19]
        case "act" if entry["restores"] is not None:
            return f"rolled back to {entry['restores']}"
        case _:
            return _cell(column, entry[column])


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
    if name == "canary":
        return f"{value['share']:g} % to {value['version']}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    return str(value)
