"""What a process is doing while it starts: a stage, and how far it is.

Whoever does something long says so with `tell_stage`; whoever shows it listens. As with logging,
there is one listener for the process, and without one nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of a start.

    Args:
        name: What is being done, for a person: ``loading and quantizing weights``.
        done: How many of ``total`` are done.
        total: Of what is counted; 0: nothing is.
    """

    name: str
    done: int = 0
    total: int = 0


_listeners: list[Callable[[Stage], None]] = []


def listen_to_stages(listener: Callable[[Stage], None] | None) -> None:
    """Have ``listener`` called at every stage of this process; None: nobody listens any more."""
    _listeners[:] = [] if listener is None else [listener]


def tell_stage(name: str, done: int = 0, total: int = 0) -> None:
    """Say what is being done from now on, or how far it is; quick, and it raises nothing."""
    for listener in _listeners:
        listener(Stage(name, done, total))
