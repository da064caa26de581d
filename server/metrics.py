"""Prometheus metrics, right across processes.

Counters and histograms live in the files of prometheus_client's multiprocess mode, one set per
process, and are summed when someone asks. Gauges are not stored at all: they are read at that
moment from the worker's state file and the operating system, so a dead process leaves none behind.
prometheus_client decides about multiprocess mode when it is imported; call `prepare` before.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Histogram
    from prometheus_client.metrics_core import Metric

    from adapters.registry.objects import StoreNote

FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
BASE_LABEL: Final = "base"
OTHER_LABEL: Final = "_other"  # no adapter can have this name
ADAPTER_BYTES: Final = 90_000  # that the series of one name take, about, for each HTTP process
SPARE_BYTES: Final = 1_000_000
FOLDER_CHECKED_EVERY_S: Final = 1.0
MAX_ADAPTER_LABELS: Final = 512  # those beyond share one
MAX_KEY_LABELS: Final = 512  # of keys; the same
KEY_BYTES: Final = 4_000  # that the series of one key take, about

REQUEST_SECONDS: Final = (
    0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0,
)  # fmt: skip
TOKEN_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
WAIT_SECONDS: Final = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0,
)  # fmt: skip
STEP_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
POWERS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def prepare(folder: Path) -> None:
    """Empty the folder of the metric files and name it to this process and its children.

    Raises:
        RuntimeError: prometheus_client is imported already and has chosen without it.
    """
    if "prometheus_client" in sys.modules and os.environ.get(FOLDER_VARIABLE) != str(folder):
        raise RuntimeError("metrics.prepare must run before prometheus_client is imported")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ[FOLDER_VARIABLE] = str(folder)


def count_as(role: str) -> None:
    """From now on this process counts in the files of its role, on top of what is in them.

    By process id, which is prometheus_client's way, every process that dies would leave its files
    behind for good. Its successor takes them over: they do not add up, and no counter goes back.

    Args:
        role: No two processes may have the same at one time. Without ``_``.
    """
    from prometheus_client import values

    if FOLDER_VARIABLE in os.environ:
        files = _Files(role, Path(os.environ[FOLDER_VARIABLE]))
        counting: Any = values.MultiProcessValue(files.name)  # type: ignore[no-untyped-call]
        counting.role = role
        values.ValueClass = counting


class _Files:
    """Names the files of a role; anew when their folder has been replaced, for what is counted in
    a deleted file is seen by nobody. prometheus_client asks at every count and then begins at 0."""

    def __init__(self, role: str, folder: Path) -> None:
        self._role = role
        self._folder = folder
        self._inode = folder.stat().st_ino
        self._turn = 0
        self._looked = time.monotonic()

    def name(self) -> str:
        if time.monotonic() - self._looked > FOLDER_CHECKED_EVERY_S:
            self._looked = time.monotonic()
            with suppress(OSError):  # gone: the files stay in use until there is a new folder
                inode = self._folder.stat().st_ino
                self._turn += inode != self._inode
                self._inode = inode
        return f"{self._role}-{self._turn}" if self._turn else self._role


def most_bytes(http_processes: int) -> int:
    """What all files of counts together may come to take."""
    names = MAX_ADAPTER_LABELS * ADAPTER_BYTES + MAX_KEY_LABELS * KEY_BYTES
    return http_processes * names + SPARE_BYTES


class AdapterLabels:
    """Adapter names as label values, at most so many: the rest share one."""

    def __init__(self, most: int = MAX_ADAPTER_LABELS, seen: Iterable[str] = ()) -> None:
        self._most = most
        self._seen = set(seen)

    def of(self, adapter: str | None) -> str:
        if adapter is None:
            return BASE_LABEL
        if adapter not in self._seen:
            if len(self._seen) >= self._most:
                return OTHER_LABEL
            self._seen.add(adapter)
        return adapter


class StoreMetrics:
    """What a process asked of an object store that holds the bytes of adapters."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Histogram

        self._cache = Counter(
            "hira_store_cache_total",
            "Looks for an adapter on this disk, before it is fetched from the object store.",
            ["outcome"],
            registry=registry,
        )
        self._calls = Counter(
            "hira_store_calls_total",
            "Calls of the object store.",
            ["operation", "outcome"],
            registry=registry,
        )
        self._bytes = Counter(
            "hira_store_bytes_total",
            "Bytes of adapters put into the object store, and got from it.",
            ["operation"],
            registry=registry,
        )
        self._seconds = Histogram(
            "hira_store_seconds",
            "Time of a call of the object store.",
            ["operation"],
            buckets=REQUEST_SECONDS,
            registry=registry,
        )

    def add(self, note: StoreNote) -> None:
        """Count one note."""
        if note.operation == "cache":
            self._cache.labels(note.outcome).inc()
            return
        self._calls.labels(note.operation, note.outcome).inc()
        self._seconds.labels(note.operation).observe(note.seconds)
        if note.nbytes:
            self._bytes.labels(note.operation).inc(note.nbytes)


