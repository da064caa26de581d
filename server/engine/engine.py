"""The engine: one base, its adapters and two lanes on one device; usable without any HTTP.

``submit`` takes messages, ``step`` runs at most one forward of one lane and returns what happened.
Loading adapters goes on beside it, in the residency's thread. One thread calls everything here but
``wake``.

    engine = Engine.build(options)
    result = engine.encode(["A fine film."], version=version, task="text-classification")
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import UnsupportedOption
from adapters.intake.checkpoint import AdapterWeights, Numbers, load_adapter, load_with
from adapters.registry.adapter_bytes import AdapterBytes, open_store
from adapters.registry.objects import StoreNote
from adapters.residency.packed_files import PackedFiles
from adapters.residency.slots import Residency
from adapters.tasks import BY_NAME, Task
from server.base.captured_steps import GraphPool
from server.base.load import LoadedBase, load_base
from server.encoding.batch import inputs_of
from server.encoding.lane import EncodeFigures, EncodeLane
from server.engine.self_check import generate_lane, try_base
from server.engine.snapshot import (
    EngineSnapshot,
    FailureTracker,
    NamedVersions,
    StepFigures,
    cuda_bytes,
)
from server.generation.failures import cannot_generate
from server.generation.lane import GenerateLane
from server.generation.prefill import with_prefill_tokens
from server.inputs.images import ImageInput, Images
from server.inputs.text import Text, TextInput
from server.messages import (
    TERMINAL,
    Cancel,
    EncodeRequest,
    EncodeResult,
    Event,
    Failure,
    GenerateRequest,
    GenerateResult,
    Message,
    Pin,
    Preload,
    ReleaseQuarantine,
    Request,
    SamplingOptions,
)
from server.options import EngineOptions
from server.stages import tell_stage

logger = logging.getLogger(__name__)


class EngineFailure(Exception):
    """A request made through ``encode`` or ``generate`` failed; ``failure`` says how."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.code}: {failure.message}")
        self.failure = failure


@dataclass(slots=True)
class _EngineParts:
    base: LoadedBase
    inputs: Text | Images
    residency: Residency
    encode: EncodeLane
    generate: GenerateLane | None
    store: AdapterBytes
    failures: FailureTracker
    base_bytes: Mapping[str, int] = field(default_factory=dict)


