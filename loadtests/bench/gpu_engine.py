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
from loadtests.bench.modulation import LLAMA_TARGETS, random_factors
from loadtests.bench.peers import nf4_options
from loadtests.bench.runs import run_to_end
from loadtests.bench.timing import Figure, Report
from server.engine.engine import Engine
from server.messages import GenerateRequest, SamplingOptions
from server.options import DecodeSteps, EngineOptions

RANK_OF_ADAPTERS = 32
STEPS: tuple[DecodeSteps, ...] = ("dynamic", "static", "ahead")
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
    """A base in a folder, and its adapters in a store."""

    root: Path
    base: Path
    folders: tuple[Path, ...]
    versions: tuple[str, ...]


@contextmanager
def stored(shape: Shape, adapters: int, device: torch.device, vocabulary: int) -> Iterator[Stored]:
    """Write a base of this shape and so many adapters to a folder that is gone afterwards."""
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
    with tempfile.TemporaryDirectory(prefix="hira-gpu-") as name:
        root = Path(name)
        save_base(model, root / "base")
        signature = describe(model, "base")
        del model
        folders = tuple(_adapter(root / f"a{n}", signature, n) for n in range(adapters))
        store = Store(root / "store")
        yield Stored(root, root / "base", folders, tuple(store.add(one) for one in folders))


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
    made: Stored, shape: Shape, device: torch.device, steps: DecodeSteps
) -> Iterator[Engine]:
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
            slots=32,
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


def measure(
    report: Report,
    shape: Shape,
    device: torch.device,
    *,
    adapters: int = 16,
    new_tokens: int = 32,
    vocabulary: int = 128_256,
    prompt_tokens: int = 512,
) -> None:
    """All kinds of steps, prompts and peers, of one shape."""
    with stored(shape, adapters, device, vocabulary) as made:
        peers = _peers(report, shape, made, device=device, new_tokens=new_tokens, batch=adapters)
        for steps in STEPS:
            with engine_on(made, shape, device, steps) as engine:
                cases: dict[str, Sequence[str | None]] = {
                    f"{adapters} sequences, {adapters} adapters": made.versions,
                    f"{shape.max_sequences} sequences, {adapters} adapters": [
                        made.versions[i % adapters] for i in range(shape.max_sequences)
                    ],
                    "1 sequence, 1 adapter": made.versions[:1],
                    f"{adapters} sequences, bare base": [None] * adapters,
                }
                for case, versions in cases.items():
                    seconds_of(engine, versions, 2)
                    seconds = min(seconds_of(engine, versions, new_tokens) for _ in range(2))
                    report.add(
                        Figure(
                            "gpu",
                            f"{shape.name}, {case}",
                            f"{steps} steps",
                            seconds / new_tokens * 1e3,
                            unit="ms",
                            note=f"{len(versions) * new_tokens / seconds:.0f} tokens/s",
                        )
                    )
                    if case.startswith(f"{adapters} sequences, {adapters}"):
                        report.add(
                            Figure(
                                "gpu",
                                f"{shape.name}, {case}",
                                f"{steps} steps against generate on bitsandbytes",
                                peers / seconds,
                            )
                        )
                many = made.versions[:8]
                seconds_of(engine, many, 1, prompt_tokens)
                seconds = seconds_of(engine, many, 1, prompt_tokens)
                report.add(
                    Figure(
                        "gpu",
                        f"{shape.name}, prompts of {prompt_tokens}, {len(many)} adapters",
                        f"{steps} steps",
                        len(many) * prompt_tokens / seconds,
                        unit="tokens/s",
                    )
                )


def _peers(
    report: Report, shape: Shape, made: Stored, *, device: torch.device, new_tokens: int, batch: int
) -> float:
    """Seconds of ``generate`` on the bitsandbytes base for ``batch`` sequences without adapters."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(
        made.base,
        dtype=torch.bfloat16,
        quantization_config=nf4_options(),
        device_map={"": device},
    ).eval()

    def generate(model: Any, rows: int, new: int) -> float:
        ids = torch.full((rows, 32), 7, device=device)
        began = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )
            found.cpu()
        return time.perf_counter() - began

    times: dict[int, float] = {}
    for rows in dict.fromkeys((batch, 1, shape.max_sequences)):
        generate(base, rows, 2)
        times[rows] = min(generate(base, rows, new_tokens) for _ in range(2))
        case = f"{shape.name}, {rows} sequences, bare base"
        step_ms = times[rows] / new_tokens * 1e3
        report.add(Figure("gpu", case, "generate on bitsandbytes", step_ms, unit="ms"))
    wrapped: Any = PeftModel.from_pretrained(
        base, made.folders[0], adapter_name="0", autocast_adapter_dtype=False
    ).eval()
    generate(wrapped, 1, 2)
    alone = generate(wrapped, 1, new_tokens)
    report.add(
        Figure("gpu", f"{shape.name}, 1 request", "PEFT", new_tokens / alone, unit="tokens/s")
    )
    return times[batch]
