"""Answers held to a grammar in mixed batches: valid, ended, and nobody else changed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from server.generation import lane as lanes
from server.generation.constraints import CompiledGrammars
from server.inputs.grammar_engine import GrammarKind, Masks, Vocabulary, engine_text
from server.messages import Failure, GenerateResult, Grammar, TokenEvent
from tests.stand.dense import (
    DenseAdapted,
    DenseResidency,
    Stage,
    base,
    ids_of,
    options,
    prompts,
    spaced_tokenizer,
    terminals,
)
from tests.stand.generate_lane import VERSIONS, nothing_is_held

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": ["to", "be"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["a", "n"],
    "additionalProperties": False,
}


def grammar(kind: GrammarKind, content: Any) -> Grammar:
    text = engine_text(kind, content)
    return Grammar(text, f"{hash(text):x}")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_answers_fit_and_free_ones_are_what_they_are_alone() -> None:
    stage = Stage()
    asked, alone = prompts(8, 20, seed=3), {}
    for i, prompt in enumerate(asked):
        more = {"do_sample": i % 3 > 0, "seed": i, "temperature": 1.5}
        alone[i] = ids_of(stage.answer(VERSIONS[i % 4], prompt, **more))
    free: dict[str, int] = {}
    held: dict[str, int] = {}
    for i, prompt in enumerate(asked):
        more = {"do_sample": i % 3 > 0, "seed": i, "temperature": 1.5}
        free[stage.submit(VERSIONS[i % 4], prompt, stream=i % 2 == 0, **more)] = i
        one = grammar("json_schema", SCHEMA)
        more |= {"max_new_tokens": 70, "logprobs": True, "alternatives": 2}
        name = stage.submit(VERSIONS[i % 4], prompt, stream=i % 2 == 0, grammar=one, **more)
        held[name] = i
    events = stage.drain()
    results = {one.id: one for one in terminals(events)}
    finished = 0
    for name, i in free.items():
        assert ids_of(results[name]) == alone[i]
    for name in held:
        result = results[name]
        assert isinstance(result, GenerateResult), result
        if result.finish_reason == "eos_token":
            finished += 1
            value = json.loads(result.text)
            assert value["a"] in {"to", "be"}
            assert 0 <= value["n"] <= 99
        else:
            assert len(result.tokens) == 70
        assert all(one.logprob is not None for one in result.tokens)
        streamed = [one.text for one in events if isinstance(one, TokenEvent) and one.id == name]
        if streamed:
            assert "".join(streamed) + result.tail == result.text
    assert finished >= 6
    assert nothing_is_held(stage)


def test_an_answer_ends_where_it_is_complete_and_may_end_where_it_may_go_on() -> None:
    stage = Stage()
    prompt = prompts(1, 10)[0]
    one = stage.answer(None, prompt, grammar=grammar("choice", ["to be"]), max_new_tokens=20)
    assert (one.text, one.finish_reason) == ("to be", "eos_token")
    count = len(one.tokens)
    exact = stage.answer(None, prompt, grammar=grammar("choice", ["to be"]), max_new_tokens=count)
    assert (exact.text, exact.finish_reason) == ("to be", "eos_token")
    cut = stage.answer(None, prompt, grammar=grammar("choice", ["to be"]), max_new_tokens=1)
    assert (cut.finish_reason, len(cut.tokens)) == ("length", 1)
    assert "to be".startswith(cut.text)
    ends = set()
    for seed in range(8):
        more: dict[str, Any] = {"do_sample": True, "seed": seed, "temperature": 100.0}
        found = stage.answer(None, prompt, grammar=grammar("regex", "a{2,}"), **more)
        assert re.fullmatch("a{2,}", found.text)
        ends.add(found.finish_reason)
        kept = stage.answer(
            None, prompt, grammar=grammar("regex", "a{2,}"), ignore_eos=True, **more
        )
        assert (kept.finish_reason, len(kept.tokens)) == ("length", 12)
    assert "eos_token" in ends


def test_an_adapters_own_end_token_ends_and_stop_strings_stop() -> None:
    stage = Stage()
    prompt = prompts(1, 10)[0]
    own = 7
    more: dict[str, Any] = {"do_sample": True, "temperature": 100.0, "end_ids": (own,)}
    last = set()
    for seed in range(12):
        found = stage.answer(None, prompt, grammar=grammar("regex", "a{2,}"), seed=seed, **more)
        last.add(ids_of(found)[-1])
        assert 1 not in ids_of(found)
    assert own in last
    one = stage.answer(None, prompt, grammar=grammar("choice", ["to be"]), stop=("o b",))
    assert (one.text, one.finish_reason) == ("t", "stop_sequence")


def test_a_grammar_of_another_script_is_written_in_bytes() -> None:
    model = base("llama")
    residency = DenseResidency({}, slow=())
    tokenizer = spaced_tokenizer()
    made: Any = lanes.GenerateLane
    lane = made(DenseAdapted(model, {}), tokenizer, residency, options())
    stage = Stage()
    request = stage.request(
        None, [1, 5], grammar=grammar("choice", ["日本 €"]), max_new_tokens=40, stream=True
    )
    lane.submit(request)
    events: list[Any] = []
    while lane.has_work():
        events += lane.step()
    result = terminals(events)[0]
    assert (result.text, result.finish_reason) == ("日本 €", "eos_token")
    streamed = "".join(one.text for one in events if isinstance(one, TokenEvent))
    assert streamed + result.tail == result.text


def test_penalties_do_not_bring_back_what_may_not_come() -> None:
    stage = Stage()
    prompt = prompts(1, 10)[0]
    for changed in ({"repetition_penalty": 3.0}, {"top_k": 3}, {"typical_p": 0.5}, {"top_p": 0.1}):
        more: dict[str, Any] = {"do_sample": "repetition_penalty" not in changed, **changed}
        found = stage.answer(None, prompt, grammar=grammar("regex", "[ab]{10}"), **more)
        assert re.fullmatch("[ab]{10}", found.text), more


def test_cancelled_and_late_ones_leave_nothing() -> None:
    stage = Stage()
    prompt = prompts(1, 10)[0]
    endless = grammar("regex", "[ab]{500}")
    name = stage.submit(None, prompt, grammar=endless, max_new_tokens=80)
    other = stage.submit(
        None, prompt, grammar=endless, max_new_tokens=80, deadline=time.monotonic() + 0.2
    )
    events = [one for _ in range(4) for one in stage.lane.step()]
    assert stage.lane.cancel(name)
    time.sleep(0.2)
    (late,) = terminals(events + stage.drain())
    assert isinstance(late, Failure)
    assert (late.id, late.code) == (other, "deadline_exceeded")
    assert nothing_is_held(stage)


def test_what_cannot_go_on_fails_alone() -> None:
    """A matcher that meets its limits, as one of a grammar that the check could not see through."""
    stage = Stage()
    asked = prompts(2, 10)
    good = stage.submit(None, asked[0])
    bad = stage.submit(None, asked[1], grammar=Grammar("no grammar", "0"))
    results = {one.id: one for one in terminals(stage.drain())}
    assert isinstance(results[good], GenerateResult)
    assert results[bad].code == "grammar_too_complex"
    assert nothing_is_held(stage)


def test_a_step_does_not_wait_for_a_slow_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    asked = prompts(4, 10)
    alone = [ids_of(stage.answer(None, one)) for one in asked]
    slow = grammar("regex", "[ab]{3}")
    taken = Masks.take

    def slowly(masks: Masks, tokens: Any) -> None:
        time.sleep(0.2)
        taken(masks, tokens)

    monkeypatch.setattr(Masks, "take", slowly)
    late = stage.submit(None, asked[0], grammar=slow)
    names = [stage.submit(None, one) for one in asked]
    ended = [one.id for one in terminals(stage.drain(20_000))]
    assert ended[-1] == late
    assert set(ended[:-1]) == set(names)
    assert stage.lane.figures().generated_tokens > 0
    assert alone


def test_compiled_grammars_are_kept_within_a_budget() -> None:
    vocabulary = Vocabulary([bytes((one,)) for one in range(256)])
    kept = CompiledGrammars(vocabulary, 1 << 20)
    for turn in range(2):
        for number in range(30):
            kept.matcher(grammar("regex", f"a{{{number + 1}}}"))
            assert kept.held_bytes <= 1 << 20
        assert kept.compiled == 30 * (turn + 1)
    kept.matcher(grammar("regex", "a{30}"))
    assert kept.compiled == 60
