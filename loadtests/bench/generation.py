"""The engine without HTTP: 16 requests on 16 adapters decoding together, and PEFT one by one.

The base is saved to a folder and loaded from it as a server would; PEFT loads the same base with
transformers and the same adapter folders, and calls ``generate`` for one request at a time. It is
timed on some of the requests: its time for all of them is their number times its mean. How many
leading tokens agree is shown only to be seen: on random weights roundings part near ties early.
"""

from __future__ import annotations

import itertools
import json
import statistics
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
from loadtests.bench.modulation import (
    LLAMA_TARGETS,
    RANK,
    dense_model,
    llama_config,
    random_factors,
)
from loadtests.bench.peers import factors_in, nf4_options, prepare_for_peft
from loadtests.bench.runs import run_to_end
from loadtests.bench.timing import THREADS, Budget, DTypeName, Figure, Report, ratio_of
from server.engine.engine import Engine
from server.messages import (
    GenerateRequest,
    GenerateResult,
    SamplingOptions,
)
from server.options import EngineOptions

ADAPTERS = 16
NEW_TOKENS = 64
LABELS = ("NEGATIVE", "POSITIVE")
PROMPTS = tuple(
    f"{opening} {subject}"
    for opening, subject in itertools.product(
        ("In the morning", "The company said that", "My lord, I have", "Not long ago"),
        ("the king", "a small town", "every player", "nothing at all"),
    )
)
_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Made:
    """A base in a folder, adapters that generate and adapters that classify."""

    base: Path
    generators: tuple[Path, ...]
    classifiers: tuple[Path, ...]


def bench(report: Report) -> None:
    """Engine against PEFT."""
    report.section(f"Generation: Llama shape, {ADAPTERS} adapters, {NEW_TOKENS} new tokens, greedy")
    torch.set_num_threads(THREADS)
    budget = Budget(0.0, 1, 1) if report.quick else Budget(40.0, 4, 8)
    with made() as folders, built(folders, report.dtype) as alone:
        wrapped, tokenizer = _peft(folders, report.torch_dtype)
        numbers = itertools.cycle(range(ADAPTERS))
        texts = generate_all(alone)
        if not report.quick:
            _peft_request(wrapped, tokenizer, next(numbers))
        ours, theirs, ratios, same = [], [], [], []
        for _ in budget.rounds():
            began = time.perf_counter()
            texts = generate_all(alone)
            ours.append(time.perf_counter() - began)
            number = next(numbers)
            began = time.perf_counter()
            ids = _peft_request(wrapped, tokenizer, number)
            theirs.append(time.perf_counter() - began)
            ratios.append(theirs[-1] * ADAPTERS / ours[-1])
            same.append(_common(texts[number], ids))
    tokens = ADAPTERS * NEW_TOKENS
    case = f"{ADAPTERS} requests, {ADAPTERS} adapters"

    def add(what: str, value: Any, **more: Any) -> None:
        report.add(Figure("generation", case, what, value, **more))

    add("engine", tokens / statistics.median(ours), unit="tokens/s")
    add(
        "PEFT, mean of a request",
        statistics.mean(theirs),
        unit="s",
        note=f"{len(theirs)} requests, {NEW_TOKENS / statistics.mean(theirs):.1f} tokens/s; "
        f"{statistics.mean(same):.0f} of {NEW_TOKENS} leading tokens as the engine's",
    )
    add(
        "engine against PEFT",
        ratio_of(ratios, min(theirs) * ADAPTERS / min(ours)),
        at_least=12.0,
    )


@dataclass(frozen=True, slots=True)
class Alone:
    """An engine without HTTP and the versions of the adapters in its store."""

    engine: Engine
    generators: tuple[str, ...]
    classifiers: tuple[str, ...]


