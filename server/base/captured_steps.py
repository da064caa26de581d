"""Steps captured as CUDA graphs, in the memory that all graphs share; on a CPU there are none."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Final, NamedTuple

import torch

from adapters.errors import in_a_line
from adapters.modulation.graph_capture import capture_graph, ends_memory

logger = logging.getLogger(__name__)

# Ranks that steps are made for, and whether LoRA is in them: few, so that few are captured.
LAUNCH_CLASSES: Final = ((0, False), (32, False), (128, True))
_WARM_UPS = 2  # compile, and let libraries allocate what they keep, before anything is captured
# A metric's word for steps that no captured one holds, and for no step at all for want of memory.
UNCAPTURED: Final = "uncaptured"


class CannotCapture(Exception):
    """The device cannot capture a step, and goes on all the same."""


class StepKey(NamedTuple):
    """What the launches of a step are made for."""

    rows: int
    rank: int  # padded; 0: no HiRA
    has_lora: bool
    plain: bool  # the best token alone is wanted

    def holds(self, least: StepKey) -> bool:
        """Whether a step that needs ``least`` may run by these launches."""
        return (
            self.rows >= least.rows
            and self.rank >= least.rank
            and (self.has_lora or not least.has_lora)
            and self.plain == least.plain
        )


def launch_class(rank: int, has_lora: bool) -> tuple[int, bool]:
    """The class of launches that serves slots of this padded rank, with LoRA or without."""
    return next(one for one in LAUNCH_CLASSES if one[0] >= rank and (one[1] or not has_lora))


class GraphPool:
    """The memory that all graphs of one device share, those of both lanes, and the stream on which
    all of them are captured.

    PyTorch lets graphs share a pool, whatever the order of their replays, if no two run at once and
    none reads what another left there. So it is here: one thread launches both lanes on one stream,
    and what a step answers is in buffers of its own. The largest graph then says how much there is.

    Args:
        device: Of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    @cached_property
    def stream(self) -> Any:
        """Where warm-ups and captures run. Libraries keep a workspace for each stream they see, and
        the allocator keeps blocks apart: a stream for each capture would take both many times."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> Any:
        """What a capture is told; None: it begins a pool. One that has lost all of its graphs is
        given back and must not be named again."""
        return next((one.pool() for one in self._graphs), None)

    def add(self, graph: Any) -> None:
        """Note a graph that was captured."""
        self._graphs.add(graph)


class CapturedSteps:
    """One graph for each key.

    Args:
        device: Where they run.
        pool: What their memory is in; None: one of their own.
        spare_bytes: Of the device that must be left: what is needed later, when nothing can be
            given back.
    """

    def __init__(
        self, device: torch.device, pool: GraphPool | None = None, spare_bytes: int = 0
    ) -> None:
        self._device = device
        self._pool = pool or GraphPool(device)
        self._spare_bytes = spare_bytes
        self._graphs: dict[StepKey, Any] = {}
        self._is_done = False
        self.nbytes = 0  # that capturing took of the device

    @property
    def possible(self) -> bool:
        """Whether the device has graphs at all."""
        return self._device.type == "cuda"

    def __len__(self) -> int:
        return len(self._graphs)

    def __iter__(self) -> Iterator[StepKey]:
        return iter(self._graphs)

    def __contains__(self, key: object) -> bool:
        return key in self._graphs

    def serving(self, least: StepKey) -> StepKey | None:
        """The launches by which a step runs; None: memory ended before such were captured.

        Uncaptured, a step over fixed buffers gains nothing on a device that has graphs, and may use
        fewer kernels than the other path: who gets None takes that one. Before anything is
        captured, and where nothing can be, it is ``least``.
        """
        if least in self or not (self.possible and self._is_done):
            return least
        return min((one for one in self if one.holds(least)), default=None)

    def capture_all(
        self, keys: Sequence[StepKey], run: Callable[[StepKey], None]
    ) -> Iterator[tuple[int, int]]:
        """Capture every key, the heaviest first; yields how many of how many are done.

        Where memory does not hold one, only those of fewer rows are tried from there on. Where the
        device has no graphs there is nothing to do.

        Raises:
            CannotCapture: The device cannot capture them.
            Exception: The device itself is lost.
        """
        if not self.possible:
            return
        too_many: int | None = None  # rows
        # Of as many rows that, too, which also samples: the others then fit into its memory.
        order = sorted(keys, key=lambda key: (*key[:-1], not key.plain), reverse=True)
        for done, key in enumerate(order, start=1):
            if too_many is not None and key.rows >= too_many:
                continue
            if not self.capture(key, partial(run, key)):
                too_many = key.rows
                continue
            yield done, len(keys)
        self._is_done = True

    def capture(self, key: StepKey, run: Callable[[], None]) -> bool:
        """Capture ``run``; False: the memory is used up, and what is there already stays.

        Whatever happens, the thread is on the stream that it was on, and what a failed capture took
        is given back.

        Raises:
            CannotCapture: The device cannot capture it, or what ran raised; the first error of all
                is its cause.
            Exception: The device itself is lost.
        """
        before = self._free_bytes()
        graph, error = self._try(run)
        if error is None:
            left = self._free_bytes()
            if left >= self._spare_bytes:
                self._pool.add(graph)
                self._graphs[key] = graph
                self.nbytes += max(0, before - left)
                return True
            needed, free = self._spare_bytes >> 20, left >> 20
            error = torch.OutOfMemoryError(f"{needed} MiB are needed later, {free} were left")
        self._give_back(graph)
        if not ends_memory(error):
            raise CannotCapture(in_a_line(error)) from error
        logger.warning(
            "No memory to capture steps of %d rows (%s): %d are captured, the others run as "
            "without them. Lower kv_bytes or device_bytes for more.",
            key.rows,
            in_a_line(error),
            len(self),
        )
        return False

    def replay(self, key: StepKey) -> bool:
        """Run a captured step; False: there is none."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        graph.replay()
        return True

    def _try(self, run: Callable[[], None]) -> tuple[Any, Exception | None]:
        """A graph, or what was raised first."""
        try:
            with self._aside():
                for _ in range(_WARM_UPS):
                    run()
            pool = self._pool
            graph = capture_graph(run, self._device, pool=pool.handle, stream=pool.stream)
        except Exception as error:  # noqa: BLE001  # told apart by the caller
            # Frames hold tensors of the step, and those the memory that is to be given back.
            error.__context__ = error.__cause__ = None
            error.__traceback__ = None
            return None, error
        return graph, None

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream of captures, after all that was launched, and back in every case."""
        stream = self._pool.stream
        before = torch.cuda.current_stream(self._device)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            yield
        before.wait_stream(stream)

    def _free_bytes(self) -> int:
        """Of the device, by its driver: graphs themselves are not in the allocator's books."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])

    def _give_back(self, graph: Any) -> None:
        """What a capture took that failed, or left too little; the device must be heard of once
        more.

        Raises:
            Exception: The device itself is lost.
        """
        if graph is not None:
            graph.reset()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
