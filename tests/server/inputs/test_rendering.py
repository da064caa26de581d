"""Templates of strangers: rendered as transformers renders them, and never without a bound."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from server.inputs.rendering import (
    ChatTemplate,
    ChatTemplateFailed,
    ChatTemplateUnread,
    RenderLimits,
    RenderProcess,
)
from server.inputs.text_errors import InputTooSlow, InvalidInput

PIECES = (
    "{%- for m in messages %}\n  {{ m.role }}: {{ m.content | trim }}\n{%- endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ m | tojson }}\n{% endfor %}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m.content %}{% endfor %}{{ ns.n }} {{ ns.last }}",
    "{% macro said(m) %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endmacro %}"
    "{% for m in messages %}{{ said(m) }}{% endfor %}",
    "{{ dict(a=1, b='é') | tojson(indent=2) }}{{ dict.fromkeys(['x', 'y'], 3) }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
    "{{ bos_token }}{% if add_generation_prompt %}<|a|>{% endif %}{{ tools }}{{ documents }}",
    "{% for m in messages %}{{ m.thinking or '' }}{{ m.reasoning_content }}{% endfor %}",
    "{{ messages[0]['content'].split(' ') | join('|') | upper }}{{ messages | length }}\n\n",
    "{% for m in messages[::-1] %}{{ m.content[:3] }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}",
    "{{ strftime_now('%Y') }}  \n  {%- if true %}\n    x\n  {%- endif %}\n",
    "{{ messages.append(1) }}",
    "{{ ''.__class__ }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ raise_exception('no ' ~ messages[0].role) }}",
    "{{ messages[9].content.x }}",
)
WORDS = ("hello", " two  words ", "naïve — «café»", "日本語", "<b>&amp;</b>", "", "{{ 1 }}", "a\nb")


@pytest.fixture(scope="module")
def process() -> Iterator[RenderProcess]:
    with RenderProcess() as made:
        yield made


def reference(template: str, messages: list[dict[str, Any]], variables: dict[str, str]) -> str:
    (text,), _ = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        add_generation_prompt=True,
        **variables,
    )
    return str(text)


@pytest.mark.parametrize("seed", range(60))
def test_it_renders_what_transformers_renders_and_refuses_what_it_refuses(
    seed: int, process: RenderProcess
) -> None:
    draw = random.Random(seed)
    template = "".join(draw.sample(PIECES, draw.choice([1, 2, 3])))
    messages: list[dict[str, Any]] = [
        {"role": draw.choice(["user", "assistant", "system"]), "content": draw.choice(WORDS)}
        for _ in range(draw.randint(1, 4))
    ]
    if draw.random() < 0.5:
        messages[0]["reasoning_content"] = draw.choice(WORDS)
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    try:
        wanted = reference(template, messages, variables)
    except Exception:  # noqa: BLE001  # whatever it raises is a refusal
        with pytest.raises(InvalidInput):
            process.render(ChatTemplate(template, variables), messages)
        return
    assert process.render(ChatTemplate(template, variables), messages) == wanted


@pytest.mark.parametrize(
    ("template", "limits", "reason"),
    [
        (
            "{% for a in range(30000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}",
            RenderLimits(cpu_s=0.2),
            "0.2 s of processor time",
        ),
        (
            "{% for a in range(2000) %}{{ 'x' * 100 }}{% endfor %}",
            RenderLimits(characters=10_000),
            "10000 characters",
        ),
        ("{{ 'x' * 100000000 | int }}", RenderLimits(memory_bytes=80 << 20), "memory"),
        ("{% for %}", RenderLimits(), "Expected"),
    ],
)
def test_what_takes_too_much_is_an_error_and_the_next_is_answered(
    template: str, limits: RenderLimits, reason: str
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    good = ChatTemplate("{{ messages[0].content }}")
    with RenderProcess(limits) as process:
        for _ in range(2):
            with pytest.raises(ChatTemplateFailed) as caught:
                process.render(ChatTemplate(template), messages)
            assert reason in str(caught.value.found)
            assert caught.value.expected
            assert caught.value.fix
            assert process.render(good, messages) == "hi"


def test_a_deadline_ends_it_too() -> None:
    slow = ChatTemplate(
        "{% for a in range(90000) %}{% for b in range(300) %}{% endfor %}{% endfor %}"
    )
    with RenderProcess(RenderLimits(cpu_s=30.0)) as process:
        process.render(ChatTemplate("x"), [])
        with pytest.raises(InputTooSlow):
            process.render(slow, [], deadline=time.monotonic() + 0.3)


def test_a_process_has_nothing_of_the_server_and_one_that_was_killed_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HIRA_ADMIN_KEY", "secret-key")
    own = psutil.Process()
    before = {one.pid for one in own.children()}
    with RenderProcess() as process:
        assert process.render(ChatTemplate("x"), []) == "x"
        (child,) = (one for one in own.children() if one.pid not in before)
        # Nothing of the server's: neither its keys nor its files.
        assert not [name for name in child.environ() if name.startswith("HIRA_")]
        assert child.cwd() == "/"
        child.kill()
        child.wait()
        assert process.render(ChatTemplate("y"), []) == "y"
    assert {one.pid for one in own.children()} == before


def test_tools_and_variables_reach_a_template_that_reads_them_and_no_other() -> None:
    text = (
        "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
        "{% for t in tools or [] %}{{ t.name }}{% endfor %}"
        "{{ bos }}{{ mood }}{{ messages[0].content }}"
    )
    template = ChatTemplate(text, {"bos": "<s>"})
    said = [{"role": "user", "content": "hi"}]
    with RenderProcess() as process:
        found = process.render(template, said, tools=[{"name": "f"}], variables={"mood": "glad"})
        assert found == "f<s>gladhi"
        assert process.render(template, said) == "<s>hi"
        kept = process.render(template, said, variables={"bos": "mine"})
        assert kept == "<s>hi", "a client's variable never takes the place of the template's own"
        for unread in ("tool", "messages2", "namespace"):
            with pytest.raises(ChatTemplateUnread) as caught:
                process.render(template, said, variables={"mood": 1, unread: 2})
            assert caught.value.name == unread
        bare = ChatTemplate("{{ messages[0].content }} tools {# tools #}", owner="mine")
        with pytest.raises(ChatTemplateUnread, match="of mine does not know tools"):
            process.render(bare, said, tools=[{"name": "f"}])