class HttpMetrics:
    """What an HTTP process counts."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        self._registry = registry = registry or REGISTRY
        self._store: StoreMetrics | None = None

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(
            name: str, text: str, *labels: str, buckets: tuple[float, ...] = REQUEST_SECONDS
        ) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self._labels = AdapterLabels(seen=_counted_before("adapter"))
        self._key_labels = AdapterLabels(MAX_KEY_LABELS, _counted_before("key"))
        self._requests = counter(
            "hira_requests_total", "Requests answered.", "endpoint", "adapter", "status"
        )
        self._seconds = histogram(
            "hira_request_seconds",
            "From the request to the end of its answer.",
            *("endpoint", "adapter"),
        )
        self._tokens = counter(
            "hira_tokens_total", "Tokens taken in and generated.", "adapter", "kind"
        )
        self._first = histogram(
            "hira_time_to_first_token_seconds",
            "From admission to the first token of a streamed answer.",
            "adapter",
        )
        self._between = histogram(
            "hira_inter_token_seconds",
            "Between two tokens of a streamed answer.",
            "adapter",
            buckets=TOKEN_SECONDS,
        )
        self._failed = counter(
            "hira_failures_total",
            "Admitted requests that ended without an answer.",
            *("adapter", "code"),
        )
        self._refused = counter(
            "hira_refusals_total", "Error responses and refused connections.", "code"
        )
        self._predicted = histogram(
            "hira_predicted_wait_seconds",
            "What an admitted request was predicted to wait, where a queue was.",
            "lane",
            buckets=WAIT_SECONDS,
        )
        self._canary = counter(
            "hira_canary_requests_total",
            "Requests answered for names with a canary, by which version answered.",
            *("adapter", "arm", "status"),
        )
        self._canary_failed = counter(
            "hira_canary_failures_total",
            "Admitted requests for names with a canary that ended without an answer.",
            *("adapter", "arm", "code"),
        )
        self._key_requests = counter(
            "hira_key_requests_total", "Requests answered, by the key's name.", "key", "status"
        )
        self._key_tokens = counter(
            "hira_key_tokens_total", "Tokens of answers, by the key's name.", "key", "kind"
        )
        self._last = Gauge(
            "hira_last_request_timestamp_seconds",
            "When the adapter was last asked for.",
            ["adapter"],
            multiprocess_mode="max",
            registry=registry,
        )
        self._children: dict[tuple[str, ...], Any] = {}

    def request(self, endpoint: str, adapter: str | None, status: int, seconds: float) -> None:
        """One response; ``adapter`` is "" where no adapter was resolved, None for the base."""
        label = adapter if adapter == "" else self._labels.of(adapter)
        self._child(self._requests, endpoint, label, str(status)).inc()
        self._child(self._seconds, endpoint, label).observe(seconds)
        if label:
            self._child(self._last, label).set(time.time())

    def tokens(self, adapter: str | None, *, prompt: int, generated: int) -> None:
        label = self._labels.of(adapter)
        self._child(self._tokens, label, "prompt").inc(prompt)
        if generated:
            self._child(self._tokens, label, "generated").inc(generated)

    def first_token(self, adapter: str | None, seconds: float) -> None:
        self._child(self._first, self._labels.of(adapter)).observe(seconds)

    def next_token(self, adapter: str | None, seconds: float) -> None:
        self._child(self._between, self._labels.of(adapter)).observe(seconds)

    def key_request(self, key: str, status: int) -> None:
        """One response to the holder of a key."""
        self._child(self._key_requests, self._key_labels.of(key), str(status)).inc()

    def key_tokens(self, key: str, *, prompt: int, generated: int) -> None:
        label = self._key_labels.of(key)
        self._child(self._key_tokens, label, "prompt").inc(prompt)
        if generated:
            self._child(self._key_tokens, label, "generated").inc(generated)

    def failure(self, adapter: str | None, code: str) -> None:
        self._child(self._failed, self._labels.of(adapter), code).inc()

    def canary_request(self, adapter: str, arm: str, status: int) -> None:
        """One response for a name whose requests two versions share."""
        self._child(self._canary, self._labels.of(adapter), arm, str(status)).inc()

    def canary_failure(self, adapter: str, arm: str, code: str) -> None:
        self._child(self._canary_failed, self._labels.of(adapter), arm, code).inc()

    def predicted_wait(self, lane: str, seconds: float) -> None:
        """What a request that was admitted will wait, as it was predicted."""
        self._predicted.labels(lane).observe(seconds)

    def store(self, notes: Iterable[StoreNote]) -> None:
        """What was asked of the object store of adapters."""
        for note in notes:
            self._store = self._store or StoreMetrics(self._registry)
            self._store.add(note)

    def refusal(self, code: str) -> None:
        """An error response, or a connection that ended before it had a request."""
        self._child(self._refused, code).inc()

    def _child(self, metric: Any, *labels: str) -> Any:
        # prometheus_client's own look-up takes a lock and rebuilds the key on every call.
        key = (metric._name, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child


class WorkerMetrics:
    """What the worker measures of its steps."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        from prometheus_client import REGISTRY, Histogram

        self._registry = registry = registry or REGISTRY
        self._store: StoreMetrics | None = None

        def histogram(
            name: str, text: str, buckets: Iterable[float], labels: Iterable[str] = ("lane",)
        ) -> Histogram:
            return Histogram(name, text, labels, buckets=tuple(buckets), registry=registry)

        self._rows = histogram("hira_batch_rows", "Sequences of a step.", POWERS)
        self._adapters = histogram("hira_batch_adapters", "Distinct adapters of a step.", POWERS)
        self._seconds = histogram("hira_step_seconds", "Time of a step.", STEP_SECONDS)
        self._waits = histogram(
            "hira_queue_seconds", "From a request's submission to its first step.", WAIT_SECONDS
        )
        self._loads = histogram(
            "hira_adapter_load_seconds",
            "From the first wish for an adapter on disk until it is on the device.",
            REQUEST_SECONDS,
            labels=(),
        )

    def step(
        self, lane: str, *, rows: int, adapters: int, seconds: float, waits_s: Iterable[float] = ()
    ) -> None:
        """One step; ``waits_s`` are of the requests that were in none before, in seconds."""
        self._rows.labels(lane).observe(rows)
        self._adapters.labels(lane).observe(adapters)
        self._seconds.labels(lane).observe(seconds)
        for wait_s in waits_s:
            self._waits.labels(lane).observe(wait_s)

    def loads(self, seconds: Iterable[float]) -> None:
        """Adapters that were loaded from disk, each in so many seconds."""
        for one in seconds:
            self._loads.observe(one)

    def store(self, notes: Iterable[StoreNote]) -> None:
        """What was asked of the object store of adapters."""
        for note in notes:
            self._store = self._store or StoreMetrics(self._registry)
            self._store.add(note)


