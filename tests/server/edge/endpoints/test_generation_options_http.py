"""Every option of a generation on every surface that has its field: honoured, or refused by name.

What an option does is seen in the answer of a small base in its real processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.stand.live import Live, hira
from tests.stand.tiny_bases import VOCABULARY, base_folder
from tests.stand.waits import until

pytestmark = pytest.mark.http

PROMPT = "a fine film"
SIZE = 8
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("options")
    template = root / "base.jinja"
    template.write_text(TEMPLATE)
    settings: dict[str, Any] = {
        "base": base_folder(root, "llama"),
        "base_name": "base",
        "quantization": "none",
        "dtype": "fp32",
        "chat_template": template,
        "kv_bytes": "1MiB",
        "log_level": "debug",
    }
    with hira(root / "data", **settings) as running:
        yield running


def complete(live: Live, **fields: Any) -> httpx2.Response:
    body = {"prompt": PROMPT, "max_tokens": SIZE, "temperature": 0, "ignore_eos": True, **fields}
    return live.client.post("/v1/completions", json=body)


def chat(live: Live, **fields: Any) -> httpx2.Response:
    messages = [{"role": "user", "content": PROMPT}]
    body = {"messages": messages, "max_tokens": SIZE, "temperature": 0, "ignore_eos": True}
    return live.client.post("/v1/chat/completions", json=body | fields)


def generate(live: Live, **parameters: Any) -> httpx2.Response:
    asked = {"max_new_tokens": SIZE, "ignore_eos_token": True, "details": True, **parameters}
    return live.client.post("/generate", json={"inputs": PROMPT, "parameters": asked})


def words(answer: httpx2.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"]).split()


def refused(answer: httpx2.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def id_of(live: Live, word: str) -> int:
    """The id of a word, from what the base says of its own answer."""
    found = generate(live, max_new_tokens=30).json()["details"]["tokens"]
    return int(next(one["id"] for one in found if one["text"].strip() == word))


@pytest.mark.parametrize("call", [complete, chat])
def test_options_change_what_is_said(live: Live, call: Any) -> None:
    plain = words(call(live))
    first = plain[0]
    token = id_of(live, words(complete(live))[0]) if call is complete else None
    assert first not in words(call(live, bad_words=[first]))
    assert words(call(live, logit_bias={"20": 100})) == words(call(live, allowed_token_ids=[20]))
    assert len(set(words(call(live, logit_bias={"20": 100})))) == 1
    fresh = words(call(live, presence_penalty=2, frequency_penalty=2, logit_bias={"20": 5}))
    assert fresh != words(call(live, logit_bias={"20": 5}))
    biased = {"logit_bias": {"20": 60}}
    assert len(words(call(live, **biased, stop_token_ids=[20]))) == 1
    ended = call(live, **biased, stop_token_ids=[20], min_tokens=4)
    assert len(words(ended)) >= 4
    assert ended.json()["usage"]["completion_tokens"] >= 4
    # Where only the likeliest may come, a draw is no choice.
    drawn = call(live, temperature=1.5, min_p=1.0, seed=3)
    assert words(drawn) == plain
    assert words(call(live, temperature=1.5, typical_p=1e-6, seed=3))
    if token is not None:
        assert first not in words(call(live, logit_bias={str(token): -100}))


@pytest.mark.parametrize("call", [complete, chat])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": SIZE + 1}, "min_tokens"),
        ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias"),
        ({"allowed_token_ids": [VOCABULARY]}, "allowed_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"bad_words": ["日本"]}, "bad_words"),
    ],
)
def test_options_that_cannot_be_kept_are_refused_by_name(
    live: Live, call: Any, fields: dict[str, Any], param: str
) -> None:
    assert refused(call(live, **fields)) == (400, "invalid_request", param)


@pytest.mark.parametrize(
    "name",
    ["suffix", "use_beam_search", "skip_special_tokens", "prompt_logprobs", "structural_tag"],
)
def test_fields_that_would_change_the_answer_are_refused(live: Live, name: str) -> None:
    value = name != "skip_special_tokens"
    for call in (complete, chat):
        assert refused(call(live, **{name: value})) == (400, "unsupported_parameter", name)


def test_ignored_fields_are_named_in_a_header_and_the_log(live: Live) -> None:
    answer = complete(live, user="me", x_vendor={"a": 1}, metadata=None)
    assert answer.headers["X-Ignored-Fields"] == "x_vendor, user"
    assert "x-ignored-fields" not in complete(live).headers
    streamed = chat(live, stream=True, store=True)
    assert streamed.headers["X-Ignored-Fields"] == "store"
    said = f"request {answer.headers['X-Request-Id']}: ignored fields x_vendor, user"
    until(lambda: said in live.log.read_text(), f"the log does not say: {said}")


def test_nothing_that_may_come_ends_the_request_alone(live: Live) -> None:
    answer = complete(live, ignore_eos=False, stop_token_ids=[20], allowed_token_ids=[20],
                      min_tokens=2)  # fmt: skip
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_input")
    assert words(complete(live))


def test_the_best_of_several_has_the_greatest_mean_logprob(live: Live) -> None:
    asked = {"temperature": 1.2, "seed": 5, "logprobs": 0}
    every = complete(live, **asked, n=6).json()
    mean = {one["text"]: sum(one["logprobs"]["token_logprobs"]) / SIZE for one in every["choices"]}
    best = complete(live, **asked, best_of=6, n=2).json()
    order = sorted(mean, key=mean.__getitem__, reverse=True)
    assert [one["text"] for one in best["choices"]] == order[:2]
    assert best["usage"] == every["usage"]
    quiet = complete(live, temperature=1.2, seed=5, best_of=6).json()["choices"][0]
    assert (quiet["text"], quiet["logprobs"]) == (order[0], None)
    assert refused(complete(live, best_of=1, n=2)) == (400, "invalid_request", "best_of")
    streamed = complete(live, best_of=2, stream=True)
    assert refused(streamed) == (400, "unsupported_parameter", "best_of")
    assert refused(chat(live, best_of=2)) == (400, "unsupported_parameter", "best_of")


def test_tgis_best_of_gives_the_others_in_the_details(live: Live) -> None:
    answer = generate(live, best_of=4, temperature=1.2, seed=9, top_n_tokens=2).json()
    details = answer["details"]
    others = details["best_of_sequences"]
    assert len(others) == 3

    def mean(one: dict[str, Any]) -> float:
        return float(sum(token["logprob"] for token in one["tokens"])) / len(one["tokens"])

    assert mean(details) >= max(map(mean, others))
    assert {one["generated_text"] for one in others} != {answer["generated_text"]}
    assert all(len(one["top_tokens"]) == one["generated_tokens"] for one in others)
    greedy = generate(live, best_of=2)
    assert (greedy.status_code, greedy.json()["field"]) == (422, "parameters.best_of")
    body = {"inputs": PROMPT, "parameters": {"best_of": 2, "do_sample": True}}
    streamed = live.client.post("/generate_stream", json=body)
    assert (streamed.status_code, streamed.json()["field"]) == (400, "parameters.best_of")


def test_tgis_top_tokens_are_the_likeliest_whole_and_streamed(live: Live) -> None:
    details = generate(live, top_n_tokens=3).json()["details"]
    assert len(details["top_tokens"]) == SIZE
    for token, tops in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(tops) == 3
        assert tops[0] == token  # greedy: it is the likeliest itself
        values = [one["logprob"] for one in tops]
        assert values == sorted(values, reverse=True)
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": SIZE, "ignore_eos_token": True,
                                             "top_n_tokens": 3}}  # fmt: skip
    lines = live.client.post("/generate_stream", json=body).text.splitlines()
    events = [json.loads(one[5:]) for one in lines if one.startswith("data:")]
    assert [[one["id"] for one in event["top_tokens"]] for event in events] == [
        [one["id"] for one in tops] for tops in details["top_tokens"]
    ]
    assert "top_tokens" not in generate(live).json()["details"]


def test_tgis_frequency_penalty_is_openais(live: Live) -> None:
    plain = generate(live, max_new_tokens=30).json()["generated_text"]
    for value in (2.0, -2.0):
        native = generate(live, max_new_tokens=30, frequency_penalty=value).json()
        other = complete(live, max_tokens=30, frequency_penalty=value)
        assert native["generated_text"].split() == words(other)
    assert plain.split() == words(complete(live, max_tokens=30))


def choices_of(answer: httpx2.Response) -> list[dict[str, Any]]:
    lines = [one for one in answer.text.split("\n\n") if one.startswith("data: {")]
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]


def test_a_stream_tells_the_logprobs_of_tokens_that_are_held_back(live: Live) -> None:
    third = words(complete(live))[2]
    asked: dict[str, Any] = {"logprobs": 2, "stop": [f"{third} and more"]}
    whole = complete(live, **asked).json()["choices"][0]
    streamed = choices_of(complete(live, **asked, stream=True))
    texts = [one["text"] for one in streamed]
    assert texts != [one["text"] for one in choices_of(complete(live, logprobs=2, stream=True))], (
        "nothing was held back"
    )
    found: dict[str, list[Any]] = {name: [] for name in whole["logprobs"]}
    for one in streamed:
        for name, values in (one["logprobs"] or {}).items():
            found[name] += values
    assert "".join(texts) == whole["text"]
    for name in ("tokens", "text_offset"):
        assert found[name] == whole["logprobs"][name]
    assert found["token_logprobs"] == pytest.approx(whole["logprobs"]["token_logprobs"])


def test_twenty_likely_tokens_are_told_and_no_more(live: Live) -> None:
    found = complete(live, logprobs=20).json()["choices"][0]["logprobs"]
    assert {len(one) for one in found["top_logprobs"]} == {20}
    told = chat(live, logprobs=True, top_logprobs=20).json()["choices"][0]["logprobs"]["content"]
    assert {len(one["top_logprobs"]) for one in told} == {20}
    assert all(math.isfinite(one["logprob"]) for one in told)
    assert complete(live, logprobs=21).status_code == 400
    assert chat(live, logprobs=True, top_logprobs=21).status_code == 400
