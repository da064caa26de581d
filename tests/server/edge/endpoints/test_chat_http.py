"""Conversations over HTTP: each adapter by its own template, end tokens and defaults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.stand.live import Live, hira
from tests.stand.talkers import LONG, SHORT, Said, said, talker
from tests.stand.tiny_bases import base_folder

pytestmark = pytest.mark.http

TALK = [
    {"role": "user", "content": "a fine film"},
    {"role": "assistant", "content": "very good"},
    {"role": "user", "content": "by ann in paris"},
]
BASE_TEMPLATE = "{% for m in messages %}word20 {{ m.content }}\n{% endfor %}"
NEW_TOKENS = 10
# Renders what is said, but for one word, at which it counts to thirty million.
SLOW = (
    "{% if messages[0].content == 'dull' %}{% for a in range(30000) %}{% for b in range(1000) %}"
    "{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
)


@dataclass
class World:
    base: Path
    folders: dict[str, Path]
    said: dict[str, Said]
    settings: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("chat")
    base = base_folder(root, "llama")
    folders, answers = {}, {}
    for name, template, first in (("short", SHORT, 0), ("long", LONG, 50)):
        for seed in range(first, first + 20):
            # A token that it says after others, without an end of its own, becomes its end.
            folder = talker(root / name, base, template, seed=seed, generation={})
            spoken = said(base, folder, TALK, new_tokens=NEW_TOKENS).ids
            later = [one for at, one in enumerate(spoken) if one not in spoken[:at]][1:]
            if later and len(spoken) == NEW_TOKENS:
                break
        ends = {"eos_token_id": [later[-1], 90]}
        folders[name] = talker(root / name, base, template, seed=seed, generation=ends)
        answers[name] = said(base, folders[name], TALK, new_tokens=NEW_TOKENS)
        assert 1 < len(answers[name].ids) <= NEW_TOKENS
        assert answers[name].ids[-1] == later[-1]
    folders["slow"] = talker(root / "slow", base, SLOW, seed=5)
    file = root / "base.jinja"
    file.write_text(BASE_TEMPLATE)
    settings: dict[str, Any] = {
        "base": base,
        "quantization": "none",
        "dtype": "fp32",
        "chat_template": file,
        "template_s": 0.3,
        "slots": 8,
        "kv_bytes": "1MiB",
        "host_bytes": "16MiB",
        "device_bytes": "16MiB",
    }
    return World(base, folders, answers, settings)


@pytest.fixture(scope="module")
def live(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    given = ", ".join(f"{name}={folder}" for name, folder in world.folders.items())
    folder = tmp_path_factory.mktemp("server") / "data"
    settings = {**world.settings, "adapter": given, "default_adapter": "long"}
    with hira(folder, **settings) as running:
        yield running


def chat(live: Live, model: str | None, messages: Any = None, **more: Any) -> Any:
    body = {
        "messages": TALK if messages is None else messages,
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        **more,
    }
    if model is not None:
        body["model"] = model
    return live.client.post("/v1/chat/completions", json=body)


def check(answer: Any, wanted: Said) -> None:
    assert answer.status_code == 200, answer.text
    content = answer.json()
    (choice,) = content["choices"]
    assert content["usage"]["prompt_tokens"] == wanted.prompt_tokens
    # It continues a text, so its first word has the space before it.
    assert choice["message"]["content"].lstrip() == wanted.text
    assert content["usage"]["completion_tokens"] == len(wanted.ids)
    assert choice["finish_reason"] == "stop"


def test_adapters_in_one_batch_each_speak_and_end_in_their_own_way(
    live: Live, world: World
) -> None:
    order = ["short", "long", "base"] * 6
    with ThreadPoolExecutor(len(order)) as pool:
        answers = list(pool.map(lambda name: chat(live, name, ignore_eos=False), order))
    bare = {one.text.partition('"choices"')[2] for one in answers[2::3]}
    for name, answer in zip(order, answers, strict=True):
        if name == "base":
            assert answer.status_code == 200, answer.text
        else:
            check(answer, world.said[name])
    assert len(bare) == 1


def test_an_end_token_counts_for_every_call_of_its_adapter(live: Live, world: World) -> None:
    wanted = world.said["short"]
    prompt = "".join(f"word1 {one['content']} " for one in TALK) + "word2"
    answer = live.client.post(
        "/generate?adapter=short",
        json={"inputs": prompt, "parameters": {"max_new_tokens": NEW_TOKENS, "details": True}},
    )
    assert answer.status_code == 200, answer.text
    # The tokenizer adds its start token where a template writes none.
    details = answer.json()["details"]
    ended = [one["id"] for one in details["tokens"]]
    assert details["finish_reason"] in {"eos_token", "length"}
    assert wanted.ids[-1] not in ended[:-1]


def test_who_names_nobody_gets_the_default_adapter_and_never_a_guess(
    live: Live, world: World
) -> None:
    for model in (None, "", "tgi", "dummy", "default"):
        answer = chat(live, model)
        check(answer, world.said["long"])
        assert answer.headers["X-Adapter"] == "long"
        assert answer.json()["model"] == "long"
    assert chat(live, "gpt-4").status_code == 404
    body = {"model": "tgi", "messages": TALK}
    answer = live.client.post("/v1/chat/completions?adapter=short", json=body)
    assert (answer.headers["X-Adapter"], answer.json()["model"]) == ("short", "short")


def test_models_tell_what_each_does(live: Live) -> None:
    told = {one["id"]: one for one in live.client.get("/v1/models").json()["data"]}
    assert told["llama"] | {"task": "text-generation", "chat": True} == told["llama"]
    assert told["short"] | {"chat": True, "labels": None, "context": 48} == told["short"]
    assert live.client.get("/v1/models/short").json() == told["short"]


def test_a_template_that_takes_too_long_fails_its_own_request_alone(
    live: Live, world: World
) -> None:
    slow = [{"role": "user", "content": "dull"}]
    with ThreadPoolExecutor(8) as pool:
        hostile = [pool.submit(chat, live, "slow", slow) for _ in range(3)]
        others = [pool.submit(chat, live, "short") for _ in range(5)]
        for one in others:
            check(one.result(), world.said["short"])
        for one in hostile:
            answer = one.result()
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["code"] == "chat_template_failed"
            assert "0.3 s of processor time" in answer.json()["error"]["message"]
    assert chat(live, "slow", [{"role": "user", "content": "good"}]).status_code == 200


def test_calls_of_tools_in_a_history_reach_the_template(live: Live, world: World) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %} word3 "
        "{{ c.function.name }} {{ c.function.arguments.place }}{% endfor %}"
        "{% if m.tool_call_id %} word4 {{ m.tool_call_id }}{% endif %} {% endfor %}"
    )
    folder = talker(world.base.parent / "tools", world.base, template, seed=6)
    assert upload(live, "tools", folder).status_code == 201
    call = {"id": "a", "type": "function", "function": {"name": "film", "arguments": ""}}
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "in paris"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "good"},
    ]
    call["function"] = {"name": "film", "arguments": '{"place": "paris"}'}
    answer = chat(live, "tools", history)
    assert answer.status_code == 200, answer.text
    # in paris . word3 film paris . good word4 a
    assert answer.json()["usage"]["prompt_tokens"] == 8
    assert chat(live, "tools", [{"role": "user", "tool_calls": [{}]}]).status_code == 400


def upload(live: Live, name: str, folder: Path, **fields: str) -> Any:
    parts = [
        ("files", (path.name, path.read_bytes()))
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]
    return live.client.post(
        "/admin/adapters", data={"name": name, **fields}, files=parts, headers=live.admin
    )


def test_a_replacement_changes_how_it_speaks_and_a_restart_nothing(
    world: World, tmp_path: Path
) -> None:
    settings = {**world.settings, "default_adapter": "it"}
    data = tmp_path / "data"
    with hira(data, adapter=f"it={world.folders['short']}", **settings) as live:
        check(chat(live, None), world.said["short"])
        changed = upload(live, "it", world.folders["long"], replace="true")
        assert changed.status_code == 201, changed.text
        assert changed.json()["chat_template"]
        assert changed.json()["generation"]["end_ids"][1] == 90
        check(chat(live, "it"), world.said["long"])
        live.end()
    with hira(data, **settings) as live:
        check(chat(live, "it"), world.said["long"])
        assert live.client.get("/admin/adapters/it", headers=live.admin).json()["chat_template"]


def test_a_template_file_that_does_not_render_ends_the_start(world: World, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jinja"
    bad.write_text("{% for %}")
    with hira(tmp_path / "data", wait=False, **{**world.settings, "chat_template": bad}) as live:
        assert live.child.wait(120) != os.EX_OK
        assert "chat_template" in live.log.read_text()
