"""An engine without a model: answers are made of the request itself, so tests can predict them.

Token ids steer it: see the constants. It keeps the contract of `server.engine.engine.Engine`, one
terminal event per request, and is built in the real worker process by the tests of the edge.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters.registry.objects import StoreNote
from server.messages import (
    Cancel,
    EncodeRequest,
    EncodeResult,
    Event,
    Failure,
    FinishReason,
    GeneratedToken,
    GenerateRequest,
    GenerateResult,
    Message,
    TokenEvent,
)
from server.options import EngineOptions
from tests.stand import shifted_clock

SLOW_S = 0.02  # a generated token
QUEUE_S = 0.0005  # what every request is said to have waited
# In a prompt: what stands between these is said, a character a token, and then comes the end.
SCRIPT = ("«", "»")
SLOW_SEED = 600  # generations with it are six times as slow


@dataclass(frozen=True)
class Step:
    lane: str
    rows: int
    adapters: int
    seconds: float
    waits_s: tuple[float, ...] = ()


class FakeEngine:
    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.encodes: deque[EncodeRequest] = deque()
        self.running: dict[str, tuple[GenerateRequest, list[GeneratedToken]]] = {}
        self.cancelled = 0
        self.woken = threading.Event()
        self.last_step: Step | None = None
        self.load_seconds: list[float] = []

    def submit(self, message: Message) -> None:
        match message:
            case EncodeRequest():
                self.encodes.append(message)
            case GenerateRequest():
                self.running[message.id] = (message, [])
            case Cancel():
                self.cancelled += self.running.pop(message.id, None) is not None

    def has_work(self) -> bool:
        return bool(self.encodes or self.running)

    def wait(self, timeout: float) -> None:
        self.woken.wait(timeout)
        self.woken.clear()

    def wake(self) -> None:
        self.woken.set()

    def step(self) -> list[Event]:
        events: list[Event] = []
        lane = "encode" if self.encodes else "generate"
        waits_s = tuple(QUEUE_S for _ in self.encodes)
        self.last_step = Step(lane, len(self.encodes) + len(self.running), 1, SLOW_S, waits_s)
        while self.encodes:
            request = self.encodes.popleft()
            events.append(self._encode(request))
        if self.running:
            time.sleep(SLOW_S)
        if any(one.sampling.seed == SLOW_SEED for one, _ in self.running.values()):
            time.sleep(5 * SLOW_S)
        for generation, tokens in list(self.running.values()):
            events += self._generate(generation, tokens)
        return events

    def snapshot(self) -> dict[str, Any]:
        return {
            "queue_depth": {"encode": len(self.encodes), "generate": len(self.running)},
            "base_bytes": {"linear": 1000, "other": 10},
            "adapters": {"cancelled": self.cancelled},
        }

    def take_store_notes(self) -> Sequence[StoreNote]:
        return ()

    def take_load_seconds(self) -> list[float]:
        taken, self.load_seconds = self.load_seconds, []
        return taken

    def close(self) -> list[Event]:
        return []

    def _encode(self, request: EncodeRequest) -> Event:
        if request.top_k == 666:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.top_k == 500:
            return Failure(request.id, "internal", "asked for")
        if request.top_k == 501:
            raise RuntimeError("the engine broke")
        if request.top_k == 502:
            time.sleep(3600)
        outputs: tuple[Any, ...]
        if request.task == "feature-extraction":
            outputs = tuple((float(one.tokens), 0.5) for one in request.inputs)
        else:
            outputs = tuple(
                ({"label": request.adapter or "base", "score": 1.0 / one.tokens},)
                for one in request.inputs
            )
        return EncodeResult(request.id, outputs, request.version, request.tokens, 0.5, 1.5)

    def _generate(self, request: GenerateRequest, tokens: list[GeneratedToken]) -> list[Event]:
        script = script_of(request)
        if script is not None:
            return self._say(script, request, tokens)
        text = f" {request.adapter or 'base'}{len(tokens)}"
        tokens.append(GeneratedToken(len(tokens), text, -0.5, special=False))
        events: list[Event] = []
        if request.stream:
            events.append(TokenEvent(request.id, len(tokens) - 1, text, -0.5, special=False))
        if len(tokens) >= request.sampling.max_new_tokens:
            del self.running[request.id]
            whole = "".join(token.text for token in tokens)
            events.append(
                GenerateResult(
                    request.id,
                    whole,
                    "",
                    tuple(tokens),
                    "length",
                    request.version,
                    len(request.token_ids),
                    0.5,
                    1.5,
                )
            )
        return events

    def _say(
        self, script: str, request: GenerateRequest, tokens: list[GeneratedToken]
    ) -> list[Event]:
        """Five characters of a script, one a token, and the end."""
        events: list[Event] = []
        reason: FinishReason | None = None
        for _ in range(5):
            text = script[len(tokens) : len(tokens) + 1]
            tokens.append(GeneratedToken(len(tokens), text, -0.5, special=not text))
            if request.stream:
                events.append(TokenEvent(request.id, 0, text, -0.5, special=not text))
            if not text:
                reason = "eos_token"
            elif len(tokens) >= request.sampling.max_new_tokens:
                reason = "length"
            if reason is not None:
                del self.running[request.id]
                whole, many = "".join(token.text for token in tokens), len(request.token_ids)
                tail = "" if request.stream else whole
                result = GenerateResult(
                    request.id, whole, tail, tuple(tokens), reason, request.version, many, 0.5, 1.5
                )
                return [*events, result]
        return events


def script_of(request: GenerateRequest) -> str | None:
    """What a prompt asks to be said; None: nothing of its own."""
    prompt = "".join(map(chr, request.token_ids))
    start, end = (prompt.rfind(one) for one in SCRIPT)
    return prompt[start + 1 : end] if 0 <= start < end else None


class DeafEngine(FakeEngine):
    """Never stops a generation before its end."""

    def submit(self, message: Message) -> None:
        if not isinstance(message, Cancel):
            super().submit(message)


def build(options: EngineOptions) -> FakeEngine:
    shifted_clock.install(options.store_dir.parent)
    return FakeEngine(options)


def build_deaf(options: EngineOptions) -> DeafEngine:
    return DeafEngine(options)


def build_broken(options: EngineOptions) -> FakeEngine:
    raise ValueError("no such base\nin two lines")
