"""What the tests of the lane that generates ask for and look at."""

from __future__ import annotations
import copy
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
import pytest
import torch
from adapters.errors import CorruptFile
from adapters.layers.inject import inject
from adapters.modulation.slot_factors import SlotFactors
from server.base.plan import BaseModelError
from server.generation.forward import MIN_PREFILL_TOKENS
from server.generation.lane import GenerateLane
from server.messages import Failure, GenerateResult, TokenEvent
from tests.stand.dense import Stage, hira_factors, ids_of, options, prompts, terminals


VERSIONS: list[str | None] = [None, "a", "b", "c"]

def nothing_is_held(stage: Stage) -> bool:
    figures = stage.lane.figures()
    return (
        (figures.running, figures.waiting, figures.waiting_tokens, figures.kv_blocks_used)
        == (0, 0, 0, 0)
        and not +stage.residency.leases
        and stage.lane.next_deadline() is None
    )
