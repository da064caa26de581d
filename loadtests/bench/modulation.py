"""The price of adapters: one forward of a mixed batch against the bare base, PEFT, merged models.

Random weights and factors, seeded; NF4 base, HiRA of rank 32, in bfloat16 or float32. Before
anything is timed, the answers of the mixed batch are compared with PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn

from adapters.layers.adapted import AdaptedLinear
from adapters.layers.inject import AdaptedModel, inject
from adapters.modulation.autotune import Autotuner
from adapters.modulation.folded import FoldedCache
from adapters.modulation.slot_factors import SlotFactors
from adapters.segments import from_rows
from adapters.signature import BaseSignature
from loadtests.bench import peers
from loadtests.bench.timing import Budget, DTypeName, Figure, Report, Samples, alternate

RANK = 32
_HOST = torch.device("cpu")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
_CONTEXT = 64  # tokens in the cache of a decoding step
_MERGED_COPIES = 8  # held at most, used in turn: together far larger than any cache
_FOLDED_BYTES = 256 << 20
_WARM_FORWARDS = 60  # that is when folded weights are made
# Relative distance from PEFT's answers that is due to rounding through the whole model.
_AGREEMENT: Mapping[torch.dtype, float] = {torch.bfloat16: 0.1, torch.float32: 1e-3}

Shape = Literal["distilbert", "llama"]
TARGETS: Mapping[Shape, tuple[str, ...]] = {
    "distilbert": ("q_lin", "v_lin"),
    "llama": LLAMA_TARGETS,
}
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A batch and the figures to reach with it."""

    name: str
    shape: Shape
    rows: int
    tokens: int
    adapters: int
    goals: Mapping[DTypeName, tuple[float, float]]  # throughput against the bare base, PEFT's

    def owner(self, row: int) -> int:
        """The adapter of a row; rows of one adapter are together."""
        return row * self.adapters // self.rows

    def rows_of(self, adapter: int) -> slice:
        each = self.rows // self.adapters
        return slice(adapter * each, (adapter + 1) * each)


def _goals(
    bf16_base: float, bf16_peft: float, fp32_base: float, fp32_peft: float
) -> Mapping[DTypeName, tuple[float, float]]:
    return {"bf16": (bf16_base, bf16_peft), "fp32": (fp32_base, fp32_peft)}


CASES = (
    Case("DistilBERT 16 x 128, 8 adapters", "distilbert", 16, 128, 8, _goals(1.05, 1.9, 1.0, 1.8)),
    Case("DistilBERT 64 x 16, 32 adapters", "distilbert", 64, 16, 32, _goals(0.95, 5.0, 0.9, 5.0)),
    Case("DistilBERT 1 x 16", "distilbert", 1, 16, 1, _goals(1 / 1.1, 2.5, 1.1, 2.5)),
    Case("Llama decoding, 16 adapters", "llama", 16, 1, 16, _goals(0.5, 12.0, 0.6, 12.0)),
    Case("Llama prompt of 400", "llama", 1, 400, 1, _goals(0.95, 1.0, 0.95, 1.0)),
)


def bench(report: Report) -> None:
    """Run all cases."""
    report.section(f"Modulation: NF4, {report.dtype}, HiRA r = {RANK}, {report.threads} threads")
    torch.set_num_threads(report.threads)
    budget = Budget(0.0, 1, 1) if report.quick else Budget(12.0, 7, 60)
    for shape, cases in groupby(CASES, key=lambda case: case.shape):
        _measure(shape, list(cases), budget, report)


def llama_config(vocabulary: int = 6144) -> Any:
    """A Llama of width 512 with 8 layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,  # layers that change what passes through them
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,  # answers have the length that was asked for
    )


def dense_model(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Seeded random weights."""
    from transformers import DistilBertConfig, DistilBertModel, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any
    if shape == "distilbert":
        model = DistilBertModel(DistilBertConfig(vocab_size=1024))  # the table is only looked up
    else:
        model = LlamaForCausalLM(llama_config())
    model.requires_grad_(False)
    evaluated: nn.Module = model.to(dtype).eval()
    return evaluated


