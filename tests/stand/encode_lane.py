"""The encode lane by itself, with a tiny base and its adapters."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from adapters.intake.checkpoint import load_adapter
from adapters.residency.slots import Residency
from server.base.load import LoadedBase, load_base
from server.encoding.lane import EncodeLane
from server.inputs.text import Text
from server.messages import EncodeRequest, Event
from tests.stand import tiny_bases


class Lane:
    def __init__(self, root: Path, kind: str, tasks: dict[str, str], **changes: Any) -> None:
        base = tiny_bases.base_folder(root, kind)
        chosen = tiny_bases.options(base, root, **changes)
        self.base: LoadedBase = load_base(chosen)
        self.text = Text.load(base, max_tokens=48, vocab_size=tiny_bases.VOCABULARY)
        signature = self.base.adapted.signature
        self.weights = {
            name: load_adapter(tiny_bases.adapter(root / name, base, task, seed=seed), signature)
            for seed, (name, task) in enumerate(tasks.items())
        }
        self.residency = Residency(
            self.base.adapted,
            lambda version: self.weights[version],
            slots=chosen.slots,
            device_bytes=chosen.device_bytes,
            host_bytes=chosen.host_bytes,
            folded_bytes=0,
            dtype=torch.float32,
            grace_s=0.05,
        )
        self.lane = EncodeLane(self.base, self.text, self.residency, chosen)
        self.lane.start()

    def request(self, name: str, version: str | None, task: str, texts: Any, **more: Any) -> Any:
        kind: Any = task
        inputs = more.pop("inputs", None) or self.text.tokenize(texts, kind)
        return EncodeRequest(name, kind, version, version, inputs, **more)

    def drain(self) -> dict[str, Event]:
        found: dict[str, Event] = {}
        until = time.monotonic() + 60
        while self.lane.depth() or self.lane.has_work():
            assert time.monotonic() < until
            for event in self.lane.step():
                assert event.id not in found, "two ends of one request"
                found[event.id] = event
        return found
