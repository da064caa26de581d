"""``hira_adapter_bytes`` by tier against the memory that the tensors themselves hold."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.engine import Engine
from server.engine.snapshot import cuda_bytes
from server.messages import Preload
from tests.stand import tiny_bases

LABELS = ("no", "yes")


def memory_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def in_slots(engine: Engine) -> list[torch.Tensor]:
    return [
        tensor
        for layer in engine.base.adapted.layers.values()
        for entry in layer.slots.values()
        for tensor in (entry.a, entry.b, entry.bias)
        if tensor is not None
    ]


def ready(engine: Engine, version: str) -> None:
    engine.submit(Preload(version))
    until = time.monotonic() + 60
    while engine.residency.state(version) != "ready":
        assert time.monotonic() < until
        engine.wait(0.05)


def test_bytes_of_each_tier_are_those_of_its_tensors(tmp_path: Path) -> None:
    base, store = tiny_bases.base_folder(tmp_path, "distilbert"), tmp_path / "store"
    versions = [
        tiny_bases.stored(
            store,
            tiny_bases.adapter(
                tmp_path / str(seed), base, "text-classification", rank=3 + seed, seed=seed
            ),
        )
        for seed in range(3)
    ]
    options = tiny_bases.options(
        base, store, slots=2, modulation="cached", folded_bytes=3 * 64 * 64 * 4
    )
    engine = Engine.build(options)
    try:
        for version in versions:
            ready(engine, version)
            engine.encode(["a fine film"], version=version, task="text-classification")
        residency: Any = engine.residency
        entries = residency._tiers.entries
        assert sorted(entry.tier for entry in entries.values()) == ["device", "device", "host"]
        found = engine.snapshot().adapter_bytes
        assert found["device"] == memory_of(in_slots(engine)) > 0
        heads = [t for entry in entries.values() for t in entry.packed.weights.head.values()]
        out = [
            tensor
            for entry in entries.values()
            if entry.slot is None
            for factors in entry.packed.weights.factors.values()
            for tensor in (factors.a, factors.b)
        ]
        assert len(out) == 2 * 6  # two blocks, three targets each
        assert found["host"] == memory_of(heads) + memory_of(out)
        folded: Any = engine.base.adapted.modulator.folded
        assert 0 < found["folded"] <= options.folded_bytes
        assert found["folded"] == folded.nbytes
        encode: Any = engine._parts.encode
        made = [
            p for head in encode._reader._heads._kept.values() for p in head._module.parameters()
        ]
        assert found["heads"] == memory_of(made) > 0
    finally:
        engine.close()


def test_memory_of_a_device_says_what_forms_of_the_kernels_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3, 4))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2)
    told = {"allocated": 1, "reserved": 2, "free": 3, "total": 4, "forms": 7}
    assert cuda_bytes(torch.device("cuda"), 7) == told
    assert cuda_bytes(torch.device("cpu"), 0) == {}
