"""Chat templates rendered in a process with bounds: the side of the server.

A template comes with a model or an adapter and is a program of a stranger. Nothing of it runs in a
process of the server: ``server.inputs.template_program`` runs it, with limits on memory, processor
time and the length of what comes out. A process that breaks one of them is ended and the next
conversation gets a new one. Which template is used is said in ``server.inputs.conversation``.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from server.inputs.template_program import PREFIX_BYTES
from server.inputs.text import InvalidInput, TextError

PROGRAM: Final = Path(__file__).with_name("template_program.py")
START_S: Final = 30.0  # allowed for the interpreter to start on a busy machine
_PIPE_BYTES: Final = 1 << 16
_ESCAPED_BYTES: Final = 12  # the most that one character takes in JSON


class ChatTemplateFailed(TextError):
    """A chat template that took more than it may have, or is no template."""

    code = "chat_template_failed"


class ChatTemplateUnread(TextError):
    """Something was given to a template that never reads it.

    Args:
        name: Of the variable.
        owner: Whose template it is.
    """

    code = "unsupported_parameter"

    def __init__(self, name: str, owner: str) -> None:
        self.name = name
        super().__init__(
            f"The chat template of {owner} does not know {name}.",
            found=name[:80],
            expected="what the template reads",
            fix="Leave it out, or use a template that has it, by --chat-template or of an adapter.",
        )


class ChatTemplateTooSlow(ChatTemplateFailed):
    """The request's own deadline passed while its template was rendered."""

    code = "deadline_exceeded"


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What one conversation may take.

    Args:
        cpu_s: Seconds of processor time; a usual template takes a thousandth of one.
        memory_bytes: Address space of the process, its own 25 MiB included.
        characters: Of the text that comes out.
    """

    cpu_s: float = 1.0
    memory_bytes: int = 256 << 20
    characters: int = 8 << 20


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template with the words that it knows beside the messages.

    Args:
        text: Jinja.
        variables: The special tokens by name.
        owner: Whose it is, for errors: a name, or "the base".
    """

    text: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    owner: str = "the base"


class _RendererEnded(Exception):
    """The process has ended; ``because`` says what of."""

    def __init__(self, because: str) -> None:
        super().__init__(because)


class RenderProcess:
    """One process that renders, started when it is first needed. Safe to share between threads,
    which take turns."""

    def __init__(self, limits: RenderLimits | None = None) -> None:
        self.limits = limits or RenderLimits()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._used = 0  # conversations that the present process has rendered

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        deadline: float | None = None,
    ) -> str:
        """The prompt of a conversation, ready for the assistant's turn.

        Args:
            template: Whose text is the same from call to call: it is compiled once.
            messages: As templates take them.
            tools: The same.
            variables: That the client gives beside those of the template, and not in their place.
            deadline: As ``time.monotonic()`` counts.

        Raises:
            ChatTemplateUnread: Of tools or variables.
            InvalidInput: The template refuses the conversation.
            ChatTemplateFailed: It took too much, or is no template.
            ChatTemplateTooSlow: The deadline passed.
        """
        limits = self.limits
        request = {
            "template": template.text,
            "messages": messages,
            "tools": list(tools) or None,
            "variables": {**(variables or {}), **template.variables},
            "asked": ["tools"] * bool(tools) + list(variables or ()),
            "cpu_s": limits.cpu_s,
            "characters": limits.characters,
        }
        try:
            raw = json.dumps(request).encode()
        except RecursionError:
            raise InvalidInput(
                "A message is nested too deeply.",
                expected="messages as clients write them",
            ) from None
        with self._lock:
            answer = self._answer(raw, deadline)
        if "text" in answer:
            return answer["text"]
        if "unread" in answer:
            raise ChatTemplateUnread(answer["unread"], template.owner)
        if "refused" in answer:
            raise InvalidInput(
                "The chat template refused the messages.",
                found=answer["refused"][:200],
                expected=f"roles and contents that the template of {template.owner} takes",
                fix="Check the order of the roles.",
            )
        raise ChatTemplateFailed(
            f"The chat template of {template.owner} could not be run.",
            found=(answer.get("broken") or answer["exceeded"])[:200],
            expected=f"a template that renders within {limits.cpu_s:g} s of processor time, "
            f"{limits.memory_bytes} bytes of memory and {limits.characters} characters",
            fix="Shorten the conversation, or have whoever made the template mend it.",
        )

    def close(self) -> None:
        """End the process; a later call starts another."""
        with self._lock:
            self._end()

    def _answer(self, raw: bytes, deadline: float | None) -> dict[str, str]:
        while True:
            fresh = self._child is None or self._child.poll() is not None
            if fresh:
                self._start()
            used, self._used = self._used, self._used + 1
            try:
                answer: dict[str, str] = json.loads(self._exchange(raw, deadline))
            except _RendererEnded as error:
                self._end()
                if not used:
                    self._start()  # while nobody waits for it
                    return {"exceeded": str(error)}
            except TimeoutError:
                self._end()
                raise ChatTemplateTooSlow(
                    "The deadline passed while the conversation was rendered.",
                    fix="Shorten the conversation, or allow more time.",
                ) from None
            else:
                if "exceeded" not in answer or not used:
                    return answer
                self._end()
            # What others have left in the process is not held against this conversation.

    def _start(self) -> None:
        self._end()
        self._used = 0
        kept = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG")
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-B", str(PROGRAM), str(self.limits.memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            # Keys and places of the server stay out of it.
            env={name: os.environ[name] for name in kept if name in os.environ},
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        os.set_blocking(self._child.stdin.fileno(), False)
        os.set_blocking(self._child.stdout.fileno(), False)

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        child.wait()

    def _exchange(self, raw: bytes, deadline: float | None) -> bytes:
        """Send a request and read its answer.

        Raises:
            TimeoutError: The deadline passed.
            _RendererEnded: The process ended.
        """
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        # Where the caller has none: the processor time is bounded, and a busy machine has others.
        until = deadline if deadline is not None else time.monotonic() + START_S
        source, sink = child.stdout.fileno(), child.stdin.fileno()
        left = memoryview(len(raw).to_bytes(PREFIX_BYTES) + raw)
        got = bytearray()
        polled = select.poll()
        polled.register(source, select.POLLIN)
        polled.register(sink, select.POLLOUT)
        while True:
            wait = until - time.monotonic()
            ready = dict(polled.poll(wait * 1000)) if wait > 0 else {}
            if not ready:
                raise TimeoutError
            if sink in ready and left:
                try:
                    left = left[os.write(sink, left[:_PIPE_BYTES]) :]
                except BrokenPipeError:
                    raise _RendererEnded(self._why(child)) from None
                if not left:
                    polled.unregister(sink)
            if source in ready:
                piece = os.read(source, _PIPE_BYTES)
                if not piece:
                    raise _RendererEnded(self._why(child))
                got += piece
                if len(got) >= PREFIX_BYTES:
                    length = int.from_bytes(got[:PREFIX_BYTES])
                    if length > _ESCAPED_BYTES * self.limits.characters + _PIPE_BYTES:
                        raise _RendererEnded(f"more than {self.limits.characters} characters")
                    if len(got) >= PREFIX_BYTES + length:
                        return bytes(got[PREFIX_BYTES:])

    def _why(self, child: subprocess.Popen[bytes]) -> str:
        """What a process that closed its pipe ended of."""
        try:
            status = child.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        if status == -signal.SIGPROF:
            return f"more than {self.limits.cpu_s:g} s of processor time"
        return f"its process ended with {status}"
