"""Which form of the kernels computes a layer in steps over fixed buffers: timed once, at the start.

Such a step must make the same launches each time, so nothing can be timed on its traffic. Before
any step is captured, each form runs on each shape of weight, for few numbers of rows and for the
ranks that steps are made for; from then on the answers are looked up. A form whose answer is not
the fused kernel's, or that fails, is not used. On a processor, where kernels are interpreted,
nothing is timed: the form that needs the least arithmetic is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch

from adapters.errors import in_a_line
from adapters.modulation.form_agreement import FORM_TOLERANCE, row_difference
from adapters.modulation.graph_capture import capture_graph

# ``tiles``: the fused kernel; ``product``: W0 decoded once and one library product; ``expanded``:
# 4-bit tiles against expanded rows; ``row``: the kernel for one row.
StepForm = Literal["tiles", "product", "expanded", "row"]
StepCase = tuple[tuple[int, int], int, int]  # shape of a weight, padded rank, rows

TIMED_ROWS: Final = (1, 4, 16, 64)
TIMED_ADAPTERS: Final = 16  # of the rows that are timed, at most
# Rows of ``product`` and ``expanded``, expanded by their ranks: beyond it their buffers are large
# and both are hopeless.
MOST_EXPANDED: Final = 8192
_LEAST_ARITHMETIC: Final[tuple[StepForm, ...]] = ("row", "product", "expanded", "tiles")
_LAUNCHES: Final = 20  # of a round
_REPLAYS: Final = 5

logger = logging.getLogger(__name__)


class StepForms:
    """The form of each shape, rank and number of rows; where nothing was timed, ``tiles``.

    Args:
        chosen: By what was timed.
    """

    def __init__(self, chosen: Mapping[StepCase, StepForm] | None = None) -> None:
        self._chosen = dict(chosen or {})

    def of(self, shape: tuple[int, int], rank: int, rows: int) -> StepForm:
        """What computes so many rows: as the next larger number that was timed."""
        timed = _timed_as(rows)
        if timed is None:
            return "tiles"
        return self._chosen.get((shape, rank, timed), "tiles")

    def cases(self, form: StepForm) -> list[StepCase]:
        """Those for which a form was chosen."""
        return [case for case, chosen in self._chosen.items() if chosen == form]

    def without(self, form: StepForm) -> StepForms:
        """The same, but ``tiles`` in place of a form."""
        return StepForms({case: one for case, one in self._chosen.items() if one != form})

    def by_tiles(self, shape: tuple[int, int], rank: int, rows: int) -> StepForms:
        """The same, but ``tiles`` for so many rows, and for all that are computed as these."""
        timed = _timed_as(rows)
        return StepForms(
            {case: one for case, one in self._chosen.items() if case != (shape, rank, timed)}
        )


def _timed_as(rows: int) -> int | None:
    return next((one for one in TIMED_ROWS if one >= rows), None)


def fastest(runs: Mapping[StepForm, Callable[[], torch.Tensor]], device: torch.device) -> StepForm:
    """The form that takes the least time on a device, of those that agree with ``tiles``.

    Args:
        runs: Each form as a call on the same rows; ``tiles`` is among them.
        device: CUDA, or a processor on which kernels are interpreted.

    Raises:
        Exception: ``tiles`` cannot run, or not be captured, so nothing is known of any form:
            whatever a compiler, the driver or a library has raised.
    """
    wanted = runs["tiles"]()
    agreeing = {
        form: run for form, run in runs.items() if form == "tiles" or _agrees(form, run, wanted)
    }
    if device.type != "cuda":
        return next(one for one in _LEAST_ARITHMETIC if one in agreeing)
    times: dict[StepForm, float] = {}
    for form, run in agreeing.items():
        try:
            graph = _as_graph(run, device)
            times[form] = min(_replay_ms(graph) for _ in range(_REPLAYS))
        except Exception as cause:  # a driver, a library: another form serves
            if form == "tiles":
                raise
            logger.warning("%s was not timed for steps: %s", form, in_a_line(cause))
    return min(times, key=times.__getitem__)


def _agrees(form: StepForm, run: Callable[[], torch.Tensor], wanted: torch.Tensor) -> bool:
    """Whether a form gives what the fused kernel gave; says so if it does not."""
    try:
        off = row_difference(run(), wanted)
    except Exception as cause:  # noqa: BLE001  # a compiler, a driver, a library, memory
        logger.warning("%s is not used in steps: %s", form, in_a_line(cause))
        return False
    if off is not None and off <= FORM_TOLERANCE:
        return True
    why = "nothing in it is finite" if off is None else f"off the fused kernel by {off:.2g}"
    logger.warning("%s is not used in steps: %s", form, why)
    return False


def _as_graph(run: Callable[[], torch.Tensor], device: torch.device) -> Any:
    """Many launches as one graph, so that it is the device that is timed and not the host."""
    run()
    torch.cuda.synchronize()

    def launches() -> None:
        for _ in range(_LAUNCHES):
            run()

    graph = capture_graph(launches, device)
    graph.replay()
    return graph


def _replay_ms(graph: Any) -> float:
    begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))
