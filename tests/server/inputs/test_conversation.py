"""What of an adapter's template, end tokens and defaults is used on a base, and what is noted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.intake.conversation import Conversation
from server.inputs.conversation import (
    ChatTemplateMissing,
    base_template,
    read_template,
    settle,
    template_of,
)
from server.inputs.rendering import RenderLimits, RenderProcess
from server.inputs.text import Text
from tests.stand.tiny_bases import VOCABULARY, tokenizer

PLAIN = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def process() -> Iterator[RenderProcess]:
    with RenderProcess(RenderLimits(cpu_s=0.5)) as made:
        yield made


@pytest.fixture
def text() -> Text:
    return Text(tokenizer("llama"), max_tokens=40, vocab_size=VOCABULARY)


def brought(template: str | None = PLAIN, **more: Any) -> Conversation:
    templates = {} if template is None else {"default": template}
    return Conversation(
        **{"templates": templates, "special_tokens": {"eos_token": "[SEP]"}, **more}
    )


def test_what_agrees_is_used_and_nothing_is_noted(text: Text, process: RenderProcess) -> None:
    found = settle(
        brought(token_ids={"[SEP]": 3}, added={"[SEP]": 3}, sampling={"top_p": 0.9}), text, process
    )
    assert found.template
    assert found.generation == {"top_p": 0.9, "end_ids": [3]}
    assert found.notes == ()
    template = template_of(brought(special_tokens={"eos_token": "good"}), text, "it")
    assert template.variables["eos_token"] == "good"
    assert template.variables["bos_token"] == "[CLS]"


def test_the_file_of_generation_goes_before_the_tokenizers_end(
    text: Text, process: RenderProcess
) -> None:
    found = settle(brought(end_ids=(7, 9)), text, process)
    assert found.generation["end_ids"] == [7, 9]


@pytest.mark.parametrize(
    ("more", "uses_template", "ends", "told"),
    [
        ({"special_tokens": {"eos_token": "<|end|>"}}, False, None, "'<|end|>' is no token of"),
        ({"token_ids": {"[SEP]": 90}}, False, None, "id 90 for the adapter and 3 for the base"),
        ({"added": {"<|im|>": 96}}, True, [3], "'<|im|>'; their text is read"),
        (
            {"template": "<|im|>" + PLAIN, "token_ids": {"<|im|>": 96}},
            False,
            [3],
            "'<|im|>' is no token of the base",
        ),
        ({"end_ids": (5, 96, -1)}, True, [5], "eos_token_id 96 is not used: the base has no"),
        (
            {"end_ids": (5, 6), "token_ids": {"<|im|>": 6}},
            True,
            [5],
            "eos_token_id 6 is not used: it is '<|im|>' for the adapter and 'fine' for the base",
        ),
        ({"template": "{% for %}"}, False, [3], "could not be run; found: Expected"),
        (
            {"template": "{{ raise_exception('no') }}"},
            False,
            [3],
            "refused the messages; found: no",
        ),
        ({"template": "nothing"}, False, [3], "leaves out what the user says"),
        (
            {
                "template": "{% for a in range(30000) %}{% for b in range(1000) %}"
                "{% endfor %}{% endfor %}"
            },
            False,
            [3],
            "0.5 s of processor time",
        ),
        ({"template": None, "templates": {"tool_use": PLAIN}}, False, [3], "for tools only"),
    ],
)
def test_what_does_not_agree_is_not_used_and_named(
    more: dict[str, Any],
    *,
    uses_template: bool,
    ends: list[int] | None,
    told: str,
    text: Text,
    process: RenderProcess,
) -> None:
    found = settle(brought(**more), text, process)
    assert found.template is uses_template
    assert found.generation.get("end_ids") == ends
    assert told in " / ".join(found.notes)


def test_the_operators_template_is_tried_before_it_is_used(
    text: Text, process: RenderProcess, tmp_path: Path
) -> None:
    with pytest.raises(ChatTemplateMissing):
        base_template(text)
    file = tmp_path / "own.jinja"
    for content, reason in (
        (b"\xff", "UTF-8"),
        (b"x" * (1 << 19), "larger"),
        (b"{% if %}", "Expected"),
        (b"nothing", "leaves out"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            read_template(file, text, process)
    with pytest.raises(ValueError, match="No such file"):
        read_template(tmp_path / "none", text, process)
    file.write_text(PLAIN)
    text.tokenizer.chat_template = read_template(file, text, process)
    assert base_template(text).text == PLAIN