# Of the engine's snapshot: its field, the metric and its text, and the label of the values.
SNAPSHOT_GAUGES: Final = (
    ("queue_depth", "hira_queue_depth", "Requests that wait or run in the engine.", "lane"),
    ("base_bytes", "hira_base_bytes", "Memory of the base model.", "part"),
    ("adapter_bytes", "hira_adapter_bytes", "Memory of adapter factors.", "tier"),
    ("adapters", "hira_adapters", "Adapters.", "state"),
    ("slots", "hira_slots", "Slots for adapters on the device.", "state"),
    ("kv_blocks", "hira_kv_blocks", "Blocks of the KV cache.", "state"),
    ("static_bytes", "hira_static_step_bytes", "Memory of static steps.", "part"),
    ("grammars", "hira_grammars", "Of structured output.", "kind"),
    ("cuda_bytes", "hira_cuda_bytes", "Memory of the CUDA device.", "kind"),
)


# The same of what only grows; a counter whose field is empty is not there.
SNAPSHOT_COUNTERS: Final = (
    ("totals", "hira_residency", "Loads, evictions, hits of the present worker.", "event"),
    ("encode_steps", "hira_encode_steps", "Batches of the encode lane, by how they ran.", "how"),
    (
        "generate_steps",
        "hira_generate_steps",
        "Steps of the generate lane, by how they ran.",
        "how",
    ),
    ("generate_tokens", "hira_generate_tokens", "Tokens of the generate lane.", "kind"),
    ("paced_steps", "hira_paced_steps", "Generate steps with token_ms, by whose they were.", "of"),
)
# The same of each engine replica of a cluster.
REPLICA_GAUGES: Final = (
    ("queue_depth", "hira_replica_queue_depth", "Requests in an engine replica.", "lane"),
    ("adapters", "hira_replica_adapters", "Adapters of an engine replica.", "state"),
)


