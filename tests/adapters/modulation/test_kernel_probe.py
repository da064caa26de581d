"""Whether kernels may be used: probed before, refused where they cannot run, chosen by time."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapters.kernels.reference import modulated_linear
from adapters.modulation import kernel_probe
from adapters.modulation.autotune import Autotuner
from adapters.modulation.fused import FusedLayers
from adapters.modulation.layer_call import LayerCall
from adapters.segments import from_runs
from tests.stand.interpreted import Kernels, assert_relative, interpreted, one_layer
from tests.stand.tiny_models import random_factors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
CPU = torch.device("cpu")
LAYER_TOLERANCE = 3e-3


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    """The kernels as the interpreter runs them, in place of those for a GPU."""
    with interpreted() as found:
        yield found


def test_the_probe_finds_a_kernel_that_is_wrong(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel_probe.probe_error(torch.float16, CPU) < kernel_probe.PROBE_TOLERANCE
    real = kernels.tiles.hira_linear

    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        y: torch.Tensor = real(*args, **options)
        y[-1] *= 1.5  # of the base's rows alone
        return y

    monkeypatch.setattr(kernels.tiles, "hira_linear", wrong)
    assert kernel_probe.probe_error(torch.float16, CPU) > kernel_probe.PROBE_TOLERANCE


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
@pytest.mark.parametrize("fastest", ["product", "expanded", "scratch", "row", "wide"])
def test_the_form_that_was_the_fastest_computes(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    assert kernel_probe.proved_forms(torch.float16, CPU) == {
        "product", "expanded", "scratch", "row", "wide",
    }  # fmt: skip
    clock, ran, computes = Clock(), [], [False]
    plain = FusedLayers.forms

    def slowed(self: Any, call: LayerCall) -> Any:
        found = {}
        for candidate, run in plain(self, call).items():

            def slow(run: Any = run, way: str = candidate[1]) -> torch.Tensor:
                ran.append(way)
                clock.now += 1 if way == fastest else 1000
                y: torch.Tensor = run() if computes[0] else call.x.new_zeros(1)
                return y

            found[candidate] = slow
        return found

    monkeypatch.setattr(FusedLayers, "forms", slowed)
    adapted, layer = one_layer()
    for slot, rank in ((1, 4), (2, 3)):
        made = random_factors(adapted.signature, ["0"], rank=rank, dtype=torch.float16, seed=slot)
        adapted.install(slot, made)
    assert adapted.fused is not None
    runs = {"row": [(1, 1)], "wide": [(1, 150), (2, 16)]}.get(fastest, [(1, 16), (2, 16)])
    segments = from_runs(runs)
    x = torch.randn(segments.rows, layer.in_features).half()
    call = LayerCall("0", x, layer.quantized, layer.slots, segments, None)
    slots: Any = {slot: ("hira", one.a, one.b, 1.0, None) for slot, one in layer.slots.items()}
    w0 = layer.quantized.dequantize(dtype=torch.float32)
    wanted = modulated_linear(x, w0, slots, segments, None)
    tuner = Autotuner(clock=clock)
    for turn in range(4):
        tuner.begin_forward()
        computes[0] = turn == 3  # until then it is timed
        y, left = adapted.fused.linear(call, tuner)
        assert not left
    assert_relative(y, wanted, LAYER_TOLERANCE)
    assert ran[-1] == fastest
    others = {"row": {"row"}, "wide": {"scratch", "wide"}}.get(fastest, {"scratch"})
    assert set(ran) == {"tiles", "product", "expanded", *others}
    ran.clear()
    adapted.fused.linear(call)  # nothing was timed: the fused kernel
    assert ran == ["tiles"]
