"""Runs the clients and writes the table of docs/clients.md: ``python -m tests.clients``.

``--install`` makes the environments that are missing first; ``--check`` writes nothing;
``--served`` takes two servers that run already. The status is 1 where a call failed, or a client
could not be run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.stand.client_calls import Served
from tests.stand.client_environments import ENVIRONMENTS, ROOT, Outcome
from tests.stand.client_servers import client_servers

PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- calls -->", "<!-- end of calls -->"


def table(outcomes: Sequence[Outcome], lacking: dict[str, str]) -> Iterator[str]:
    """The lines of the table, clients in the order in which they ran."""
    yield "| client | version | call | |"
    yield "| --- | --- | --- | --- |"
    for one in outcomes:
        end = "works" if one.error is None else "fails: " + " ".join(one.error.split())[:120]
        yield f"| {one.client} | {one.version} | {one.call} | {end} |"
    for name, reason in lacking.items():
        yield f"| {name} | | | not run: {reason} |"


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    arguments.add_argument("--install", action="store_true", help="make missing environments")
    arguments.add_argument("--check", action="store_true", help="write nothing")
    arguments.add_argument("--served", nargs=2, metavar=("ENCODER", "DECODER"), help="their URLs")
    given = arguments.parse_args()
    if given.install:
        for one in ENVIRONMENTS:
            one.install()
    lacking = {one.name: why for one in ENVIRONMENTS if (why := one.lacking()) is not None}
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        if given.served:
            served = Served(*given.served)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            served = stack.enter_context(client_servers(Path(folder)))
        for one in ENVIRONMENTS:
            if one.name not in lacking:
                outcomes += one.run(served)
    lines = list(table(outcomes, lacking))
    print("\n".join(lines))  # noqa: T201
    if not given.check:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        middle = "\n".join(["", "", *lines, "", ""])
        PAGE.write_text(before + BEGIN + middle + END + after, encoding="utf-8")
    return int(bool(lacking) or any(one.error is not None for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
