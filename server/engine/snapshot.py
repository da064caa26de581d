"""What an engine says of itself: for the gauges, for readiness and for the admin endpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from server.engine.quarantine import Quarantine
from server.messages import Event, Failure, Request, TokenEvent

logger = logging.getLogger(__name__)

# What an adapter alone can bring about: a forward or a head that raises, numbers that overflow.
# What the bare base does as well is base_failed, and no adapter's fault.
OWN_FAULTS: Final = frozenset({"adapter_failed", "adapter_error", "internal"})

SPARE_S: Final = 5.0  # more than the HTTP processes take to tell of a new name
NAMES_CHECKED_EVERY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class StepFigures:
    """The latest forward: in which lane, of how many sequences and adapters, how long; and how long
    each request waited that was in none before."""

    lane: str
    rows: int
    adapters: int  # the base not counted
    seconds: float
    waits_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """How the engine stands, by the label values of the gauges.

    Args:
        queue_depth: Requests that wait or run, by lane.
        base_bytes: Of the base, by part.
        adapter_bytes: Of adapters, by tier.
        adapters: Versions, by tier; beside them those in quarantine, those that are pinned, and
            those pinned by name for which pins have no room on the device.
        slots: Places on the device, used and free.
        kv_blocks: Of the generate lane, by state.
        encode_steps: Of the encode lane since the start, by how they ran.
        generate_steps: Of the generate lane since the start, by how they ran; {} where none may be
            static.
        paced_steps: Of the generate lane since the start, of ``all`` adapters and of ``light`` ones
            alone; {} without ``token_ms``.
        grammars: Of structured output: compiled, kept_bytes, deferred_tokens.
        generate_tokens: Of the generate lane since the start: ``chosen``, and those of prompts that
            were found in the cache (``shared``).
        static_bytes: Of static steps on the device, by what holds them.
        cuda_bytes: Of the device, by kind; empty on the CPU.
        totals: Counters since the start.
        residency: The tier of each version that is not only on disk.
        quarantined: Versions that failed too often: until when (``time.time()``), and why.
        device, dtype: Where and in what everything is computed.
        kernel: What computes the linear layers: ``Modulator.kernel``.
        storage: How the base's linear layers are stored, for people.
        weights_digest: Of the base's linear layers as they are stored; equal on every device.
    """

    queue_depth: Mapping[str, int]
    base_bytes: Mapping[str, int]
    adapter_bytes: Mapping[str, int]
    adapters: Mapping[str, int]
    slots: Mapping[str, int]
    kv_blocks: Mapping[str, int]
    encode_steps: Mapping[str, int]
    generate_steps: Mapping[str, int]
    generate_tokens: Mapping[str, int]
    static_bytes: Mapping[str, int]
    paced_steps: Mapping[str, int]
    grammars: Mapping[str, int]
    cuda_bytes: Mapping[str, int]
    totals: Mapping[str, int]
    residency: Mapping[str, str]
    quarantined: Mapping[str, tuple[float, str]]
    device: str
    dtype: str
    kernel: str
    storage: str
    weights_digest: str


class FailureTracker:
    """What adapter versions make of the requests that they are given, and who is not tried.

    Args:
        failures, seconds: See ``Quarantine``.
    """

    def __init__(self, failures: int, seconds: float) -> None:
        self._quarantine = Quarantine(failures, seconds)
        self._versions: dict[str, str] = {}  # of requests that run

    @property
    def total(self) -> int:
        """Quarantines so far."""
        return self._quarantine.total

    def admit(self, request: Request) -> Failure | None:
        """Take note of a request, or say why its version is not tried."""
        version = request.version
        if version is None:
            return None
        entry = self._quarantine.entry(version, time.monotonic())
        if entry is None:
            self._versions[request.id] = version
            return None
        seconds = max(1, math.ceil(entry.left_s))
        return Failure(
            request.id,
            "adapter_quarantined",
            f"The adapter {request.adapter} failed too often and is not tried for a while.",
            found=entry.reason,
            fix=f"Replace the adapter, or let an admin PATCH it; it is tried again in {seconds} s.",
            retry_after_s=seconds,
        )

    def forget(self, request_id: str) -> None:
        """A request was cancelled: it says nothing about its adapter."""
        self._versions.pop(request_id, None)

    def note(self, events: Sequence[Event]) -> None:
        """Take note of how the requests of one step ended.

        What they may have in common, such as one forward or one load, is one failure of their
        version; and none where it has answered another request as well.
        """
        answered: set[str] = set()
        failed: dict[str, str] = {}
        for event in events:
            if isinstance(event, TokenEvent):
                continue
            version = self._versions.pop(event.id, None)
            if version is None:
                continue
            if not isinstance(event, Failure):
                answered.add(version)
            elif event.code in OWN_FAULTS:
                failed[version] = f"{event.code}: {event.message}"
        for version in answered:
            self._quarantine.succeeded(version)
        for version in failed.keys() - answered:
            if self._quarantine.failed(version, failed[version], time.monotonic()):
                logger.error(
                    "Adapter version %s is quarantined: %s",
                    version,
                    failed[version],
                    extra={"version": version},
                )

    def release(self, version: str) -> None:
        """Try a version again."""
        if self._quarantine.release(version):
            logger.warning("Adapter version %s is tried again", version)

    def quarantined(self) -> dict[str, tuple[float, str]]:
        """Versions that are not tried: until when, as ``time.time()`` counts, and why."""
        now, clock = time.time(), time.monotonic()
        entries = self._quarantine.entries(clock)
        return {version: (now + one.left_s, one.reason) for version, one in entries.items()}


class NamedVersions:
    """Which adapter versions a name is on, as last told.

    A version is in use before the worker hears of its name, and may be asked for again just after
    it has lost it; so what was asked for lately counts as named.

    Args:
        spare_s: How lately.
    """

    def __init__(self, spare_s: float = SPARE_S) -> None:
        self.spare_s = spare_s
        self._named: frozenset[str] | None = None
        self._asked: dict[str, float] = {}
        self._looked = 0.0
        self._is_tidy = False  # nothing is held without a name, as far as is known

    @property
    def named(self) -> frozenset[str] | None:
        """Versions that have a name; None: nothing is known."""
        return self._named

    @named.setter
    def named(self, versions: frozenset[str] | None) -> None:
        self._named, self._is_tidy = versions, False

    def ask(self, version: str) -> None:
        """A request for ``version`` has come."""
        self._asked[version] = time.monotonic()
        if self._named is not None and version not in self._named:
            self._is_tidy = False

    def is_due(self) -> bool:
        """Whether it is time to look again; not while nothing can have lost its name."""
        if self._named is None or self._is_tidy:
            return False
        return time.monotonic() - self._looked >= NAMES_CHECKED_EVERY_S

    def unnamed(self, held: Collection[str], needed: Collection[str] = ()) -> set[str]:
        """Those of ``held`` that have no name, were not asked for lately and are not ``needed``."""
        if self._named is None:
            return set()
        self._looked = time.monotonic()
        since = self._looked - self.spare_s
        self._asked = {version: at for version, at in self._asked.items() if at > since}
        without = set(held) - self._named
        gone = without - self._asked.keys() - set(needed)
        # What is asked for and not held yet comes again later.
        self._is_tidy = without == gone and self._named.issuperset({*self._asked, *needed})
        return gone


def cuda_bytes(device: torch.device, form_bytes: int) -> dict[str, int]:
    """Memory of the device, by kind; empty on the CPU.

    Args:
        device: Of the base.
        form_bytes: What forms of the kernels keep of it, ``AdaptedModel.form_bytes``.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "free": free,
        "total": total,
        "forms": form_bytes,
    }
