"""Static decode steps before the first request: compared, captured, and compared again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from server.base.captured_steps import UNCAPTURED
from server.failures import is_lost
from server.generation.forward import PagedForward
from server.generation.kv_cache import KVCache
from server.generation.sequences import Sequence
from server.generation.step_probe import step_fault
from server.stages import tell_stage

if TYPE_CHECKING:
    from adapters.layers.inject import AdaptedModel

logger = logging.getLogger(__name__)


def start_static(
    forward: PagedForward, adapted: AdaptedModel, kv: KVCache, begin: Callable[..., Sequence]
) -> None:
    """Try the static decode steps, and capture them on a CUDA device.

    Where they differ from the other steps, or cannot be captured, ``forward`` leaves them: all its
    steps are dynamic. That is said once in the log, and counted. Without static steps nothing
    happens.

    Args:
        forward: Makes the steps; none may be under way.
        adapted: The base with its adapted layers; two slots are used and given back.
        kv: Has room for a few sequences, which are gone afterwards.
        begin: As ``SequenceEvents.begin``.

    Raises:
        Exception: The device itself is lost.
    """
    if forward.static is None:
        return
    reason = "differs"
    try:
        # Before anything is captured, and then what was captured.
        fault = step_fault(forward, adapted, kv, begin)
        if fault is None:
            reason = "uncapturable"
            for done, every in forward.capture_static():
                tell_stage("capturing decode steps", done, every)
                if done % 10 == 0 or done == every:
                    logger.warning("Capturing decode steps: %d of %d", done, every)
            captured = forward.static.captured
            if len(captured):
                reason = "differs"
                fault = step_fault(forward, adapted, kv, begin)
            elif captured.possible:
                reason, fault = UNCAPTURED, "memory ended before any was captured"
    except Exception as error:
        if is_lost(error):
            raise
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        forward.leave_static(reason, fault)
