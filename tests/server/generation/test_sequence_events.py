"""What chosen tokens come to: streamed texts, stop strings, end tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from server.generation.lane import GenerateLane
from server.messages import TokenEvent
from tests.stand.dense import Stage, ids_of, options, prompts, terminals
from tests.stand.generate_lane import VERSIONS, nothing_is_held


def test_streamed_text_and_tail_make_the_text() -> None:
    stage = Stage()
    for i, prompt in enumerate(prompts(6, 20)):
        stage.submit(VERSIONS[i % 4], prompt, stream=True, max_new_tokens=20, logprobs=True)
    events = stage.drain()
    for result in terminals(events):
        own = [e for e in events if isinstance(e, TokenEvent) and e.id == result.id]
        assert "".join(e.text for e in own) + result.tail == result.text
        assert [(e.token_id, e.logprob, e.special) for e in own] == [
            (t.id, t.logprob, t.special) for t in result.tokens
        ]
        assert events.index(result) > max(events.index(e) for e in own)
        text = stage.tokenizer.decode(ids_of(result), skip_special_tokens=True)
        assert result.text == text.rstrip("\ufffd")


def test_requests_that_are_not_streamed_get_one_event() -> None:
    stage = Stage()
    stage.submit("a", [5, 6, 7])
    events = stage.drain()
    assert len(events) == 1
    assert events[0].tail == events[0].text


def test_a_stop_string_ends_an_answer_before_it() -> None:
    stage = Stage()
    prompt = prompts(1, 20, seed=3)[0]
    whole = stage.answer("b", prompt, max_new_tokens=30)
    readable = [i for i, t in enumerate(whole.tokens) if t.text.isascii() and t.text.strip()]
    first, second = next((i, j) for i, j in pairwise(readable) if j == i + 1)
    stop = whole.tokens[first].text[-1] + whole.tokens[second].text[0]
    stage.submit("b", prompt, max_new_tokens=30, stop=("never", stop), stream=True)
    events = stage.drain()
    result = events[-1]
    assert result.finish_reason == "stop_sequence"
    assert result.text == whole.text[: whole.text.find(stop)]
    assert "".join(e.text for e in events[:-1]) == result.text
    own = [e.text if e.spelling is None else e.spelling for e in events[:-1]]
    assert own == [t.text for t in result.tokens]
    assert len(result.tokens) <= second + 1
    assert nothing_is_held(stage)


def test_eos_ends_an_answer_unless_it_is_to_be_ignored() -> None:
    stage = Stage()
    prompt = prompts(1, 20, seed=4)[0]
    end = ids_of(stage.answer("a", prompt))[3]
    stage.adapted.model.generation_config.eos_token_id = end
    lane: Any = GenerateLane
    stage.lane = lane(stage.adapted, stage.tokenizer, stage.residency, options())
    ended = stage.answer("a", prompt)
    assert ended.finish_reason == "eos_token"
    assert ids_of(ended)[-1] == end
    assert len(ended.tokens) <= 4
    ignored = stage.answer("a", prompt, ignore_eos=True)
    assert (ignored.finish_reason, len(ignored.tokens)) == ("length", 12)
