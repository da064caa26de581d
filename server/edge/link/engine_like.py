"""What drives an engine needs of it, and how one is built that is named as a string.

HTTP processes never load the engine, so nobody here imports it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final, Protocol, cast

from adapters.registry.objects import StoreNote
from server.messages import Event, Message
from server.options import EngineOptions

ENGINE: Final = "server.engine.engine:Engine.build"
ENGINE_FAILED: Final = 70  # exit status of a process that lost its engine, or a part it needs


class StepLike(Protocol):
    """The latest forward, for the metrics."""

    @property
    def lane(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def adapters(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def waits_s(self) -> tuple[float, ...]: ...


class EngineLike(Protocol):
    """What the loop needs of an engine; `server.engine.engine.Engine` is the real one."""

    def submit(self, message: Message) -> None: ...

    def step(self) -> list[Event]: ...

    def has_work(self) -> bool: ...

    def wait(self, timeout: float) -> None: ...

    def wake(self) -> None: ...

    @property
    def last_step(self) -> StepLike | None: ...

    def snapshot(self) -> Any: ...

    def take_load_seconds(self) -> list[float]: ...

    def take_store_notes(self) -> Sequence[StoreNote]: ...

    def close(self) -> list[Event]: ...


def build_engine(path: str, options: EngineOptions) -> EngineLike:
    """Import and call what builds an engine; takes seconds to minutes.

    Args:
        path: ``module:attribute`` of it.
        options: For the engine.

    Raises:
        Exception: Whatever it raises: the base cannot be served.
    """
    module, _, attribute = path.partition(":")
    build: Any = importlib.import_module(module)
    for part in attribute.split("."):
        build = getattr(build, part)
    return cast(EngineLike, build(options))