def random_factors(
    signature: BaseSignature,
    targets: tuple[str, ...],
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    rank: int = RANK,
    device: torch.device = _HOST,
) -> dict[str, SlotFactors]:
    """HiRA factors whose modulation has elements of about a third, made on ``device``."""
    generator = torch.Generator(device).manual_seed(seed)
    factors: dict[str, SlotFactors] = {}
    for path, layer in signature.layers.items():
        if path.rsplit(".", 1)[-1] in targets:
            shape_a, shape_b = layer.factor_shapes(rank, "hira")
            a = torch.randn(shape_a, generator=generator, device=device)
            b = torch.randn(shape_b, generator=generator, device=device) * (0.3 / rank**0.5)
            factors[path] = SlotFactors("hira", a.to(dtype), b.to(dtype))
    return factors


def _measure(shape: Shape, cases: list[Case], budget: Budget, report: Report) -> None:
    dtype = report.torch_dtype
    dense = dense_model(shape, dtype)
    adapted = inject(peers.quantized(dense))
    adapted.modulator.tuner = Autotuner()
    _tell_memory(shape, adapted, report)
    most = max(case.adapters for case in cases)
    factors = [
        random_factors(adapted.signature, TARGETS[shape], seed, dtype) for seed in range(most)
    ]
    for number, one in enumerate(factors):
        adapted.install(number + 1, one)
    bases = peers.layouts(dense)
    copies = peers.merged(dense, factors[: 2 if report.quick else _MERGED_COPIES])
    for case in cases:
        # With the adapters of the case only: PEFT grows slower with those that it holds.
        wrapped = peers.peft_model(dense, factors[: case.adapters], TARGETS[shape])
        # As in a server with its default settings.
        adapted.modulator.folded = FoldedCache(_FOLDED_BYTES, adapted.device)
        with torch.inference_mode():
            sides = _sides(case, adapted, {**bases, "dense": dense}, wrapped, copies)
            difference = _difference(sides["mixed"](), sides["peft"]())
            if difference > _AGREEMENT[dtype]:
                raise SystemExit(f"{case.name}: answers differ from PEFT's by {difference:.2g}")
            for _ in range(0 if report.quick else _WARM_FORWARDS):
                sides["mixed"]()
            samples = alternate(sides, budget, report.clock)
        _tell(case, samples, difference, report)
        _tell_folded(case, adapted, report)


def _tell_memory(shape: Shape, adapted: AdaptedModel, report: Report) -> None:
    linear, _ = adapted.base_bytes()
    weights = sum(
        layer.in_features * layer.out_features
        for layer in adapted.layers.values()
        if isinstance(layer, AdaptedLinear) and not layer.is_output
    )
    report.add(
        Figure("modulation", f"{shape} base", "bytes a linear weight", linear / weights,
               unit="bytes", at_most=0.57)
    )  # fmt: skip


def _tell_folded(case: Case, adapted: AdaptedModel, report: Report) -> None:
    folded = adapted.modulator.folded
    report.add(
        Figure("modulation", case.name, "folded weights kept", folded.nbytes, unit="bytes",
               at_most=folded.budget_bytes, note=f"{len(folded)} of them")
    )  # fmt: skip


def _sides(
    case: Case,
    adapted: AdaptedModel,
    bases: Mapping[str, nn.Module],
    wrapped: Any,
    copies: Sequence[nn.Module],
) -> dict[str, Run]:
    rows = from_rows(case.owner(row) + 1 for row in range(case.rows))

    def batch(tokens: int) -> Any:
        return adapted.batch(rows.repeat(tokens), rows)

    of_llama = _decoding if case.tokens == 1 else _reading
    make = _encoding if case.shape == "distilbert" else of_llama
    everything = slice(0, case.rows)
    sides: dict[str, Run] = {"mixed": make(case, adapted.model, everything, batch)}
    for layout, model in bases.items():
        name = layout if layout == "dense" else f"bitsandbytes {layout}"
        sides[name] = make(case, model, everything, None)
    sides["peft"] = _one_by_one(case, lambda _: wrapped, make, wrapped.set_adapter)
    sides["merged"] = _one_by_one(case, lambda n: copies[n % len(copies)], make, None)
    return sides


