"""Whether kernels may be used: probed before, refused where they cannot run, chosen by time."""

from __future__ import annotations

import importlib.util
import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.kernels.reference import modulated_linear
from adapters.kernels.triton_operands import GROUP_FEATURES
from adapters.kernels.triton_tiles import FEW_ROWS, MANY_BLOCK_ROWS
from adapters.modulation import fused, kernel_probe
from adapters.modulation.autotune import Autotuner
from adapters.modulation.form_agreement import FORM_TOLERANCE
from adapters.modulation.fused import FusedLayers
from adapters.modulation.kernel_probe import ProbeCase, probe_error
from adapters.modulation.layer_call import LayerCall
from adapters.modulation.quant import QuantizedWeight
from adapters.modulation.strategy import Computation
from adapters.segments import from_runs
from tests.stand.interpreted import Kernels, assert_relative, one_layer
from tests.stand.tiny_models import random_factors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
CPU = torch.device("cpu")
LAYER_TOLERANCE = 3e-3


def test_the_probe_finds_a_kernel_that_is_wrong(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = kernel_probe.INTERPRETED_CASES
    assert probe_error(torch.float16, CPU, "tiles", case) < FORM_TOLERANCE
    real = kernels.tiles.hira_linear

    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        y: torch.Tensor = real(*args, **options)
        y[-1] *= 1.5  # of the base's rows alone
        return y

    monkeypatch.setattr(kernels.tiles, "hira_linear", wrong)
    assert probe_error(torch.float16, CPU, "tiles", case) > FORM_TOLERANCE


def test_the_layers_that_a_device_is_probed_with_are_as_awkward_as_real_ones() -> None:
    cases = kernel_probe.DEVICE_CASES
    assert {one.kind for one in cases} == {"nf4", "fp4"}
    assert {one.shape[1] % GROUP_FEATURES == 0 for one in cases} == {True, False}
    assert all(one.shape[0] % 64 for one in cases)
    assert {rank for one in cases for rank in one.ranks} >= {1, 16, 128}
    assert {one.biased for one in cases} == {True, False}
    assert all(FEW_ROWS <= one.many <= MANY_BLOCK_ROWS for one in cases)


@pytest.mark.parametrize("case", kernel_probe.DEVICE_CASES, ids=str)
def test_every_form_agrees_on_the_layers_that_a_device_is_probed_with(
    kernels: Kernels, case: ProbeCase
) -> None:
    # Of fewer numbers, in the same order of codes: what is interpreted takes seconds.
    less = replace(case, shape=(40, 160 if case.shape[1] % GROUP_FEATURES else 256), many=FEW_ROWS)
    for form in ("tiles", *kernel_probe.FORMS_BESIDE_TILES):
        # Rows expanded by rank 128 take 10 s here, and have tests of their own.
        if form != "wide" and (max(case.ranks) < 128 or form not in {"product", "expanded"}):
            assert probe_error(torch.float16, CPU, form, less) < LAYER_TOLERANCE, form


def test_forms_are_probed_before_there_are_layers_to_compute(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[tuple[str, ProbeCase]] = []

    def tries(
        dtype: torch.dtype, device: torch.device, form: Computation, case: ProbeCase
    ) -> float:
        tried.append((form, case))
        return {"row": 0.5, "scratch": math.nan}.get(form, 0.0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("adapters.modulation.kernel_probe.probe_error", tries)
    device = torch.device("cuda", 6)
    with caplog.at_level(logging.INFO):
        proved = kernel_probe.proved_forms(torch.float16, device)
    assert proved == {"product", "expanded", "wide"}
    large, small = kernel_probe.DEVICE_CASES
    forms = [(one, case) for one in kernel_probe.FORMS_BESIDE_TILES for case in (large, small)]
    assert tried == [one for one in forms if one != ("wide", small)]  # of a rank that it never has
    lines = [one.getMessage() for one in caplog.records]
    assert lines[0].startswith("Compiling the other forms")
    assert lines[1:3] == [
        "The form scratch is off by nan in its probe: not used",
        "The form row is off by 0.5 in its probe: not used",
    ]
    assert lines[3].startswith(
        "Forms that may be timed with the fused kernel: product, expanded, w"
    )
    asked: list[object] = []

    def proved_nothing(*where: object) -> frozenset[Computation]:
        asked.append(where)
        return frozenset()

    monkeypatch.setattr(fused, "proved_forms", proved_nothing)
    weight = QuantizedWeight.from_dense(torch.randn(16, 128), "nf4")
    fused.FusedLayers({"a": weight}, torch.float16, CPU)
    assert asked == [(torch.float16, CPU)]


def test_a_triton_that_cannot_be_imported_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise OSError("libcuda.so.1:\n  cannot open shared object file")

    monkeypatch.setattr(kernel_probe, "tile_kernels", fails)
    assert kernel_probe.obstacle(torch.float16, CPU) == "OSError when triton is imported"
    (line,) = [one.getMessage() for one in caplog.records]
    assert line == (
        "Triton cannot be imported, torch computes: "
        "OSError: libcuda.so.1: cannot open shared object file"
    )


def test_a_driver_that_fails_is_told_in_one_line(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> float:
        raise RuntimeError("CUDA driver error:\n  its version is insufficient")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("adapters.modulation.kernel_probe.probe_error", fails)
    device = torch.device("cuda", 7)
    for _ in range(2):  # it is not tried again
        assert kernel_probe.obstacle(torch.float16, device) == "RuntimeError in its probe"
    (line,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert line == (
        "The fused kernel failed its probe, torch computes: "
        "RuntimeError: CUDA driver error: its version is insufficient"
    )


@torch.no_grad()
@pytest.mark.parametrize("of", ["compiler", "driver"])
def test_a_layer_at_which_the_kernel_fails_is_left_to_torch(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, of: str
) -> None:
    adapted, layer = one_layer()
    made = random_factors(adapted.signature, ["0"], rank=4, dtype=torch.float16)
    adapted.install(1, made)
    assert adapted.fused is not None
    failures: list[Exception] = [
        kernels.tiles.KernelFailure("out of resource:\n  shared memory")
        if of == "compiler"
        else RuntimeError("Triton Error [CUDA]: out of resource:\n  shared memory"),
        RuntimeError("the device is gone"),
    ]

    def fails(*_: Any, **__: Any) -> torch.Tensor:
        raise failures[-1]

    monkeypatch.setattr(kernels.tiles, "hira_linear", fails)
    segments = from_runs([(1, 2), (0, 1)])
    x = torch.randn(3, layer.in_features).half()
    with pytest.raises(RuntimeError, match="gone"), adapted.batch(segments):
        adapted.model(x)
    failures.pop()
    for _ in range(2):
        with adapted.batch(segments):
            y = adapted.model(x)
    slots: Any = {1: ("hira", made["0"].a, made["0"].b, 1.0, None)}
    w0 = layer.quantized.dequantize(dtype=torch.float32)
    truth = modulated_linear(x, w0, slots, segments, layer.get_parameter("bias"))
    assert_relative(y, truth, 1e-2)
    (line,) = [one.getMessage() for one in caplog.records if "from now on" in one.getMessage()]
    told = {"compiler": "TritonError", "driver": "RuntimeError: Triton Error [CUDA]"}[of]
    assert line == (
        "Torch computes 0 from now on, the fused kernel failed: "
        f"{told}: out of resource: shared memory"
    )


class Clock:
    """A clock that goes as fast as it is told."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@torch.no_grad()
@pytest.mark.parametrize(
    ("runs", "others"),
    [
        ([(1, 16), (2, 16)], ("product", "expanded", "scratch")),
        ([(1, 1)], ("row",)),
        ([(1, 150), (2, 16)], ("wide",)),
    ],
)
def test_the_form_that_was_the_fastest_computes(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    runs: list[tuple[int, int]],
    others: tuple[Computation, ...],
) -> None:
    assert kernel_probe.proved_forms(torch.float16, CPU) == {*kernel_probe.FORMS_BESIDE_TILES}
    clock, ran, fastest = Clock(), [], ["tiles"]
    answers: dict[str, torch.Tensor] = {}  # the interpreter is slow: each is computed once
    failing: set[str] = set()
    plain = FusedLayers.forms

    def slowed(self: Any, call: LayerCall, workspace: Any = None) -> Any:
        found = {}
        for (backend, way), run in plain(self, call, workspace).items():
            if way not in {"tiles", *others}:
                continue

            def slow(run: Any = run, way: str = way) -> torch.Tensor:
                ran.append(way)
                clock.now += 1 if way == fastest[0] else 1000
                if way in failing:
                    raise RuntimeError("Triton Error [CUDA]: an illegal launch")
                if way not in answers:
                    answers[way] = run()
                return answers[way].clone()

            found[backend, way] = slow
        return found

    monkeypatch.setattr(FusedLayers, "forms", slowed)
    adapted, layer = one_layer()
    for slot, rank in ((1, 4), (2, 3)):
        made = random_factors(adapted.signature, ["0"], rank=rank, dtype=torch.float16, seed=slot)
        adapted.install(slot, made)
    assert adapted.fused is not None
    segments = from_runs(runs)
    x = torch.randn(segments.rows, layer.in_features).half()
    call = LayerCall("0", x, layer.quantized, layer.slots, segments, None)
    slots: Any = {slot: ("hira", one.a, one.b, 1.0, None) for slot, one in layer.slots.items()}
    w0 = layer.quantized.dequantize(dtype=torch.float32)
    wanted = modulated_linear(x, w0, slots, segments, None)
    for fastest[0] in others:
        tuner = Autotuner(clock=clock)
        for _ in range(4):
            tuner.begin_forward()
            ran.clear()
            y, left = adapted.fused.linear(call, tuner)
            assert not left
        assert ran == [fastest[0]]
        assert_relative(y, wanted, LAYER_TOLERANCE)
    assert_relative(answers["tiles"], wanted, LAYER_TOLERANCE)
    ran.clear()
    adapted.fused.linear(call)  # nothing was timed: the fused kernel
    assert ran == ["tiles"]
    failing.add(others[-1])
    ran.clear()
    y, _ = adapted.fused.linear(call, tuner)
    assert ran == [others[-1], "tiles"]
    assert torch.equal(y, answers["tiles"])
    assert "an illegal launch" in caplog.text
