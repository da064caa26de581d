"""Whole static decode steps over the GPU kernels, as the interpreter runs them."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapters.layers.inject import inject
from adapters.modulation import fused_steps
from adapters.modulation.strategy import Strategy
from adapters.signature import Method
from server.base import captured_steps
from server.base.probe_adapters import probe_factors
from server.generation import forward
from server.generation.lane import GenerateLane
from server.options import DecodeSteps
from tests.stand import dense
from tests.stand.dense import Stage, terminals
from tests.stand.interpreted import Kernels, interpreted
from tests.stand.tiny_models import quantize

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
# Of a log-probability: what rounding to float16 may cost in kernels and in torch's operators.
LOGPROB_TOLERANCE = 3e-2
ADAPTERS: tuple[tuple[str, Method, int], ...] = (("a", "hira", 5), ("b", "lora", 4))


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    with interpreted() as found:
        yield found


@pytest.fixture(autouse=True)
def _small_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one low rank, and by the fused kernel: the interpreter takes long for more."""
    for module in (captured_steps, forward):
        monkeypatch.setattr(module, "LAUNCH_CLASSES", ((0, False), (16, True)))
    monkeypatch.setattr(fused_steps, "proved_forms", lambda *_: frozenset())


def staged(model: Any, steps: DecodeSteps, strategy: Strategy) -> Stage:
    stage = Stage()
    adapted = inject(copy.deepcopy(model), name="test", strategy=strategy)
    residency: Any = stage.residency
    made = dense.options(decode_steps=steps, slots=3, max_sequences=4, kv_bytes=1 << 18)
    stage.lane = GenerateLane(adapted, stage.tokenizer, residency, made)
    for slot, (version, method, rank) in enumerate(ADAPTERS, start=1):
        factors = probe_factors(
            adapted, slot, method, rank, dtype=torch.float16, serves=lambda path: ".mlp." in path
        )
        adapted.install(slot, factors)
        stage.residency.prefetch(version)
    return stage


def answers(stage: Stage) -> dict[str, Any]:
    for version in ("a", "b", None):
        more: dict[str, Any] = {"do_sample": True, "seed": 3} if version == "b" else {}
        stage.submit(
            version, [5, 6, 7, 8], ignore_eos=True, max_new_tokens=3, logprobs=True,
            id=f"of {version}", **more,
        )  # fmt: skip
    return {one.id: one for one in terminals(stage.drain())}


def test_tokens_are_those_of_torchs_operators(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dense.base("llama", hidden_size=64, num_hidden_layers=1, head_dim=16).half()
    # The interpreter takes long: these layers are on the kernels, the others on torch's operators.
    mlp = model.model.layers[0].mlp
    mlp.get_output_embeddings = lambda: None
    quantize(mlp, "nf4")
    del mlp.get_output_embeddings
    ran: list[tuple[str, int]] = []

    def count(name: str) -> None:
        plain = getattr(kernels.tiles, name)

        def counted(x: torch.Tensor, *given: Any, **more: Any) -> Any:
            ran.append((name, x.shape[0]))
            return plain(x, *given, **more)

        monkeypatch.setattr(kernels.tiles, name, counted)

    count("few_rows_linear")
    count("add_lora_rows")
    wanted = answers(staged(model, "dynamic", "auto"))
    assert not ran
    stage = staged(model, "static", "fused")
    ran.clear()  # of forms that were tried
    found = answers(stage)
    assert dict(stage.lane.figures().steps_by) == {"prefill": 1, "static": 2}
    # Three layers over all rows of the bucket, in each of two steps.
    for name in ("few_rows_linear", "add_lora_rows"):
        assert ran.count((name, 4)) == 3 * 2
    for name, one in wanted.items():
        assert [t.id for t in found[name].tokens] == [t.id for t in one.tokens]
        for mine, theirs in zip(found[name].tokens, one.tokens, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=LOGPROB_TOLERANCE)
