"""What is compared: the methods, the tasks, and how much of each the budget allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

SENTIMENT: Final = ("NEGATIVE", "POSITIVE")


@dataclass(frozen=True)
class Method:
    """One way to adapt; `name` is as the recipe has it."""

    title: str
    name: Literal["hira", "lora", "qlora", "sparse-lora"]
    rank: int

    @property
    def key(self) -> str:
        return f"{self.name}-r{self.rank}"


METHODS: Final = (
    Method("HiRA r = 32", "hira", 32),
    Method("HiRA r = 8", "hira", 8),
    Method("LoRA r = 8", "lora", 8),
    Method("QLoRA r = 8", "qlora", 8),
    Method("Sparse LoRA 50 % r = 8", "sparse-lora", 8),
)


CARDS_RATE: Final = 3e-4
# HiRA changes a weight in proportion to itself, so it needs longer steps than LoRA to get as far
# in as many of them. Found on rows of SST-2's training part.
OWN_RATES: Final = {"hira": 2e-2, "lora": 2e-3, "qlora": 2e-3, "sparse-lora": 2e-3}


@dataclass(frozen=True)
class Task:
    """One set of rows, and how fast each method learns from it.

    Args:
        key: Its name in files and adapters.
        title: Its name in the tables.
        source: The corpus.
        train_rows: Rows of the training part that are used; characters for plain text.
        set_aside: Rows of these that only choose which state of a run is kept.
        test_rows: Rows of the test part; characters for plain text; 0 for all.
        max_tokens: Where a text is cut in training, and by the server at the most of all tasks;
            the window of plain text.
        rates: Learning rate by the method's name.
    """

    key: str
    title: str
    source: Literal["sst2", "imdb", "wikitext2"]
    train_rows: int
    set_aside: int
    test_rows: int
    max_tokens: int
    rates: Mapping[str, float] = field(default_factory=lambda: OWN_RATES)

    @property
    def kind(self) -> Literal["SEQ_CLS", "CAUSAL_LM"]:
        """What its adapters do, in PEFT's words."""
        return "CAUSAL_LM" if self.source == "wikitext2" else "SEQ_CLS"


@dataclass(frozen=True)
class Plan:
    """One comparison: what is trained and measured, and the passes of every run over its rows."""

    tasks: tuple[Task, ...]
    epochs: int = 3


def full_plan() -> Plan:
    """What two cores train in about an hour."""
    cards = dict.fromkeys(OWN_RATES, CARDS_RATE)
    return Plan(
        (
            Task("sst2", "SST-2", "sst2", 2000, 256, 0, 64),
            Task("wiki", "WikiText-2", "wikitext2", 200_000, 0, 300_000, 128),
            Task("imdb", "IMDB", "imdb", 900, 100, 1000, 128),
            Task("sst2-cards", "SST-2, every method at 3e-4", "sst2", 2000, 256, 0, 64, cards),
        ),
    )


def quick_plan() -> Plan:
    """As small as still runs every part."""
    return Plan(
        (
            Task("sst2", "SST-2", "sst2", 96, 32, 64, 64),
            Task("wiki", "WikiText-2", "wikitext2", 12_000, 0, 6_000, 64),
        ),
        epochs=1,
    )
