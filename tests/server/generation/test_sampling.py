"""Choosing tokens, against transformers' own logits processors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.generation.sampling import TokenChooser, choose, truncate
from server.messages import SamplingOptions
from tests.stand.warpers import penalties, warpers

VOCABULARY = 2500

options_of = st.builds(
    SamplingOptions,
    do_sample=st.booleans(),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    top_p=st.sampled_from([0.0, 0.2, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 40, 1500, VOCABULARY, 10**6]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.integers(-5, 2**64),
    logprobs=st.booleans(),
)


def expected_scores(row: torch.Tensor, options: SamplingOptions, ids: list[int]) -> torch.Tensor:
    """What transformers' ``generate`` would sample from, or take the best of."""
    steps = penalties(options)
    if options.do_sample:
        steps += warpers(options)
    scores: torch.Tensor = steps(torch.tensor([ids]), row[None].clone())[0]
    return scores


def expected_token(row: torch.Tensor, options: SamplingOptions, ids: list[int]) -> int:
    scores = expected_scores(row, options, ids)
    if not options.do_sample:
        return int(scores.argmax())
    generator = torch.Generator().manual_seed(options.seed % 2**63 if options.seed else 0)
    shares = scores.double().softmax(-1).cumsum(-1)
    return int((shares > torch.rand((), generator=generator, dtype=torch.float64)).nonzero()[0])


@given(st.lists(options_of, min_size=1, max_size=6), st.integers(0, 10**6), st.booleans())
@settings(max_examples=80, deadline=None)
def test_each_row_is_chosen_as_transformers_would(
    rows: list[SamplingOptions], seed: int, flat: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), VOCABULARY, generator=generator) * (0.3 if flat else 4)
    before = logits.clone()
    prompts = torch.randint(0, VOCABULARY, (len(rows), 9), generator=generator).tolist()
    made = choose(logits, [TokenChooser(o, ids) for o, ids in zip(rows, prompts, strict=True)])
    assert torch.equal(logits, before)
    for row, options, ids, choice in zip(logits, rows, prompts, made, strict=True):
        assert choice.token_id == expected_token(row, options, ids)
        assert choice.finite
        if options.logprobs:
            wanted = row.double().log_softmax(-1)[choice.token_id].item()
            assert choice.logprob == pytest.approx(wanted, abs=1e-5)
        else:
            assert choice.logprob is None


