"""A base and a thousand adapters on it, registered one by one as a server registers them.

All are of one shape: Llama of width 512 with 8 layers, HiRA of rank 32 on q_proj and v_proj, a head
of two labels; about 1 MiB each in bfloat16. They differ in every number.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters.registry.registry import Registry
from adapters.registry.store import Store
from adapters.signature import BaseSignature, describe
from loadtests.bench.generation import LABELS, save_base
from loadtests.bench.modulation import RANK, dense_model, llama_config
from loadtests.bench.runs import raise_if_failed
from loadtests.bench.timing import THREADS, DTypeName
from server.engine.engine import Engine
from server.messages import TERMINAL, EncodeRequest, TokenizedInput
from server.options import EngineOptions

TARGETS = ("q_proj", "v_proj")
TOKENS = 32  # of every request
_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class Stock:
    """A base, and the versions of the adapters that are registered for it.

    Args:
        root: Holds the registry and the store.
        base: The base's folder.
        signature: Of the base.
        dtype: That its engines compute in.
        versions: In the order of their registration.
        seconds: That each registration took.
    """

    root: Path
    base: Path
    signature: BaseSignature
    dtype: DTypeName
    versions: tuple[str, ...]
    seconds: tuple[float, ...]

    def engine(self, **changes: Any) -> Engine:
        """An engine on the base with the stock's store; close it after use."""
        return Engine.build(
            EngineOptions(
                base=str(self.base),
                store_dir=self.root / "store",
                cache_dir=self.root / "cache",
                dtype=self.dtype,
                device="cpu",
                threads=THREADS,
                **changes,
            )
        )


@contextmanager
def stocked(count: int, dtype: DTypeName) -> Iterator[Stock]:
    """Make the base and register ``count`` adapters; all is gone afterwards.

    Args:
        count: Of adapters.
        dtype: That engines on it compute in.
    """
    with tempfile.TemporaryDirectory(prefix="hira-bench-") as name:
        root = Path(name)
        model: Any = dense_model("llama")
        base = root / "llama-512x8"
        save_base(model, base)
        signature = describe(model, base.name)
        store = Store(root / "store")
        registry = Registry(root / "registry.db", store)
        source = Source(root / "source", signature)
        versions, seconds = [], []
        for number in range(count):
            folder = source.write(number)
            began = time.perf_counter()
            record, _ = registry.register(
                f"adapter-{number}", folder, signature, source="bench", check=None
            )
            seconds.append(time.perf_counter() - began)
            versions.append(record.version)
        registry.close()
        yield Stock(root, base, signature, dtype, tuple(versions), tuple(seconds))


class Source:
    """One folder, written anew for every adapter, as PEFT saves it."""

    def __init__(self, folder: Path, signature: BaseSignature) -> None:
        self.folder = folder
        self._signature = signature
        folder.mkdir()
        width = llama_config().hidden_size
        described = {
            "peft_type": "HIRA",
            "task_type": "SEQ_CLS",
            "base_model_name_or_path": "llama-512x8",
            "r": RANK,
            "target_modules": list(TARGETS),
            "modules_to_save": ["score"],
            "inference_mode": True,
        }
        task = {
            "model_type": "llama",
            "id2label": dict(enumerate(LABELS)),
            "num_labels": len(LABELS),
            "problem_type": "single_label_classification",
        }
        (folder / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(task), encoding="utf-8")
        self._head = torch.zeros(len(LABELS), width)

    def write(self, seed: int) -> Path:
        """The folder, with the factors and the head of ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, torch.Tensor] = {}
        for path, layer in self._signature.layers.items():
            if path.rsplit(".", 1)[-1] in TARGETS:
                shape_a, shape_b = layer.factor_shapes(RANK, "hira")
                a = torch.randn(shape_a, generator=generator)
                b = torch.randn(shape_b, generator=generator) * (0.3 / RANK**0.5)
                tensors[f"base_model.model.{path}.hira_A"] = a.bfloat16()
                tensors[f"base_model.model.{path}.hira_B"] = b.bfloat16()
        tensors["base_model.model.score.weight"] = torch.randn(
            self._head.shape, generator=generator
        )
        save_file(tensors, self.folder / "adapter_model.safetensors", {"format": "pt"})
        return self.folder


def zipf(versions: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` draws: version n with a probability that is proportional to 1 / (n + 1)."""
    weights = [1.0 / (place + 1) for place in range(len(versions))]
    return random.Random(seed).choices(versions, weights, k=count)


def request(version: str | None, seed: int) -> EncodeRequest:
    """A text of random tokens to classify."""
    generator = random.Random(seed)
    ids = tuple(generator.randrange(3, 1024) for _ in range(TOKENS))
    return EncodeRequest(
        id=f"bench-{next(_ids)}",
        task="text-classification",
        adapter=version,
        version=version,
        inputs=(TokenizedInput(ids),),
        submitted=time.time(),
    )


def serve(engine: Engine, versions: Sequence[str], clients: int) -> list[float]:
    """One request for each of ``versions``, from ``clients`` that each wait for their answer.

    Returns:
        Seconds from submission to answer, in the order of the answers.
    """
    waiting: dict[str, float] = {}
    coming = iter(enumerate(versions))
    latencies: list[float] = []

    def ask() -> None:
        number, version = next(coming, (0, None))
        if version is not None:
            one = request(version, number)
            engine.submit(one)
            waiting[one.id] = time.perf_counter()

    for _ in range(clients):
        ask()
    while waiting:
        if not engine.has_work():
            engine.wait(1.0)
        for event in engine.step():
            raise_if_failed(event)
            if isinstance(event, TERMINAL):
                latencies.append(time.perf_counter() - waiting.pop(event.id))
                ask()
    return latencies
