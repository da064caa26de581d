"""What an adapter brings for conversations and for generating: templates, end tokens, defaults.

Read from the tokenizer's and the generation's files beside an adapter, and kept with it in one
file, ``KEPT_CONVERSATION_FILE``, that holds what can change an answer and nothing else. Nothing
here refuses an adapter: what cannot be read is noted. Whether it agrees with a base's vocabulary,
and whether a template renders, is for those to say who have the base's tokenizer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from adapters.errors import CorruptFile
from adapters.intake.safetensors_header import open_regular
from adapters.intake.strict_json import MAX_JSON_BYTES, show, strict_json

TEMPLATE_FILE: Final = "chat_template.jinja"
TOOLS_TEMPLATE_FILE: Final = "tool_use.jinja"
TOKENIZER_FILE: Final = "tokenizer_config.json"
VOCABULARY_FILE: Final = "tokenizer.json"
ADDED_TOKENS_FILE: Final = "added_tokens.json"
GENERATION_FILE: Final = "generation_config.json"
KEPT_CONVERSATION_FILE: Final = "hira_conversation.json"
# By their path in a folder: the names under which the same files lie flat.
NESTED_TEMPLATES: Final[Mapping[str, str]] = {
    f"additional_chat_templates/{TOOLS_TEMPLATE_FILE}": TOOLS_TEMPLATE_FILE
}
CONVERSATION_FILES: Final = (
    TEMPLATE_FILE,
    TOOLS_TEMPLATE_FILE,
    TOKENIZER_FILE,
    VOCABULARY_FILE,
    ADDED_TOKENS_FILE,
    GENERATION_FILE,
    KEPT_CONVERSATION_FILE,
)
# PEFT's task types of adapters that are never asked to generate: their files mean nothing here.
OTHER_TASK_TYPES: Final = frozenset(
    {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"}
)
MAX_TEMPLATE_BYTES: Final = 1 << 18
MAX_END_IDS: Final = 64
_MAX_TOKENIZER_BYTES: Final = 4 << 20  # a configuration that lists six thousand tokens has 1.2 MB
_MAX_ADDED: Final = 20_000
_MAX_TOKEN_CHARACTERS: Final = 512
# Of generation_config.json: the defaults for what a request leaves out, and what each may be.
_SAMPLING: Final[Mapping[str, tuple[float, float]]] = {  # above the first, at most the second
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
    "top_k": (-1, 1 << 20),
    "max_new_tokens": (0, 1 << 20),
}
_WHOLE: Final = frozenset({"top_k", "max_new_tokens"})
# Without effect on an answer here; names with an underscore first neither.
_WITHOUT_EFFECT: Final = frozenset(
    {"bos_token_id", "pad_token_id", "transformers_version", "use_cache", "cache_implementation"}
)
# What the other fields say when they say nothing.
_UNSAID: Final[Mapping[str, tuple[object, ...]]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1,)),
    **dict.fromkeys(("length_penalty", "typical_p", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "diversity_penalty"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "encoder_no_repeat_ngram_size"), (0,)),
    "max_length": (20,),
}
_FIELDS_SHOWN: Final = 8
_HALF: Final = re.compile("[\ud800-\udfff]")  # half a character cannot be written anywhere
_BASES: Final = "the base's is"


@dataclass(frozen=True)
class Conversation:
    """What the files say, whatever the base is.

    Args:
        templates: Jinja, by name: ``default`` and, where there is one for tools, ``tool_use``.
        special_tokens: ``eos_token`` and those that a template names, as the tokenizer spells them.
        token_ids: Ids in the adapter's own vocabulary, as far as its files tell: of its special
            tokens, of those that a template writes and of those that end an answer.
        end_ids: Tokens that end an answer, of ``generation_config.json``; None where it says none.
        sampling: Defaults of ``generation_config.json`` for what a request leaves out.
        added: Every added token with its id. Not kept: a base that lacks one is told of once.
        notes: What cannot be used whatever the base is, for a person to read.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    token_ids: Mapping[str, int] = field(default_factory=dict)
    end_ids: tuple[int, ...] | None = None
    sampling: Mapping[str, float | int | bool] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def kept(self) -> bytes:
        """What is stored with the adapter: the same bytes for the same content; b"" for none."""
        content = {
            "templates": dict(self.templates),
            "special_tokens": dict(self.special_tokens),
            "token_ids": dict(self.token_ids),
            "end_ids": None if self.end_ids is None else list(self.end_ids),
            "sampling": dict(self.sampling),
        }
        used = (self.templates, self.special_tokens, self.end_ids, self.sampling)
        if not any(used):
            return b""
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class UsedConversation:
    """What of a conversation is used on one base.

    Args:
        template: Whether the adapter's own template is.
        generation: ``end_ids``, where its own end an answer, and its defaults for sampling.
        notes: Each thing that is not used, and why.
    """

    template: bool = False
    generation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def unused(conversation: Conversation) -> UsedConversation:
    """Where there is no tokenizer to compare with: nothing is used, and all of it is noted."""
    notes = []
    if conversation.templates:
        notes.append(f"its chat template is not used: {_BASES}")
    if conversation.end_ids or conversation.sampling:
        notes.append(f"{GENERATION_FILE} is not used: {_BASES}")
    return UsedConversation(notes=tuple(notes))


