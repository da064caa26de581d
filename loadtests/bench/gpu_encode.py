"""The encode lane on a BERT-base shape: texts classified by many adapters, each with a head of its
own, and stock models that have one head for all."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adapters.registry.store import Store
from adapters.signature import describe
from loadtests.bench.gpu_bases import write_adapter
from loadtests.bench.part_clock import PartClock
from loadtests.bench.peers import nf4_options
from loadtests.bench.runs import run_to_end
from loadtests.bench.timing import Figure, Report
from server.engine.engine import Engine
from server.messages import EncodeRequest, TokenizedInput
from server.options import EncodeBatches, EngineOptions

TARGETS = ("query", "value")
BITSANDBYTES = "the bitsandbytes base"
# The first is the one that something is asked of.
KINDS: tuple[EncodeBatches, ...] = ("static", "dynamic")
_MOST_TOKENS = 32 * 1024
_WARM_UPS = 2
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class EncodeCase:
    """A batch of texts of one length."""

    rows: int
    tokens: int
    adapters: int
    at_least: float | None = None  # of the speed of the bitsandbytes base
    at_most_ms: float | None = None


ENCODE_CASES = (
    EncodeCase(64, 128, 8, 1.0),
    EncodeCase(256, 128, 32, 0.9),
    EncodeCase(256, 16, 32),
    EncodeCase(64, 512, 8),
    EncodeCase(1, 16, 1, at_most_ms=5.0),
)


def measure_encode(
    report: Report,
    device: torch.device,
    clock: PartClock,
    cases: tuple[EncodeCase, ...] = ENCODE_CASES,
    *,
    hidden: int = 768,
    layers: int = 12,
    rounds: int = 5,
) -> None:
    """The bitsandbytes base, a dense model and the engine over every case, the best of each.

    What padding costs is in no case: texts of a batch are of one length, for the peers' sake.
    """
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BertConfig,
        BertForPreTraining,
    )

    from server.demo import BASE_DIR

    with TemporaryDirectory(prefix="hira-gpu-") as name:
        root = Path(name)
        config = BertConfig(
            vocab_size=8192,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
        )
        torch.manual_seed(0)
        model: Any = BertForPreTraining(config)
        model.save_pretrained(root / "base")
        # A masked-language model whose checkpoint has the pooler that heads read.
        described = json.loads((root / "base/config.json").read_text(encoding="utf-8"))
        described["architectures"] = ["BertForMaskedLM"]
        (root / "base/config.json").write_text(json.dumps(described), encoding="utf-8")
        tokenizer: Any = AutoTokenizer.from_pretrained(BASE_DIR)
        tokenizer.add_special_tokens({"pad_token": "<pad>", "mask_token": "<mask>"})
        tokenizer.save_pretrained(root / "base")
        signature = describe(model, "base")
        store = Store(root / "store")
        versions = [
            store.add(
                write_adapter(
                    root / f"a{n}", signature, TARGETS, seed=n, device=device,
                    head={"classifier": True}, model_type="bert",
                )
            )
            for n in range(max(case.adapters for case in cases))
        ]  # fmt: skip
        load: Any = AutoModelForSequenceClassification.from_pretrained
        where = {"dtype": torch.bfloat16, "device_map": {"": device}, "num_labels": 2}
        options = nf4_options()
        options.llm_int8_skip_modules = ["classifier"]
        peers = {
            BITSANDBYTES: load(root / "base", quantization_config=options, **where).eval(),
            "a dense model": load(root / "base", **where).eval(),
        }
        known = {
            case: {name: _peer_s(one, case, device, rounds) for name, one in peers.items()}
            for case in cases
            if clock.has_time(f"{_named(case)}, peers")
        }
        del peers
        for batches in KINDS:
            if not clock.has_time(f"{batches} batches"):
                continue
            engine = Engine.build(
                EngineOptions(
                    base=str(root / "base"),
                    store_dir=root / "store",
                    cache_dir=root / "cache",
                    dtype="bf16",
                    device="cuda" if device.type == "cuda" else "cpu",
                    encode_batches=batches,
                    max_batch_tokens=_MOST_TOKENS if device.type == "cuda" else 64,
                    max_batch_rows=512,
                    threads=torch.get_num_threads(),
                )
            )
            try:
                for case, theirs in known.items():
                    if clock.has_time(f"{_named(case)}, {batches} batches"):
                        _one(report, case, engine, versions, theirs, batches, rounds)
            finally:
                engine.close()


def _one(  # noqa: PLR0917
    report: Report,
    case: EncodeCase,
    engine: Engine,
    versions: list[str],
    peers: dict[str, float],
    batches: EncodeBatches,
    rounds: int,
) -> None:
    before = engine.snapshot().encode_steps
    # What is compiled, and the forms of the kernels that are timed at first.
    for _ in range(_WARM_UPS * rounds):
        _engine_seconds(engine, case, versions)
    best = min(_engine_seconds(engine, case, versions) for _ in range(rounds))
    after = engine.snapshot().encode_steps
    ran = {how: count - before.get(how, 0) for how, count in after.items()}
    note = ", ".join(f"{how} {count}" for how, count in sorted(ran.items()) if count)
    asked = batches == KINDS[0]
    report.add(
        Figure(
            "gpu",
            _named(case),
            f"{batches} batches",
            best * 1e3,
            "ms",
            at_most=case.at_most_ms if asked else None,
            note=note,
        )
    )
    for name, seconds in peers.items():
        goal = case.at_least if asked and name == BITSANDBYTES else None
        what, note = f"{batches} batches against {name}", f"{seconds * 1e3:.1f} ms"
        report.add(Figure("gpu", _named(case), what, seconds / best, at_least=goal, note=note))


def _named(case: EncodeCase) -> str:
    return f"encode, {case.rows} x {case.tokens}, {case.adapters} adapters"


def _engine_seconds(engine: Engine, case: EncodeCase, versions: list[str]) -> float:
    requests = [
        EncodeRequest(
            id=f"gpu-encode-{next(_numbers)}",
            task="text-classification",
            adapter=versions[i % case.adapters],
            version=versions[i % case.adapters],
            inputs=(
                TokenizedInput(tuple((i * 31 + j * 7) % 3000 + 5 for j in range(case.tokens))),
            ),
            submitted=time.monotonic(),
        )
        for i in range(case.rows)
    ]
    began = time.perf_counter()
    run_to_end(engine, requests)
    return time.perf_counter() - began


def _peer_s(model: Any, case: EncodeCase, device: torch.device, rounds: int) -> float:
    """The best of some forwards, answers on the host."""
    ids = torch.full((case.rows, case.tokens), 7, device=device)
    mask = torch.ones_like(ids)
    times: list[float] = []
    for _ in range(2 + rounds):
        began = time.perf_counter()
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask).logits.cpu()
        times.append(time.perf_counter() - began)
    return min(times[2:])
