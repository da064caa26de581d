"""`hira apply`: many adapters in one go, all of them or none.

Every adapter is checked and stored first, without its name. Only when all of them are right do the
names move, in one transaction of the server's registry.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from server.cli.client import (
    DEFAULT_URL,
    KeyOption,
    UrlOption,
    ask,
    every_adapter,
    key_or_local_admin_key,
    problems_of,
    reach,
)
from server.cli.layout import MISUSED, fail, print_fault
from server.cli.manifest import Manifest, ManifestEntry, ManifestFaults, read_manifest
from server.cli.upload import sent_form

if TYPE_CHECKING:
    import httpx2

SIGNS: Final = {
    "created": "+",
    "replaced": "~",
    "pinned": "^",
    "unpinned": "v",
    "removed": "-",
    "unchanged": "=",
}
COMPARED: Final = ("method", "task", "labels", "ranks", "targets", "parameters", "bytes", "source")
VERSION_SHOWN: Final = 12


def add_apply_command(app: typer.Typer) -> None:
    app.command("apply", rich_help_panel="Adapters")(apply_file)


def apply_file(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST.yaml", help="Names, sources and pins.")
    ],
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all of it and show what would change.")
    ] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Bring a running server's adapters to what a manifest says, as a whole.

    One adapter that is broken: nothing is applied, and every fault is listed. The same manifest
    again changes nothing.

    \b
    A manifest:
      adapters:
        imdb: ./runs/imdb
        sst2: {source: "hf://org/sst2@main", pinned: true}
      aliases: {production: imdb}
      prune: false

    Example:

      hira apply adapters.yaml --dry-run
    """
    try:
        wanted = read_manifest(manifest)
    except ManifestFaults as wrong:
        tell_manifest_faults(wrong, url, key)
    with reach(url, key_or_local_admin_key(key)) as client:
        apply_manifest(client, wanted, dry_run=dry_run)


def apply_manifest(
    client: httpx2.Client, wanted: Manifest, *, dry_run: bool = False, replace: bool = True
) -> None:
    """Check and store what is new, show the plan, and apply it.

    Args:
        client: Of the server.
        wanted: What it shall have.
        dry_run: Change nothing.
        replace: Whether a name may move from another version.

    Raises:
        SystemExit: Something is wrong; nothing was applied then.
    """
    present = {one["name"]: one for one in every_adapter(client)}
    staged, faults = _stage_all(client, wanted, present)
    if faults:
        wrong = _tell_adapter_faults(faults)
        fail(f"nothing was applied: {wrong} of {len(wanted.entries)} adapters cannot be")
    names = {one.name for one in wanted.entries}
    body = {
        "adapters": [
            {
                "name": one.name,
                "version": staged[one.name]["version"],
                "source": staged[one.name]["source"],
                "pinned": one.pinned,
            }
            for one in wanted.entries
        ],
        "remove": sorted(set(present) - names) if wanted.prune else [],
        "aliases": wanted.aliases,
    }
    answer = ask(client, "POST", "/admin/apply", json={**body, "dry_run": True}).json()
    changes, aliases = answer["changes"], answer["aliases"]
    moved = [one["name"] for one in changes if one["change"] == "replaced"]
    if moved and not replace:
        fail(
            f"nothing was applied: {len(moved)} names are on another version",
            found=", ".join(moved[:8]),
            fix="add --replace to move them",
        )
    _show_plan(changes, present, staged)
    _show_aliases(aliases)
    planned = [*changes, *aliases]
    count = sum(one["change"] != "unchanged" for one in planned)
    if not count:
        print(f"no change: {len(changes)} adapters are as they shall be")
    elif dry_run:
        print(f"{count} changes, {len(planned) - count} unchanged; nothing applied (--dry-run)")
    else:
        ask(client, "POST", "/admin/apply", json={**body, "dry_run": False})
        print(f"{count} changes applied, {len(planned) - count} unchanged")


