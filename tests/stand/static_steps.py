"""A lane over real adapted layers, and random traffic through it."""

from __future__ import annotations

import copy
import random
from typing import Any

from adapters.layers.inject import AdaptedModel, inject
from adapters.modulation.slot_factors import SlotFactors
from server.generation.lane import GenerateLane
from server.messages import GenerateResult
from server.options import DecodeSteps
from tests.stand.dense import Stage, hira_factors, options, prompts, terminals

VERSIONS: list[str | None] = [None, "a", "b", "c"]


def factors_of(model: Any, seed: int, method: Any = "hira", **more: Any) -> dict[str, SlotFactors]:
    pairs = hira_factors(model, seed)
    return {path: SlotFactors(method, a, b, **more) for path, (a, b) in pairs.items()}


def staged(name: str = "llama", steps: DecodeSteps = "static", **changes: Any) -> tuple[Stage, Any]:
    """A stage over real adapted layers, and those."""
    stage = Stage(name)
    model = copy.deepcopy(stage.adapted.original)
    adapted = inject(model, name="test")
    made = options(decode_steps=steps, **({"slots": 6} | changes))
    residency: Any = stage.residency
    stage.lane = GenerateLane(adapted, stage.tokenizer, residency, made)
    for version, slot in stage.residency.slots.items():
        method = "lora" if version == "c" else "hira"
        more = {"scale": 0.5} if version == "c" else {}
        adapted.install(slot, factors_of(stage.adapted.original, slot, method, **more))
        stage.residency.prefetch(version)
    return stage, adapted


def wish(chance: random.Random) -> dict[str, Any]:
    """Random options of a request."""
    return {
        "max_new_tokens": chance.randint(1, 14),
        "do_sample": chance.random() < 0.5,
        "temperature": chance.choice([0.7, 1.0, 1.6]),
        "top_k": chance.choice([0, 5, 50]),
        "top_p": chance.choice([1.0, 0.9]),
        "repetition_penalty": chance.choice([1.0, 1.0, 1.3]),
        "seed": chance.randint(0, 99),
        "logprobs": chance.random() < 0.5,
        "alternatives": chance.choice([0, 3]),
        "ignore_eos": True,
    }


def random_run(stage: Stage, adapted: AdaptedModel, seed: int) -> dict[str, GenerateResult]:
    """Joins, leaves and swaps in an order that depends on the seed alone."""
    chance = random.Random(seed)
    asked = prompts(14, 40, seed=seed)
    results: list[Any] = []
    swapped = 0
    while asked or stage.lane.has_work():
        for _ in range(chance.randint(0, 3)):
            if asked:
                stage.submit(chance.choice(VERSIONS), asked.pop(), **wish(chance))
        for _ in range(chance.randint(1, 4)):
            results += terminals(stage.lane.step())
        idle = [v for v in ("a", "b") if not stage.residency.leases[v]]
        if idle and chance.random() < 0.3:
            swapped += 1
            slot = stage.residency.slots[idle[0]]
            adapted.uninstall(slot)
            adapted.install(slot, factors_of(stage.adapted.original, 10 * swapped + slot))
    return {one.id: one for one in results}
