"""transformers counts the weights that it loads on bars of its own: here they become a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from transformers.utils import logging as transformers_logging

from server.stages import tell_stage

TOLD_MOST: Final = 100  # a stage is told so often at most


class _CountedWeights:
    """What transformers takes for one of its bars, as far as its loader uses one."""

    def __init__(self, items: Any, total: int, name: str) -> None:
        self._items = items
        self._total = total
        self._name = name
        self._done = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self._done += count
        if self._done % max(1, self._total // TOLD_MOST) == 0:
            tell_stage(self._name, self._done, self._total)

    def __enter__(self) -> _CountedWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **named: None  # descriptions and other ornaments

    def close(self) -> None:
        """Nothing is drawn, so nothing is cleared."""


@contextmanager
def weights_told_as(name: str) -> Iterator[None]:
    """Within it, what transformers would draw bars of is told as the stage ``name``."""

    def count(factory: Any, given: tuple[Any, ...], named: dict[str, Any]) -> _CountedWeights:
        items = given[0] if given else named.get("iterable", ())
        total = named.get("total") or (len(items) if hasattr(items, "__len__") else 0)
        tell_stage(name, 0, total)
        return _CountedWeights(items, total, name)

    before = transformers_logging.set_tqdm_hook(count)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)
