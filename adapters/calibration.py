"""The coefficients of ``adapters.costs`` on the machine at hand: measured once, and kept.

``adapters.probes`` measures every shape class of the model. What it found is kept in a file that
names the machine, the threads and the versions it holds for; with another, or one that cannot be
read, it is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from adapters import probes
from adapters.costs import UNMEASURED, Backend, CostModel, Costs, ShapeClass
from adapters.inject import AdaptedModel
from adapters.kernels import native_ops
from adapters.layers import AdaptedLinear
from adapters.quant import WeightKind

_log = logging.getLogger(__name__)

_FORMAT = 2
_FEWEST_WEIGHTS = 1 << 14  # of a layer: below, every strategy takes microseconds
_MOST_CLASSES = 6


def calibrate(adapted: AdaptedModel, dtype: torch.dtype, folder: Path | None = None) -> CostModel:
    """The costs of this model's linear layers, as kept in ``folder`` or measured now.

    Whatever goes wrong with the file is logged and costs a new measurement; what goes wrong with a
    measurement is logged and leaves the built-in costs, with which every answer is the same.

    Args:
        adapted: Its layers tell the shapes and the storage; nothing of it changes.
        dtype: The compute dtype.
        folder: Where the file is; None to measure and keep nothing.
    """
    wanted = _shapes(adapted)
    if not wanted:
        return UNMEASURED
    machine = _machine(adapted.device, dtype, sorted({kind for _, kind in wanted.values()}))
    path = None
    table: dict[ShapeClass, dict[Backend, Costs]] = {}
    if folder is not None:
        digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
        path = folder / f"costs-{digest[:16]}.json"
        table = _read(path, machine)
    missing = {key: one for key, one in wanted.items() if key not in table}
    if not missing:
        return CostModel(table)
    began = time.perf_counter()
    unsure: dict[ShapeClass, set[str]] = {}
    try:
        with torch.inference_mode():
            for key, (shape, kind) in missing.items():
                table[key], doubtful = probes.measure(shape, kind, dtype, adapted.device)
                if doubtful:
                    unsure[key] = doubtful
    except (RuntimeError, ValueError) as error:
        _log.warning("The strategies could not be measured (%s): built-in costs are used.", error)
        return UNMEASURED
    took_s = time.perf_counter() - began
    _log.info("Measured the strategies for %d shapes in %.2f s.", len(missing), took_s)
    for key, doubtful in unsure.items():
        _log.warning(
            "The machine was too busy to measure all of %s: built-in costs stand for %s until the "
            "next start.", key, ", ".join(sorted(doubtful)),
        )  # fmt: skip
    sure = {key: costs for key, costs in table.items() if key not in unsure}
    if path is not None and any(key in sure for key in missing):
        _write(path, machine, sure)
    return CostModel(table)


def _shapes(adapted: AdaptedModel) -> dict[ShapeClass, tuple[tuple[int, int], WeightKind]]:
    """For each class, the shape to measure; those of most layers first, if there are too many."""
    found: dict[ShapeClass, tuple[tuple[int, int], WeightKind]] = {}
    counts: dict[ShapeClass, int] = {}
    for layer in adapted.layers.values():
        if isinstance(layer, AdaptedLinear) and not layer.is_output:
            weight = layer.quantized
            if weight.shape[0] * weight.shape[1] < _FEWEST_WEIGHTS:
                continue
            key = ShapeClass.of(weight.shape)
            counts[key] = counts.get(key, 0) + 1
            found.setdefault(key, (weight.shape, weight.kind))
    often = sorted(found, key=lambda key: (-counts[key], key))[:_MOST_CLASSES]
    return {key: found[key] for key in sorted(often)}


def _machine(device: torch.device, dtype: torch.dtype, kinds: list[str]) -> dict[str, Any]:
    """All that the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernel": native_ops.digest(),
        "dtype": str(dtype),
        "storage": ",".join(kinds),
    }


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: Path, machine: Mapping[str, Any]) -> dict[ShapeClass, dict[Backend, Costs]]:
    """What the file holds for this machine; nothing if there is none, or it cannot be used."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != _FORMAT or held["machine"] != machine:
            raise ValueError("it is of another machine or version")
        table: dict[ShapeClass, dict[Backend, Costs]] = {}
        for text, backends in held["costs"].items():
            first, second = (int(part) for part in text.split(","))
            table[ShapeClass(first, second)] = {
                backend: _costs_of(backends[backend])
                for backend in _backends()
                if backend in backends or backend == "torch"
            }
        return table
    except FileNotFoundError:
        return {}
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        _log.warning("%s cannot be used (%s): the strategies are measured anew.", path, error)
        return {}


def _costs_of(values: Mapping[str, Any]) -> Costs:
    """Raises ValueError, KeyError or TypeError unless they are all there and sensible."""
    if set(values) != {field.name for field in fields(Costs)}:
        raise ValueError("its fields are others")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is no number")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}")
    whole = {name: int(values[name]) for name in ("granule", "lone_rows")}
    if whole["granule"] < 1:
        raise ValueError("granule is below 1")
    return Costs(**{name: float(value) for name, value in values.items()} | whole)  # type: ignore[arg-type]


def _backends() -> tuple[Backend, ...]:
    return ("native", "torch")


def _write(
    path: Path, machine: Mapping[str, Any], table: Mapping[ShapeClass, Mapping[Backend, Costs]]
) -> None:
    costs = {
        f"{key.weights_log2},{key.inputs_log2}": {name: asdict(one) for name, one in own.items()}
        for key, own in table.items()
    }
    text = json.dumps({"format": _FORMAT, "machine": machine, "costs": costs}, indent=1)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        _log.warning("%s cannot be written (%s): the next start measures again.", path, error)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
