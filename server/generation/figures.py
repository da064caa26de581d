"""What a lane tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GenerateFigures:
    """How the lane stands; counters count since it was made."""

    waiting: int
    running: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int  # unused, kept for the prefix that they hold
    steps: int
    shared_tokens: int  # of prompts, found in the cache
    generated_tokens: int
    deferred_tokens: int  # that were not chosen in their step: what a grammar allows came too late
    grammars_compiled: int
    grammar_bytes: int  # kept compiled, about
    paced_steps: Mapping[str, int]  # by whose rows they had; {} without token_ms
    steps_by: Mapping[str, int]  # that were static, or why they were not; {} where none may be
    static_bytes: Mapping[str, int]  # of static steps on the device: buffers, graphs
    last_rows: int  # token rows of the latest forward
    last_adapters: int  # distinct adapters in it, the base not counted
