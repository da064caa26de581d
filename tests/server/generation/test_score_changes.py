"""What a request changes in its logits, against transformers' own processors and float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from server.generation.sampling import TokenChooser, choose
from server.generation.score_changes import ScoreChanges
from server.messages import Failure, SamplingOptions
from tests.stand.dense import VOCABULARY as SMALL
from tests.stand.dense import Stage, ids_of, prompts, terminals
from tests.stand.generate_lane import VERSIONS, nothing_is_held
from tests.stand.warpers import warpers

VOCABULARY = 400
ENDS = (7, 11)

ids = st.integers(0, VOCABULARY - 1)
options_of = st.builds(
    SamplingOptions,
    do_sample=st.booleans(),
    temperature=st.sampled_from([0.3, 1.0, 1.9]),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 0, 40]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    typical_p=st.sampled_from([0.4, 0.95, 1.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -1.0, 2.0]),
    logit_bias=st.dictionaries(ids, st.sampled_from([-100.0, -3.0, 4.0, 100.0]), max_size=4).map(
        lambda found: tuple(found.items())
    ),
    bad_words=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple), max_size=6)
    .map(dict.fromkeys)
    .map(tuple),
    allowed_ids=st.none() | st.lists(ids, min_size=60, unique=True).map(tuple),
    min_tokens=st.sampled_from([0, 3, 6]),
    seed=st.integers(0, 2**40),
    max_new_tokens=st.just(40),
)


def penalized(row: torch.Tensor, options: SamplingOptions, generated: Sequence[int]) -> Any:
    """OpenAI's definition in float64: mu - count * frequency - (count > 0) * presence."""
    counts = torch.zeros(len(row), dtype=torch.float64)
    for one in generated:
        counts[one] += 1
    by = counts * options.frequency_penalty + (counts > 0) * options.presence_penalty
    return (row.double() - by).to(row.dtype)


def changed(
    row: torch.Tensor, options: SamplingOptions, prompt: list[int], generated: list[int]
) -> torch.Tensor:
    """The row as transformers' processors leave it, in the order of its ``generate``."""
    seen, scores = torch.tensor([prompt + generated]), row[None].clone()
    if options.logit_bias:
        bias = {(one,): by for one, by in options.logit_bias}
        scores = SequenceBiasLogitsProcessor(bias)(seen, scores)
    if options.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(options.repetition_penalty)(seen, scores)
    scores = penalized(scores[0], options, generated)[None]
    words = [list(one) for one in options.bad_words]
    if [one for one in words if one not in [[end] for end in ENDS]]:
        scores = NoBadWordsLogitsProcessor(words, list(ENDS))(seen, scores)
    if options.min_tokens:
        least = MinNewTokensLengthLogitsProcessor(len(prompt), options.min_tokens, list(ENDS))
        scores = least(seen, scores)
    if options.allowed_ids is not None:
        allowed = list(options.allowed_ids)
        scores = PrefixConstrainedLogitsProcessor(lambda _, __: allowed, 1)(seen, scores)
    found: torch.Tensor = scores[0]
    return found


def expected(
    row: torch.Tensor, options: SamplingOptions, prompt: list[int], generated: list[int]
) -> torch.Tensor:
    """float64 shares that transformers would sample from, [vocabulary]."""
    nothing: Any = None
    row = changed(row, options, prompt, generated)
    scores: torch.Tensor = warpers(options)(nothing, row[None])[0]
    return scores.double().softmax(-1)


def chooser_of(options: SamplingOptions, prompt: list[int], generated: list[int]) -> TokenChooser:
    made = TokenChooser(options, prompt, ENDS)
    for token in generated:
        made.draw()
        made.note(token)
    return made


