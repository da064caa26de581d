"""Steps captured as CUDA graphs, in one memory pool; on a CPU there are none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch

logger = logging.getLogger(__name__)

# Ranks that steps are made for, and whether LoRA is in them: few, so that few are captured.
LAUNCH_CLASSES: Final = ((0, False), (32, False), (128, True))
_WARM_UPS = 2  # compile, and let libraries allocate what they keep, before anything is captured


class StepKey(NamedTuple):
    """What the launches of a step are made for."""

    rows: int
    rank: int  # padded; 0: no HiRA
    has_lora: bool
    plain: bool  # the best token alone is wanted


def launch_class(rank: int, has_lora: bool) -> tuple[int, bool]:
    """The class of launches that serves slots of this padded rank, with LoRA or without."""
    return next(one for one in LAUNCH_CLASSES if one[0] >= rank and (one[1] or not has_lora))


class CapturedSteps:
    """One graph for each key.

    Args:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[StepKey, Any] = {}
        self._pool: Any = None
        self.nbytes = 0  # that capturing took of the device

    @property
    def possible(self) -> bool:
        """Whether the device has graphs at all."""
        return self._device.type == "cuda"

    def __len__(self) -> int:
        return len(self._graphs)

    def __iter__(self) -> Iterator[StepKey]:
        return iter(self._graphs)

    def capture(self, key: StepKey, run: Callable[[], None]) -> bool:
        """Capture ``run``; False: the memory is used up, and what is there already stays.

        Raises:
            RuntimeError: The device cannot capture it.
        """
        before = torch.cuda.memory_reserved(self._device)
        try:
            aside: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream(self._device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                run()
        except torch.OutOfMemoryError as error:
            logger.warning(
                "No memory to capture steps of %d rows (%s): %d are captured, the others run "
                "uncaptured. Lower kv_bytes or device_bytes for more.",
                key.rows,
                str(error).splitlines()[0][:120],
                len(self),
            )
            torch.cuda.empty_cache()
            return False
        self._pool = graph.pool()
        self._graphs[key] = graph
        self.nbytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        return True

    def replay(self, key: StepKey) -> bool:
        """Run a captured step; False: there is none."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        graph.replay()
        return True
