"""What every endpoint of an HTTP process needs: settings, base, registry, dispatcher, keys.

Made once in the main process before the fork, then opened in each HTTP process. It resolves a name
to a version when a request is admitted, so that a replacement never changes an answer half-way.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast

from adapters.errors import AdapterError
from adapters.intake.conversation import Conversation, UsedConversation, unused
from adapters.registry.names import POLL_S, Names
from adapters.tasks import BY_NAME, ROWS, Task, asked_at, tasks_at
from server.edge.admit.body_budget import BodyBudget
from server.edge.admit.bounded_pool import BoundedPool, PoolFull, PoolHung, PoolLate
from server.edge.admit.bounds import Bounds
from server.edge.admit.keys import Keyring, resolve_admin_key
from server.edge.admit.shared_load import SharedLoad
from server.edge.grammars import Grammars
from server.edge.link.dispatcher import Dispatcher
from server.edge.link.link import Link
from server.edge.templates import Templates
from server.errors import Refusal
from server.inputs.conversation import settle
from server.inputs.grammars import GrammarLimits
from server.inputs.images import Images
from server.inputs.rendering import RenderLimits, RenderProcess
from server.inputs.text import Text, TextError
from server.inputs.token_bytes import token_bytes
from server.messages import Event, Failure, GenerateResult, Pin, Request, TokenEvent
from server.metrics import BASE_LABEL, HttpMetrics
from server.settings import Settings, SettingsFault

if TYPE_CHECKING:
    from adapters.intake.checkpoint import AdapterWeights
    from adapters.registry.registry import AdapterRecord, Registry
    from adapters.signature import BaseSignature

logger = logging.getLogger(__name__)
T = TypeVar("T")
InputsT = TypeVar("InputsT", Text, Images)

AT_ONCE_CHARACTERS: Final = 4096  # texts longer than this are tokenized off the event loop
LONG_CHARACTERS: Final = 1 << 16  # and longer than this, by a tokenizer that nobody else waits for
INPUT_CHARACTERS: Final = 128  # what an input costs beside its text, in characters
# Threads of each kind of slow work: one kind at its limit stops no other.
Pool = Literal[
    "short-texts",
    "long-texts",
    "sources",
    "uploads",
    "registrations",
    "records",
    "collecting",
    "metrics",
    "bodies",
    "answers",
]
POOLS: Final[dict[Pool, int]] = {
    "short-texts": 1,  # a tokenizer keeps state
    "long-texts": 1,  # and so does its twin
    "sources": 4,  # fetching: as slow as where they come from
    "uploads": 2,
    "registrations": 2,
    "records": 2,
    "collecting": 1,
    "metrics": 1,
    "bodies": 1,  # large ones, from bytes to values
    "answers": 1,  # large ones, from values to bytes
}
# Kinds that are as slow as a disk, or as somebody else's server, and that few ask for.
UNHURRIED: Final[frozenset[Pool]] = frozenset(
    {"sources", "uploads", "registrations", "records", "collecting"}
)
UNHURRIED_WAITING: Final = 64  # requests that may wait for one of those
UNHURRIED_HANG_S: Final = 3600.0  # longer than any source or disk takes for one adapter
# What may change while the server runs.
RELOADABLE: Final = (
    "admin_key",
    "api_keys",
    "access_log",
    "default_adapter",
    "timeout_s",
    "max_timeout_s",
    "max_inputs",
    "max_new_tokens",
    "max_body_bytes",
    "max_pending_body_bytes",
    "max_upload_bytes",
    "max_queue_requests",
    "max_queue_tokens",
    "max_queue_pixel_bytes",
    "max_adapter_requests",
    "max_adapter_tokens",
)


@dataclass(frozen=True)
class Base:
    """The base model as the HTTP side knows it: no weights."""

    name: str
    task: Task  # what the bare base does
    signature: BaseSignature
    check_head: Callable[[AdapterWeights], None]  # raises what is wrong with a task head
    inputs: Text | Images  # tokenizer, limited to what one input may have; or image processor
    prompts: Text | None  # the tokenizer, limited to the base's context; None on a base of images
    created: float

    @property
    def texts(self) -> Text:
        """The tokenizer, limited to the base's context.

        Raises:
            Refusal: The base takes images.
        """
        if self.prompts is None:
            raise Refusal.because(
                "task_mismatch",
                "This base takes images, not texts.",
                found="a call for texts",
                expected="images for /predict or /embed",
            )
        return self.prompts


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a request is for: an adapter in one version, or the bare base; and what it asks for."""

    adapter: str | None
    version: str | None
    task: Task
    own_template: bool = False  # conversations are written with the adapter's own
    generation: Mapping[str, Any] = field(default_factory=dict)  # as ``AdapterRecord`` has it

    @property
    def shown(self) -> str:
        return self.adapter or BASE_LABEL


