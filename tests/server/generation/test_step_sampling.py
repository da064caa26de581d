"""Choosing tokens inside a step, against the sampler of the other path and transformers' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
)

from server.generation.kv_cache import KVCache
from server.generation.sampling import TokenChooser, choose
from server.generation.step_buffers import RowNumbers, StepBuffers
from server.generation.step_sampling import choose_all, choose_best, option_obstacle, takes_best
from server.messages import Grammar, SamplingOptions
from tests.stand.launches import Launches
from tests.stand.warpers import penalties, warpers

VOCABULARY = 700
ROWS = 7
CPU = torch.device("cpu")

options_of = st.builds(
    SamplingOptions,
    do_sample=st.booleans(),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    top_p=st.sampled_from([0.0, 0.2, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 40, 500, VOCABULARY, 10**6]),
    min_p=st.sampled_from([0.0, 0.0, 0.03, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.integers(-5, 2**64),
    logprobs=st.just(True),
    alternatives=st.sampled_from([0, 1, 20]),
)


def buffers() -> StepBuffers:
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=VOCABULARY
    )
    cache = KVCache(
        config,
        budget_bytes=1 << 20,
        max_sequences=ROWS,
        context_tokens=32,
        dtype=torch.float32,
        device=CPU,
    )
    return StepBuffers(ROWS, cache, VOCABULARY, CPU)


def told(
    step: StepBuffers, logits: torch.Tensor, choosers: list[TokenChooser], prompts: list[list[int]]
) -> None:
    """Fill the buffers as a step does, and choose."""
    numbers = []
    for seat, (one, prompt) in enumerate(zip(choosers, prompts, strict=True)):
        wish = one.options
        step.seen[seat] = False
        step.seen[seat, prompt] = True
        numbers.append(
            RowNumbers(
                token_id=prompt[-1],
                position=len(prompt) - 1,
                seat=seat,
                tables={"full_attention": [2]},
                temperature=wish.temperature if one.sampled else 1.0,
                top_k=min(wish.top_k, VOCABULARY),
                top_p=wish.top_p,
                min_p=wish.min_p,
                penalty=wish.repetition_penalty,
                sampled=one.sampled,
                point=one.draw() if one.sampled else 0.0,
            )
        )
    step.fill(numbers)
    with Launches([]):
        choose_all(logits, step)


@given(st.lists(options_of, min_size=1, max_size=ROWS), st.integers(0, 10**6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_each_row_is_chosen_as_by_the_other_sampler(
    rows: list[SamplingOptions], seed: int, flat: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), VOCABULARY, generator=generator) * (0.3 if flat else 4)
    prompts = torch.randint(0, VOCABULARY, (len(rows), 9), generator=generator).tolist()
    choosers = [TokenChooser(one, ids) for one, ids in zip(rows, prompts, strict=True)]
    wanted = choose(logits, choosers)
    step = buffers()
    told(step, logits, choosers, prompts)
    assert step.told_ids[0, : len(rows)].tolist() == [one.token_id for one in wanted]
    for row, one in enumerate(wanted):
        assert step.told_scores[0, row].item() == pytest.approx(one.logprob, abs=1e-5)
        many = len(one.likeliest)
        assert step.told_ids[1 : 1 + many, row].tolist() == [token for token, _ in one.likeliest]
        assert step.told_scores[-1, row] == 1


@given(options_of, st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_what_may_be_drawn_is_what_transformers_leaves(wish: SamplingOptions, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, VOCABULARY, generator=generator) * 2
    ids = torch.randint(0, VOCABULARY, (9,), generator=generator).tolist()
    chooser = TokenChooser(wish, ids)
    step = buffers()
    told(step, logits, [chooser], [ids])
    token = int(step.told_ids[0, 0])
    made = penalties(wish)
    if not wish.do_sample:
        assert token == int(made(torch.tensor([ids]), logits.clone())[0].argmax())
        return
    made += warpers(wish)
    shares = made(torch.tensor([ids]), logits.double()).softmax(-1)[0]
    before = float(shares[:token].sum())
    # The point lies within the token's share, to what top-p's border may move by rounding.
    assert before - 1e-4 <= chooser.draw() <= before + float(shares[token]) + 1e-4


def test_neighbours_change_nothing() -> None:
    torch.manual_seed(1)
    wish = SamplingOptions(do_sample=True, temperature=1.2, top_p=0.9, seed=5, logprobs=True)
    mine = TokenChooser(wish, [1])
    logits = torch.randn(ROWS, VOCABULARY)
    alone, crowd = buffers(), buffers()
    told(alone, logits[3:4], [mine], [[1]])
    others = [TokenChooser(SamplingOptions(do_sample=True, seed=s), [1]) for s in range(ROWS)]
    others[3] = mine
    told(crowd, logits, others, [[1]] * ROWS)
    assert torch.equal(alone.told_ids[:, 0], crowd.told_ids[:, 3])
    assert torch.equal(alone.told_scores[:, 0], crowd.told_scores[:, 3])


def test_logits_that_are_not_finite_are_told_row_by_row() -> None:
    logits = torch.zeros(3, VOCABULARY)
    logits[1, 5] = float("nan")
    logits[2, 5] = float("inf")
    step = buffers()
    choose_best(logits, step)
    assert step.told_scores[-1, :3].tolist() == [1, 0, 0]
    wish = SamplingOptions(do_sample=True, seed=1)
    told(step, logits, [TokenChooser(wish, [1])] * 3, [[1]] * 3)
    assert step.told_scores[-1, :3].tolist() == [1, 0, 0]


def test_which_options_need_more_than_the_best_token() -> None:
    assert takes_best(SamplingOptions(top_p=0.5, temperature=0.0, do_sample=True))
    assert not takes_best(SamplingOptions(do_sample=True))
    assert not takes_best(SamplingOptions(logprobs=True))
    assert not takes_best(SamplingOptions(repetition_penalty=1.1))
    assert option_obstacle(SamplingOptions(alternatives=20)) is None
    assert option_obstacle(SamplingOptions(alternatives=21)) == "alternatives"
    assert option_obstacle(SamplingOptions(typical_p=0.9)) == "typical_p"
    assert option_obstacle(SamplingOptions(grammar=Grammar("", ""))) == "grammar"
    for wish, reason in (
        (SamplingOptions(presence_penalty=0.1), "penalties"),
        (SamplingOptions(frequency_penalty=-0.1), "penalties"),
        (SamplingOptions(logit_bias=((3, 1.0),)), "logit_bias"),
        (SamplingOptions(bad_words=((3,),)), "excluded_tokens"),
        (SamplingOptions(allowed_ids=(3,)), "excluded_tokens"),
        (SamplingOptions(min_tokens=3), "excluded_tokens"),
    ):
        assert option_obstacle(wish) == reason
    assert option_obstacle(SamplingOptions(min_tokens=3), 2) == "excluded_tokens"
    assert option_obstacle(SamplingOptions(min_tokens=3), 3) is None
    assert option_obstacle(SamplingOptions(stop_ids=(3,), ignore_eos=True, min_p=0.1)) is None
