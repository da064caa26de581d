"""Random batches with ``deterministic``: every bit of each logit as it is alone, and the cost.

A pool of requests is answered one at a time first. Then random ones of them come in a random order
and at random times, whole batches of any mixture of adapters, until enough forwards have run; each
logit, score and number of a vector is compared with the one that was noted. The same traffic goes
through an engine without ``deterministic``, turn by turn: the cost is the ratio of the times.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from adapters.registry.store import Store
from adapters.signature import BaseSignature, describe
from loadtests.bench.generation import LABELS, save_base
from loadtests.bench.modulation import LLAMA_TARGETS, random_factors
from loadtests.bench.runs import raise_if_failed
from loadtests.bench.timing import Figure, Report, ratio_of
from server.engine.engine import Engine
from server.generation.forward import PagedForward
from server.messages import (
    TERMINAL,
    EncodeRequest,
    EncodeResult,
    Event,
    GenerateRequest,
    SamplingOptions,
    TokenizedInput,
)
from server.options import DType, EngineOptions, Quantization

BatchLane = Literal["generation", "encoding"]

BATCHES = 1000
WIDTH = 256
LAYERS = 2
VOCABULARY = 6144
_ENCODER_TARGETS = ("q_lin", "v_lin", "lin1")
_RANKS = (32, 8, 5, 16)  # of adapters in turn; the last of every four is LoRA
_ADAPTERS = 8
POOL = 160  # requests that are known alone
_EACH_ROUND = 24  # requests of one turn of each engine
_LONGEST_TOKENS = 60
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class SmallBase:
    """A small base in a folder, and the versions of its adapters in a store."""

    folder: Path
    store: Path
    versions: tuple[str, ...]


@contextmanager
def small_base(lane: BatchLane) -> Iterator[SmallBase]:
    """A Llama that generates, or a DistilBERT whose adapters classify, of random numbers."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any
    if lane == "generation":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=3 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                pad_token_id=0,
            )
        )
    else:
        model = DistilBertForMaskedLM(
            DistilBertConfig(
                vocab_size=VOCABULARY,
                dim=WIDTH,
                hidden_dim=4 * WIDTH,
                n_layers=LAYERS,
                n_heads=4,
                pad_token_id=0,
            )
        )
    with tempfile.TemporaryDirectory(prefix="hira-batches-") as name:
        root = Path(name)
        _save(model, root / "base", lane)
        signature = describe(model, "base")
        store = Store(root / "store")
        folders = [_adapter(root / f"a{n}", signature, lane, n) for n in range(_ADAPTERS)]
        yield SmallBase(root / "base", root / "store", tuple(store.add(one) for one in folders))


