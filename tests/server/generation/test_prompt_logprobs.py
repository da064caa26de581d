"""Log-probabilities of a prompt's own tokens: the lane's, and through HTTP, against float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from server.demo import BASE_DIR
from server.edge.endpoints.openai_format import ChatFormat
from server.inputs.detokenize import spell
from server.messages import Alternative, Failure, GeneratedToken, GenerateResult
from tests.stand.dense import (
    Stage,
    byte_tokenizer,
    effective,
    ids_of,
    prompts,
    spaced_tokenizer,
    terminals,
)
from tests.stand.live import Live, hira
from tests.stand.made import make_adapter

VERSIONS: list[str | None] = [None, "a", "b", "c"]
TEXT = "The king is dead, and the café was closed. In the morning nobody came."
FP32 = 2e-5  # nats, with random factors that change every layer
TOLERANCE_HTTP = 2e-4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def truth(stage: Stage, version: str | None, ids: list[int]) -> list[float]:
    """log p(ids[i] | ids[:i]) for i >= 1, in float64 from the effective weights."""
    slot = 0 if version is None else stage.residency.slots[version]
    model = effective(stage.adapted.original, stage.adapted.slots.get(slot, {})).double()
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(rows[at - 1, ids[at]]) for at in range(1, len(ids))]


def assert_scored(stage: Stage, version: str | None, prompt: list[int], result: Any) -> None:
    assert isinstance(result, GenerateResult), result
    first, *rest = result.prompt_logprobs
    assert first is None
    assert rest == pytest.approx(truth(stage, version, prompt), abs=FP32)


@pytest.mark.parametrize("budget", [16, 64])
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "qwen2"])
def test_scores_are_those_of_the_model_in_a_mixed_batch(name: str, budget: int) -> None:
    stage = Stage(name, prefill_tokens=budget)
    asked = {}
    for i, prompt in enumerate(prompts(12, 100, seed=3)):
        version, new = VERSIONS[i % 4], (0, 5, 3)[i % 3]
        scored = i % 3 != 2  # every third asks for its answer alone
        wanted = stage.submit(
            version, prompt, max_new_tokens=new, prompt_logprobs=scored, ignore_eos=True
        )
        asked[wanted] = (version, prompt, new, scored)
    results = terminals(stage.drain())
    assert {one.id for one in results} == set(asked)
    for result in results:
        version, prompt, new, scored = asked[result.id]
        assert len(ids_of(result)) == new
        if scored:
            assert_scored(stage, version, prompt, result)
        else:
            assert result.prompt_logprobs == ()
        if new:
            assert ids_of(result) == stage.reference(version, prompt, new, eos_token_id=None)
    assert max(len(plan.slots) for plan in stage.adapted.plans) >= 3
    assert stage.lane.figures().kv_blocks_used == 0


@pytest.mark.parametrize("budget", [16, 64])
def test_alternatives_are_the_likeliest_of_the_model(budget: int) -> None:
    stage = Stage("llama", prefill_tokens=budget)
    (prompt,) = prompts(1, 40, seed=6)
    for version in (None, "a"):
        result = stage.answer(
            version,
            prompt,
            max_new_tokens=4,
            prompt_logprobs=True,
            logprobs=True,
            alternatives=3,
            ignore_eos=True,
        )
        slot = 0 if version is None else stage.residency.slots[version]
        model = effective(stage.adapted.original, stage.adapted.slots.get(slot, {})).double()
        with torch.no_grad():
            rows = model(torch.tensor([prompt + ids_of(result)])).logits[0].log_softmax(-1)
        told: list[Any] = list(result.prompt_likeliest)
        assert told[0] == ()
        told += [[(one.id, one.logprob) for one in token.alternatives] for token in result.tokens]
        assert len(told) == len(prompt) + 4
        for at, found in enumerate(told[1:]):
            values, ids = rows[at].topk(3)
            assert [token for token, _ in found] == ids.tolist()
            assert [value for _, value in found] == pytest.approx(values.tolist(), abs=FP32)
        for token in result.tokens:  # greedy: the first is the one that was chosen
            assert (token.alternatives[0].id, token.alternatives[0].text) == (token.id, token.text)
            assert len({one.text for one in token.alternatives}) == 3
    assert stage.answer("a", prompt, max_new_tokens=2, logprobs=True).tokens[0].alternatives == ()


def test_alternatives_have_texts_of_their_own() -> None:
    tokenizer = spaced_tokenizer()
    first, second = tokenizer.convert_tokens_to_ids(["<0xE2>", "<0xF0>"])
    (be,) = tokenizer.convert_tokens_to_ids(["▁be"])
    likeliest = ((be, -0.1), (first, -1.0), (second, -2.0), (first, -3.0))
    pieces = spell(tokenizer, [be, be], [(), likeliest])
    assert pieces[0].alternatives == ()
    assert [one.text for one in pieces[1].alternatives] == [
        " be",
        "<0xE2>",
        "<0xF0>",
        f"token_id:{first}",
    ]


def test_adapters_score_one_prompt_differently() -> None:
    stage = Stage()
    (prompt,) = prompts(1, 40, seed=4)
    scores = [
        stage.answer(version, prompt, max_new_tokens=0, prompt_logprobs=True).prompt_logprobs
        for version in VERSIONS
    ]
    assert len(set(scores)) == 4


def test_rows_reach_the_output_layer_only_where_they_are_asked_for() -> None:
    stage = Stage(prefill_tokens=32)
    rows: list[int] = []
    stage.adapted.model.lm_head.register_forward_pre_hook(
        lambda module, inputs: rows.append(inputs[0].shape[1])
    )
    stage.answer("a", [5] * 60, max_new_tokens=1)
    plain, rows[:] = list(rows), []
    stage.answer("a", [5] * 60, max_new_tokens=1, prompt_logprobs=True)
    assert plain == [1, 1]
    assert rows == [32, 28]  # 59 tokens that follow another, and the row that predicts a new one


@pytest.mark.parametrize("length", [1, 2, 16, 17, 127, 128])
def test_a_prompt_as_long_as_the_context_can_be_scored(length: int) -> None:
    stage = Stage()
    result = stage.answer("b", [7] * length, max_new_tokens=0, prompt_logprobs=True)
    assert_scored(stage, "b", [7] * length, result)
    assert (result.finish_reason, result.text, result.tokens) == ("length", "", ())
    assert stage.lane.figures().kv_blocks_used == 0


@pytest.mark.parametrize(("length", "fits"), [(80, True), (81, False)])
def test_a_scored_prompt_needs_room_for_each_of_its_tokens(length: int, fits: bool) -> None:
    stage = Stage(kv_bytes=4096 * 7)  # five blocks hold 80
    result = stage.answer("a", [7] * length, max_new_tokens=0, prompt_logprobs=True)
    if fits:
        assert_scored(stage, "a", [7] * length, result)
    else:
        assert isinstance(result, Failure)
        assert (result.code, result.expected) == ("input_too_long", "at most 80 in all")


def test_nothing_at_all_is_still_refused() -> None:
    failure = Stage().answer("a", [5, 6], max_new_tokens=0)
    assert isinstance(failure, Failure)
    assert failure.code == "invalid_input"


def test_a_shared_prefix_is_read_again_to_be_scored() -> None:
    stage = Stage(allow_prefix_sharing=True, kv_bytes=4096 * 64)
    prompt = [5, 9, 17, 200] * 15
    for _ in range(3):
        result = stage.answer("a", prompt, max_new_tokens=2, prompt_logprobs=True)
        assert_scored(stage, "a", prompt, result)
    assert stage.lane.figures().shared_tokens == 0
    # What a scored prompt leaves in the cache serves others.
    assert ids_of(stage.answer("a", prompt)) == stage.reference("a", prompt, 12)
    assert stage.lane.figures().shared_tokens == 48


def test_an_adapter_that_overflows_fails_alone_while_scoring() -> None:
    stage = Stage(prefill_tokens=16)
    broken = dict(stage.adapted.slots[2])
    path = next(iter(broken))
    broken[path] = torch.full_like(broken[path], float("nan"))
    stage.adapted.slots[2] = broken
    prompt = [5, 6, 7] * 20
    bad = stage.submit("b", prompt, max_new_tokens=0, prompt_logprobs=True)
    good = stage.submit("a", prompt, max_new_tokens=0, prompt_logprobs=True)
    events = terminals(stage.drain())
    results = {one.id: one for one in events}
    assert len(events) == 2
    assert results[bad].code == "adapter_failed"
    assert_scored(stage, "a", prompt, results[good])
    assert stage.lane.figures().kv_blocks_used == 0


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), spaced_tokenizer()], ids=["byte", "space"])
def test_pieces_of_a_text_join_to_it(tokenizer: Any) -> None:
    ids = [tokenizer.bos_token_id, *tokenizer("to be or not héllo €uro 日本 😀")["input_ids"]]
    pieces = spell(tokenizer, ids)
    readable = "".join(one.text for one in pieces if not one.special)
    assert readable == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(pieces) == len(ids)
    assert (pieces[0].text, pieces[0].special) == ("<s>", True)


# Through HTTP

with_demo = pytest.mark.skipif(
    not (BASE_DIR / "config.json").exists(), reason="the embedded demo has not been trained"
)
NAMES = ("alpha", "beta")


def folded_truth(folder: Path | None, ids: list[int]) -> list[float]:
    """The same in float64, from the NF4 base folded with a HiRA adapter of the demo base."""
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    tensors = load_file(folder / "adapter_model.safetensors") if folder else {}
    packed = {
        path: functional.dequantize_4bit(
            *functional.quantize_4bit(
                module.weight.data, quant_type="nf4", compress_statistics=True
            )
        )
        for path, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    model = model.double().eval()
    with torch.no_grad():
        for path, weight in packed.items():
            key = f"base_model.model.model.{path}.hira_"
            w0 = weight.double()
            if key + "A" in tensors:
                w0 = w0 * (1 + tensors[key + "B"].double() @ tensors[key + "A"].double())
            model.model.get_submodule(path).weight.copy_(w0)
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(rows[at - 1, ids[at]]) for at in range(1, len(ids))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scored")
    return {name: make_adapter(root / name, seed=seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Iterator[Live]:
    adapters = [f"--adapter={name}={folder}" for name, folder in folders.items()]
    base = ("--base", str(BASE_DIR), "--base-name", "plain")
    folder = tmp_path_factory.mktemp("scored-http") / "server"
    with hira(folder, *base, "--dtype", "fp32", *adapters) as server:
        yield server


def details(live: Live, name: str) -> Any:
    parameters = {"max_new_tokens": 1, "details": True, "decoder_input_details": True}
    body = {"inputs": TEXT, "parameters": parameters}
    answer = live.client.post(f"/generate?adapter={name}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["details"]


def scored(live: Live, model: str, prompt: Any, **more: Any) -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = live.client.post("/v1/completions", json=body | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


@with_demo
@pytest.mark.http
def test_every_adapter_is_exact_over_http_in_mixed_traffic(
    live: Live, folders: dict[str, Path]
) -> None:
    places = {**folders, "plain": None}
    ids = [one["id"] for one in details(live, "alpha")["prefill"]]
    expected = {name: folded_truth(place, ids) for name, place in places.items()}
    assert max(abs(a - b) for a, b in zip(expected["alpha"], expected["beta"], strict=True)) > 0.1
    asked = [*places] * 4
    with ThreadPoolExecutor(len(asked)) as pool:
        native = list(pool.map(lambda name: details(live, name)["prefill"], asked))
        openai = list(pool.map(lambda name: scored(live, name, TEXT), asked))
    for name, prefill, completion in zip(asked, native, openai, strict=True):
        logprobs = completion["choices"][0]["logprobs"]
        for found in ([one["logprob"] for one in prefill], logprobs["token_logprobs"]):
            assert found[0] is None
            assert found[1:] == pytest.approx(expected[name], abs=TOLERANCE_HTTP)


@with_demo
@pytest.mark.http
def test_the_tokens_of_a_prompt_spell_it(live: Live) -> None:
    prefill = details(live, "alpha")["prefill"]
    assert prefill[0]["special"]
    assert "".join(one["text"] for one in prefill if not one["special"]) == TEXT
    (choice,) = scored(live, "alpha", TEXT)["choices"]
    logprobs = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert logprobs["tokens"] == [one["text"] for one in prefill]
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[1:]:
        assert TEXT[offset:].startswith(token)


@with_demo
@pytest.mark.http
def test_token_ids_and_several_prompts_are_scored_alike(live: Live) -> None:
    prefill = details(live, "beta")["prefill"]
    ids = [one["id"] for one in prefill]
    answer = scored(live, "beta", [ids, ids[:5]], max_tokens=2, n=2, seed=1)
    wanted = [one["logprob"] for one in prefill]
    for index, choice in enumerate(answer["choices"]):
        prompt = len(ids) if index < 2 else 5
        found = choice["logprobs"]["token_logprobs"]
        assert len(found) <= prompt + 2
        assert found[1:prompt] == pytest.approx(wanted[1:prompt], abs=TOLERANCE_HTTP)
        assert None not in found[prompt:]
    assert answer["usage"]["prompt_tokens"] == len(ids) + 5


@with_demo
@pytest.mark.http
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "stream": True}, "stream"),
        ({"echo": True, "logprobs": 0, "stream": True}, "stream"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(
    live: Live, body: dict[str, Any], field: str
) -> None:
    answer = live.client.post("/v1/completions", json={"model": "alpha", "prompt": "x", **body})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["param"] == field


@with_demo
@pytest.mark.http
def test_details_of_a_prompt_are_not_streamed(live: Live) -> None:
    body = {"inputs": "x", "parameters": {"decoder_input_details": True}}
    answer = live.client.post("/generate_stream?adapter=alpha", json=body)
    assert answer.status_code == 400
    assert answer.json()["field"] == "parameters.decoder_input_details"


@with_demo
@pytest.mark.http
def test_the_likeliest_tokens_of_a_prompt_are_told(live: Live) -> None:
    (choice,) = scored(live, "alpha", TEXT, logprobs=2, max_tokens=3)["choices"]
    logprobs = choice["logprobs"]
    tops = logprobs["top_logprobs"]
    assert tops[0] is None
    assert len(tops) == len(logprobs["tokens"])
    greedy = []
    told = zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
    for token, logprob, top in list(told)[1:]:
        assert 2 <= len(top) <= 3
        assert top[token] == pytest.approx(logprob, abs=1e-4)
        greedy.append(max(top, key=top.__getitem__) == token)
    assert not all(greedy), "a text that no model would have written word by word"
    none = scored(live, "alpha", TEXT, logprobs=0)["choices"][0]["logprobs"]
    assert none["top_logprobs"] is None
    assert none["tokens"] == logprobs["tokens"][: len(none["tokens"])]


@with_demo
@pytest.mark.http
@pytest.mark.parametrize("stream", [False, True])
def test_alternatives_of_an_answer_are_told(live: Live, stream: bool) -> None:
    body = {"model": "alpha", "prompt": "Once", "max_tokens": 6, "logprobs": 3, "temperature": 0}
    answer = live.client.post("/v1/completions", json=body | {"stream": stream})
    assert answer.status_code == 200, answer.text
    if stream:
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        parts = [json.loads(line)["choices"][0]["logprobs"] for line in lines]
    else:
        parts = [answer.json()["choices"][0]["logprobs"]]
    seen = 0
    for part in filter(None, parts):
        told = zip(part["tokens"], part["token_logprobs"], part["top_logprobs"], strict=True)
        for token, logprob, top in told:
            seen += 1
            assert len(top) == 3
            assert max(top.values()) == pytest.approx(top[token], abs=1e-4)
            assert top[token] == pytest.approx(logprob)
    assert seen >= 4


@with_demo
@pytest.mark.http
def test_top_logprobs_of_a_chat_need_logprobs(live: Live) -> None:
    body = {"model": "alpha", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}
    answer = live.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "logprobs" in answer.json()["error"]["message"]


def test_a_chat_tells_alternatives_as_openai_does() -> None:
    others = (Alternative(5, "a", -0.1), Alternative(6, "é", -2.0))
    token = GeneratedToken(5, "a", -0.1, False, others)
    result = GenerateResult("1", "a", "", (token,), "length", None, 1, 0.0, 0.0)
    (choice,) = ChatFormat("", 0, "m", True, 2).answer([result], 1)["choices"]
    (content,) = choice["logprobs"]["content"]
    assert content == {
        "token": "a",
        "logprob": -0.1,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.1, "bytes": [97]},
            {"token": "é", "logprob": -2.0, "bytes": [195, 169]},
        ],
    }