@dataclass(frozen=True, eq=False)  # a registry keeps collectors by identity
class Live:
    """What is read at the moment of a scrape, and its metric families.

    Args:
        snapshot: What the engine said of itself last, an ``EngineSnapshot`` by the names of its
            fields; empty when no worker has spoken.
        processes: Process id by role.
        running: Admitted requests and tokens.
        worker_ready: Whether the worker answers.
        replicas: In a cluster, the snapshot of each engine replica by its name.
        routed: In a cluster, requests that this HTTP replica sent, by why they went where.
        keys_file_good: Whether the keys file is used as it is now; None where there is none.
        registered: Adapters in the registry, as last read; None where nothing is known.
        build: Labels that say what is running.
    """

    snapshot: Mapping[str, Any] = field(default_factory=dict)
    processes: Mapping[str, int] = field(default_factory=dict)
    running: Mapping[str, float] = field(default_factory=dict)
    worker_ready: bool = False
    replicas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    routed: Mapping[str, int] = field(default_factory=dict)
    keys_file_good: bool | None = None
    registered: int | None = None
    build: Mapping[str, str] = field(default_factory=dict)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of whatever is registered, here for one scrape."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        said, replicas = self.snapshot, self.replicas
        gauges: list[_Family] = [
            (name, text, (label,), said.get(key, {})) for key, name, text, label in SNAPSHOT_GAUGES
        ]
        gauges += [
            ("hira_kernel", "What computes the linear layers.", ("kernel",),
             {said["kernel"]: 1.0} if "kernel" in said else {}),
            ("hira_admitted", "Requests and tokens admitted now.", ("kind",), self.running),
            ("hira_process_resident_bytes", "Resident memory, shared pages in each.", ("role",),
             resident_bytes(self.processes)),
            ("hira_process_private_bytes", "Memory that no other process shares.", ("role",),
             resident_bytes(self.processes, private=True)),
            ("hira_worker_ready", "Whether the worker answers.", (), {(): self.worker_ready}),
        ]  # fmt: skip
        counters: list[_Family] = [
            (name, text, (label,), said[key])
            for key, name, text, label in SNAPSHOT_COUNTERS
            if said.get(key)
        ]
        if said.get("weights_digest"):
            text = "The digest of the base's quantized weights."
            gauges.append(("hira_base_weights", text, ("digest",), {said["weights_digest"]: 1.0}))
        if self.build:
            what = {tuple(self.build.values()): 1.0}
            gauges.append(("hira_build_info", "What is running.", tuple(self.build), what))
        if self.registered is not None:
            text = "Adapters in the registry."
            gauges.append(("hira_registered_adapters", text, (), {(): self.registered}))
        if self.keys_file_good is not None:
            text = "Whether the keys file is used as it is now."
            gauges.append(("hira_keys_file_good", text, (), {(): self.keys_file_good}))
        if replicas:
            for key, name, text, label in REPLICA_GAUGES:
                gauges.append((name, text, ("replica", label), _by_replica(replicas, key)))
            text, events = "Loads and evictions of an engine replica.", ("replica", "event")
            counters.append(
                ("hira_replica_residency", text, events, _by_replica(replicas, "totals"))
            )
        if self.routed:
            text = "Requests sent to engine replicas, by why to which."
            counters.append(("hira_routed", text, ("reason",), self.routed))
        families: tuple[tuple[Any, list[_Family]], ...] = (
            (GaugeMetricFamily, gauges),
            (CounterMetricFamily, counters),
        )
        for family, rows in families:
            for name, text, labels, values in rows:
                metric = family(name, text, labels=labels)
                for value, amount in sorted(values.items()):
                    metric.add_metric([value] if isinstance(value, str) else value, amount)
                yield metric


