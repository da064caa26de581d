"""Whole steps of the engine on random Llama shapes, decoding and prompts, and stock peers.

All kinds of decode steps are measured in one run, against transformers' ``generate`` on the
bitsandbytes base without any adapter and PEFT with one adapter, a request at a time.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters.registry.store import Store
from adapters.signature import describe
from loadtests.bench.generation import save_base
from loadtests.bench.gpu_http import measure_http
from loadtests.bench.gpu_swaps import measure_swaps
from loadtests.bench.modulation import LLAMA_TARGETS, random_factors
from loadtests.bench.part_clock import PartClock
from loadtests.bench.peers import nf4_options, prepare_for_peft, quantize
from loadtests.bench.runs import run_to_end
from loadtests.bench.timing import Figure, Report
from server.engine.engine import Engine
from server.messages import GenerateRequest, SamplingOptions
from server.options import DecodeSteps, EngineOptions

RANK_OF_ADAPTERS = 32
# The most telling first: what does not fit into the time is left out from the end.
STEPS: tuple[DecodeSteps, ...] = ("dynamic", "ahead", "static")
_MORE_ADAPTERS = 4  # than slots: so many are elsewhere while adapters are swapped
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama of random numbers."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    tied: bool
    max_sequences: int = 64
    kv_bytes: int = 4 << 30


SHAPES = (
    Shape("1.2 B", 2048, 8192, 16, 32, 8, tied=True),
    Shape("8 B", 4096, 14336, 32, 32, 8, tied=False),
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A base in a folder, in bitsandbytes' NF4, and its adapters in a store."""

    root: Path
    base: Path
    folders: tuple[Path, ...]
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much of everything.

    Args:
        adapters: And sequences of a usual step.
        new_tokens: Of each sequence.
        vocabulary: Of the base.
        prompt_tokens: Of prompts that are read.
        swaps: Adapters loaded while others decode.
        clients: Of the server.
    """

    adapters: int = 16
    new_tokens: int = 32
    vocabulary: int = 128_256
    prompt_tokens: int = 512
    swaps: int = 1000
    clients: tuple[int, ...] = (1, 16, 64)


def random_llama(shape: Shape, device: torch.device, vocabulary: int) -> Any:
    """transformers' model of this shape in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


@contextmanager
def stored(model: Any, shape: Shape, device: torch.device, adapters: int) -> Iterator[Stored]:
    """Quantize a model in place and write it, and so many adapters, to a folder that is gone
    afterwards; so a large base is never written whole, nor quantized twice."""
    signature = describe(model, "base")
    quantize(model, device)
    options = nf4_options()
    options.llm_int8_skip_modules = ["lm_head"]
    with tempfile.TemporaryDirectory(prefix="hira-gpu-") as name:
        root = Path(name)
        base = root / "base"
        save_base(model, base, weights=False)
        described = json.loads((base / "config.json").read_text(encoding="utf-8"))
        described["quantization_config"] = options.to_dict()
        described["dtype"] = "bfloat16"
        (base / "config.json").write_text(json.dumps(described), encoding="utf-8")
        tensors = {key: one.contiguous() for key, one in model.state_dict().items()}
        if shape.tied:
            tensors.pop("lm_head.weight")
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        del tensors
        folders = tuple(_adapter(root / f"a{n}", signature, n) for n in range(adapters))
        store = Store(root / "store")
        yield Stored(root, base, folders, tuple(store.add(one) for one in folders))


