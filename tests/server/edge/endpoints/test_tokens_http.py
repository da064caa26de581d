"""Texts to tokens and back over HTTP, and what /info says, on a tiny encoder and a tiny decoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import AutoTokenizer

from tests.stand import tiny_bases
from tests.stand.live import Live, hira

pytestmark = pytest.mark.http

TEMPLATE = (
    "{{ eos_token }}{% for one in tools or [] %} {{ one.function.name }}{% endfor %}"
    "{% if mood %} {{ mood }}{% endif %}{% if reasoning_effort %} {{ reasoning_effort }}{% endif %}"
    "{% for one in messages %} {{ one['content'] }}{% endfor %} good"
)
TOOL = {"type": "function", "function": {"name": "film"}}
LONG = " ".join(["very"] * 90)
TEXTS = ["a fine film, not dull", "by ann in paris", "", "unheard-of [MASK] ÄÖ film"]


def served(root: Path, kind: str, adapters: Mapping[str, tuple[str, tuple[str, ...]]]) -> list[str]:
    base = tiny_bases.base_folder(root, kind)
    arguments = ["--base", str(base), "--quantization=none", "--dtype=fp32"]
    for name, (task, labels) in adapters.items():
        folder = tiny_bases.adapter(root / name, base, task, labels=labels)
        if name == "talk":
            made = {"chat_template": TEMPLATE, "eos_token": "[SEP]", "bos_token": "[CLS]"}
            (folder / "tokenizer_config.json").write_text(json.dumps(made))
        arguments += ["--adapter", f"{name}={folder}"]
    return arguments


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("encoder")
    adapters = {
        "mood": ("text-classification", ("bad", "fine", "great")),
        "relevance": ("text-ranking", ("LABEL_0",)),
    }
    keys = "reader=secret-key"
    with hira(root / "data", *served(root, "bert", adapters), api_keys=keys) as server:
        server.client.headers["Authorization"] = "Bearer secret-key"
        yield server


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("decoder")
    adapters = {"talk": ("text-generation", ("no", "yes")), "mute": ("text-generation", ("a", "b"))}
    with hira(root / "data", *served(root, "llama", adapters), tool_format="hermes") as server:
        yield server


def post(live: Live, path: str, body: Any) -> httpx2.Response:
    return live.client.post(path, json=body)


def reference(live: Live, kind: str) -> Any:
    return AutoTokenizer.from_pretrained(live.folder.parent / kind)


@pytest.mark.parametrize("special", [True, False])
def test_tokens_of_texts_are_the_tokenizers_own(encoder: Live, special: bool) -> None:
    wanted = reference(encoder, "bert")
    sent = {"inputs": TEXTS, "add_special_tokens": special}
    told = post(encoder, "/tokenize?adapter=mood", sent)
    assert told.headers["X-Adapter"] == "mood"
    for text, tokens in zip(TEXTS, told.json(), strict=True):
        own = wanted(text, add_special_tokens=special, return_offsets_mapping=True)
        assert [one["id"] for one in tokens] == own["input_ids"]
        for one, (start, stop) in zip(tokens, own["offset_mapping"], strict=True):
            if one["special"]:
                assert (one["start"], one["stop"]) == (None, None)
                assert one["text"] in {"[CLS]", "[SEP]"}
            else:
                assert (one["start"], one["stop"], one["text"]) == (start, stop, text[start:stop])
    alone = post(encoder, "/tokenize", {**sent, "inputs": TEXTS[0]}).json()
    assert alone == told.json()[:1], "TEI answers one text with a list of lists"


def test_one_text_on_a_base_that_generates_is_told_as_tgi_does(decoder: Live) -> None:
    many = post(decoder, "/tokenize", {"inputs": TEXTS[:2]}).json()
    assert post(decoder, "/tokenize", {"inputs": TEXTS[0]}).json() == many[0]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_vllms_shape_counts_what_a_call_would_send(
    kind: str, request: pytest.FixtureRequest
) -> None:
    live: Live = request.getfixturevalue(kind)
    counted = post(live, "/tokenize", {"prompt": TEXTS[0], "return_token_strs": True}).json()
    own = reference(live, "bert" if kind == "encoder" else "llama")
    assert counted["tokens"] == own(TEXTS[0])["input_ids"]
    assert counted["token_strs"] == own.convert_ids_to_tokens(counted["tokens"])
    assert (counted["count"], counted["max_model_len"]) == (len(counted["tokens"]), 48)
    path, body = ("/v1/embeddings", {"model": "base", "input": TEXTS[0]})
    used = post(live, path, body).json()["usage"]["prompt_tokens"]
    assert used == counted["count"]
    back = post(live, "/detokenize", {"tokens": counted["tokens"]}).json()
    assert back == {"prompt": own.decode(counted["tokens"])}


@pytest.mark.parametrize("path", ["/detokenize", "/decode"])
def test_ids_become_texts_as_tei_does(encoder: Live, path: str) -> None:
    own = reference(encoder, "bert")
    lists = [own(text)["input_ids"] for text in TEXTS]
    for skip in (True, False):
        told = post(encoder, path, {"ids": lists, "skip_special_tokens": skip}).json()
        assert told == [own.decode(ids, skip_special_tokens=skip) for ids in lists]
    assert post(encoder, path, {"ids": lists[0]}).json() == [
        own.decode(lists[0], skip_special_tokens=True)
    ]


def test_a_conversation_is_counted_by_the_adapters_own_template(decoder: Live) -> None:
    messages = [{"role": "user", "content": "a fine film"}]
    counted = post(decoder, "/tokenize", {"model": "talk", "messages": messages}).json()
    own = reference(decoder, "llama")
    wanted = own("[SEP] a fine film good", add_special_tokens=False)["input_ids"]
    assert counted["tokens"] == wanted
    chat = {"model": "talk", "messages": messages, "max_tokens": 1}
    usage = post(decoder, "/v1/chat/completions", chat).json()["usage"]
    assert usage["prompt_tokens"] == counted["count"]
    without = post(decoder, "/tokenize", {"model": "mute", "messages": messages}).json()
    assert without["code"] == "chat_template_missing"


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/tokenize", {"inputs": LONG}, (413, "input_too_long", "inputs")),
        ("/tokenize", {"prompt": LONG}, (413, "input_too_long", "prompt")),
        ("/tokenize", {"inputs": "a " * 5_000_000}, (413, "body_too_large", None)),
        ("/tokenize", {"inputs": "very " * 500_000}, (413, "input_too_long", "inputs")),
        ("/tokenize", {"inputs": ["a"] * 300}, (422, "invalid_request", "inputs")),
        ("/tokenize", {"inputs": []}, (422, "invalid_request", "inputs")),
        ("/tokenize", {"inputs": "\ud800"}, (422, "invalid_request", "inputs")),
        ("/tokenize", {"inputs": "a", "truncate": 3}, (422, "invalid_request", "truncate")),
        ("/tokenize", {"inputs": "a", "prompt_name": "query"},
         (400, "unsupported_parameter", "prompt_name")),
        ("/tokenize?adapter=nobody", {"inputs": "a"}, (404, "adapter_not_found", "adapter")),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, (404, "adapter_not_found", "model")),
        ("/tokenize?adapter=mood", {"prompt": "a", "model": "relevance"},
         (400, "adapter_conflict", "model")),
        ("/detokenize", {"ids": [96]}, (422, "invalid_input", "ids")),
        ("/detokenize", {"tokens": [-1]}, (422, "invalid_input", "tokens")),
        ("/decode", {"ids": [1] * 49}, (413, "input_too_long", "ids")),
        ("/decode", {"ids": [[1]] * 300}, (422, "invalid_request", "ids")),
        ("/decode", {"ids": [1 << 70]}, (422, "invalid_input", "ids")),
    ],
)  # fmt: skip
def test_what_cannot_be_tokenized_is_refused(
    encoder: Live, path: str, body: Any, expected: tuple[int, str, str | None]
) -> None:
    raw = json.dumps(body)
    answer = encoder.client.post(path, content=raw, headers={"Content-Type": "application/json"})
    told = answer.json()
    assert (answer.status_code, told["code"], told.get("field")) == expected


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"tools": [TOOL]}, "[SEP] film a good"),
        ({"tools": [TOOL], "tool_choice": "none"}, "[SEP] a good"),
        ({"chat_template_kwargs": {"mood": "dull"}}, "[SEP] dull a good"),
        ({"reasoning_effort": "very"}, "[SEP] very a good"),
    ],
)
def test_tools_and_variables_of_a_template_count_as_in_a_chat(
    decoder: Live, fields: dict[str, Any], prompt: str
) -> None:
    body = {"model": "talk", "messages": [{"role": "user", "content": "a"}], **fields}
    counted = post(decoder, "/tokenize", body).json()
    own = reference(decoder, "llama")
    assert counted["tokens"] == own(prompt, add_special_tokens=False)["input_ids"]
    chat = post(decoder, "/v1/chat/completions", {**body, "max_tokens": 1}).json()
    assert chat["usage"]["prompt_tokens"] == counted["count"]


def test_fields_that_vllms_shape_does_not_have_are_named_or_refused(decoder: Live) -> None:
    chat: dict[str, Any] = {"model": "talk", "messages": [{"role": "user", "content": "a"}]}
    for path, body in (
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", chat),
        ("/detokenize", {"tokens": [5]}),
    ):
        answer = post(decoder, path, {**body, "x_vendor": 1})
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Ignored-Fields"] == "x_vendor"
        told = post(decoder, path, {**body, "adapter": "mute"})
        assert (told.status_code, told.json()["field"]) == (400, "adapter")


def test_what_changes_a_conversation_is_refused(decoder: Live) -> None:
    body = {"model": "talk", "messages": [{"role": "user", "content": "a"}]}
    for name, value in (
        ("tools", [{"type": "function", "function": {"name": "no name"}}]),
        ("tool_choice", "required"),
        ("documents", [{"text": "a"}]),
        ("chat_template", "{{ 1 }}"),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"never_read": True}),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
    ):
        answer = post(decoder, "/tokenize", {**body, name: value})
        assert answer.status_code in {400, 422}, answer.text
        assert name in answer.text


def test_the_served_model_is_described(encoder: Live, decoder: Live) -> None:
    base = encoder.client.get("/info").json()
    assert base["model_type"] == {"fill-mask": {}}
    assert (base["model_dtype"], base["model_device_type"]) == ("float32", "cpu")
    assert (base["max_input_length"], base["max_client_batch_size"]) == (48, 256)
    assert len(base["checkpoint_digest"]) == 32
    assert base["weights_digest"] in encoder.client.get("/metrics").text
    mood = encoder.client.get("/info?adapter=mood").json()
    assert mood["model_type"]["classifier"]["id2label"] == {"0": "bad", "1": "fine", "2": "great"}
    assert mood["model_type"]["classifier"]["label2id"]["great"] == 2
    assert (mood["served_model_name"], mood["chat"]) == ("mood", False)
    assert set(encoder.client.get("/info?adapter=relevance").json()["model_type"]) == {"reranker"}
    story = decoder.client.get("/info?adapter=talk").json()
    assert (story["model_pipeline_tag"], story["chat"]) == ("text-generation", True)
    assert (story["max_input_tokens"], story["max_total_tokens"]) == (47, 48)
    assert decoder.client.get("/info?adapter=mute").json()["chat"] is False
    assert encoder.client.get("/info?adapter=nobody").status_code == 404


def test_lookups_need_a_key_where_inference_does_and_health_none(encoder: Live) -> None:
    bare = httpx2.Client(base_url=encoder.url)
    for path in ("/tokenize", "/detokenize", "/decode"):
        assert bare.post(path, json={}).status_code == 401
    assert bare.get("/info").status_code == 401
    assert bare.get("/ping").json() == {"status": "ready"}
    assert set(bare.get("/version").json()) == {"version"}
    bare.close()


def test_a_prompt_beyond_the_context_is_openais_error(decoder: Live) -> None:
    sent = {"model": "talk", "prompt": LONG, "max_tokens": 8}
    answer = post(decoder, "/v1/completions", sent)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["type"] == "invalid_request_error"
    assert "This model's maximum context length is 48 tokens. However," in error["message"]
    assert 'code="context_length_exceeded"' in decoder.client.get("/metrics").text
    native = post(decoder, "/generate?adapter=talk", {"inputs": LONG})
    assert (native.status_code, native.json()["code"]) == (413, "input_too_long")