def _tell(case: Case, samples: Samples, difference: float, report: Report) -> None:
    bases = [name for name in samples.seconds if name.startswith("bitsandbytes")]
    base = min(bases, key=samples.median)
    base_at_least, peft_at_least = case.goals[report.dtype]
    tokens = case.rows * case.tokens
    note = f"{samples.median('mixed') * 1e3:.2f} ms a forward, off PEFT's by {difference:.1g}"

    def add(what: str, value: Any, **more: Any) -> None:
        report.add(Figure("modulation", case.name, what, value, **more))

    add("tokens/s", tokens / samples.median("mixed"), unit="tokens/s", note=note)
    own = f"{samples.median(base) * 1e3:.2f} ms"
    if case.rows == 1:
        latency = samples.latency("mixed", base)
        add(f"latency of {base}", latency, at_most=1 / base_at_least, note=own)
    else:
        speed = samples.speed("mixed", base)
        add(f"speed of {base}", speed, at_least=base_at_least, note=own)
    for name, goal in (("peft", peft_at_least), ("merged", None), ("dense", None)):
        own = f"{samples.median(name) * 1e3:.2f} ms"
        add(f"speed of {name}", samples.speed("mixed", name), at_least=goal, note=own)


def _encoding(case: Case, model: Any, rows: slice, batch: Any) -> Run:
    ids = _ids(case.rows, case.tokens)[rows]

    def run() -> torch.Tensor:
        if batch is None:
            return model(ids)[0]  # type: ignore[no-any-return]
        with batch(case.tokens):
            return model(ids)[0]  # type: ignore[no-any-return]

    return run


def _reading(case: Case, model: Any, rows: slice, batch: Any) -> Run:
    """A prompt of every sequence, and the scores of what may follow it."""
    from contextlib import nullcontext

    ids = _ids(case.rows, case.tokens)[rows]

    def run() -> torch.Tensor:
        with nullcontext() if batch is None else batch(case.tokens):
            logits: torch.Tensor = model(ids, use_cache=True, logits_to_keep=1).logits
        return logits

    return run


def _decoding(case: Case, model: Any, rows: slice, batch: Any) -> Run:
    """One step of every sequence over a cache of 64 tokens, which is as before afterwards."""
    from contextlib import nullcontext

    from transformers import DynamicCache

    context = _ids(case.rows, _CONTEXT)[rows]
    ids = _ids(case.rows, 1)[rows]
    cache = DynamicCache()
    with nullcontext() if batch is None else batch(_CONTEXT):
        model(context, past_key_values=cache, use_cache=True)

    def run() -> torch.Tensor:
        with nullcontext() if batch is None else batch(1):
            logits: torch.Tensor = model(ids, past_key_values=cache, use_cache=True).logits
        cache.crop(_CONTEXT - cache.get_seq_length())  # negative: so many are removed
        assert cache.get_seq_length() == _CONTEXT
        return logits

    return run


def _one_by_one(case: Case, model_of: Callable[[int], Any], make: Any, select: Any) -> Run:
    """The sub-batch of each adapter after the other."""
    runs = []
    for number in range(case.adapters):
        if select is not None:
            select(str(number), inference_mode=True)
        runs.append(make(case, model_of(number), case.rows_of(number), None))

    def run() -> torch.Tensor:
        parts = []
        for number, one in enumerate(runs):
            if select is not None:
                select(str(number), inference_mode=True)
            parts.append(one())
        return torch.cat(parts)

    return run


def _ids(rows: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + tokens)
    return torch.randint(3, 1024, (rows, tokens), generator=generator)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    distance = (found.float() - expected.float()).norm() / expected.float().norm()
    return float(distance)