@given(options_of, st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_truncation_keeps_the_same_tokens_with_the_same_shares(
    options: SamplingOptions, seed: int
) -> None:
    row = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    sampled = SamplingOptions(do_sample=True, top_k=options.top_k, top_p=options.top_p)
    got = truncate(row[None], [sampled])[0]
    wanted = expected_scores(row.double(), sampled, [0]).softmax(-1)
    differ = (got > 0) != (wanted > 0)
    # Where the sum of shares meets top_p to the last bits, either side is right.
    assert wanted[differ].sum() + got[differ].sum() < 1e-5
    assert differ.sum() <= 1 + 3 * (options.top_p > 0.99)
    torch.testing.assert_close((got / got.sum()).double(), wanted, rtol=1e-4, atol=1e-5)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.05, 0.2, 0.5, 0.95, 0.999, 1.0]),
            st.sampled_from([0, 3, 40]),
            st.sampled_from([0.3, 0.9, 1.0]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_typical_tokens_are_those_of_transformers_row_by_row(
    asked: list[tuple[float, int, float]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(asked), VOCABULARY, generator=generator) * 3
    options = [
        SamplingOptions(do_sample=True, typical_p=typical_p, top_k=top_k, top_p=top_p)
        for typical_p, top_k, top_p in asked
    ]
    before = rows.clone()
    for row, got, one in zip(rows, truncate(rows, options), options, strict=True):
        wanted = expected_scores(row, one, [0]).softmax(-1)
        differ = (got > 0) != (wanted > 0)
        # Where the sum of shares meets a limit to the last bits, either side is right.
        assert differ.sum() <= 2
        if not differ.any():
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(rows, before)


def test_the_most_typical_tokens_need_not_be_the_likeliest() -> None:
    # One token of probability 0.4, 60 of 0.01: the entropy is nearer to theirs.
    row = torch.tensor([[0.4, *[0.01] * 60]]).log()
    got = truncate(row, [SamplingOptions(do_sample=True, typical_p=0.3)])[0]
    assert got[0] == 0
    assert got.count_nonzero() == 60, "equal ones stay together"


def test_equal_tokens_stay_or_go_together() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    for options in (
        SamplingOptions(do_sample=True, top_k=2),
        SamplingOptions(do_sample=True, top_p=0.6),
    ):
        kept = truncate(scores, [options])[0] > 0
        assert kept.tolist() == [False, True, True, True, False]


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    torch.manual_seed(0)
    mine = SamplingOptions(do_sample=True, temperature=1.3, top_p=0.95, seed=7)
    alone, crowded = TokenChooser(mine, [1]), TokenChooser(mine, [1])
    others = [TokenChooser(SamplingOptions(do_sample=True, seed=s), [1]) for s in range(4)]
    for _ in range(20):
        logits = torch.randn(5, 300)
        one = choose(logits[2:3], [alone])[0]
        many = choose(logits, [*others[:2], crowded, *others[2:]])[2]
        assert one.token_id == many.token_id
        for chooser in (alone, crowded, *others):
            chooser.note(one.token_id)


def test_a_choice_that_is_made_again_is_the_same_until_its_token_is_taken() -> None:
    logits = torch.zeros(1, 1000)
    options = SamplingOptions(do_sample=True, seed=7)
    once, again = TokenChooser(options, [1]), TokenChooser(options, [1])
    for _ in range(10):
        token = choose(logits, [once])[0].token_id
        choose(logits, [again])  # of a step that failed after it
        assert choose(logits, [again])[0].token_id == token
        once.note(token)
        again.note(token)


def test_without_a_seed_two_requests_differ() -> None:
    logits = torch.zeros(1, 1000)
    sampled = SamplingOptions(do_sample=True)
    first, second = TokenChooser(sampled, [1]), TokenChooser(sampled, [1])
    pairs = []
    for _ in range(8):
        pairs.append([choose(logits, [one])[0].token_id for one in (first, second)])
        first.note(pairs[-1][0])
        second.note(pairs[-1][1])
    assert any(a != b for a, b in pairs)


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 12)
    chooser = TokenChooser(SamplingOptions(do_sample=True, seed=3), [1])
    counts = torch.zeros(12)
    for _ in range(4000):
        token = choose(logits, [chooser])[0].token_id
        chooser.note(token)
        counts[token] += 1
    assert (counts / 4000 - logits[0].softmax(-1)).abs().max() < 0.03


def test_generated_tokens_are_penalized_too() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    chooser = TokenChooser(SamplingOptions(repetition_penalty=10.0, max_new_tokens=4), [0])
    seen = []
    for _ in range(3):
        token = choose(logits, [chooser])[0].token_id
        chooser.note(token)
        seen.append(token)
    assert seen == [1, 2, 3]


def test_zero_temperature_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0]])
    assert (
        choose(logits, [TokenChooser(SamplingOptions(do_sample=True, temperature=0), [0])])[
            0
        ].token_id
        == 1
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_not_finite_spoil_only_their_row(bad: float, do_sample: bool) -> None:
    logits = torch.randn(3, 50)
    logits[1, 7] = bad
    options = SamplingOptions(do_sample=do_sample, top_p=0.9, seed=1, logprobs=True)
    made = choose(logits, [TokenChooser(options, [1]) for _ in range(3)])
    assert [choice.finite for choice in made] == [True, False, True]
    clean = choose(logits[::2], [TokenChooser(options, [1]) for _ in range(2)])
    assert [made[0], made[2]] == clean


def test_no_rows_give_no_choices() -> None:
    assert choose(torch.zeros(0, 5), []) == []
