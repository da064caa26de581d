"""Conversations with tools through templates of the published forms, and their calls read back.

The templates here are our own and short; they write turns, calls and results as those of Qwen 2.5
and 3, of Llama 3.x and of Mistral's models do, with what those refuse. Where the package ``trl`` is
installed, which carries the published ones of Qwen and Llama, the same holds for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from server.edge.endpoints.openai_format import ToolReading
from server.edge.endpoints.schemas_conversation import ChatRequest
from server.edge.endpoints.tool_calls import (
    CALL_MARKS,
    CallBegun,
    MoreArguments,
    Words,
    form_of,
)
from server.edge.endpoints.tool_grammar import asked_of_tools
from server.inputs.grammar_engine import Vocabulary
from server.inputs.grammar_program import Checker
from server.inputs.rendering import ChatTemplate, RenderProcess
from server.inputs.text_errors import InvalidInput

QWEN = """\
{%- if tools %}<|im_start|>system
{{ messages[0].content + '\n' if messages[0].role == 'system' }}<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools> <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
<tool_response>
{{ m.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- elif m.role != 'system' %}
{{- '<|im_start|>' + m.role }}
{%- if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA = """\
{{- bos_token }}
{%- macro turn(role, text) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + text }}
{{- '<|eot_id|>' }}{% endmacro %}
{%- if messages[0].role == 'system' %}{{ turn('system', messages[0].content) }}
{%- set messages = messages[1:] %}{% endif %}
{%- for m in messages %}
{%- if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set f = m.tool_calls[0].function %}
{{- turn('assistant', '{"name": "' + f.name + '", "parameters": ' + f.arguments | tojson + '}') }}
{%- elif m.role == 'tool' %}{{ turn('ipython', m.content | tojson) }}
{%- elif loop.first and tools %}
{%- set known %}{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{% endset %}
{{- turn('user', '{"name": function name, "parameters": dictionary of argument name and its value}'
   + known + m.content) }}
{%- else %}{{ turn(m.role, m.content | trim) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
# The older of Mistral's writes a list of calls, the newer ones a name, an id and the arguments.
_MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system='', users=0, at=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.users = ns.users + 1 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}
{%- elif m.role == 'user' %}{% set ns.at = ns.at + 1 %}
{%- if ns.at == ns.users and tools %}
{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + (ns.system if ns.at == ns.users else '') + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id is undefined or m.tool_call_id | length != 9 %}
{{- raise_exception('ids have nine characters') }}{% endif %}
{{- '[TOOL_RESULTS]' + {'content': m.content, 'call_id': m.tool_call_id} | tojson }}
{{- '[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}
{%- for call in m.tool_calls %}{% if call.id is undefined or call.id | length != 9 %}
{{- raise_exception('ids have nine characters') }}{% endif %}{% endfor %}
{{- CALLS }}
{{- eos_token }}
{%- else %}{{ m.content + eos_token }}
{%- endif %}
{%- endfor %}"""
MISTRAL = _MISTRAL.replace(
    "{{- CALLS }}",
    """{{- '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}' }}{{ ', ' if not loop.last }}{% endfor %}{{ ']' }}""",
)
MISTRAL_WITH_ARGS = _MISTRAL.replace(
    "{{- CALLS }}",
    """{% for call in m.tool_calls %}
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
{%- endfor %}""",
)
MISTRAL_WITH_IDS = MISTRAL_WITH_ARGS.replace("+ '[ARGS]'", "+ '[CALL_ID]' + call.id + '[ARGS]'")
OWN = {
    "qwen": (QWEN, "<|im_end|>"),
    "llama": (LLAMA, "<|eot_id|>"),
    "mistral, a list": (MISTRAL, "</s>"),
    "mistral, name and arguments": (MISTRAL_WITH_ARGS, "</s>"),
    "mistral, name, id and arguments": (MISTRAL_WITH_IDS, "</s>"),
}
PUBLISHED = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["place"],
            },
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}},
]
ARGUMENTS = {"place": 'Köln, "old town"', "days": 2}


def called(number: int, name: str, arguments: Any) -> dict[str, Any]:
    """As an OpenAI client sends a call back."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def conversation(calls: int) -> list[dict[str, Any]]:
    made = [called(1, "weather", ARGUMENTS), called(2, "clock", {})][:calls]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is it there?"},
        {"role": "assistant", "content": None, "tool_calls": made},
        *({"role": "tool", "tool_call_id": one["id"], "content": "14 °C"} for one in made),
        {"role": "assistant", "content": "Cool."},
        {"role": "user", "content": "And tomorrow?"},
    ]


@pytest.fixture(scope="module")
def process() -> Iterator[RenderProcess]:
    with RenderProcess() as made:
        yield made


@pytest.fixture(params=[*OWN, *PUBLISHED])
def template(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A template and the mark that ends a turn of it."""
    name = request.param
    if name in OWN:
        return OWN[name]
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("the package trl, which carries published templates, is not installed")
    file = Path(spec.origin).parent / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"this version of trl has no template {name}")
    return file.read_text(encoding="utf-8"), PUBLISHED[name]


