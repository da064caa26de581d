"""A server in its real processes around the fake engine: quick to start, for faults and limits.

Run as a program by `tests.stand.live`; the registry is a dictionary, a token is a character.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from adapters.tasks import Task
from server import metrics
from server.edge.admit.shared_load import SharedLoad
from server.inputs.text import Side, Text, TextInput
from server.inputs.text_errors import InputTooLong, InvalidInput
from server.messages import TokenizedInput
from server.settings import Settings, load_settings
from tests.stand import shifted_clock

if TYPE_CHECKING:
    from server.edge.target import Base

BROKEN_BEAT = "break-beat"
HUNG_CHORE = "hang-chore"
HANGING = "hang " * 1024  # a text on which the tokenizer hangs


@dataclass
class Record:
    name: str
    task: str
    version: str
    created: datetime
    pinned: bool = False
    labels: tuple[str, ...] | None = None
    chat_template: bool = False
    generation: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    canary: None = None

    def versions(self) -> tuple[str, ...]:
        return (self.version,)

    def fits(self, base_digest: str) -> bool:
        return not base_digest


class FakeRegistry:
    def __init__(self) -> None:
        self.store: Any = SimpleNamespace(
            conversation=None, take_notes=tuple, close=lambda: None, missing=set
        )
        tasks = {"imdb": "text-classification", "story": "text-generation"}
        now = datetime.now(UTC)
        self.known = {name: Record(name, task, f"{name}-v1", now) for name, task in tasks.items()}

    def reopen(self) -> None:
        return

    def close(self) -> None:
        return

    def collect_garbage(self, resident: set[str], *, grace_s: float) -> None:
        return

    def records(self) -> dict[str, Record]:
        return self.known


class Characters(Text):
    """A tokenizer without transformers."""

    @cached_property
    def apart(self) -> Text:
        """Nothing is shared, so nothing has to be apart."""
        return self

    @property
    def chat_template(self) -> str | None:
        return self.template

    @property
    def tool_template(self) -> str | None:
        return self.template

    @property
    def special_tokens(self) -> dict[str, Any]:
        return {"eos_token": "</s>"}

    def id_of(self, token: str) -> int | None:
        return None

    def __init__(self, max_tokens: int, template: str | None = None) -> None:
        self.template = template
        self.max_tokens = max_tokens
        self.vocab_size = None

    def tokenize(
        self,
        texts: Sequence[TextInput],
        task: Task,
        *,
        truncation: bool = False,
        side: Side | None = None,
    ) -> tuple[TokenizedInput, ...]:
        if HANGING in texts:
            threading.Event().wait()
        if any(not one for one in texts):
            raise InvalidInput("An input is empty.")
        found = [tuple(map(ord, "".join(one))) for one in texts]
        if not truncation and any(len(ids) > self.max_tokens for ids in found):
            raise InputTooLong("An input is too long.", limit_tokens=self.max_tokens)
        return tuple(TokenizedInput(ids[: self.max_tokens]) for ids in found)

    def tokenize_prompt(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 0,
        truncation: bool = False,
        special_tokens: bool = True,
    ) -> tuple[int, ...]:
        if len(prompt) + max_new_tokens > self.max_tokens:
            raise InputTooLong("The prompt is too long.", limit_tokens=self.max_tokens)
        return tuple(map(ord, prompt))


def break_beat(load: SharedLoad, order: Path) -> None:
    """Have the heartbeat of one HTTP process fail once, as soon as the file ``order`` is there."""
    beat, main_pid = load.beat, os.getpid()

    def fallible(number: int) -> None:
        if os.getpid() != main_pid and order.exists():
            order.unlink()
            raise OSError(5, "asked for")
        beat(number)

    given: Any = load
    given.beat = fallible


def hang_if_told(order: Path) -> None:
    """A chore that never ends once the file ``order`` is there; says in it where it hangs."""
    if order.exists():
        order.write_text(str(os.getpid()))
        threading.Event().wait()


def fake_base(settings: Settings) -> Base:
    """A base without a model, of which a token is a character."""
    from server.edge.target import Base

    nothing: Any = None
    signature: Any = SimpleNamespace(digest="")
    file = settings.chat_template
    text = Characters(256) if file is None else Characters(8192, file.read_text(encoding="utf-8"))
    return Base(
        name="fake-base",
        task="text-generation",
        signature=signature,
        check_head=nothing,
        inputs=text,
        prompts=text,
        created=time.time(),
    )


def main(engine: str) -> None:
    settings = load_settings({})
    shifted_clock.install(settings.data_dir)
    settings.run_dir.mkdir(parents=True)
    metrics.prepare(settings.metrics_dir)
    from server.edge.litserve import logs
    from server.edge.processes.failed_start import StartFailed
    from server.edge.processes.run import run_service
    from server.edge.service import Service

    logs.configure(settings.log_level, access=settings.access_log, form=settings.log_format)
    base = fake_base(settings)
    registry: Any = FakeRegistry()
    service = Service(settings, base, registry, lambda: load_settings({}))
    break_beat(service.load, settings.data_dir / BROKEN_BEAT)
    try:
        run_service(
            service,
            [],
            base="none",
            engine=engine,
            on_ready=lambda: None,
            upkeep=lambda: None,
            chore=lambda: hang_if_told(settings.data_dir / HUNG_CHORE),
        )
    except StartFailed as failure:
        sys.stderr.write(f"hira: {failure}\n")
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