class Engine:
    """See the module. Made by ``build``."""

    def __init__(self, parts: _EngineParts) -> None:
        self._parts = parts
        self._wake = threading.Event()
        self._outbox: list[Event] = []
        self._turn_is_encode = True
        self._ids = itertools.count()
        self._last: StepFigures | None = None
        self._names = NamedVersions()
        self._found: Counter[str] = Counter()  # requests by whether their adapter was in a slot
        # Of the trial of the base, which are nobody's.
        for lane in (parts.encode, parts.generate):
            if lane is not None:
                lane.take_waits_s()
        parts.residency.on_ready(self._settled)

    @classmethod
    def build(cls, options: EngineOptions) -> Engine:
        """Load the base, try it (``server.engine.self_check``) and start; takes seconds to minutes.

        Raises:
            BaseModelError: The base cannot be served.
            TokenizerError, ImageProcessorError: It has no usable one.
        """
        base = load_base(options)
        signature = base.adapted.signature
        inputs = inputs_of(base, options)
        store = open_store(options.store_dir, options.remote_store)
        store.open()  # before any loader, whose thread gives way to others

        def served(weights: AdapterWeights) -> AdapterWeights:
            if weights.head and BY_NAME[weights.task].head != "adapter":
                raise UnsupportedOption(
                    f"The adapter does {weights.task} and saved modules whole.",
                    found=", ".join(sorted(weights.head)[:3]),
                    expected="factors only: the base's own modules are shared by all adapters",
                    fix="Target those modules with HiRA or LoRA in place of modules_to_save.",
                )
            return weights

        def load(version: str) -> AdapterWeights:
            return served(load_adapter(store.sound_path(version), signature))

        def load_packed(version: str, numbers: Numbers) -> AdapterWeights:
            return served(load_with(store.path(version), signature, numbers))

        files = PackedFiles(
            options.cache_dir / "packed",
            dtype=base.dtype,
            b_by_column=base.adapted.fused is not None,
            pinned=base.device.type == "cuda",
            max_bytes=options.packed_bytes,
            stamp=store.stamp,
            load_with=load_packed,
        )
        residency = Residency(
            base.adapted,
            load,
            files=files if options.packed_bytes else None,
            slots=options.slots,
            device_bytes=options.device_bytes,
            host_bytes=options.host_bytes,
            folded_bytes=options.folded_bytes,
            dtype=base.dtype,
            size=store.tensor_bytes,
        )
        try:
            graphs = GraphPool(base.device)  # one of both lanes: one of them runs at a time
            lanes = options
            if base.generates:
                lanes = with_prefill_tokens(options, base.adapted)
            encode = EncodeLane(base, inputs, residency, lanes, graphs)
            generate = None
            if base.generates and isinstance(inputs, Text):
                generate = generate_lane(base, inputs, residency, lanes, graphs)
            tell_stage("trying the base")
            encode.start()
            try_base(base, inputs, encode, generate)
            if generate is not None:
                generate.start_steps()
        except BaseException:
            residency.close()
            raise
        linear, other = base.adapted.base_bytes()
        return cls(
            _EngineParts(
                base=base,
                inputs=inputs,
                residency=residency,
                encode=encode,
                generate=generate,
                store=store,
                failures=FailureTracker(options.quarantine_failures, options.quarantine_s),
                base_bytes={"linear": linear, "other": other},
            )
        )

    @property
    def base(self) -> LoadedBase:
        return self._parts.base

    @property
    def text(self) -> Text:
        """The tokenizer of a base that takes texts."""
        assert isinstance(self._parts.inputs, Text)
        return self._parts.inputs

    @property
    def inputs(self) -> Text | Images:
        """What turns inputs into what the base takes."""
        return self._parts.inputs

    @property
    def residency(self) -> Residency:
        return self._parts.residency

    @property
    def last_step(self) -> StepFigures | None:
        """The latest step that ran a forward."""
        return self._last

    def submit(self, message: Message) -> None:
        """Take a message; what comes of it is in the events of later steps.

        Raises:
            ValueError: A request of this id is here already.
        """
        if isinstance(message, EncodeRequest | GenerateRequest) and message.version is not None:
            self._names.ask(message.version)
            refused = self._parts.failures.admit(message)
            if refused is not None:
                self._outbox.append(refused)
                return
            is_there = self._parts.residency.state(message.version) == "ready"
            self._found["hit" if is_there else "miss"] += 1
        match message:
            case EncodeRequest():
                self._parts.encode.submit(message)
            case GenerateRequest():
                if self._parts.generate is None:
                    self._outbox.append(
                        cannot_generate(message.id, self.base.adapted.signature.architecture)
                    )
                else:
                    self._parts.generate.submit(message)
            case Cancel():
                self._parts.failures.forget(message.id)
                self._outbox = [one for one in self._outbox if one.id != message.id]
                if not self._parts.encode.cancel(message.id) and self._parts.generate is not None:
                    self._parts.generate.cancel(message.id)
            case Preload():
                self._names.ask(message.version)
                self._parts.residency.prefetch(message.version)
            case ReleaseQuarantine():
                self._parts.failures.release(message.version)
            case Pin():
                self._parts.residency.set_pinned(message.versions)
                if message.named is not None:
                    self._names.named = frozenset((*message.named, *message.versions))
                    self._parts.residency.forget_files(self._names.named)
                    self._tidy()

    def step(self) -> list[Event]:
        """Run at most one forward, of the lane whose turn it is; [] when there is nothing to do."""
        if self._names.is_due():
            self._tidy()
        events, self._outbox = self._outbox, []
        encode, generate = self._parts.encode, self._parts.generate
        can_encode = encode.has_work()
        can_generate = generate is not None and generate.has_work()
        if not can_encode and not can_generate:
            self._parts.failures.note(events)
            return events
        encodes = can_encode and (self._turn_is_encode or not can_generate)
        self._turn_is_encode = not encodes
        if encodes:
            before = encode.figures().steps
            events += encode.step()
            self._note_encode(encode.figures(), before)
        elif generate is not None:
            steps, clock = generate.figures().steps, time.perf_counter()
            events += generate.step()
            self._note_generate(generate, steps, time.perf_counter() - clock)
        self._parts.failures.note(events)
        return events

    def has_work(self) -> bool:
        """Whether a step could do something now, rather than wait for an adapter to load."""
        generate = self._parts.generate
        return bool(
            self._outbox
            or self._parts.encode.has_work()
            or (generate is not None and generate.has_work())
        )

    def wait(self, timeout: float) -> None:
        """Return when an adapter has been loaded or has failed, ``wake`` is called, a deadline
        passes, or after ``timeout`` seconds; at once if one came since the last wait."""
        if self._names.is_due():
            self._tidy()
        lanes = (self._parts.encode, self._parts.generate)
        deadlines = [lane.next_deadline() for lane in lanes if lane is not None]
        now = time.monotonic()
        until = [max(0.0, one - now) for one in deadlines if one is not None]
        self._wake.wait(min([timeout, *until]))
        self._wake.clear()

    def wake(self) -> None:
        """End a ``wait``; from any thread."""
        self._wake.set()

    def take_load_seconds(self) -> list[float]:
        """How long each load of an adapter from disk took, in seconds, since the last call."""
        return self._parts.residency.take_load_seconds()

    def take_store_notes(self) -> Sequence[StoreNote]:
        """What was asked of an object store that holds adapters, since the last call."""
        return self._parts.store.take_notes()

    def snapshot(self) -> EngineSnapshot:
        parts = self._parts
        known = parts.residency.snapshot()
        quarantined = parts.failures.quarantined()
        generate = parts.generate.figures() if parts.generate is not None else None
        encode = parts.encode.figures()
        depth = {"encode": parts.encode.depth()}
        blocks: dict[str, int] = {}
        totals = {
            "load": known.loads,
            "ready_made": known.ready_made,
            "eviction": known.evictions,
            "failure": known.failures,
            "quarantine": parts.failures.total,
            "hit": self._found["hit"],
            "miss": self._found["miss"],
        }
        if generate is not None:
            depth["generate"] = generate.waiting + generate.running
            blocks = {
                "used": generate.kv_blocks_used,
                "cached": generate.kv_blocks_cached,
                "free": generate.kv_blocks_total
                - generate.kv_blocks_used
                - generate.kv_blocks_cached,
            }
        return EngineSnapshot(
            queue_depth=depth,
            base_bytes=parts.base_bytes,
            adapter_bytes={
                "device": known.device_bytes,
                "host": known.host_bytes,
                "folded": known.folded_bytes,
                "heads": encode.head_bytes,
            },
            adapters={
                **Counter(known.tiers.values()),
                "quarantined": len(quarantined),
                "pinned": len(known.pinned),
                "pins_without_room": len(known.pins_without_room),
            },
            slots={"used": known.slots_used, "free": known.slots - known.slots_used},
            kv_blocks=blocks,
            encode_steps=encode.steps_by,
            generate_steps={} if generate is None else generate.steps_by,
            generate_tokens={}
            if generate is None
            else {"chosen": generate.generated_tokens, "shared": generate.shared_tokens},
            static_bytes=_sum(encode.static_bytes, generate.static_bytes if generate else {}),
            paced_steps={} if generate is None else generate.paced_steps,
            grammars={}
            if generate is None
            else {
                "compiled": generate.grammars_compiled,
                "kept_bytes": generate.grammar_bytes,
                "deferred_tokens": generate.deferred_tokens,
            },
            cuda_bytes=cuda_bytes(parts.base.device, parts.base.adapted.form_bytes),
            totals=totals,
            residency=dict(known.tiers),
            quarantined=quarantined,
            device=str(parts.base.device),
            dtype=str(parts.base.dtype).removeprefix("torch."),
            kernel=parts.base.kernel,
            storage=parts.base.storage,
            weights_digest=parts.base.weights_digest,
        )

    def close(self) -> list[Event]:
        """Fail every request that is still here and stop the loader."""
        events, self._outbox = self._outbox, []
        events += self._parts.encode.close()
        if self._parts.generate is not None:
            events += self._parts.generate.close()
        self._parts.residency.close()
        self._parts.store.close()
        return events

    # For tests and notebooks: a request at a time, without a loop of one's own.

    def encode(
        self,
        inputs: Sequence[TextInput] | Sequence[ImageInput],
        *,
        task: Task,
        version: str | None = None,
        top_k: int | None = None,
        truncation: bool = False,
        **options: Any,
    ) -> EncodeResult:
        """Encode some texts, or images, and wait for the answer.

        Raises:
            TextError: An input that the model cannot take.
            EngineFailure: The request failed.
        """
        encodable: Any = inputs
        result = self.run(
            EncodeRequest(
                id=f"local-{next(self._ids)}",
                task=task,
                adapter=version,
                version=version,
                inputs=self._parts.inputs.tokenize(encodable, task, truncation=truncation),
                top_k=top_k,
                options=options,
                submitted=time.monotonic(),
            )
        )
        assert isinstance(result, EncodeResult)
        return result

    def generate(
        self, prompt: str, *, version: str | None = None, **sampling: Any
    ) -> GenerateResult:
        """Continue a prompt and wait for the whole answer.

        Args:
            sampling: Fields of ``SamplingOptions``.

        Raises:
            TextError: A prompt that the model cannot take.
            EngineFailure: The request failed.
        """
        chosen = SamplingOptions(**sampling)
        ids = self.text.tokenize_prompt(prompt, max_new_tokens=chosen.max_new_tokens)
        result = self.run(
            GenerateRequest(
                id=f"local-{next(self._ids)}",
                adapter=version,
                version=version,
                token_ids=ids,
                sampling=chosen,
                submitted=time.monotonic(),
            )
        )
        assert isinstance(result, GenerateResult)
        return result

    def run(self, request: Request) -> EncodeResult | GenerateResult:
        """Submit one request and step until it is answered; events of others are dropped.

        Raises:
            EngineFailure: The request failed.
        """
        self.submit(request)
        while True:
            if not self.has_work():
                self.wait(1.0)
            for event in self.step():
                if event.id != request.id or not isinstance(event, TERMINAL):
                    continue
                if isinstance(event, Failure):
                    raise EngineFailure(event)
                return event

    def _settled(self, version: str) -> None:
        """In the loader's thread: a version is ready, or has failed."""
        error = self._parts.residency.error(version)
        if error is not None:
            logger.warning(
                "Adapter version %s could not be loaded: %s",
                version,
                error,
                extra={"version": version},
            )
        self.wake()

    def _tidy(self) -> None:
        """Let go of what is in memory of versions that nobody names or asks for any more."""
        encode, generate = self._parts.encode, self._parts.generate
        known = {*self._parts.residency.snapshot().tiers, *encode.headed()}
        needed = encode.versions() | (generate.versions() if generate is not None else set())
        for version in self._names.unnamed(known, needed):
            self._parts.residency.drop(version)
            encode.forget_head(version)

    def _note_encode(self, figures: EncodeFigures, steps_before: int) -> None:
        if figures.steps > steps_before:
            self._last = StepFigures(
                "encode",
                figures.last_rows,
                figures.last_adapters,
                figures.last_seconds,
                self._parts.encode.take_waits_s(),
            )

    def _note_generate(self, lane: GenerateLane, steps_before: int, seconds: float) -> None:
        figures = lane.figures()
        if figures.steps > steps_before:
            self._last = StepFigures(
                "generate",
                figures.last_rows,
                figures.last_adapters,
                seconds,
                lane.take_waits_s(),
            )


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    """By name, over all of them; what is 0 stays."""
    total: Counter[str] = Counter()
    for one in parts:
        total.update(one)
    return dict(total)