def _adapter(folder: Path, signature: Any, seed: int) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for path, entry in random_factors(signature, LLAMA_TARGETS, seed).items():
        tensors[f"base_model.model.{path}.hira_A"] = entry.a
        tensors[f"base_model.model.{path}.hira_B"] = entry.b
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    described = {
        "peft_type": "HIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": RANK_OF_ADAPTERS,
        "target_modules": list(LLAMA_TARGETS),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


@contextmanager
def engine_on(
    made: Stored, shape: Shape, device: torch.device, steps: DecodeSteps, slots: int
) -> Iterator[Engine]:
    """The engine on what is stored."""
    engine = Engine.build(
        EngineOptions(
            base=str(made.base),
            store_dir=made.root / "store",
            cache_dir=made.root / f"cache-{steps}",
            dtype="bf16",
            device="cuda" if device.type == "cuda" else "cpu",
            decode_steps=steps,
            kv_bytes=shape.kv_bytes,
            device_bytes=8 << 30 if device.type == "cuda" else 1 << 30,
            max_sequences=shape.max_sequences,
            slots=slots,
        )
    )
    try:
        yield engine
    finally:
        engine.close()


def seconds_of(
    engine: Engine, versions: Sequence[str | None], new_tokens: int, prompt_tokens: int = 32
) -> float:
    """One request for each of ``versions``, all at once, to the end of the last.

    Raises:
        SystemExit: A request failed.
    """
    vocabulary = engine.base.adapted.signature.vocab_size
    requests = [
        GenerateRequest(
            id=f"gpu-{next(_numbers)}",
            adapter=version,
            version=version,
            token_ids=tuple((i * 37 + j * 11) % (vocabulary - 5) + 5 for j in range(prompt_tokens)),
            sampling=SamplingOptions(max_new_tokens=new_tokens, ignore_eos=True),
            submitted=time.monotonic(),
        )
        for i, version in enumerate(versions)
    ]
    began = time.perf_counter()
    run_to_end(engine, requests)
    return time.perf_counter() - began


def measure_engine(
    report: Report,
    shape: Shape,
    device: torch.device,
    amounts: Amounts,
    *,
    clock: PartClock,
    kinds: Sequence[DecodeSteps] = STEPS,
) -> None:
    """Peers, all kinds of steps and prompts of one shape; with ``ahead`` swaps and the server, too.

    Args:
        report: Gets the figures.
        shape: Of the base.
        device: Where all of it runs.
        amounts: How much.
        clock: What does not fit is left out.
        kinds: Of decode steps.
    """
    model = random_llama(shape, device, amounts.vocabulary)
    peers: dict[str, float] = {}
    for rows in dict.fromkeys((amounts.adapters, 1)):
        if clock.has_time(f"{shape.name}: dense model, batch of {rows}"):
            name = f"{shape.name}, {rows} sequences, bare base"
            _add_generate(
                report, name, "generate on dense bf16", model,
                rows=rows, new_tokens=amounts.new_tokens,
            )  # fmt: skip
    more = _MORE_ADAPTERS if amounts.swaps else 0
    with stored(model, shape, device, amounts.adapters + more) as made:
        # What is written is not what bitsandbytes makes of it in its forward on a processor.
        prepare_for_peft(model)
        for rows in dict.fromkeys((amounts.adapters, 1, shape.max_sequences)):
            if clock.has_time(f"{shape.name}: bitsandbytes, batch of {rows}"):
                name = f"{shape.name}, {rows} sequences, bare base"
                peers[str(rows)] = _add_generate(
                    report,
                    name,
                    "generate on bitsandbytes",
                    model,
                    rows=rows,
                    new_tokens=amounts.new_tokens,
                )
        if clock.has_time(f"{shape.name}: PEFT"):
            _peft(report, shape, made, model, amounts.new_tokens)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for steps in kinds:
            if not clock.has_time(f"{shape.name}: {steps} steps"):
                continue
            slots = amounts.adapters
            with engine_on(made, shape, device, steps, slots) as engine:
                _steps(
                    report, shape, engine, made,
                    amounts=amounts, clock=clock, steps=steps, peers=peers,
                )  # fmt: skip
                if steps == "ahead" and amounts.swaps and clock.has_time(f"{shape.name}: swaps"):
                    measure_swaps(
                        report, shape.name, engine, made.versions, swaps=amounts.swaps, clock=clock
                    )
            if steps == "ahead" and amounts.clients and clock.has_time(f"{shape.name}: HTTP"):
                measure_http(
                    report, shape.name, made.base, made.folders[: amounts.adapters],
                    device=device, steps=steps, new_tokens=amounts.new_tokens,
                    clients=amounts.clients, kv_bytes=shape.kv_bytes, clock=clock,
                )  # fmt: skip


def _steps(
    report: Report,
    shape: Shape,
    engine: Engine,
    made: Stored,
    *,
    amounts: Amounts,
    clock: PartClock,
    steps: DecodeSteps,
    peers: dict[str, float],
) -> None:
    adapters, new_tokens = amounts.adapters, amounts.new_tokens
    own = made.versions[:adapters]
    usual = f"{adapters} sequences, {adapters} adapters"
    cases: dict[str, Sequence[str | None]] = {
        usual: own,
        f"{shape.max_sequences} sequences, {adapters} adapters": [
            own[i % adapters] for i in range(shape.max_sequences)
        ],
        "1 sequence, 1 adapter": own[:1],
        f"{adapters} sequences, bare base": [None] * adapters,
    }
    for case, versions in cases.items():
        if not clock.has_time(f"{shape.name}, {case}, {steps} steps"):
            continue
        seconds_of(engine, versions, 2)
        seconds = min(seconds_of(engine, versions, new_tokens) for _ in range(2))
        named = f"{shape.name}, {case}"
        note = f"{len(versions) * new_tokens / seconds:.0f} tokens/s"
        step_ms = seconds / new_tokens * 1e3
        report.add(Figure("gpu", named, f"{steps} steps", step_ms, unit="ms", note=note))
        if case == usual and str(adapters) in peers:
            against = f"{steps} steps against generate on bitsandbytes"
            report.add(Figure("gpu", named, against, peers[str(adapters)] / seconds))
        if case == usual and engine.base.device.type == "cuda":
            busy = _busy_s(engine, versions, new_tokens) / seconds
            report.add(Figure("gpu", named, f"card busy, {steps} steps", busy, unit="of the time"))
    many = own[:8]
    if clock.has_time(f"{shape.name}, prompts, {steps} steps"):
        seconds_of(engine, many, 1, amounts.prompt_tokens)
        seconds = seconds_of(engine, many, 1, amounts.prompt_tokens)
        named = f"{shape.name}, prompts of {amounts.prompt_tokens}, {len(many)} adapters"
        rate = len(many) * amounts.prompt_tokens / seconds
        report.add(Figure("gpu", named, f"{steps} steps", rate, unit="tokens/s"))


def _busy_s(engine: Engine, versions: Sequence[str | None], new_tokens: int) -> float:
    """Seconds that kernels ran in one run of all of these, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        seconds_of(engine, versions, new_tokens)
        torch.cuda.synchronize()
    return float(sum(one.self_device_time_total for one in seen.events())) / 1e6


def _add_generate(
    report: Report, case: str, what: str, model: Any, *, rows: int, new_tokens: int
) -> float:
    """Report and return the seconds of transformers' ``generate`` for so many sequences."""
    _generate_s(model, rows, 2)
    seconds = min(_generate_s(model, rows, new_tokens) for _ in range(2))
    note = f"{rows * new_tokens / seconds:.0f} tokens/s"
    report.add(Figure("gpu", case, what, seconds / new_tokens * 1e3, unit="ms", note=note))
    return seconds


def _generate_s(model: Any, rows: int, new_tokens: int) -> float:
    ids = torch.full((rows, 32), 7, device=model.device)
    began = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        found.cpu()
    return time.perf_counter() - began


def _peft(report: Report, shape: Shape, made: Stored, base: Any, new_tokens: int) -> None:
    """One adapter under PEFT, one request at a time; wraps ``base``, which is not used again."""
    from peft import PeftModel

    wrapped: Any = PeftModel.from_pretrained(
        base, made.folders[0], adapter_name="0", autocast_adapter_dtype=False
    ).eval()
    _generate_s(wrapped, 1, 2)
    alone = _generate_s(wrapped, 1, new_tokens)
    report.add(
        Figure("gpu", f"{shape.name}, 1 request", "PEFT", new_tokens / alone, unit="tokens/s")
    )
