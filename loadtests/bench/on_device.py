"""Calls timed on a device: a queue of launches ends with a wait, and may be replayed as a graph."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import torch


def wait_for(device: torch.device) -> None:
    """Return when all that was launched has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeated(side: Callable[[], object], device: torch.device, times: int) -> Callable[[], None]:
    """So many calls and one wait: a launch is shorter than what a clock tells well."""

    def run() -> None:
        for _ in range(times):
            side()
        wait_for(device)

    return run


def graph_of(side: Callable[[], object], device: torch.device, times: int) -> Callable[[], None]:
    """So many calls as one CUDA graph, replayed and waited for: the device without the host.

    Without CUDA the calls themselves, so that what surrounds them can be tried anywhere.

    Raises:
        RuntimeError: The calls cannot be captured.
    """
    if device.type != "cuda":
        return repeated(side, device, times)
    aside: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(3):
            side()
    torch.cuda.current_stream(device).wait_stream(aside)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            side()

    def run() -> None:
        graph.replay()
        wait_for(device)

    return run


def card_of(device: torch.device) -> dict[str, Any]:
    """The card, its driver and what is compiled for it, as the report names them."""
    if device.type != "cuda":
        return {"gpu": "none: the parts ran on the processor, on shapes of nothing"}
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
        version = driver.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        version = "unknown"
    properties: Any = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "driver": version,
        "cuda": torch.version.cuda,
    }