@contextmanager
def made() -> Iterator[Made]:
    """Write the base and its adapters to a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="hira-bench-") as name:
        root = Path(name)
        base = root / "llama-512x8"
        model: Any = dense_model("llama")
        save_base(model, base)
        from adapters.signature import describe

        signature = describe(model, base.name)
        generators = tuple(
            _save_adapter(root / f"gen-{n}", signature, seed=n) for n in range(ADAPTERS)
        )
        classifiers = tuple(
            _save_adapter(root / f"cls-{n}", signature, seed=100 + n, labels=LABELS)
            for n in range(ADAPTERS)
        )
        yield Made(base, generators, classifiers)


@contextmanager
def built(folders: Made, dtype: DTypeName, *, deterministic: bool = False) -> Iterator[Alone]:
    """An engine on the base, with all adapters in its store."""
    with tempfile.TemporaryDirectory(prefix="hira-bench-store-") as name:
        root = Path(name)
        store = Store(root / "store")
        generators, classifiers = (
            tuple(store.add(folder) for folder in some)
            for some in (folders.generators, folders.classifiers)
        )
        engine = Engine.build(
            EngineOptions(
                base=str(folders.base),
                store_dir=root / "store",
                cache_dir=root / "cache",
                dtype=dtype,
                device="cpu",
                threads=THREADS,
                deterministic=deterministic,
            )
        )
        try:
            yield Alone(engine, generators, classifiers)
        finally:
            engine.close()


def generate_all(alone: Alone) -> list[list[int]]:
    """One streamed request on each adapter, all at once; the tokens of each."""
    engine = alone.engine
    requests = [
        GenerateRequest(
            id=f"bench-{next(_ids)}",
            adapter=version,
            version=version,
            token_ids=engine.text.tokenize_prompt(prompt, max_new_tokens=NEW_TOKENS),
            sampling=SamplingOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True),
            stream=True,
            submitted=time.monotonic(),
        )
        for version, prompt in zip(alone.generators, PROMPTS, strict=True)
    ]
    ended = run_to_end(engine, requests)
    tokens: list[list[int]] = []
    for request in requests:
        event = ended[request.id]
        assert isinstance(event, GenerateResult)
        tokens.append([token.id for token in event.tokens])
        assert len(tokens[-1]) == NEW_TOKENS
    return tokens


def _peft(folders: Made, dtype: torch.dtype) -> tuple[Any, Any]:
    """The same base and adapters in PEFT; adapter n is named "n"."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base: Any = AutoModelForCausalLM.from_pretrained(
        folders.base,
        dtype=dtype,
        quantization_config=nf4_options(dtype),
        device_map={"": "cpu"},
    )
    prepare_for_peft(base)
    wrapped: Any = PeftModel.from_pretrained(
        base, folders.generators[0], adapter_name="0", autocast_adapter_dtype=False
    )
    for number, folder in enumerate(folders.generators[1:], start=1):
        wrapped.load_adapter(folder, adapter_name=str(number), autocast_adapter_dtype=False)
    factors_in(wrapped, dtype)
    return wrapped.eval(), AutoTokenizer.from_pretrained(folders.base)


def _peft_request(wrapped: Any, tokenizer: Any, number: int) -> list[int]:
    with torch.inference_mode():
        wrapped.set_adapter(str(number), inference_mode=True)
        ids = tokenizer(PROMPTS[number], return_tensors="pt")
        found = wrapped.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    new: list[int] = found[0, ids["input_ids"].shape[1] :].tolist()
    assert len(new) == NEW_TOKENS
    return new


def save_base(model: Any, folder: Path, *, weights: bool = True) -> None:
    """Write a base with the demo's tokenizer; without ``weights``, all but these."""
    from transformers import AutoTokenizer, GenerationConfig

    from server.demo import BASE_DIR

    tokenizer: Any = AutoTokenizer.from_pretrained(BASE_DIR)
    tokenizer.eos_token = None
    assert len(tokenizer) == llama_config().vocab_size
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    if weights:
        model.save_pretrained(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_adapter(folder: Path, signature: Any, *, seed: int, labels: tuple[str, ...] = ()) -> Path:
    """A folder as PEFT saves it; with labels it classifies, without it generates."""
    tensors: dict[str, torch.Tensor] = {}
    for path, entry in random_factors(signature, LLAMA_TARGETS, seed).items():
        tensors[f"base_model.model.{path}.hira_A"] = entry.a
        tensors[f"base_model.model.{path}.hira_B"] = entry.b
    folder.mkdir()
    described = {
        "peft_type": "HIRA",
        "task_type": "SEQ_CLS" if labels else "CAUSAL_LM",
        "base_model_name_or_path": "llama-512x8",
        "r": RANK,
        "target_modules": list(LLAMA_TARGETS),
        "modules_to_save": ["score"] if labels else None,
        "inference_mode": True,
    }
    if labels:
        generator = torch.Generator().manual_seed(seed)
        width = llama_config().hidden_size
        tensors["base_model.model.score.weight"] = torch.randn(
            len(labels), width, generator=generator
        )
        task = {
            "model_type": "llama",
            "id2label": dict(enumerate(labels)),
            "num_labels": len(labels),
            "problem_type": "single_label_classification",
        }
        (folder / "config.json").write_text(json.dumps(task), encoding="utf-8")
    (folder / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=True))
    return sum(1 for _ in pairs)
