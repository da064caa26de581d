"""Pruned adapters out of a slot: kept without their zeros, and exactly themselves again in one."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.factors import Factors
from adapters.intake.checkpoint import AdapterWeights, load_adapter
from adapters.layers.inject import AdaptedModel, inject
from adapters.residency.packing import PackedAdapter, pack_adapter
from adapters.residency.slots import Residency
from adapters.segments import from_rows
from tests.stand.folders import lora_folder, small_base
from tests.stand.tiny_models import VOCAB, build, random_factors

CPU = torch.device("cpu")


def pruned(weights: AdapterWeights, share: float) -> AdapterWeights:
    """The smallest numbers of every factor set to zero, by magnitude, as ``nonzero`` counts."""

    def prune(tensor: torch.Tensor) -> torch.Tensor:
        count = int(tensor.numel() * share)
        if not count:
            return tensor
        least = tensor.abs().flatten().kthvalue(count).values
        return torch.where(tensor.abs() <= least, torch.zeros(()), tensor)

    factors = {
        path: replace(entry, a=prune(entry.a), b=prune(entry.b))
        for path, entry in weights.factors.items()
    }
    nonzero = sum(
        int(entry.a.count_nonzero() + entry.b.count_nonzero()) for entry in factors.values()
    )
    return replace(weights, factors=factors, nonzero=nonzero)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> AdapterWeights:
    return load_adapter(lora_folder(tmp_path_factory.mktemp("a") / "lora"), small_base())


def tensors(packed: PackedAdapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    factors = packed.to_device(CPU)
    return {path: (entry.a.clone(), entry.b.clone()) for path, entry in factors.items()}


@pytest.mark.parametrize(
    ("dtype", "share"),
    [(torch.bfloat16, 0.5625), (torch.float16, 0.5625), (torch.float32, 0.53125)],
)
def test_half_of_the_numbers_take_little_more_than_half_of_the_bytes(
    weights: AdapterWeights, dtype: torch.dtype, share: float
) -> None:
    packed = pack_adapter(pruned(weights, 0.5), dtype, CPU)
    head = sum(tensor.nbytes for tensor in weights.head.values())
    packed.to_device(CPU)
    assert packed.host_nbytes(in_slot=True) == head
    packed.leave_device()
    assert packed.host_nbytes(in_slot=False) - head == pytest.approx(
        packed.nbytes * share, rel=0.01
    )


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.26, 1.0), seed=st.integers(0, 100))
def test_it_comes_back_bit_by_bit(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(3, 24, generator=generator), torch.randn(8, 3, generator=generator)
    a[0, 0] = -0.0
    plain: Any = AdapterWeights(
        config=_config(),
        factors={"x": Factors("lora", a, b, 2.0), "y": Factors("lora", b.t(), a.t(), 1.0)},
        head={}, labels=None, task="text-generation",
    )  # fmt: skip
    packed = pack_adapter(pruned(plain, share), torch.bfloat16, CPU)
    before = tensors(packed)
    for _ in range(2):
        packed.leave_device()
        packed.compact()
        assert all(entry.a.is_meta for entry in packed.factors.values()), "the numbers are let go"
        packed.restore()
        after = tensors(packed)
        for path, pair in before.items():
            for one, other in zip(pair, after[path], strict=True):
                assert torch.equal(one.view(torch.int16), other.view(torch.int16))


def _config() -> Any:
    from adapters.intake.config import parse_config

    return parse_config(b'{"peft_type": "LORA", "target_modules": ["x"]}')


def test_a_dense_adapter_stays_as_it_is(weights: AdapterWeights) -> None:
    packed = pack_adapter(weights, torch.bfloat16, CPU)
    packed.to_device(CPU)
    packed.leave_device()
    head = sum(tensor.nbytes for tensor in weights.head.values())
    assert packed.host_nbytes(in_slot=False) == head + packed.nbytes
    assert not packed.is_loose


def _six(adapted: AdaptedModel) -> dict[str, Any]:
    """Adapters of one size."""
    paths = [path for path in adapted.signature.layers if path.endswith(("q_lin", "v_lin"))]
    made: dict[str, Any] = {}
    for seed in range(6):
        factors = random_factors(adapted.signature, paths, method="lora", rank=8, seed=seed)
        made[f"v{seed}"] = AdapterWeights(
            config=_config(),
            factors=factors,
            head={}, labels=None, task="fill-mask",
        )  # fmt: skip
    return made


@pytest.mark.parametrize("slots", [1, 3])
def test_a_burst_of_compact_adapters_that_are_larger_than_the_host_tier_is_served(
    slots: int,
) -> None:
    """Without their zeros all six fit; made whole at once they would not."""
    adapted = inject(build("distilbert"))
    made = _six(adapted)
    size = pack_adapter(made["v0"], torch.float32, CPU).nbytes
    residency = Residency(
        adapted, lambda version: pruned(made[version], 0.5), slots=slots, device_bytes=10 * size,
        host_bytes=3 * size, folded_bytes=0, dtype=torch.float32, grace_s=0.01,
    )  # fmt: skip
    until = time.monotonic() + 60

    def serve(burst: list[str]) -> None:
        waiting = dict.fromkeys(burst)
        while waiting:
            for version in waiting:  # again, too: it may leave before it is seen
                residency.prefetch(version)
            assert time.monotonic() < until, f"{list(waiting)} were never placed"
            waiting = {v: None for v in waiting if residency.state(v) != "ready"}
            time.sleep(0.002)

    try:
        for version in made:
            serve([version])
        while residency._tiers.to_compact() is not None:
            assert time.monotonic() < until
            time.sleep(0.002)
        cold = [version for version in made if residency.state(version) != "ready"]
        assert len(cold) == len(made) - slots
        reads = residency.snapshot().loads
        for _ in range(3):
            serve(list(made))
        assert residency.snapshot().loads == reads, "they were in memory"
    finally:
        residency.close()


def test_the_host_tier_holds_more_pruned_adapters_and_they_answer_as_before() -> None:
    """One slot, and host memory for four dense adapters: five pruned ones stay in it, and one that
    is being loaded."""
    adapted = inject(build("distilbert"))
    made = _six(adapted)
    size = pack_adapter(made["v0"], torch.float32, CPU).nbytes

    def answers(share: float) -> tuple[list[torch.Tensor], int]:
        residency = Residency(
            adapted, lambda version: pruned(made[version], share), slots=1, device_bytes=10 * size,
            host_bytes=4 * size, folded_bytes=0, dtype=torch.float32, grace_s=0.01,
        )  # fmt: skip
        found = []
        ids = torch.randint(3, VOCAB, (1, 6), generator=torch.Generator().manual_seed(1))
        for version in [*made, *made]:
            residency.prefetch(version)
            until = time.monotonic() + 60
            while residency.state(version) != "ready":
                assert time.monotonic() < until
                time.sleep(0.002)
            slots = residency.lease([version])
            with torch.no_grad(), adapted.batch(from_rows([slots[version]] * 6)):
                found.append(adapted.model(ids)[0].clone())
            residency.release([version])
        while residency._tiers.to_compact() is not None:
            time.sleep(0.002)
        kept = [one.packed for one in residency._tiers.entries.values() if one.slot is None]
        assert all(one is not None and one.is_compact == (share > 0) for one in kept)
        snapshot = residency.snapshot()
        assert snapshot.host_bytes <= 4 * size
        residency.close()
        return found, snapshot.loads

    found, loads = answers(0.5)
    assert loads == len(made), "the second round found all of them in memory"
    for first, second in zip(found[: len(made)], found[len(made) :], strict=True):
        assert torch.equal(first, second)
    _, dense_loads = answers(0.0)
    assert dense_loads > len(made), "dense ones had to be read again"


def test_sparsity_is_in_the_registry_and_the_report(tmp_path: Path) -> None:
    from adapters.inspection.audit import audit
    from tests.stand.coverage_adapters import prune

    folder = lora_folder(tmp_path / "a")
    prune(folder / "adapter_model.safetensors")
    assert load_adapter(folder, small_base()).sparsity == pytest.approx(0.5, abs=0.01)
    report = audit(folder, small_base())
    assert report.tensors is not None
    assert report.tensors.sparsity == pytest.approx(0.5, abs=0.01)