def plain(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools as the endpoint gives them to a template."""
    body = ChatRequest.model_validate({"messages": messages, "tools": TOOLS})
    return [one.plain() for one in body.messages], body.used_tools()


def calls_at_once(text: str) -> int:
    """How many calls of one turn the template takes."""
    return 1 if form_of(text) == "llama3_json" else 2


def test_a_conversation_with_tools_is_written_as_transformers_writes_it(
    template: tuple[str, str], process: RenderProcess
) -> None:
    text, _ = template
    messages, tools = plain(conversation(calls_at_once(text)))
    found = process.render(ChatTemplate(text, VARIABLES), messages, tools=tools)
    (wanted,), _ = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=text,
        add_generation_prompt=True,
        **VARIABLES,
    )
    assert found == wanted
    for said in ("weather", "clock", "The weather of a place.", "14 °C", "Cool.", "And tomorrow?"):
        assert said in found
    assert '"place": "K' in found  # arguments are values to a template, and not a text with quotes


def test_calls_are_read_back_from_what_the_template_writes(
    template: tuple[str, str], process: RenderProcess
) -> None:
    text, end = template
    count = calls_at_once(text)
    messages, tools = plain(conversation(count)[:3])
    before = process.render(ChatTemplate(text, VARIABLES), messages[:2], tools=tools)
    whole = process.render(ChatTemplate(text, VARIABLES), messages, tools=tools)
    assert whole.startswith(before.removesuffix("<think>\n\n</think>\n\n"))
    answer = whole[len(before) :].partition(end)[0]
    form = form_of(text)
    assert form is not None
    marks = tuple(one for one in CALL_MARKS if form == "mistral" and one in text)
    reading = ToolReading(form, ("weather", "clock"), True, marks)
    for size in (len(answer), 7, 1):
        reader = reading.reader()
        parts = [
            part
            for at in range(0, len(answer), size)
            for part in reader.push(answer[at : at + size])
        ]
        parts += reader.finish()
        names = [one.name for one in parts if isinstance(one, CallBegun)]
        assert names == ["weather", "clock"][:count], answer
        for index, arguments in enumerate([ARGUMENTS, {}][:count]):
            mine = [one for one in parts if isinstance(one, MoreArguments) and one.index == index]
            assert json.loads("".join(one.text for one in mine)) == arguments
        words = "".join(one.text for one in parts if isinstance(one, Words))
        assert words.removeprefix("<think>\n\n</think>").strip() == ""


def test_a_call_as_the_template_writes_it_fits_the_grammar_of_calls(
    template: tuple[str, str], process: RenderProcess
) -> None:
    text, end = template
    if "[CALL_ID]" in text:
        pytest.skip("a held call has an id of its own")
    messages, tools = plain(conversation(1)[:3])
    before = process.render(ChatTemplate(text, VARIABLES), messages[:2], tools=tools)
    whole = process.render(ChatTemplate(text, VARIABLES), messages, tools=tools)
    answer = whole[len(before) :].partition(end)[0].removeprefix("<think>\n\n</think>").lstrip()
    form = form_of(text)
    assert form is not None
    marks = tuple(one for one in CALL_MARKS if form == "mistral" and one in text)
    reading = ToolReading(form, ("weather", "clock"), True, marks)
    body = ChatRequest.model_validate(
        {"messages": conversation(1), "tools": TOOLS, "tool_choice": "required"}
    )
    asked = asked_of_tools(body.tools or (), body.tool_choice, reading, lambda _: None, None)
    assert asked is not None
    tokens = [bytes([at]) for at in range(256)]
    checker = Checker()
    checker({"tokens": [one.hex() for one in tokens], "cpu_s": 1})
    grammar = checker({"kind": asked.kind, "content": asked.content})["text"]
    matcher = Vocabulary(tokens).matcher(grammar)
    assert all(matcher.consume_token(one) for one in answer.encode()), answer
    assert matcher.is_accepting()


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("llama", conversation(2)),
        (
            "mistral, a list",
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"type": "function", "id": "long" * 9,
                 "function": {"name": "clock", "arguments": "{}"}}]},
            ],
        ),
    ],
)  # fmt: skip
def test_what_a_template_refuses_is_refused_in_its_words(
    name: str, messages: list[dict[str, Any]], process: RenderProcess
) -> None:
    said, tools = plain(messages)
    with pytest.raises(InvalidInput) as caught:
        process.render(ChatTemplate(OWN[name][0], VARIABLES), said, tools=tools)
    assert "one call at a time" in str(caught.value.found) or "nine" in str(caught.value.found)