def _save(model: Any, folder: Path, lane: BatchLane) -> None:
    if lane == "generation":
        save_base(model, folder)
        return
    from transformers import AutoTokenizer

    from server.demo import BASE_DIR

    tokenizer: Any = AutoTokenizer.from_pretrained(BASE_DIR)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _adapter(folder: Path, signature: BaseSignature, lane: BatchLane, seed: int) -> Path:
    rank, lora = _RANKS[seed % len(_RANKS)], seed % len(_RANKS) == len(_RANKS) - 1
    targets = LLAMA_TARGETS if lane == "generation" else _ENCODER_TARGETS
    names = ("lora_A.weight", "lora_B.weight") if lora else ("hira_A", "hira_B")
    tensors: dict[str, torch.Tensor] = {}
    for path, entry in random_factors(signature, targets, seed).items():
        tensors[f"base_model.model.{path}.{names[0]}"] = entry.a[:rank].contiguous()
        tensors[f"base_model.model.{path}.{names[1]}"] = entry.b[:, :rank].contiguous()
    described: dict[str, Any] = {
        "peft_type": "LORA" if lora else "HIRA",
        "task_type": "CAUSAL_LM" if lane == "generation" else "SEQ_CLS",
        "base_model_name_or_path": "base",
        "r": rank,
        "target_modules": list(targets),
        "inference_mode": True,
    }
    if lora:
        described["lora_alpha"] = rank
    folder.mkdir()
    if lane == "encoding":
        described["modules_to_save"] = ["pre_classifier", "classifier"]
        generator = torch.Generator().manual_seed(seed)
        for module, outputs in (("pre_classifier", WIDTH), ("classifier", len(LABELS))):
            weight = torch.randn(outputs, WIDTH, generator=generator) / WIDTH**0.5
            tensors[f"base_model.model.{module}.weight"] = weight
            tensors[f"base_model.model.{module}.bias"] = torch.randn(outputs, generator=generator)
        task = {
            "model_type": "distilbert",
            "id2label": dict(enumerate(LABELS)),
            "num_labels": len(LABELS),
            "problem_type": "single_label_classification",
        }
        (folder / "config.json").write_text(json.dumps(task), encoding="utf-8")
    (folder / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@contextmanager
def small_engine(
    base: SmallBase,
    dtype: DType,
    quantization: Quantization,
    *,
    deterministic: bool,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Iterator[Engine]:
    """An engine on the base; steps are small, so that prompts are read in pieces."""
    with tempfile.TemporaryDirectory(prefix="hira-batches-cache-") as cache:
        engine = Engine.build(
            EngineOptions(
                base=str(base.folder),
                store_dir=base.store,
                cache_dir=Path(cache),
                quantization=quantization,
                dtype=dtype,
                device=device,
                threads=torch.get_num_threads(),
                prefill_tokens=48,
                max_sequences=16,
                max_batch_tokens=1024,
                max_batch_rows=16,
                deterministic=deterministic,
            )
        )
        try:
            yield engine
        finally:
            engine.close()


def pool(base: SmallBase, lane: BatchLane, count: int = POOL, seed: int = 0) -> list[Any]:
    """Random requests, each on a random adapter or on the bare base where that can answer."""
    chance = random.Random(seed)
    made: list[Any] = []
    for _ in range(count):
        ids = tuple(chance.randrange(5, 4096) for _ in range(chance.randint(1, _LONGEST_TOKENS)))
        version = chance.choice([None, *base.versions])
        if lane == "generation":
            wanted = SamplingOptions(
                max_new_tokens=chance.randint(1, 8), ignore_eos=True, logprobs=True
            )
            made.append(GenerateRequest("", version, version, ids, wanted))
        elif version is None or chance.random() < 0.5:
            vector = {"pooling": chance.choice(["mean", "cls", "last"]), "normalize": False}
            made.append(
                EncodeRequest("", "feature-extraction", version, version, (TokenizedInput(ids),),
                              None, vector)
            )  # fmt: skip
        else:
            # The scores are the logits themselves.
            raw = {"function_to_apply": "none"}
            made.append(
                EncodeRequest("", "text-classification", version, version, (TokenizedInput(ids),),
                              None, raw)
            )  # fmt: skip
    return made


@dataclass(slots=True)
class LogitsSeen:
    """A digest of every row of logits that a generation lane chose from: by request and length."""

    rows: dict[tuple[str, int], bytes] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        plain = PagedForward.__call__
        seen = self.rows

        def watched(forward: PagedForward, parts: Any) -> Any:
            logits = plain(forward, parts)
            predicting = [part.sequence for part in parts if part.predicts]
            for row, one in zip(logits.last, predicting, strict=True):
                raw = row.contiguous().view(torch.uint8).cpu().numpy().tobytes()
                seen[one.request.id, len(one.ids)] = hashlib.blake2b(raw, digest_size=16).digest()
            return logits

        PagedForward.__call__ = watched  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            PagedForward.__call__ = plain  # type: ignore[method-assign]


class Comparison:
    """What every request of a pool is answered alone, and how many answers in batches differ.

    Args:
        requests: The pool.
        seen: Of the engine that is compared, watching.
    """

    def __init__(self, requests: Sequence[Any], seen: LogitsSeen) -> None:
        self._requests = requests
        self._seen = seen
        self._alone: dict[int, Any] = {}
        self.compared = 0  # rows of logits, and outputs of the encode lane
        self.differing = 0

    def learn(self, engine: Engine) -> None:
        """Answer each request alone."""
        for number, one in enumerate(self._requests):
            name = f"alone-{next(_numbers)}"
            event = engine.run(replace(one, id=name, submitted=time.monotonic()))
            self._alone[number] = self._told(name, event)

    def traffic(self, engine: Engine, seed: int, *, compare: bool) -> tuple[int, float]:
        """One turn: forwards that ran, and seconds.

        Args:
            engine: Idle before and after.
            seed: Of what comes, in which order, and when.
            compare: Whether answers are held against those that were learned.

        Raises:
            SystemExit: A request failed.
        """
        chance = random.Random(seed)
        known = len(self._requests)
        waiting = chance.sample(range(known), min(known, _EACH_ROUND))
        names: dict[str, int] = {}
        ends: dict[str, Event] = {}
        forwards = 0
        began = time.perf_counter()
        while waiting or len(ends) < len(names):
            for _ in range(min(len(waiting), chance.choice([0, 0, 1, 2, 6]))):
                name = f"mixed-{next(_numbers)}"
                names[name] = waiting.pop()
                one = self._requests[names[name]]
                engine.submit(replace(one, id=name, submitted=time.monotonic()))
            if names and not engine.has_work() and len(ends) < len(names):
                engine.wait(1.0)
            before = engine.last_step
            for event in engine.step():
                raise_if_failed(event)
                if isinstance(event, TERMINAL):
                    ends[event.id] = event
            forwards += engine.last_step is not before
        seconds = time.perf_counter() - began
        for name, number in names.items():
            told = self._told(name, ends[name])
            if compare:
                wanted = self._alone[number]
                self.compared += len(wanted)
                self.differing += sum(
                    mine != theirs for mine, theirs in zip(told, wanted, strict=True)
                )
        return forwards, seconds

    def _told(self, name: str, event: Event) -> list[Any]:
        """Of one request: digests of its logits in order, or its outputs; forgets the logits."""
        if isinstance(event, EncodeResult):
            return list(event.outputs)
        keys = sorted(key for key in self._seen.rows if key[0] == name)
        return [self._seen.rows.pop(key) for key in keys]


def measure(
    report: Report,
    lane: BatchLane,
    dtype: DType,
    quantization: Quantization,
    *,
    batches: int = BATCHES,
    count: int = POOL,
    device: Literal["cpu", "cuda"] = "cpu",
    has_time: Callable[[], bool] = lambda: True,
    cost_turns: int | None = None,
    at_least: int | None = None,
) -> None:
    """Compare so many batches of one lane, and tell the cost.

    Args:
        report: Where the figures go.
        lane, dtype, quantization: Of both engines.
        batches: Forwards at least.
        count: Requests in the pool.
        device: Of both engines.
        has_time: Asked after each turn; no: there are fewer batches, and the figure says how many.
        cost_turns: That the engine without ``deterministic`` runs as well; None: all.
        at_least: Batches that are asked for.

    Raises:
        SystemExit: A bit differs, or a request failed.
    """
    seen = LogitsSeen()
    with (
        small_base(lane) as base,
        small_engine(base, dtype, quantization, deterministic=True, device=device) as engine,
        small_engine(base, dtype, quantization, deterministic=False, device=device) as usual,
        seen.watching(),
    ):
        comparison = Comparison(pool(base, lane, count), seen)
        comparison.learn(engine)
        for seed in range(-2, 0):  # what is timed and cached at first
            comparison.traffic(usual, seed, compare=False)
        done, ratios, ours, theirs = 0, [], 0.0, 0.0
        for seed in itertools.count():
            sides = [(engine, True), (usual, False)]
            if cost_turns is not None and seed >= cost_turns:
                sides = sides[:1]
            took: dict[bool, float] = {}
            for one, compare in sides if seed % 2 else reversed(sides):
                forwards, took[compare] = comparison.traffic(one, seed, compare=compare)
                done += forwards if compare else 0
            if False in took:
                ratios.append(took[True] / took[False])
                ours, theirs = ours + took[True], theirs + took[False]
            if done >= batches or not has_time():
                break
    case = f"{lane}, {quantization} in {dtype}"
    if comparison.differing:
        raise SystemExit(
            f"{case}: {comparison.differing} of {comparison.compared} answers differ in a bit"
        )
    note = f"{comparison.compared} rows of logits or outputs, none differs in a bit"
    report.add(
        Figure("deterministic", case, "random batches", done, unit="", at_least=at_least, note=note)
    )
    ratio = ratio_of(ratios, ours / theirs)
    report.add(Figure("deterministic", case, "time of the default", ratio))
