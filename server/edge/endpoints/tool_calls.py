"""Calls of tools in the text of an answer, read as the text comes.

Models write calls in the form that their chat template shows. Three are read: ``hermes``
(``<tool_call>{"name", "arguments"}</tool_call>``; Qwen, too), ``mistral`` (``[TOOL_CALLS]`` and a
list of such objects, or a name and its arguments) and ``llama3_json`` (an answer that is such an
object, with ``parameters``). What looks like a call and is none stays text: nothing is lost.
Nothing here checks arguments against the schema of a tool; ``tool_grammar.py`` has what holds them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, get_args

ToolForm = Literal["hermes", "mistral", "llama3_json"]
FORMS: Final[tuple[ToolForm, ...]] = get_args(ToolForm)
# What begins a call, and what ends one where something does.
MARKERS: Final[dict[ToolForm, tuple[str, str]]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", ""),
    "llama3_json": ("<|python_tag|>", ""),
}
# What Mistral's newer templates write between a name and its arguments.
CALL_MARKS: Final = ("[CALL_ID]", "[ARGS]")
_ARGUMENTS: Final = ("arguments", "parameters")
_NAME_CHARACTERS: Final = 256  # of what stands between a marker and the arguments


def form_of(template: str) -> ToolForm | None:
    """The form that a chat template shows, or None: it shows none that is read here."""
    return next((form for form in FORMS if MARKERS[form][0] in template), None) or (
        "llama3_json" if '"parameters": dictionary of argument' in template else None
    )


@dataclass(frozen=True, slots=True)
class Words:
    """Text that is no part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call, as soon as its name is known.

    Args:
        index: Of the call in the answer.
        name: Of the function.
    """

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class MoreArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


AnswerPart = Words | CallBegun | MoreArguments


class CallObject:
    """One JSON object that is a call, character by character.

    Args:
        name: Of the function, where it stands before the object, which then is the arguments.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self._raw: list[str] = []
        self.done = False
        self.broken = False
        self._whole = name is not None
        self._arguments = ""  # that nobody has taken
        self._took = False
        self._depth = 0
        self._string = self._escaped = False
        self._part: Literal["key", "colon", "value", "comma"] = "key"
        self._key = ""
        self._value: list[str] = []  # of the string at hand, at the top of the object

    @property
    def raw(self) -> str:
        """All that was added."""
        return "".join(self._raw)

    def push(self, text: str) -> int:
        """Add text; returns how many of its characters belong to the object."""
        for at, character in enumerate(text):
            if self.done or self.broken:
                return at
            self._add(character)
        return len(text)

    def take(self) -> str:
        """New text of the arguments; an empty object at the end where there were none."""
        begins = not self._took and self._arguments[:1] == '"'
        if not self._whole and self._key in _ARGUMENTS and begins:
            if not self.done and self._part == "value":
                return ""  # arguments written as a string: not before it is complete
            with suppress(ValueError):
                self._arguments = str(json.loads(self._arguments))
        found, self._arguments = self._arguments, ""
        if not found and self.done and not self._took:
            found = "{}"
        self._took = self._took or bool(found)
        return found

    def _add(self, character: str) -> None:
        self._raw.append(character)
        if self._whole:
            self._arguments += character
        elif self._part == "value" and self._depth >= 1 and self._key in _ARGUMENTS:
            self._keep(character)
        if self._string:
            self._in_string(character)
        elif character == '"':
            self._string = True
            self._value = ['"'] if self._depth == 1 else self._value
            if self._depth == 1 and self._part not in ("key", "value"):
                self.broken = True
        elif character in "{[":
            self._open()
        elif character in "}]":
            self._close(character)
        elif self._depth == 1:
            self._at_top(character)

    def _keep(self, character: str) -> None:
        """A character of the arguments' value, unless it stands around it."""
        outside = self._depth == 1 and not self._string
        if outside and (character in ",}" or (character.isspace() and not self._arguments)):
            return
        self._arguments += character

    def _in_string(self, character: str) -> None:
        if self._depth == 1:
            self._value.append(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._string = False
            if self._depth == 1:
                self._ended()

    def _ended(self) -> None:
        """A string at the top of the object is complete."""
        try:
            value = json.loads("".join(self._value))
        except ValueError:
            self.broken = True
            return
        if self._part == "key":
            self._key, self._part = value, "colon"
        else:
            if self._key == "name" and not self._whole:
                self.name = value
            self._part = "comma"

    def _open(self) -> None:
        if self._depth == 1 and self._part != "value":
            self.broken = True
        self._depth += 1

    def _close(self, character: str) -> None:
        self._depth -= 1
        if self._depth == 1:
            self._part = "comma"
        elif self._depth == 0:
            self.done = True
            self.broken = character != "}" or self.name is None

    def _at_top(self, character: str) -> None:
        match self._part, character:
            case "colon", ":":
                self._part = "value"
            case (("comma" | "value"), ","):
                self._part = "key"
            case "value", _:
                pass  # a number, or a word such as true
            case _ if not character.isspace():
                self.broken = True


class ToolCallReader:
    """Reads one answer.

    Args:
        form: How calls are written.
        names: Of the functions that there are. In a form without a marker, an object with another
            name is text.
    """

    def __init__(self, form: ToolForm, names: Collection[str]) -> None:
        self._form: ToolForm = form
        self._marker, self._end = MARKERS[form]
        self._names = frozenset(names)
        self._held = ""  # not read yet
        self._raw = ""  # of a call that has not begun, to be given back as text
        self._mode = "start" if form == "llama3_json" else "text"
        self._listed = False
        self._marked = False
        self._object: CallObject | None = None
        self._begun = False
        self.calls = 0

    def push(self, text: str) -> list[AnswerPart]:
        """Add text; returns what is certain by now."""
        self._held += text
        found: list[AnswerPart] = []
        while self._advance(found):
            pass
        return _joined(found)

    def finish(self) -> list[AnswerPart]:
        """The answer has ended: what was held back. A call that was cut stays as far as it came."""
        found: list[AnswerPart] = []
        if self._object is not None:
            if not self._begun:
                found.append(Words(self._raw + self._object.raw))
        elif self._mode in ("open", "name"):
            if not self._listed or not self.calls:
                found.append(Words(self._raw + self._held))
        elif self._mode in ("start", "text") and (self._held.strip() or not self.calls):
            found.append(Words(self._held))
        self._held, self._object = "", None
        return _joined([one for one in found if not isinstance(one, Words) or one.text])

    def _advance(self, found: list[AnswerPart]) -> bool:
        """Read on as far as one part goes; whether more may follow."""
        match self._mode:
            case "text":
                return self._read_text(found)
            case "plain":
                found.append(Words(self._held))
                self._held = ""
                return False
            case "start" | "between":
                return self._read_start()
            case "close":
                return self._read_close()
            case "open":
                return self._read_open(found)
            case "name":
                return self._read_name(found)
            case _:
                return self._read_object(found)

    def _read_text(self, found: list[AnswerPart]) -> bool:
        at = self._held.find(self._marker)
        if at >= 0:
            before = self._held[:at].rstrip()
            if before:
                found.append(Words(before))
            self._raw = self._held[len(before) : at] + self._marker
            self._held = self._held[at + len(self._marker) :]
            self._mode, self._listed = "open", False
            return True
        # What may become a marker is held back, and the space before it, which is no text then.
        keep = next(
            (
                n
                for n in range(len(self._marker) - 1, 0, -1)
                if self._held.endswith(self._marker[:n])
            ),
            0,
        )
        shown = self._held[: len(self._held) - keep].rstrip()
        if self.calls and not shown.strip():
            return False
        if shown:
            found.append(Words(shown))
            self._held = self._held[len(shown) :]
        return False

    def _read_start(self) -> bool:
        """Of an answer that is a call from its start, or of what follows a call of it."""
        text = self._held.lstrip(" \t\r\n;," if self._mode == "between" else None)
        if text.startswith(self._marker):
            self._held = text[len(self._marker) :]
            self._raw, self._mode, self._marked = self._marker, "open", True
            return True
        if not text or self._marker.startswith(text):
            return False
        if text[0] == "{":
            self._raw, self._held, self._mode = "", text, "open"
            return True
        self._mode = "plain"
        return True

    def _read_close(self) -> bool:
        text = self._held.lstrip()
        if text.startswith(self._end):
            self._held = text[len(self._end) :]
        elif self._end.startswith(text):
            return False
        self._mode = "text"
        return True

    def _read_open(self, found: list[AnswerPart]) -> bool:
        text = self._held.lstrip()
        self._raw += self._held[: len(self._held) - len(text)]
        self._held = text
        if not text:
            return False
        if text[0] == "{":
            self._begin(CallObject())
        elif self._form == "mistral" and text[0] in "[,]":
            self._listed = text[0] != "]"
            self._raw += text[0]
            self._held, self._mode = text[1:], "open" if self._listed else "text"
        elif self._form == "mistral" and not self._listed:
            self._mode = "name"
        else:
            self._give_back(found, "")
        return True

    def _read_name(self, found: list[AnswerPart]) -> bool:
        at = self._held.find("{")
        if at < 0:
            if len(self._held) <= _NAME_CHARACTERS:
                return False
            self._give_back(found, "")
            return True
        name = self._held[:at]
        for mark in CALL_MARKS:
            name = name.partition(mark)[0]
        name = name.strip()
        self._raw += self._held[:at]
        self._held = self._held[at:]
        self._begin(CallObject(name))
        return True

    def _begin(self, call: CallObject) -> None:
        self._object, self._begun, self._mode = call, False, "object"

    def _read_object(self, found: list[AnswerPart]) -> bool:
        call = self._object
        assert call is not None
        self._held = self._held[call.push(self._held) :]
        foreign = (
            self._form == "llama3_json"
            and not self._marked
            and call.name is not None
            and call.name not in self._names
        )
        if (call.broken or foreign) and not self._begun:
            self._object = None
            self._give_back(found, call.raw)
            return True
        if call.name is not None and not self._begun:
            self._begun = True
            found.append(CallBegun(self.calls, call.name))
            self.calls += 1
        if self._begun and (more := call.take()):
            found.append(MoreArguments(self.calls - 1, more))
        if not call.done and not call.broken:
            return False
        self._object, self._raw = None, ""
        if self._form == "hermes":
            self._mode = "close"
        elif self._form == "llama3_json":
            self._mode = "between"
        else:
            self._mode = "open" if self._listed else "text"
        return True

    def _give_back(self, found: list[AnswerPart], more: str) -> None:
        """It was no call: its text is text."""
        found.append(Words(self._raw + more))
        self._raw = ""
        self._mode = "plain" if self._form == "llama3_json" else "text"


def _joined(pieces: Sequence[AnswerPart]) -> list[AnswerPart]:
    """Neighbours of one kind as one."""
    found: list[AnswerPart] = []
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, Words) and isinstance(last, Words):
            found[-1] = Words(last.text + piece.text)
        elif (
            isinstance(piece, MoreArguments)
            and isinstance(last, MoreArguments)
            and piece.index == last.index
        ):
            found[-1] = MoreArguments(last.index, last.text + piece.text)
        else:
            found.append(piece)
    return found
