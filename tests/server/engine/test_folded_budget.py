"""Forcing the cached strategy through the whole engine keeps to its budget, to the byte."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from adapters.modulation.folded import FoldedCache
from server.engine.engine import Engine
from server.messages import EncodeRequest, EncodeResult
from tests.stand import tiny_bases
from tests.stand.engines import by_id, drain


@pytest.mark.parametrize("weights", [0, 1, 5, 7])
def test_folded_bytes_never_exceed_the_budget_and_are_what_is_shown(
    tmp_path: Path, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, store = tiny_bases.base_folder(tmp_path, "distilbert"), tmp_path / "store"
    folders = [
        tiny_bases.adapter(tmp_path / f"a{seed}", base, "text-classification", seed=seed)
        for seed in range(3)
    ]
    versions = [tiny_bases.stored(store, folder) for folder in folders]
    config = json.loads((base / "config.json").read_text())
    one = 4 * config["dim"] * max(config["dim"], config["hidden_dim"])  # the largest, in float32
    budget = weights * one + 3
    peak, allocated = 0, 0
    reserve = FoldedCache.reserve

    def watched(self: FoldedCache, *args: object) -> torch.Tensor | None:
        nonlocal peak, allocated
        found = reserve(self, *args)  # type: ignore[arg-type]
        held = {kept.weight.untyped_storage().data_ptr() for kept in self._kept.values()}
        allocated = sum(kept.weight.untyped_storage().nbytes() for kept in self._kept.values())
        assert len(held) == len(self._kept)
        assert allocated == self.nbytes
        peak = max(peak, allocated)
        return found

    monkeypatch.setattr(FoldedCache, "reserve", watched)
    options = tiny_bases.options(base, store, modulation="cached", folded_bytes=budget)
    engine = Engine.build(options)
    try:
        for number in range(4):
            for name, version in enumerate(versions):
                inputs = engine.text.tokenize(
                    tiny_bases.texts(2, seed=number), "text-classification"
                )
                engine.submit(
                    EncodeRequest(
                        id=f"{number}-{name}", task="text-classification", adapter=str(name),
                        version=version, inputs=inputs, submitted=time.time(),
                    )
                )  # fmt: skip
            events = drain(engine)
            assert all(isinstance(event, EncodeResult) for event in by_id(events).values())
            shown = engine.snapshot().adapter_bytes["folded"]
            assert shown == allocated
            assert shown <= budget
        assert peak <= budget
        assert (peak > 0) == (weights > 0)
        assert budget - peak < one  # what fits is kept
    finally:
        engine.close()