def tell_manifest_faults(wrong: ManifestFaults, url: str, key: str | None) -> NoReturn:
    """End the command with every fault of a manifest, and with what the server finds in the files
    of its other adapters: who mends one shall not be told of the next.

    Folders that the server has as they are need not be sent for that. Where it lets nobody look, as
    with a wrong key, it is asked once and not for every adapter.

    Raises:
        SystemExit: Always.
    """
    for text, fix in wrong.faults:
        print_fault(text, {"fix": fix})
    if wrong.entries:
        with suppress(SystemExit), reach(url, key_or_local_admin_key(key)) as client:
            present = {one["name"]: one for one in every_adapter(client)}
            _tell_adapter_faults(_stage_all(client, Manifest(wrong.entries), present)[1])
    fail("nothing was applied", status=MISUSED)


def _tell_adapter_faults(faults: Sequence[tuple[str, dict[str, Any]]]) -> int:
    """Print what is wrong with adapters; returns how many they are."""
    for text, problem in faults:
        print_fault(text, problem)
    return len({problem["adapter"] for _, problem in faults})


def _stage_all(
    client: httpx2.Client, wanted: Manifest, present: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """A record for every entry, and what is wrong with those that have none."""
    staged: dict[str, Any] = {}
    faults: list[tuple[str, dict[str, Any]]] = []
    with _adapters_counted(len(wanted.entries)) as advance:
        for one in wanted.entries:
            known = present.get(one.name)
            if known is not None and one.folder is not None and _is_there(one, known["version"]):
                staged[one.name] = known
            else:
                answer = _stage(client, one)
                if answer.is_success:
                    staged[one.name] = answer.json()
                else:
                    for problem in problems_of(answer):
                        text = f"{one.name}: {problem.get('code', '')}: {problem.get('detail', '')}"
                        faults.append((text, {**problem, "adapter": one.name}))
            advance(one.name)
    return staged, faults


def _is_there(entry: ManifestEntry, version: str) -> bool:
    """Whether the folder holds the version that the name is on: then it need not be sent."""
    if entry.folder is None or not entry.folder.is_dir():
        return False
    from adapters.errors import AdapterError
    from adapters.registry.store import versions_of

    try:
        return version in versions_of(entry.folder)
    except (AdapterError, OSError):
        return False  # the server says what is wrong with it


def _stage(client: httpx2.Client, entry: ManifestEntry) -> httpx2.Response:
    if entry.folder is None:
        body = {"name": entry.name, "source": entry.source, "stage": True}
        return client.post("/admin/adapters", json=body)
    return sent_form(client, {"name": entry.name, "stage": "true"}, entry.folder)


def _show_plan(
    changes: Sequence[Mapping[str, Any]],
    present: Mapping[str, Mapping[str, Any]],
    staged: Mapping[str, Mapping[str, Any]],
) -> None:
    """A line for every name that changes, and below it what becomes different."""
    for one in changes:
        name, change = one["name"], one["change"]
        if change == "unchanged":
            continue
        version = one["version"][:VERSION_SHOWN]
        if change == "replaced" and one["before"] != one["version"]:
            version = f"{one['before'][:VERSION_SHOWN]} -> {version}"
        print(f"{SIGNS[change]} {name}  {change}  {version}{'  pinned' if one['pinned'] else ''}")
        if change == "replaced":
            before, after = present[name], staged[name]
            for field in COMPARED:
                if before.get(field) != after.get(field):
                    print(f"    {field}: {before.get(field)} -> {after.get(field)}")


def _show_aliases(changes: Sequence[Mapping[str, Any]]) -> None:
    """A line for every alias that changes."""
    for one in changes:
        change = one["change"]
        if change != "unchanged":
            places = [place for place in (one["before"], one["adapter"]) if place is not None]
            print(f"{SIGNS[change]} {one['alias']}  alias {change}  {' -> '.join(places)}")


@contextmanager
def _adapters_counted(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over the adapters on a terminal; elsewhere nothing."""
    if not sys.stderr.isatty() or total < 2:
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("checking"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("checking", total=total, name="")
        yield lambda name: progress.update(bar, advance=1, name=name)
