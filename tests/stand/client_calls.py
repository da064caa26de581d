"""How a program that drives one client says what it tried: a line of JSON for each call.

Such a program runs in the environment of its client, which has nothing of this project's
dependencies: only the standard library is imported here.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import NoReturn

ERROR_CHARACTERS = 600


@dataclass(frozen=True)
class Served:
    """Two servers, and the names of their adapters.

    Args:
        encoder: URL of a tiny BERT with ``mood`` (a classifier), ``words`` (of tokens),
            ``relevance`` (a cross-encoder, the default), ``answers`` (to questions), ``vectors``.
        decoder: URL of a tiny Llama with a chat template and ``story``, the default.
    """

    encoder: str
    decoder: str


Call = Callable[[Served], None]


class Calls:
    """The calls of one client.

    Args:
        package: Its distribution, for the version.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self._calls: dict[str, Call] = {}

    def call(self, name: str) -> Callable[[Call], Call]:
        """A decorator: the function makes this call, and asserts what it gets."""

        def keep(made: Call) -> Call:
            self._calls[name] = made
            return made

        return keep

    def run(self, served: Served) -> None:
        """Make all calls and print a line for each."""
        for name, made in self._calls.items():
            error = None
            try:
                made(served)
            except Exception as failed:  # noqa: BLE001  # whatever a client raises is told
                last = traceback.extract_tb(failed.__traceback__)[-1]
                where = f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
                error = f"{type(failed).__name__} at {where}: {failed}"[:ERROR_CHARACTERS]
            told = {
                "client": self.package,
                "version": version(self.package),
                "call": name,
                "error": error,
            }
            print(json.dumps(told), flush=True)  # noqa: T201  # read by whoever started it


def run_all(*clients: Calls) -> None:
    """The program: ``python -m … ENCODER DECODER``."""
    served = Served(*sys.argv[1:3])
    for one in clients:
        one.run(served)


@contextmanager
def raises(*kinds: type[BaseException]) -> Iterator[list[BaseException]]:
    """Fails unless the block raises one of them; what it raised is appended to the list."""
    caught: list[BaseException] = []
    try:
        yield caught
    except kinds as error:
        caught.append(error)
        return
    _missing(kinds)


def _missing(kinds: tuple[type[BaseException], ...]) -> NoReturn:
    raise AssertionError(f"no {' or '.join(kind.__name__ for kind in kinds)} was raised")
