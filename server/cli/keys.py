"""`hira keys`: make keys and their entries of a keys file, check one, show what was used."""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final

import typer

from server.cli.client import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    UrlOption,
    ask,
    key_or_local_admin_key,
    print_json,
    reach,
    show_table,
)
from server.cli.layout import FAILED, MISUSED, fail, print_fault
from server.edge.admit.key_file import digest_of, new_key, parse_keys, read_key_file
from server.settings import SettingsFault

keys_app = typer.Typer(help="Keys of callers: make, check, what they used.", no_args_is_help=True)
DAYS: Final = re.compile(r"(\d{1,4})d")
BARE_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")  # that TOML takes without quotes

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A keys file.")]
CountOption = Annotated[int | None, typer.Option(metavar="N", min=1)]


@keys_app.command("new")
def make_key(
    name: Annotated[str, typer.Argument(help="Of the key, for logs and metrics.")],
    *,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="PATTERN",
            help="A name that the key may ask for, or a pattern: imdb-*; the bare base is base. "
            "Repeatable (default: all).",
        ),
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may make the admin calls.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="It may read /metrics.")] = False,
    requests_per_minute: CountOption = None,
    requests_per_day: CountOption = None,
    tokens_per_minute: CountOption = None,
    tokens_per_day: CountOption = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="30d, 2027-01-31 or 2027-01-31T12:00:00Z."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="Put the entry into this keys file."),
    ] = None,
) -> None:
    """Make a key. It is shown once and kept nowhere: the keys file holds only its SHA-256.

    Examples:

      hira keys new search --adapter 'imdb-*' --requests-per-minute 600 --expires 90d

      hira keys new ops --admin --file keys.toml
    """
    key = new_key()
    lines = [f"[{name}]" if BARE_NAME.fullmatch(name) else f"[{json.dumps(name)}]"]
    lines.append(f'sha256 = "{digest_of(key.encode())}"')
    lines += ["admin = true"] if admin else []
    lines += ["metrics = true"] if metrics else []
    lines += [f"adapters = {json.dumps(adapters)}"] if adapters else []
    for field, limit in (
        ("requests_per_minute", requests_per_minute),
        ("requests_per_day", requests_per_day),
        ("tokens_per_minute", tokens_per_minute),
        ("tokens_per_day", tokens_per_day),
    ):
        lines += [f"{field} = {limit}"] if limit is not None else []
    lines += [f"expires = {_moment(expires)}"] if expires is not None else []
    entry = "\n".join(lines) + "\n"
    path = file or Path("keys.toml")
    _check_text(entry, path, MISUSED)
    if file is None:
        print(f"key (shown once)\n\n{key}\n\nentry for the keys file\n\n{entry}", end="")
        return
    _append(file, entry)
    print(key)
    print(f"the key of {name}, shown once; its entry is in {file}", file=sys.stderr)


@keys_app.command("check")
def check_command(file: FileArgument) -> None:
    """Check a keys file, and list its keys."""
    try:
        keys = read_key_file(file)
    except SettingsFault as fault:
        _tell_faults(fault)
        raise SystemExit(FAILED) from None
    for key in sorted(keys.values(), key=lambda one: one.name):
        what = "admin" if key.admin else ", ".join(key.adapters)
        until = "" if key.expires is None else _utc_text(key.expires)
        print(f"{key.name}\t{what}\t{until}{' (expired)' if key.is_expired() else ''}".rstrip())


@keys_app.command("usage")
def show_usage(
    *,
    days: Annotated[int, typer.Option(metavar="N", min=1, max=31, help="Last days.")] = 1,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """What the keys of a running server have used, by day (UTC), and what they may.

    Example:

      hira keys usage --days 7
    """
    with reach(url, key_or_local_admin_key(key)) as client:
        told = ask(client, "GET", "/admin/keys", params={"days": days}).json()
    if as_json:
        print_json(told)
        return
    limits = {one["name"]: one["limits"] for one in told["keys"]}
    columns = ("day", "key", "requests", "of", "tokens in", "tokens out", "of")
    show_table(
        columns,
        [
            [
                one["day"],
                one["key"],
                str(one["requests"]),
                _quota(limits, one["key"], "requests_per_day"),
                str(one["prompt_tokens"]),
                str(one["generated_tokens"]),
                _quota(limits, one["key"], "tokens_per_day"),
            ]
            for one in told["days"]
        ],
    )
    if told["fault"]:
        fail("the keys file is not used as it is now", found=told["fault"])


def _quota(limits: dict[str, dict[str, int | None]], key: str, field: str) -> str:
    """A quota as a cell: a dash where there is none, or no such key any more."""
    found = limits.get(key, {}).get(field)
    return "-" if found is None else str(found)


def _append(file: Path, entry: str) -> None:
    """Add an entry to a file, all at once, so that a server that reads it sees no half.

    The folder is locked meanwhile: of two commands at once, none takes the other's entry away.
    """
    place = file.resolve()
    try:
        folder = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        fail(f"the keys file {file} cannot be written", found=error.strerror)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            there = place.stat() if place.exists() else None
            before = "" if there is None else place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"the keys file {file} cannot be read", found=str(error))
        text = before + ("\n" if before and not before.endswith("\n\n") else "") + entry
        _check_text(text, file, FAILED)
        try:
            _replace_file(place, text, there)
        except OSError as error:
            fail(f"the keys file {file} cannot be written", found=error.strerror)
    finally:
        os.close(folder)  # lets the lock go


def _replace_file(place: Path, text: str, there: os.stat_result | None) -> None:
    """Put a text in the place of a file, for the same owner and mode; all of it or nothing."""
    handle, draft = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(handle)
        if there is not None:
            if (there.st_uid, there.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(draft, there.st_uid, there.st_gid)  # or the server could not read it
            os.chmod(draft, there.st_mode & 0o777)
        os.replace(draft, place)
    except BaseException:
        os.unlink(draft)
        raise


def _check_text(text: str, file: Path, status: int) -> None:
    try:
        parse_keys(text.encode(), file)
    except SettingsFault as fault:
        _tell_faults(fault)
        raise SystemExit(status) from None


def _tell_faults(fault: SettingsFault) -> None:
    for one in fault.faults:
        print_fault(one.text, {"found": one.found, "expected": one.expected, "fix": one.fix})


def _moment(text: str) -> str:
    """A moment as TOML writes it, in UTC."""
    days = DAYS.fullmatch(text)
    if days:
        return (datetime.now(UTC) + timedelta(days=int(days[1]))).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        found = datetime.fromisoformat(text)
        found = found.replace(tzinfo=found.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        fail(
            "--expires is no moment",
            MISUSED,
            found=text[:40],
            expected="30d, 2027-01-31 or 2027-01-31T12:00:00Z",
        )
    return found.isoformat(timespec="seconds").replace("+00:00", "Z")


def _utc_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
