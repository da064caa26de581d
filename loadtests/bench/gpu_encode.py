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
from server.options import EngineOptions

TARGETS = ("query", "value")
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
    """Alternate the engine, the bitsandbytes base and a dense model over every case.

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
            "bitsandbytes base": load(root / "base", quantization_config=options, **where).eval(),
            "dense model": load(root / "base", **where).eval(),
        }
        engine = Engine.build(
            EngineOptions(
                base=str(root / "base"),
                store_dir=root / "store",
                cache_dir=root / "cache",
                dtype="bf16",
                device="cuda" if device.type == "cuda" else "cpu",
                max_batch_tokens=64 * 1024,
                max_batch_rows=512,
                threads=torch.get_num_threads(),
            )
        )
        try:
            for case in cases:
                if not clock.has_time(f"{case.rows} x {case.tokens}, {case.adapters}"):
                    continue
                _one(report, case, engine, versions, peers=peers, device=device, rounds=rounds)
        finally:
            engine.close()


def _one(
    report: Report,
    case: EncodeCase,
    engine: Engine,
    versions: list[str],
    *,
    peers: dict[str, Any],
    device: torch.device,
    rounds: int,
) -> None:
    times: dict[str, list[float]] = {"engine": [], **{name: [] for name in peers}}
    for turn in range(rounds + 2):
        found = {"engine": _engine_seconds(engine, case, versions)}
        found |= {name: _peer_seconds(one, case, device) for name, one in peers.items()}
        if turn >= 2:
            for name, seconds in found.items():
                times[name].append(seconds)
    best = {name: min(one) for name, one in times.items()}
    named = f"encode, {case.rows} x {case.tokens}, {case.adapters} adapters"
    ran = engine.snapshot().encode_steps
    note = ", ".join(f"{how} {count}" for how, count in sorted(ran.items()))
    milliseconds = best["engine"] * 1e3
    report.add(
        Figure("gpu", named, "engine", milliseconds, "ms", at_most=case.at_most_ms, note=note)
    )
    for name in peers:
        goal = case.at_least if name == "bitsandbytes base" else None
        speed = best[name] / best["engine"]
        note = f"{best[name] * 1e3:.1f} ms"
        report.add(Figure("gpu", named, f"speed of {name}", speed, at_least=goal, note=note))


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


def _peer_seconds(model: Any, case: EncodeCase, device: torch.device) -> float:
    ids = torch.full((case.rows, case.tokens), 7, device=device)
    began = time.perf_counter()
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.cpu()
    return time.perf_counter() - began