# A metric's name, its text, its labels, and amounts by the value of its label, or of all of them.
_Family = tuple[str, str, tuple[str, ...], Mapping[Any, float]]


def _by_replica(
    replicas: Mapping[str, Mapping[str, Any]], key: str
) -> dict[tuple[str, str], float]:
    return {
        (name, value): amount
        for name, said in replicas.items()
        for value, amount in said.get(key, {}).items()
    }


def resident_bytes(processes: Mapping[str, int], *, private: bool = False) -> dict[str, float]:
    """Memory by role; processes that are gone are left out.

    Args:
        processes: Process id by role.
        private: Only what no other process shares: HTTP processes are forks of the main one, and
            resident memory counts the pages that they have in common once for each.
    """
    import psutil

    found = {}
    for role, pid in processes.items():
        try:
            one = psutil.Process(pid)
            found[role] = float(one.memory_full_info().uss if private else one.memory_info().rss)
        except psutil.Error:
            continue
    return found


def adapter_usage() -> dict[str, tuple[int, float | None]]:
    """Requests answered, and the time of the last, by adapter; over all processes."""
    counts: dict[str, float] = {}
    last: dict[str, float] = {}
    for metric in _usage_metrics():
        if metric.name in {"hira_requests", "hira_last_request_timestamp_seconds"}:
            for sample in metric.samples:
                adapter = sample.labels.get("adapter", "")
                if metric.name == "hira_requests" and sample.name.endswith("_total"):
                    counts[adapter] = counts.get(adapter, 0.0) + sample.value
                elif metric.name != "hira_requests":
                    last[adapter] = max(last.get(adapter, 0.0), sample.value)
    return {name: (int(count), last.get(name)) for name, count in counts.items()}


def _usage_metrics() -> Iterable[Metric]:
    """Counters and times of all processes, without the histograms, which are most of the files:
    to read those as well took ten times as long."""
    from prometheus_client import multiprocess

    if FOLDER_VARIABLE not in os.environ:
        return _stored().collect()
    folder = Path(os.environ[FOLDER_VARIABLE])
    files = [str(one) for kind in ("counter", "gauge_max") for one in folder.glob(f"{kind}_*.db")]
    found: Iterable[Metric] = multiprocess.MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
    return found


def _counted_before(label: str) -> set[str]:
    """Values of a label in the files that this process has taken over."""
    from prometheus_client import multiprocess, values

    if FOLDER_VARIABLE not in os.environ:
        return set()
    role = getattr(values.ValueClass, "role", os.getpid())
    file = Path(os.environ[FOLDER_VARIABLE], f"counter_{role}.db")
    if not file.exists():
        return set()
    found = multiprocess.MultiProcessCollector.merge([str(file)])  # type: ignore[no-untyped-call]
    names = {sample.labels.get(label) for metric in found for sample in metric.samples}
    return names - {None, "", BASE_LABEL, OTHER_LABEL}


def _stored() -> CollectorRegistry:
    """What all processes have counted; without multiprocess mode, what this one has."""
    from prometheus_client import REGISTRY, CollectorRegistry, multiprocess

    if FOLDER_VARIABLE not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


def exposition(live: Live, accept: str) -> tuple[bytes, str]:
    """The answer to a scrape and its content type."""
    from prometheus_client.exposition import choose_encoder

    registry = _stored()
    encode, content_type = choose_encoder(accept)
    registry.register(live)
    try:
        return encode(registry), content_type
    finally:
        registry.unregister(live)
