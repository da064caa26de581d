"""What every body under /v1 has in common: which of its fields are honoured, ignored or refused.

One rule for what is not here: a field that nobody knows is ignored, as OpenAI-compatible servers
do, and named in a header of the answer; a field that would change the answer and cannot be honoured
is refused with 400.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.edge.endpoints.schemas import nullable, without_nulls
from server.errors import Refusal

# Neutral values of what we cannot do; any other value is refused, not ignored.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": ("", None),
    "logprobs": (False, 0, None),
    "top_logprobs": (0, None),
    "prompt_logprobs": (None,),
    "min_p": (0, None),
    "typical_p": (1, None),
    "min_tokens": (0, None),
    "stop_token_ids": ([], None),
    "bad_words": ([], None),
    "allowed_token_ids": (None,),
    "logits_processors": ([], None),
    "use_beam_search": (False, None),
    "length_penalty": (1, None),
    "include_stop_str_in_output": (False, None),
    "skip_special_tokens": (True, None),
    "truncate_prompt_tokens": (None,),
    "add_special_tokens": (None,),
    "return_token_ids": (False, None),
    "return_tokens_as_token_ids": (False, None),
    "prompt_embeds": (None,),
    # Who answers: ``model`` says it here
    "adapter": (None,),
    "adapter_id": (None,),
    # Conversations
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "function_call": ("none", "auto", None),
    "chat_template": (None,),
    "chat_template_kwargs": ({}, None),
    "documents": ([], None),
    "add_generation_prompt": (True, None),
    "continue_final_message": (False, None),
    "reasoning_effort": (None,),
    "verbosity": ("medium", None),
    "audio": (None,),
    "modalities": (["text"], None),
    "web_search_options": (None,),
    # What an answer must be like
    "structural_tag": (None,),
    "guided_decoding_backend": (None,),
    "guided_whitespace_pattern": (None,),
    "grammar": (None,),
    # Vectors and ranks
    "encoding_format": ("float", "base64", None),
    "dimensions": (None,),
    "rank_fields": ([], ["text"], None),
    "max_chunks_per_doc": (None,),
    "max_tokens_per_doc": (None,),
    "instruction": ("", None),
}
_INSTEAD = dict.fromkeys(("adapter", "adapter_id"), "Name the adapter as model.")
# Fields that are known to have no effect here.
V1_WITHOUT_EFFECT = frozenset({"user"})
MAX_NAMED = 32  # ignored fields that are named
MAX_NAMED_CHARACTERS = 64


def extra_fields(place: str, parts: Iterable[BaseModel]) -> list[str]:
    """Dotted names of what parts of a body have beyond their schema, each once.

    Args:
        place: Of the parts in the body.
        parts: All of one kind, whose extra fields pydantic keeps.
    """
    found = dict.fromkeys(
        name
        for part in parts
        for name, value in (part.model_extra or {}).items()
        if value is not None
    )
    return [f"{place}.{name}" for name in found]


class OpenAIBody(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, json_schema_extra=nullable)

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, content: Any) -> Any:
        return without_nulls(cls, content)

    def unsupported(self) -> list[tuple[str, object]]:
        """Fields that would change the answer and have more than their neutral value."""
        given = {name: getattr(self, name, None) for name in self.model_fields_set}
        return [
            (name, value)
            for name, value in given.items()
            if name in NEUTRAL
            and name not in type(self).model_fields
            and value not in NEUTRAL[name]
        ]

    def ignored(self) -> tuple[str, ...]:
        """Fields that are there and have no effect, as a header can say them."""
        given = (*(self.model_extra or {}), *sorted(V1_WITHOUT_EFFECT & self.model_fields_set))
        names = [
            name for name in given if name not in NEUTRAL and getattr(self, name, None) is not None
        ]
        names += self.ignored_within()
        shown = dict.fromkeys(
            quote(name[:MAX_NAMED_CHARACTERS], safe=".", errors="replace")
            for name in names[:MAX_NAMED]
        )
        return tuple(shown)

    def ignored_within(self) -> list[str]:
        """Dotted names of ignored fields that are not at the top of the body."""
        return []

    def check_supported(self) -> None:
        """Raises Refusal for a field that would change the answer and cannot be honoured."""
        for name, value in self.unsupported():
            raise Refusal.because(
                "unsupported_parameter",
                f"{name} cannot be honoured by this server.",
                found=repr(value)[:80],
                expected="its neutral value, or no such field",
                fix=_INSTEAD.get(name),
                field=name,
            )


class ModelNamed(OpenAIBody):
    model: str | None = Field(
        default=None,
        description="An adapter's name, or the base's; without one the server's default answers.",
    )
