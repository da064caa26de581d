"""Captures launches as a CUDA graph, and leaves the thread where it was if that fails.

What a graph is for, and in whose memory it lies, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import torch

# Of errors that have no class of their own: of the driver that makes a graph, of libraries.
_NO_MEMORY: Final = ("out of memory", "alloc_failed")


def capture_graph(
    launches: Callable[[], object], device: torch.device, *, pool: Any = None, stream: Any = None
) -> Any:
    """What ``launches`` launches, as a graph that replays it; nothing of it runs yet.

    Whatever happens, the thread is on the stream that it was on. A graph that failed is given up,
    so that its memory may be given back.

    Args:
        launches: Has run before, so that everything is compiled. What it allocates belongs to the
            graph.
        device: CUDA.
        pool: Of another graph, whose memory this one shares; None: it begins one.
        stream: On which it is captured; None: the one that PyTorch keeps for this.

    Raises:
        Exception: What failed first: a capture that is broken raises once more at its end, and
            that says less.
    """
    graph: Any = torch.cuda.CUDAGraph()
    first: list[Exception] = []
    before = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            try:
                launches()
            except Exception as error:
                first.append(error)
                raise
    except Exception as error:  # noqa: BLE001  # raised below, without the one that came after it
        first.append(error)
    finally:
        # A capture that fails at its beginning or its end leaves the thread on its stream.
        torch.cuda.set_stream(before)
    if not first:
        return graph
    with suppress(RuntimeError):  # the capture may be broken already
        graph.reset()
    told = first[0]
    first.clear()
    try:
        raise told
    finally:
        del told  # else its frames hold it, and it the tensors in them


def ends_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is used up."""
    told = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(one in told for one in _NO_MEMORY)
