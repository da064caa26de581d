"""What an adapter brings for conversations and for generating, and that is not used, by name.

The base's chat template and end tokens and the request's settings count for every adapter. A
template is a program: one of a stranger would have to be bound in time and memory to be run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from adapters.errors import CorruptFile
from adapters.intake.safetensors_header import open_regular
from adapters.intake.strict_json import MAX_JSON_BYTES, show, strict_json

TEMPLATE_FILE: Final = "chat_template.jinja"
TOKENIZER_FILE: Final = "tokenizer_config.json"
GENERATION_FILE: Final = "generation_config.json"
CONVERSATION_FILES: Final = (TEMPLATE_FILE, TOKENIZER_FILE, GENERATION_FILE)
# Without effect on an answer here; names with an underscore first neither.
_SETTINGS_WITHOUT_EFFECT = frozenset(
    {"bos_token_id", "pad_token_id", "transformers_version", "use_cache"}
)
_MAX_SETTINGS_SHOWN = 8


def conversation_notes(folder: Path) -> Iterator[str]:
    """A note on each of ``CONVERSATION_FILES`` that says something; none refuses an adapter."""
    if os.path.lexists(folder / TEMPLATE_FILE):
        yield f"{TEMPLATE_FILE} is not used: the base's chat template is"
    for name in (TOKENIZER_FILE, GENERATION_FILE):
        if not os.path.lexists(folder / name):
            continue
        try:
            with open_regular(folder / name) as file:
                content = strict_json(file.read(MAX_JSON_BYTES + 1), name)
        except CorruptFile as fault:
            yield f"{name} is not used, and cannot be read ({fault.found})"
            continue
        yield from _said(name, content)


def _said(name: str, content: dict[str, Any]) -> Iterator[str]:
    if name == TOKENIZER_FILE:
        if content.get("chat_template"):
            yield f"chat_template in {name} is not used: the base's chat template is"
        return
    said = [
        f"{field[:80]} = {show(value)}"
        for field, value in content.items()
        if value is not None and field not in _SETTINGS_WITHOUT_EFFECT and not field.startswith("_")
    ]
    if said:
        more = (
            f" and {len(said) - _MAX_SETTINGS_SHOWN} more"
            if len(said) > _MAX_SETTINGS_SHOWN
            else ""
        )
        yield (
            f"{name} is not used ({', '.join(said[:_MAX_SETTINGS_SHOWN])}{more}): "
            "the base's end tokens and the request's settings are"
        )