def read_conversation(folder: Path) -> Conversation:
    """What is in an adapter's folder, as it came or as it was stored.

    Args:
        folder: Of the adapter.

    Returns:
        What could be read, within bounds on every file; the rest is in its notes.
    """
    if os.path.lexists(folder / KEPT_CONVERSATION_FILE):
        try:
            return stored_conversation(
                _read_bounded(folder / KEPT_CONVERSATION_FILE, _MAX_TOKENIZER_BYTES)
            )
        except CorruptFile as fault:
            return Conversation(notes=(_cannot_be_read(KEPT_CONVERSATION_FILE, fault),))
    notes: list[str] = []
    tokenizer = _read_object(folder, TOKENIZER_FILE, notes)
    templates = dict(_templates(folder, tokenizer, notes))
    special = dict(_special_tokens(tokenizer))
    added = _added_tokens(folder, tokenizer, notes)
    end_ids, sampling = _generation(_read_object(folder, GENERATION_FILE, notes), notes)
    written = "\n".join(templates.values())
    named = {name: it for name, it in special.items() if name == "eos_token" or name in written}
    wanted = {
        token: id_
        for token, id_ in added.items()
        if token in named.values() or id_ in (end_ids or ()) or token in written
    }
    return Conversation(templates, named, wanted, end_ids, sampling, added, tuple(notes))


def conversation_bytes(folder: Path, config: Mapping[str, Any]) -> bytes:
    """What the store keeps of a folder's conversation; b"" where there is nothing to keep.

    Args:
        folder: Of the adapter, as it came or as it was stored.
        config: Its ``adapter_config.json``.
    """
    if config.get("task_type") in OTHER_TASK_TYPES:
        return b""
    return read_conversation(folder).kept()


def stored_conversation(raw: bytes) -> Conversation:
    """What ``Conversation.kept`` wrote, checked as any other file.

    Raises:
        CorruptFile: It is not that.
    """
    content = strict_json(raw, KEPT_CONVERSATION_FILE, _MAX_TOKENIZER_BYTES)
    templates: Any = content.get("templates")
    special: Any = content.get("special_tokens")
    ids, end_ids, sampling = (content.get(name) for name in ("token_ids", "end_ids", "sampling"))
    if not (
        all(_is_texts(one) for one in (templates, special))
        and isinstance(ids, dict)
        and all(type(id_) is int for id_ in ids.values())
        and (end_ids is None or _is_ids(end_ids))
        and isinstance(sampling, dict)
        and all(_is_allowed(name, value) for name, value in sampling.items())
        and all(len(one.encode()) <= MAX_TEMPLATE_BYTES for one in templates.values())
    ):
        raise CorruptFile(
            f"{KEPT_CONVERSATION_FILE} is malformed.",
            found=show(raw[:80]),
            expected="what this server keeps of an adapter's chat template and end tokens",
            fix="Leave it out and send the tokenizer's files and generation_config.json.",
        )
    return Conversation(
        templates, special, ids, None if end_ids is None else tuple(end_ids), sampling
    )


def _templates(
    folder: Path, tokenizer: Mapping[str, Any], notes: list[str]
) -> Iterator[tuple[str, str]]:
    """Name and text of each template; files go before what the configuration holds."""
    places = {"default": TEMPLATE_FILE, "tool_use": TOOLS_TEMPLATE_FILE}
    nested = {flat: name for name, flat in NESTED_TEMPLATES.items()}
    found = False
    for name, flat in places.items():
        for place in (nested.get(flat, flat), flat):
            if os.path.lexists(folder / place):
                found = True
                try:
                    raw = _read_bounded(folder / place, MAX_TEMPLATE_BYTES)
                    yield from _template(name, raw.decode("utf-8"), place, notes)
                except (CorruptFile, UnicodeDecodeError) as fault:
                    notes.append(_cannot_be_read(place, fault))
                break
    given = tokenizer.get("chat_template")
    if found or given is None:
        return
    where = f"chat_template in {TOKENIZER_FILE}"
    if isinstance(given, str):
        yield from _template("default", given, where, notes)
        return
    listed = given if isinstance(given, list) else [given]
    for one in listed[:_FIELDS_SHOWN]:
        entry = one if isinstance(one, dict) else {}
        called, text = entry.get("name"), entry.get("template")
        if not isinstance(called, str) or not isinstance(text, str):
            notes.append(f"{where} is not used: {show(one)} is no template with a name")
        elif called in places:
            yield from _template(called, text, where, notes)
        else:
            notes.append(f"{where}: the template {called[:80]} is not used, no call asks for it")