def base_task(architecture: str) -> Task:
    """What a base of this class does without any adapter."""
    heads = (row for row in ROWS if row.head == "base" and architecture.endswith(row.class_ends))
    return next((row.name for row in heads), "feature-extraction")


def bounds_of(settings: Settings) -> Bounds:
    return Bounds(
        requests=settings.max_queue_requests,
        tokens=settings.max_queue_tokens,
        adapter_requests=settings.max_adapter_requests,
        adapter_tokens=settings.max_adapter_tokens,
        pixel_bytes=int(settings.max_queue_pixel_bytes),
    )


class Service:
    """See the module.

    Args:
        settings: Of the start.
        base: What is served.
        registry: Opened anew in every process.
        reload: Reads the settings again, for the part that may change while the server runs.
        link: Makes the way to the engines; without it, the one to the worker of this machine.
    """

    def __init__(
        self,
        settings: Settings,
        base: Base,
        registry: Registry,
        reload: Callable[[], Settings],
        link: Callable[[SharedLoad, Bounds], Link] | None = None,
    ) -> None:
        self.settings = settings
        self.base = base
        self.registry = registry
        self.load = SharedLoad(settings.api_processes)
        self.names = Names(registry, self.load.registry_changes, base_digest=base.signature.digest)
        self.names.refresh()  # an HTTP process that starts while the database is away has these
        self._number = 0
        self._changing = threading.Lock()
        self._reading: asyncio.Future[bool] | None = None
        self.dispatcher: Link = (
            Dispatcher(self.load, bounds_of(settings), settings.api_processes, settings.run_dir)
            if link is None
            else link(self.load, bounds_of(settings))
        )
        self.bodies = BodyBudget()
        self.metrics: HttpMetrics | None = None
        self.started = time.time()
        self.read_settings = reload
        self._settings_age = 0
        self.keys = self._keyring()
        self._tokens_at: dict[str, float] = {}  # when a streamed request had its last token
        # Not asyncio's default threads: LitServe's response task lives there and must never wait.
        self._pools: dict[Pool, BoundedPool] = {}
        self._reader: ThreadPoolExecutor | None = None  # of the registry, and of nothing else
        self._templates: Templates | None = None
        self._grammars: Grammars | None = None
        self._trials = RenderProcess(self._render_limits)  # of templates at their registration

    def open(self, number: int) -> None:
        """Take up service in an HTTP process: threads, metrics and connections of its own.

        Args:
            number: Of the HTTP process.
        """
        self._number = number
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="registry")
        self.registry.reopen()
        self.metrics = HttpMetrics()
        self._templates = Templates(self._render_limits, self.registry.store.conversation)
        self.open_pools()
        self._grammars = Grammars(
            cache(lambda: token_bytes(self.base.texts.tokenizer, self.base.signature.vocab_size)),
            self._grammar_limits,
            hang_s=self.settings.max_step_s,
            hung=self.dispatcher.give_up,
        )
        self.dispatcher.on_event = self._count

    def open_pools(self) -> None:
        """Make the threads for slow work; on the event loop, once in a process."""
        self._pools = {
            name: BoundedPool(name, count, hang_s=self._hang_s(name), hung=self.dispatcher.give_up)
            for name, count in POOLS.items()
        }

    def _hang_s(self, pool: Pool) -> float:
        """How long a piece of work may have a thread before this process is given up for it."""
        if pool in UNHURRIED:
            return UNHURRIED_HANG_S
        return self.settings.max_step_s if pool == "long-texts" else self.settings.hang_s

    def refused(self, code: str) -> None:
        """Count an error response, or a connection that ended before it had a request."""
        if self.metrics is not None:
            self.metrics.refusal(code)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        if self._reader is not None:
            self._reader.shutdown(wait=False, cancel_futures=True)
        if self._templates is not None:
            self._templates.close()
        if self._grammars is not None:
            self._grammars.close()
        self._trials.close()
        self.registry.close()

    @property
    def templates(self) -> Templates:
        """What renders conversations, in a process that is open."""
        assert self._templates is not None
        return self._templates

    @property
    def grammars(self) -> Grammars:
        """What checks grammars, in a process that is open."""
        assert self._grammars is not None
        return self._grammars

    @property
    def default_model(self) -> str:
        """Who answers where nobody is named: the adapter that the operator named, or the base."""
        return self.settings.default_adapter or self.base.name

    def settle(self, conversation: Conversation) -> UsedConversation:
        """What of an adapter's conversation is used on this base; not for the event loop."""
        return settle_on(self.base, conversation, self._trials)

    def refresh(self) -> None:
        """Take over reloaded settings, if there are any; one comparison when there are none."""
        age = self.load.settings_age
        if age == self._settings_age:
            return
        self._settings_age = age
        try:
            fresh = self.read_settings()
        except SettingsFault as fault:
            logger.error("The settings were not reloaded: %s", fault)
            return
        changed = {name: getattr(fresh, name) for name in RELOADABLE}
        self.settings = self.settings.model_copy(update=changed)
        self.dispatcher.bounds = bounds_of(self.settings)
        self.keys = self._keyring()

    async def follow_registry(self) -> None:
        """Tell the worker which versions are pinned and which have a name: when it comes up, and
        when any process has changed it."""
        told: object = None
        while True:
            epoch = self.dispatcher.epoch
            await self._read_registry()
            now = (epoch, self._known_versions())
            if epoch is not None and now != told:
                self.dispatcher.tell(now[1])
                told = now
            await asyncio.sleep(POLL_S)

    async def catch_up(self) -> None:
        """Return when every change that was acknowledged so far, by any HTTP process, is known
        here, or the registry cannot be read: ``record`` then says so where it matters.

        At once when nothing has changed, and while the registry is known to be away.
        """
        changes = self.load.registry_changes()
        while not (self.names.covers(changes) or self.names.is_down):
            await self._read_registry()

    async def _read_registry(self) -> None:
        """One reading at a time, in a thread; whoever comes meanwhile waits for the same one."""
        if self._reading is None or self._reading.done():
            loop = asyncio.get_running_loop()
            self._reading = loop.run_in_executor(self._reader, self.names.refresh)
        await asyncio.shield(self._reading)

    async def change_registry(self, work: Callable[[], T], pool: Pool) -> T:
        """Run a change of the registry in a thread; every request after it finds it done.

        Raises:
            Refusal: As ``in_thread``.
        """

        def change() -> T:
            done = work()
            with self._changing:
                self.load.registry_changed(self._number)
            return done

        done = await self.in_thread(change, pool)
        if self.names.is_down:  # the database has just answered: do not wait for the next reading
            await self._read_registry()
        return done

    async def in_thread(
        self,
        work: Callable[[], T],
        pool: Pool,
        *,
        size_bytes: int = 0,
        deadline: float | None = None,
        owed: bool = False,
    ) -> T:
        """Run something slow off the event loop, on the threads of its kind.

        Args:
            work: Its exceptions are passed on.
            pool: The kind.
            size_bytes: About what is held in memory for it.
            deadline: As ``time.monotonic()`` counts; without one, ``timeout_s`` from now for what
                answers depend on, and none for the rest.
            owed: It has to be done, however much waits: the end of what was begun.

        Raises:
            Refusal: overloaded, deadline_exceeded, or restarting where a piece of work hangs.
        """
        settings = self.settings
        most = max(1, settings.max_queue_requests // settings.api_processes)
        if pool in UNHURRIED:
            most = min(most, UNHURRIED_WAITING)
        elif deadline is None and not owed:
            deadline = time.monotonic() + settings.timeout_s
        try:
            return await self._pools[pool].run(
                work,
                deadline=deadline,
                most=None if owed else most,
                size_bytes=size_bytes,
                most_bytes=None if owed else int(settings.max_pending_body_bytes),
            )
        except PoolFull as full:
            raise self.dispatcher.admission.overloaded(full.found, full.expected) from None
        except PoolLate:
            raise Refusal.because(
                "deadline_exceeded",
                "The deadline passed before the request could be prepared, or its answer written.",
                fix="Ask for less, allow more time, or send fewer requests at once.",
            ) from None
        except PoolHung:
            raise Refusal.because(
                "restarting",
                "Work on a request has hung, and its HTTP process ends.",
                fix="Send the request again; a new process is being started.",
            ) from None

    async def tokenize(
        self,
        encoder: InputsT,
        characters: int,
        work: Callable[[InputsT], T],
        field: str,
        deadline: float,
    ) -> T:
        """Run the tokenizer: at once for short texts, off the event loop for others; for long ones
        a tokenizer and a thread of their own, so that short ones never wait for them.

        Args:
            encoder: The tokenizer, or the image processor.
            characters: How long the texts are in all, with ``INPUT_CHARACTERS`` for each.
            work: What to run, with ``encoder`` or its twin.
            field: Where the body has the texts, for an error.
            deadline: Of the request, as ``time.monotonic()`` counts.

        Raises:
            Refusal: In the tokenizer's words; or as ``in_thread``.
        """
        short = self._pools["short-texts"]
        try:
            # While its thread is at work it has the tokenizer: the event loop must not wait for it.
            if characters <= AT_ONCE_CHARACTERS and short.idle:
                return work(encoder)
            if characters <= LONG_CHARACTERS:
                return await self.in_thread(
                    lambda: work(encoder), "short-texts", size_bytes=characters, deadline=deadline
                )
            return await self.in_thread(
                lambda: work(encoder.apart), "long-texts", size_bytes=characters, deadline=deadline
            )
        except TextError as error:
            raise Refusal.of(error, field) from None

    def record(self, name: str, field: str | None = None) -> AdapterRecord:
        """The registry's record of an adapter, from memory; of whatever base.

        Raises:
            Refusal: adapter_not_found or registry_unavailable.
        """
        try:
            return self.names.resolve(name)
        except AdapterError as error:
            raise Refusal.of(error, field) from None

    def served_record(self, name: str, field: str | None = None) -> AdapterRecord:
        """The record of an adapter that can be asked for answers on this base.

        Raises:
            Refusal: adapter_not_found, registry_unavailable or base_mismatch.
        """
        record = self.record(name, field)
        try:
            self.names.check_fits(record)
        except AdapterError as error:
            raise Refusal.of(error, field) from None
        return record

    def is_base(self, name: str) -> bool:
        """Whether a name means the bare base."""
        return name in {self.base.name, BASE_LABEL}

    def target(
        self,
        names: Sequence[str | None],
        path: str,
        field: str = "adapter",
        *,
        call: str | None = None,
    ) -> Target:
        """Resolve the adapter that a call names, in its query or its body.

        Args:
            names: Everything that names one; at most one distinct name may be among them. The
                base's own name means the bare base.
            path: The native call, which the table of tasks has.
            field: Where it is named, for the error.
            call: What the client called, for the error, where that is another.

        Raises:
            Refusal: adapter_conflict, adapter_required, or as ``adapter_target``.
        """
        name = self._one_name(names, field)
        if name is None:
            return self._bare_base(path, field, call or path)
        return self.adapter_target(name, path, field)

    def _one_name(self, names: Sequence[str | None], field: str) -> str | None:
        """The adapter that is named, None for the bare base.

        Raises:
            Refusal: adapter_conflict for two of them.
        """
        given = {name for name in names if name is not None}
        distinct = sorted({self.base.name if self.is_base(name) else name for name in given})
        if len(distinct) > 1:
            raise Refusal.because(
                "adapter_conflict",
                "The request names two adapters.",
                found=" and ".join(distinct),
                expected="one adapter",
                fix="Name it once, in the query or in the body.",
                field=field,
            )
        return None if not distinct or self.is_base(distinct[0]) else distinct[0]

    def own_path(self, names: Sequence[str | None]) -> str:
        """The native call for what the one adapter that is named is for, or else the base.

        Raises:
            Refusal: adapter_conflict, adapter_not_found, registry_unavailable or base_mismatch.
        """
        name = self._one_name(names, "adapter")
        task: str = self.base.task
        if name is not None:
            task = self.served_record(name, "adapter").task
        row = BY_NAME.get(task)
        return "/predict" if row is None else row.path

    def adapter_target(self, name: str, path: str, field: str = "adapter") -> Target:
        """Resolve one adapter for an endpoint.

        Raises:
            Refusal: adapter_not_found, registry_unavailable, base_mismatch or task_mismatch.
        """
        record = self.served_record(name, field)
        # A record of another program's may hold a task that this one does not know.
        task = asked_at(cast(Task, record.task), path) if record.task in BY_NAME else None
        if task is None:
            own = BY_NAME.get(record.task)
            raise Refusal.because(
                "task_mismatch",
                f"The adapter {name} does {record.task}.",
                found=record.task,
                expected=" or ".join(sorted(tasks_at(path))),
                fix=f"Call {f'POST {own.path}' if own else 'another endpoint'} for this adapter.",
                field=field,
            )
        return Target(name, record.version, task, record.chat_template, record.generation)

    def deadline(self, began: float, asked: str | None) -> float:
        """When a request must be done, as ``time.monotonic()`` counts.

        Args:
            began: When its head arrived, on the same clock.
            asked: The client's ``X-Timeout-Seconds``.

        Raises:
            Refusal: invalid_request for a header that is no number in range.
        """
        seconds = self.settings.timeout_s
        if asked is not None:
            try:
                seconds = float(asked)
            except ValueError:
                seconds = -1.0
            if not 0 < seconds <= self.settings.max_timeout_s:
                raise Refusal.because(
                    "invalid_request",
                    "X-Timeout-Seconds is not a usable number.",
                    found=asked[:40],
                    expected=f"seconds above 0, at most {self.settings.max_timeout_s:g}",
                    field="X-Timeout-Seconds",
                )
        return began + seconds

    def _bare_base(self, path: str, field: str, call: str) -> Target:
        task = asked_at(self.base.task, path)
        if task is None:
            raise Refusal.because(
                "adapter_required",
                f"{call} needs an adapter on this base.",
                found="no adapter",
                expected=(
                    "?adapter=NAME, or adapter in the body"
                    if field == "adapter"
                    else f"an adapter's name in {field}"
                ),
                fix="GET /v1/models lists the adapters.",
                field=field,
            )
        return Target(None, None, task)

    @property
    def _render_limits(self) -> RenderLimits:
        return RenderLimits(cpu_s=self.settings.template_s)

    @property
    def _grammar_limits(self) -> GrammarLimits:
        settings = self.settings
        return GrammarLimits(settings.grammar_s, int(settings.max_grammar_bytes))

    def _keyring(self) -> Keyring:
        key, _ = resolve_admin_key(self.settings.admin_key, self.settings.data_dir)
        return Keyring(key, self.settings.api_keys)

    def _known_versions(self) -> Pin:
        return Pin(self.names.pinned_versions(), named=tuple(sorted(self.names.versions())))

    def _count(self, request: Request, event: Event) -> None:
        """Metrics of what comes back, as it comes back."""
        metrics, adapter = self.metrics, request.adapter
        if metrics is None:
            return
        match event:
            case TokenEvent():
                now = time.monotonic()
                before = self._tokens_at.get(request.id)
                self._tokens_at[request.id] = now
                if before is None:
                    metrics.first_token(adapter, now - request.submitted)
                else:
                    metrics.next_token(adapter, now - before)
            case Failure():
                self._tokens_at.pop(request.id, None)
                metrics.failure(adapter, event.code)
            case GenerateResult():
                self._tokens_at.pop(request.id, None)
                metrics.tokens(adapter, prompt=event.prompt_tokens, generated=len(event.tokens))
            case _:
                metrics.tokens(adapter, prompt=event.prompt_tokens, generated=0)


def settle_on(base: Base, conversation: Conversation, process: RenderProcess) -> UsedConversation:
    """What of an adapter's conversation is used on a base: nothing where it takes no texts."""
    if base.prompts is None:
        return unused(conversation)
    return settle(conversation, base.prompts, process)
