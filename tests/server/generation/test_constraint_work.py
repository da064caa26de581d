"""How what grammars allow is worked out: together, and by itself what is slow."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from server.generation.constraints import (
    SLOW_S,
    SLOW_TOGETHER_S,
    SUSPECT_TOKENS,
    Allowed,
    Constraint,
    Constraints,
    told_apart,
)
from server.generation.sampling import only_allowed, unpacked_bits
from server.inputs.grammar_engine import Masks, Vocabulary, engine_text
from server.messages import Grammar

TOKENS = [bytes((one,)) for one in range(32, 127)] + [b"ab", b"ba", b'":', b"true", b"", b"  "]
TEXTS = (
    ("regex", "[ab]{3,9}"),
    ("regex", "(ab)+"),
    ("choice", ["a", "ab", "true"]),
    ("json_schema", {"type": "object", "properties": {"a": {"type": "boolean"}}}),
    ("regex", "b"),
)


def grammar(at: int) -> Grammar:
    kind, content = TEXTS[at % len(TEXTS)]
    return Grammar(engine_text(kind, content), str(at % len(TEXTS)))  # type: ignore[arg-type]


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary(TOKENS)


@pytest.fixture
def constraints(vocabulary: Vocabulary) -> Iterator[Constraints]:
    made = Constraints(vocabulary, 1 << 20)
    yield made
    made.close()


def ids_of(one: Allowed) -> list[int]:
    found: list[int] = np.flatnonzero(np.unpackbits(one.bits, bitorder="little")).tolist()
    return found


def alone(vocabulary: Vocabulary, ends: set[int], at: int, taken: list[int]) -> Any:
    """The reference: one matcher, one token after the other, each id looked at by itself."""
    matcher = vocabulary.matcher(grammar(at).text)
    for token in taken:
        matcher.consume_token(token)
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        return "fault"
    may = [one for one in range(vocabulary.size + 1) if mask[one >> 3] >> (one & 7) & 1]
    complete = vocabulary.end in may
    going_on = [one for one in may if one != vocabulary.end and one not in ends]
    if not going_on:
        return "complete" if complete else "fault"
    return sorted({*going_on, *(ends if complete else ())})


def told(one: Allowed) -> Any:
    if one.fault is not None:
        return "fault"
    return "complete" if one.complete else ids_of(one)


@pytest.mark.parametrize("seed", range(6))
def test_together_is_what_each_is_alone(
    vocabulary: Vocabulary, constraints: Constraints, seed: int
) -> None:
    rng = random.Random(seed)
    ends = [set(rng.sample(range(len(TOKENS)), rng.randint(0, 2))) for _ in range(40)]
    rows = [constraints.begin(grammar(at), ends[at]) for at in range(40)]
    taken: list[list[int]] = [[] for _ in rows]
    running = list(range(40))
    for _ in range(8):
        going_on = []
        for at in running:
            found = told(rows[at].allowed())
            assert found == alone(vocabulary, ends[at], at, taken[at]), (at, taken[at])
            # Also tokens that may not come: such an answer fails alone.
            tokens = list(range(len(TOKENS))) if rng.random() < 0.05 else found
            if isinstance(found, list):
                taken[at].append(rng.choice(tokens))
                going_on.append(at)
        running = going_on
        rng.shuffle(running)
        for at in running:
            constraints.follow(rows[at], taken[at][-1])
            assert not rows[at].ready
        constraints.start()


class WithoutErrors:
    """Stands for a matcher whose mask is made up."""

    def deep_copy(self) -> WithoutErrors:
        return self

    def is_error(self) -> bool:
        return False

    def get_error(self) -> str:
        return ""

    def compute_bitmask(self) -> bytes:
        return b""


def test_what_is_slow_is_alone_and_at_low_priority_and_comes_back() -> None:
    one = Constraint(WithoutErrors, np.zeros(4, np.uint8))
    one.took_alone(SLOW_S / 2)
    assert (one.slow, one.alone_tokens) == (False, 0)
    waits = []
    for _ in range(4):
        one.took_alone(2 * SLOW_S)
        assert one.slow
        waits.append(one.alone_tokens)
        while one.alone_tokens:
            one.took_alone(0.0)
            assert not one.slow
    assert waits == [waits[0], 2 * waits[0], 4 * waits[0], 8 * waits[0]]


def test_after_a_slow_call_each_is_alone_for_a_while(
    constraints: Constraints, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [constraints.begin(grammar(0), ()) for _ in range(5)]
    token = TOKENS.index(b"a")
    for one in rows:
        one.allowed()
    plain = Masks.__call__

    def slow(masks: Masks, matchers: Any) -> Any:
        time.sleep(2 * SLOW_TOGETHER_S)
        return plain(masks, matchers)

    monkeypatch.setattr(Masks, "__call__", slow)
    for turn in range(SUSPECT_TOKENS + 2):
        for one in rows:
            constraints.follow(one, token)
        works = len({id(one.work) for one in rows})
        assert works == (1 if turn in {0, SUSPECT_TOKENS + 1} else len(rows)), turn
        constraints.start()
        for one in rows:
            one.allowed()


def test_a_fault_of_the_library_is_the_end_of_these_answers_only(
    constraints: Constraints, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [constraints.begin(grammar(0), ()) for _ in range(3)]
    for one in rows:
        one.allowed()

    def broken(masks: Masks, matchers: Any) -> Any:
        raise BaseException("panic")  # as the library's own are

    monkeypatch.setattr(Masks, "__call__", broken)
    for one in rows[:2]:
        constraints.follow(one, TOKENS.index(b"a"))
    constraints.start()
    assert [one.allowed().fault for one in rows[:2]] == [
        ("grammar_too_complex", "BaseException")
    ] * 2
    assert rows[2].allowed().fault is None


def test_ends_come_where_a_text_is_complete() -> None:
    """Of 40 ids, the last the end; 3 ends the answer and may not come as text."""

    def bits(*ids: int) -> Any:
        row = np.zeros(40, np.uint8)
        row[list(ids)] = 1
        return np.packbits(row, bitorder="little")

    masks = np.stack([bits(1, 3), bits(1, 39), bits(3), bits(39), bits(3, 39)])
    matchers = [WithoutErrors() for _ in masks]
    found = told_apart(masks, np.stack([bits(3, 39)] * 5), matchers, 39)
    assert [told(one) for one in found] == [[1], [1, 3], "fault", "complete", "complete"]


@pytest.mark.parametrize("count", [1, 7, 8, 40, 41, 64, 70])
def test_bits_are_unpacked_on_a_device_as_on_the_processor(count: int) -> None:
    packed = np.random.default_rng(count).integers(0, 256, (5, 8), np.uint8)
    wanted = np.unpackbits(packed, axis=1, count=count, bitorder="little").astype(bool)
    assert unpacked_bits(torch.from_numpy(packed), count).tolist() == wanted.tolist()
    logits = torch.randn(5, count)
    kept = only_allowed(logits, list(packed))
    assert torch.equal(kept, torch.where(torch.from_numpy(wanted), logits, -torch.inf))
