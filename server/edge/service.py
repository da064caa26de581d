"""What every endpoint of an HTTP process needs: settings, base, registry, dispatcher, keys.

Made once in the main process before the fork, then opened in each HTTP process.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Final, TypeVar

from adapters.intake.conversation import Conversation, UsedConversation, unused
from adapters.registry.names import POLL_S, Names
from server.edge.admit.audit_log import audit_log_of
from server.edge.admit.body_budget import BodyBudget
from server.edge.admit.bounds import Bounds
from server.edge.admit.callers import may_ask
from server.edge.admit.key_file import ApiKey, read_key_file
from server.edge.admit.key_usage import SharedUsage
from server.edge.admit.key_usage_file import USAGE_FILE, KeyUsageFile, UsageDays
from server.edge.admit.keys import keyring_of, settings_keyring
from server.edge.admit.shared_load import SharedLoad
from server.edge.admit.slow_work import Pool, SlowWork
from server.edge.grammars import Grammars
from server.edge.link.dispatcher import Dispatcher
from server.edge.link.link import Link
from server.edge.target import Base, Targets
from server.edge.templates import Templates
from server.edge.tracing import Tracing
from server.errors import Refusal
from server.inputs.conversation import settle
from server.inputs.grammars import GrammarLimits
from server.inputs.rendering import RenderLimits, RenderProcess
from server.inputs.token_bytes import token_bytes
from server.messages import Event, Failure, GenerateResult, Pin, Request, TokenEvent
from server.metrics import HttpMetrics
from server.settings import Settings, SettingsFault

if TYPE_CHECKING:
    from adapters.registry.registry import Registry

logger = logging.getLogger(__name__)
T = TypeVar("T")

KEYS_POLL_S: Final = 1.0
USAGE_TICKS: Final = 10  # of those, between two writings of what keys have used
KEYS_TOLD_EVERY_S: Final = 60.0  # while the file is broken
# What may change while the server runs.
RELOADABLE: Final = (
    "admin_key",
    "api_keys",
    "keys_file",
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
        usage_file: In the data folder: what keys have used, by this service's processes alone.
    """

    def __init__(
        self,
        settings: Settings,
        base: Base,
        registry: Registry,
        reload: Callable[[], Settings],
        link: Callable[[SharedLoad, Bounds], Link] | None = None,
        *,
        usage_file: str = USAGE_FILE,
    ) -> None:
        self.settings = settings
        self.base = base
        self.registry = registry
        self.load = SharedLoad(settings.api_processes)
        self.names = Names(registry, self.load.registry_changes, base_digest=base.signature.digest)
        self.names.refresh()  # an HTTP process that starts while the database is away has these
        self.targets = Targets(self.names, base, settings.default_adapter, may_ask)
        self._number = 0
        self._changing = threading.Lock()
        self._reading: asyncio.Future[bool] | None = None
        self.dispatcher: Link = (
            Dispatcher(self.load, bounds_of(settings), settings.api_processes, settings.run_dir)
            if link is None
            else link(self.load, bounds_of(settings))
        )
        self.key_usage = SharedUsage(settings.api_processes)
        self.dispatcher.key_usage = self.key_usage
        self.usage_file = KeyUsageFile(settings.data_dir / usage_file, self.key_usage)
        self.usage_file.restore()
        self.slow_work = SlowWork(settings, self.dispatcher.admission, self.dispatcher.give_up)
        self.bodies = BodyBudget()
        self.audit_log = audit_log_of(settings)
        self.tracing: Tracing | None = None  # in a process that is open, where it is asked for
        self.metrics: HttpMetrics | None = None
        self.started = time.time()
        self.read_settings = reload
        self._settings_age = 0
        self._file_keys = None if settings.keys_file is None else read_key_file(settings.keys_file)
        self.keys = keyring_of(settings, self._file_keys)
        self.keys_fault: str | None = None  # why the keys file is not used as it is now
        self._keys_told_at = -math.inf
        self._key_reader: ThreadPoolExecutor | None = None  # of the keys file
        self._tokens_at: dict[str, float] = {}  # when a streamed request had its last token
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
        self._key_reader = ThreadPoolExecutor(1, thread_name_prefix="keys-file")
        self.key_usage.number = number
        self.look_at_keys()
        self.registry.reopen()
        self.metrics = HttpMetrics()
        if self.settings.otel_endpoint is not None:
            self.tracing = Tracing.to_collector(
                self.settings.otel_endpoint, self.settings.otel_ratio
            )
        self._templates = Templates(self._render_limits, self.registry.store.conversation)
        self.slow_work.open()
        self._grammars = Grammars(
            cache(lambda: token_bytes(self.base.texts.tokenizer, self.base.signature.vocab_size)),
            self._grammar_limits,
            hang_s=self.settings.max_step_s,
            hung=self.dispatcher.give_up,
        )
        self.dispatcher.on_event = self._count
        self.dispatcher.on_predicted = self.metrics.predicted_wait

    def refused(self, code: str) -> None:
        """Count an error response, or a connection that ended before it had a request."""
        if self.metrics is not None:
            self.metrics.refusal(code)

    def close(self) -> None:
        self.slow_work.close()
        if self.tracing is not None:
            self.tracing.close()
        if self._reader is not None:
            self._reader.shutdown(wait=False, cancel_futures=True)
        if self._key_reader is not None:
            self._key_reader.shutdown(wait=False, cancel_futures=True)
        if self._templates is not None:
            self._templates.close()
        if self._grammars is not None:
            self._grammars.close()
        self._trials.close()
        self.registry.close()
        self.registry.store.close()

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
    def is_keyed(self) -> bool:
        """Whether inference needs a key."""
        return self.settings.keys_file is not None or bool(self.settings.api_keys)

    @property
    def default_model(self) -> str:
        """Who answers where nobody is named: the adapter that the operator named, or the base where
        there is none or it is not for the key of the present call."""
        default = self.settings.default_adapter
        return default if default is not None and may_ask(default) else self.base.name

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
        had_admin_key = self.settings.admin_key is not None
        self.settings = self.settings.model_copy(update=changed)
        self.slow_work.settings = self.settings
        self.targets.default = self.settings.default_adapter
        self.dispatcher.bounds = bounds_of(self.settings)
        if self.settings.keys_file is None:
            self._use_keys(None)
        elif self._file_keys is not None:
            self._use_keys(self._file_keys, is_read=False)
        elif self.keys_fault is not None:
            # An admin key that was generated stays; one of the settings may have been changed.
            generated = not had_admin_key and any(one.admin for one in self.keys.named())
            self.keys = settings_keyring(self.settings, generated=generated)
        # else it is new: the keys of before hold until `follow_keys` has read it, in a second

    async def follow_keys(self) -> None:
        """Read the keys file again every KEYS_POLL_S; a broken one lets nobody in who was not."""
        loop = asyncio.get_running_loop()
        for tick in itertools.count(1):
            await asyncio.sleep(KEYS_POLL_S)
            self.refresh()  # perhaps no request does
            if self._number == 0 and tick % USAGE_TICKS == 0:
                await loop.run_in_executor(self._key_reader, self.keep_usage)
            path = self.settings.keys_file
            if path is None:
                continue
            try:
                found = await loop.run_in_executor(self._key_reader, read_key_file, path)
            except SettingsFault as fault:
                self._tell_broken_keys(fault)
                continue
            if path == self.settings.keys_file and (
                found != self._file_keys or self.keys_fault is not None
            ):
                self._use_keys(found)

    def keep_usage(self) -> None:
        """Write what keys have used to its file; a disk that is full is told, and tried again."""
        if not self.is_keyed:
            return
        try:
            self.usage_file.write([one.name for one in self.keys.named()])
        except OSError as error:
            logger.error("What keys have used could not be written: %s", error)

    def usage_days(self) -> UsageDays:
        """What keys used on the last days, today with it; in a thread."""
        self.keep_usage()
        return self.usage_file.read()

    def look_at_keys(self) -> None:
        """Read the keys file before the first request: a process that replaces another begins with
        the settings and keys of the start, of which some may have been taken away since."""
        self.refresh()
        if self.settings.keys_file is None:
            return
        try:
            found = read_key_file(self.settings.keys_file)
        except SettingsFault as fault:
            self._tell_broken_keys(fault)
        else:
            if found != self._file_keys or self.keys_fault is not None:
                self._use_keys(found)
        if self.keys_fault is not None and self.load.keys_were_changed():
            # Which keys were the last good ones is not known here.
            self._file_keys, self.keys = None, settings_keyring(self.settings)

    def _use_keys(self, from_file: dict[str, ApiKey] | None, *, is_read: bool = True) -> None:
        """Take over the keys of a file, with those of the settings; or go on with what there is.

        ``is_read``: whether the file was read just now, or there is none. Else it may be broken
        still.
        """
        try:
            self.keys = keyring_of(self.settings, from_file)
        except SettingsFault as fault:
            self._tell_broken_keys(fault)
            return
        if self.keys_fault is not None and is_read:
            logger.warning("The keys file can be used again")
            self.keys_fault = None
        if from_file != self._file_keys:
            self.load.keys_changed(self._number)
        self._file_keys = from_file

    def _tell_broken_keys(self, fault: SettingsFault) -> None:
        """Go on with the keys of before, and say so: when it becomes so, and every minute.

        Who names a keys file wants a server that asks for keys. So where none of it was ever read,
        nobody gets in without a key, though the server may have been open until then.
        """
        now = time.monotonic()
        if str(fault) != self.keys_fault or now - self._keys_told_at > KEYS_TOLD_EVERY_S:
            logger.error("The keys were not changed, and only those of before hold: %s", fault)
            self._keys_told_at = now
        self.keys_fault = str(fault)
        if self._file_keys is None:
            self.keys = self.keys.closed()

    async def follow_registry(self) -> None:
        """Tell the worker which versions are pinned and which have a name: when it comes up, and
        when any process has changed it."""
        told: object = None
        seen, known = None, self._known_versions()
        while True:
            epoch = self.dispatcher.epoch
            await self._read_registry()
            if self.metrics is not None:
                self.metrics.store(self.registry.store.take_notes())
            if self.names.records is not seen:  # of ten thousand names it takes milliseconds
                seen, known = self.names.records, self._known_versions()
            now = (epoch, known)
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
            Refusal: As `SlowWork.run`.
        """

        def change() -> T:
            done = work()
            with self._changing:
                self.load.registry_changed(self._number)
            return done

        done = await self.slow_work.run(change, pool)
        if self.names.is_down:  # the database has just answered: do not wait for the next reading
            await self._read_registry()
        return done

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

    @property
    def _render_limits(self) -> RenderLimits:
        return RenderLimits(cpu_s=self.settings.template_s)

    @property
    def _grammar_limits(self) -> GrammarLimits:
        settings = self.settings
        return GrammarLimits(settings.grammar_s, int(settings.max_grammar_bytes))

    def _known_versions(self) -> Pin:
        return Pin(self.names.pinned_versions(), named=tuple(sorted(self.names.versions())))

    def _settle(self, request: Request, event: Event) -> None:
        if request.origin.key is None or isinstance(event, TokenEvent):
            return
        prompt = generated = 0
        if not isinstance(event, Failure):
            prompt = event.prompt_tokens
            generated = len(event.tokens) if isinstance(event, GenerateResult) else 0
            if self.metrics is not None:
                self.metrics.key_tokens(request.origin.key, prompt=prompt, generated=generated)
        self.key_usage.settle(
            request.id,
            prompt=prompt,
            generated=generated,
            kept=isinstance(event, Failure) and event.code in {"cancelled", "deadline_exceeded"},
        )

    def _count(self, request: Request, event: Event) -> None:
        """Metrics of what comes back, and what its key has used, as it comes back."""
        self._settle(request, event)
        if self.tracing is not None and not isinstance(event, TokenEvent):
            self.tracing.request(request, event)
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
                arm = self.targets.arm_of(adapter, request.version)
                if adapter is not None and arm is not None:
                    metrics.canary_failure(adapter, arm, event.code)
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