def _template(name: str, text: str, where: str, notes: list[str]) -> Iterator[tuple[str, str]]:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
        notes.append(f"{where} is not used: more than {MAX_TEMPLATE_BYTES} bytes")
    elif text.strip():
        yield name, text


def _special_tokens(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """``eos_token``, ``bos_token``, ... and how each is spelled."""
    for name, value in tokenizer.items():
        spelled = value.get("content") if isinstance(value, dict) else value
        if not name.endswith("_token") or not isinstance(spelled, str):
            continue
        if 0 < len(spelled) <= _MAX_TOKEN_CHARACTERS:
            yield name, spelled


def _added_tokens(folder: Path, tokenizer: Mapping[str, Any], notes: list[str]) -> dict[str, int]:
    """Every added token with its id, from wherever the release that saved it has put them."""
    found: dict[str, int] = {}

    def take(token: object, id_: object) -> None:
        if isinstance(id_, str) and id_.isascii() and id_.isdigit() and len(id_) < 10:
            id_ = int(id_)
        if not isinstance(token, str) or type(id_) is not int or len(found) >= _MAX_ADDED:
            return
        if 0 < len(token) <= _MAX_TOKEN_CHARACTERS and not _HALF.search(token):
            found[token] = id_

    for token, id_ in _read_object(folder, ADDED_TOKENS_FILE, notes).items():
        take(token, id_)
    decoder = tokenizer.get("added_tokens_decoder")
    for id_, entry in (decoder if isinstance(decoder, dict) else {}).items():
        take(entry.get("content") if isinstance(entry, dict) else None, id_)
    for entry in _listed_in_vocabulary(folder, notes):
        if isinstance(entry, dict):
            take(entry.get("content"), entry.get("id"))
    return found


def _listed_in_vocabulary(folder: Path, notes: list[str]) -> list[Any]:
    """``added_tokens`` of ``tokenizer.json``, which stands before the vocabulary of millions of
    bytes: no more than the file's beginning is read."""
    if not os.path.lexists(folder / VOCABULARY_FILE):
        return []
    try:
        with open_regular(folder / VOCABULARY_FILE) as file:
            text = file.read(_MAX_TOKENIZER_BYTES).decode("utf-8", "ignore")
        place = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
        found = [] if place is None else json.JSONDecoder().raw_decode(text, place.end())[0]
    except (CorruptFile, ValueError, RecursionError) as fault:
        notes.append(_cannot_be_read(VOCABULARY_FILE, fault))
        return []
    return found if isinstance(found, list) else []


def _generation(
    content: Mapping[str, Any], notes: list[str]
) -> tuple[tuple[int, ...] | None, dict[str, float | int | bool]]:
    """End tokens and defaults; every other field that says something is noted."""
    end_ids: tuple[int, ...] | None = None
    sampling: dict[str, float | int | bool] = {}
    said: list[str] = []
    for name, value in content.items():
        if value is None or name in _WITHOUT_EFFECT or name.startswith("_"):
            continue
        if name == "eos_token_id" and _is_ids(listed := value if type(value) is list else [value]):
            end_ids = tuple(dict.fromkeys(listed))
        elif _is_allowed(name, value):
            sampling[name] = value
        elif value is not False and value not in _UNSAID.get(name, ()):
            said.append(f"{name[:80]} = {show(value)}")
    if said:
        more = f" and {len(said) - _FIELDS_SHOWN} more" if len(said) > _FIELDS_SHOWN else ""
        notes.append(f"{GENERATION_FILE}: not used: {', '.join(said[:_FIELDS_SHOWN])}{more}")
    return end_ids, sampling


def _is_allowed(name: str, value: object) -> bool:
    """Whether it is a default that requests can have."""
    if name == "do_sample":
        return isinstance(value, bool)
    bounds = _SAMPLING.get(name)
    if bounds is None or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name in _WHOLE and not isinstance(value, int):
        return False
    return bounds[0] < value <= bounds[1]


def _is_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MAX_END_IDS
        and all(type(one) is int for one in value)
    )


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _read_object(folder: Path, name: str, notes: list[str]) -> dict[str, Any]:
    """A file's object; {} where there is none, or none that can be read, which is noted."""
    if not os.path.lexists(folder / name):
        return {}
    limit = MAX_JSON_BYTES if name == GENERATION_FILE else _MAX_TOKENIZER_BYTES
    try:
        return strict_json(_read_bounded(folder / name, limit), name, limit)
    except CorruptFile as fault:
        notes.append(_cannot_be_read(name, fault))
        return {}


def _read_bounded(path: Path, limit_bytes: int) -> bytes:
    with open_regular(path) as file:
        raw = file.read(limit_bytes + 1)
    if len(raw) > limit_bytes:
        raise CorruptFile(
            f"{path.name} is too large.",
            found=f"more than {limit_bytes} bytes",
            expected=f"at most {limit_bytes}",
        )
    return raw


def _cannot_be_read(name: str, fault: Exception) -> str:
    why = fault.found if isinstance(fault, CorruptFile) else str(fault)[:200]
    return f"{name} is not used, and cannot be read ({why})"
