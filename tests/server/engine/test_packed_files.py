"""An engine that finds what an earlier one has packed, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.residency import packed_files
from server.engine.engine import Engine
from server.messages import Pin
from tests.stand import tiny_bases
from tests.stand.waits import until

TEXTS = ["a fine film", "no"]


@contextmanager
def built(options: Any) -> Iterator[Engine]:
    engine = Engine.build(options)
    try:
        yield engine
    finally:
        engine.close()


def _loads(engine: Engine) -> tuple[int, int]:
    totals = engine.snapshot().totals
    return totals["load"], totals["ready_made"]


def test_a_later_engine_answers_the_same_from_packed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_files, "SETTLED_S", 0.0)
    base = tiny_bases.base_folder(tmp_path, "distilbert")
    folder = tiny_bases.adapter(tmp_path / "a", base, "text-classification", rank=3, seed=1)
    version = tiny_bases.stored(tmp_path / "store", folder)
    options = tiny_bases.options(base, tmp_path / "store")
    packed = options.cache_dir / "packed"

    def ask(engine: Engine) -> Any:
        return engine.encode(TEXTS, task="text-classification", version=version).outputs

    with built(options) as engine:
        stored = ask(engine)
        assert _loads(engine) == (1, 0)
    assert len(list(packed.iterdir())) == 1
    with built(options) as engine:
        assert ask(engine) == stored
        assert _loads(engine) == (1, 1)
        engine.submit(Pin((), named=("0" * 32,)))
        until(lambda: not list(packed.iterdir()), "the file of a version without a name stays")


def test_without_bytes_for_them_there_are_none(tmp_path: Path) -> None:
    base = tiny_bases.base_folder(tmp_path, "distilbert")
    folder = tiny_bases.adapter(tmp_path / "a", base, "text-classification", rank=3, seed=1)
    version = tiny_bases.stored(tmp_path / "store", folder)
    options = tiny_bases.options(base, tmp_path / "store", packed_bytes=0)
    with built(options) as engine:
        engine.encode(TEXTS, task="text-classification", version=version)
    assert not (options.cache_dir / "packed").exists()