def texts(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        # Few different tokens, so that words occur and counts grow.
        prompt = torch.randint(0, 13, (6,), generator=generator).tolist()
        length = int(torch.randint(0, 9, (), generator=generator))
        made.append((prompt, torch.randint(0, 13, (length,), generator=generator).tolist()))
    return made


@given(options_of, st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_logits_are_changed_as_by_transformers(options: SamplingOptions, seed: int) -> None:
    ((prompt, generated),) = texts(1, seed)
    row = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    wanted = changed(row, options, prompt, generated)
    found = row.clone()
    changes = chooser_of(options, prompt, generated).changes
    if changes is not None:
        changes.apply(found)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
    assert ScoreChanges.wanted(options) == (changes is not None)


@given(st.lists(options_of, min_size=1, max_size=6), st.integers(0, 10**6), st.booleans())
@settings(max_examples=120, deadline=None)
def test_a_row_is_drawn_as_by_transformers_alone_and_beside_others(
    rows: list[SamplingOptions], seed: int, flat: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), VOCABULARY, generator=generator) * (0.3 if flat else 4)
    before, said = logits.clone(), texts(len(rows), seed)
    together = choose(logits, [chooser_of(o, *text) for o, text in zip(rows, said, strict=True)])
    assert torch.equal(logits, before)
    for at, (options, text) in enumerate(zip(rows, said, strict=True)):
        (alone,) = choose(logits[at : at + 1], [chooser_of(options, *text)])
        assert alone == together[at]
        if not alone.possible:
            assert changed(logits[at], options, *text).max() == float("-inf")
            continue
        shares = expected(logits[at], options, *text)
        if not options.do_sample:
            most = changed(logits[at], options, *text)
            assert most[alone.token_id] >= most.max() - 1e-5
            continue
        point, token = chooser_of(options, *text).draw(), alone.token_id
        below = float(shares[:token].sum())
        # Where a sum of shares meets a limit to the last bits, either side is right.
        if below - 1e-4 <= point <= below + float(shares[token]) + 1e-4:
            continue
        assert near_a_limit(logits[at], options, text), (options, point, below)


def near_a_limit(
    row: torch.Tensor, options: SamplingOptions, text: tuple[list[int], list[int]]
) -> bool:
    """Whether another set of tokens is left when a limit is moved by a millionth."""
    left = set()
    for by in (-1e-5, 0.0, 1e-5):
        moved = replace(
            options,
            top_p=min(1.0, options.top_p * (1 + by)),
            min_p=min(1.0, options.min_p * (1 + by)),
            typical_p=min(1.0, options.typical_p * (1 + by)),
        )
        left.add(tuple((expected(row, moved, *text) > 0).nonzero().flatten().tolist()))
    return len(left) > 1


def test_a_request_that_leaves_nothing_is_told_so_and_spoils_no_other() -> None:
    none = SamplingOptions(allowed_ids=(7,), min_tokens=2)
    free = SamplingOptions(do_sample=True, seed=3)
    logits = torch.randn(2, VOCABULARY)
    first, second = choose(logits, [chooser_of(none, [1], []), chooser_of(free, [1], [])])
    assert (first.possible, first.finite) == (False, True)
    assert second == choose(logits[1:], [chooser_of(free, [1], [])])[0]
    assert second.possible


def test_no_draw_gives_a_token_without_a_share() -> None:
    logits = torch.full((1, VOCABULARY), 3.0)
    allowed = tuple(range(0, 50))
    made = TokenChooser(SamplingOptions(do_sample=True, allowed_ids=allowed, seed=1), [1])
    given: Any = made
    given.draw = lambda: 1.0  # what rounding may make of a point
    assert choose(logits, [made])[0].token_id in allowed


# In the lane


def asked_of(at: int, prompt: list[int], first: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a request, and of ``generate`` for the same.

    Args:
        at: Which kind.
        prompt: Its tokens.
        first: What it says without options.
    """
    said = first[0]
    some = sorted({*range(at, SMALL, 3), 1})
    word = (first[1], first[2])
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"min_tokens": 6, "end_ids": (said, 1)}, {"min_new_tokens": 6, "eos_token_id": [said, 1]}),
        ({"bad_words": ((said,), word)}, {"bad_words_ids": [[said], list(word)]}),
        ({"logit_bias": ((5, 9.0), (said, -9.0))},
         {"sequence_bias": {(5,): 9.0, (said,): -9.0}}),
        ({"allowed_ids": tuple(some)}, {"prefix_allowed_tokens_fn": lambda _, __: some}),
        ({"stop_ids": (first[3],)}, {"eos_token_id": [first[3], 1]}),
        ({"repetition_penalty": 1.7, "bad_words": (word,)},
         {"repetition_penalty": 1.7, "bad_words_ids": [list(word)]}),
        ({"ignore_eos": True, "end_ids": (first[1],)}, {"eos_token_id": None}),
        ({}, {}),
    ]  # fmt: skip
    return kinds[at % len(kinds)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_mixed_batch_answers_as_generate_does_with_each_requests_options(name: str) -> None:
    stage = Stage(name)
    asked = {}
    for at, prompt in enumerate(prompts(16, 30, seed=4)):
        version = VERSIONS[at % 4]
        mine, theirs = asked_of(at, prompt, stage.reference(version, prompt, 12, eos_token_id=None))
        asked[stage.submit(version, prompt, **mine)] = (version, prompt, mine, theirs)
    for result in terminals(stage.drain()):
        version, prompt, mine, theirs = asked[result.id]
        assert ids_of(result) == stage.reference(version, prompt, 12, **theirs), mine
        assert ids_of(stage.answer(version, prompt, **mine)) == ids_of(result)
    assert nothing_is_held(stage)


def test_a_token_that_stops_ends_with_a_reason_of_its_own() -> None:
    stage = Stage()
    prompt = prompts(1, 20)[0]
    said = ids_of(stage.answer(None, prompt, ignore_eos=True))
    result = stage.answer(None, prompt, ignore_eos=True, stop_ids=(said[4],))
    assert result.finish_reason == "stop_sequence"
    assert ids_of(result) == said[: said.index(said[4]) + 1]


def test_no_stop_string_ends_before_the_least_number_of_tokens() -> None:
    stage = Stage()
    prompt = prompts(1, 20, seed=3)[0]
    free = stage.answer("a", prompt, ignore_eos=True, max_new_tokens=20)
    stop = next(one.text for one in free.tokens[1:] if one.text.strip())
    early = stage.answer("a", prompt, ignore_eos=True, max_new_tokens=20, stop=(stop,))
    late = stage.answer("a", prompt, ignore_eos=True, max_new_tokens=20, stop=(stop,), min_tokens=9)
    assert len(early.tokens) < 9 <= len(late.tokens)
    assert ids_of(late) == ids_of(free)[: len(late.tokens)]
    assert stop in late.text


def test_options_that_no_token_can_keep_end_the_request_and_free_its_place() -> None:
    stage = Stage()
    named: list[dict[str, Any]] = [
        {"logit_bias": ((SMALL, 1.0),)},
        {"stop_ids": (-1,)},
        {"allowed_ids": (SMALL,)},
        {"bad_words": ((3, SMALL),)},
    ]
    for field in named:
        refused = stage.answer("a", [5, 6, 7], **field)
        assert isinstance(refused, Failure)
        assert refused.code == "invalid_input"
        assert "token id" in (refused.found or "")
    other = stage.submit("a", [5, 6, 7])
    lost = stage.submit("b", [5, 6, 7], allowed_ids=(1,), min_tokens=3)
    found = {one.id: one for one in terminals(stage.drain())}
    assert (found[lost].code, found[lost].expected) == (
        "invalid_input",
        "at least one that may come",
    )
    assert ids_of(found[other]) == stage.reference("a", [5, 6, 7], 12)
    assert nothing_is_held(stage)
