"""Layers in steps over fixed buffers, by every form of the kernels: against float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from adapters.kernels.reference import modulated_linear
from adapters.modulation import fused_steps
from adapters.modulation.kernel_probe import proved_forms
from adapters.modulation.static_rows import StaticRows
from adapters.modulation.step_forms import StepForm, StepForms
from adapters.segments import from_rows
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


@pytest.mark.parametrize("wanted", ["tiles", "product", "expanded", "row"])
def test_rows_of_a_static_step_are_the_equation_by_every_form(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, wanted: StepForm
) -> None:
    def preferred(runs: Mapping[StepForm, Any], device: torch.device) -> StepForm:
        return wanted if wanted in runs else "tiles"

    monkeypatch.setattr(fused_steps, "fastest", preferred)
    ran: list[StepForm] = []

    def count(module: Any, name: str, form: StepForm) -> None:
        real = getattr(module, name)

        def counted(*args: Any, **options: Any) -> Any:
            ran.append(form)
            return real(*args, **options)

        monkeypatch.setattr(module, name, counted)

    adapted, layer = one_layer()
    static = adapted.make_static(4, 4, (0, 16))
    count(kernels.tiles, "few_rows_linear", "tiles")
    count(kernels.scratch, "product_linear", "product")
    count(kernels.expanded, "expanded_linear", "expanded")
    count(kernels.row, "one_row_linear", "row")
    for slot, rank in ((1, 5), (2, 16)):
        factors = random_factors(
            adapted.signature, ["0"], rank=rank, dtype=torch.float16, seed=slot
        )
        adapted.install(slot, factors)
    held = static.nbytes
    made = StaticRows(4, CPU)
    static.rows = made
    for slots in ([1, 2, 0, 2], [1], [2], [0], [1, 1, 2]):
        made.fill(slots)
        made.shape(len(slots), 16, False)
        x = torch.randn(len(slots), layer.in_features).half()
        with torch.no_grad():
            y = adapted.model(x)
        truth = modulated_linear(
            x,
            layer.quantized.dequantize(dtype=torch.float32),
            {s: (f.method, f.a, f.b, f.scale, f.bias) for s, f in layer.slots.items()},
            from_rows(slots),
            layer.get_parameter("bias"),
        )
        assert_relative(y, truth, LAYER_TOLERANCE)
    static.rows = None
    many = "tiles" if wanted == "row" else wanted
    assert ran == [many, wanted, wanted, wanted, many]
    assert static.nbytes == held  # what steps share was taken before the first of them


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("form", ["product", "expanded"])
def test_factors_that_are_not_finite_fail_alone_in_products_of_steps(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, form: StepForm
) -> None:
    monkeypatch.setattr(fused_steps, "fastest", lambda runs, _: form)
    adapted, layer = one_layer()
    static = adapted.make_static(4, 4, (0, 16))
    for slot, value in ((1, None), (2, float("nan")), (3, float("inf"))):
        factors = random_factors(adapted.signature, ["0"], rank=5, dtype=torch.float16, seed=1)
        adapted.install(slot, factors)
        if value is not None:  # as of a product that overflows: install would refuse it
            layer.slots[slot].a[2] = value
    made = StaticRows(4, CPU)
    static.rows = made
    x = torch.randn(4, layer.in_features).half()
    answers = []
    for slots in ([1, 2, 0, 3], [1, 1, 0, 1]):  # the same buffers, with what was left in them
        made.fill(slots)
        made.shape(4, 16, False)
        with torch.no_grad():
            answers.append(adapted.model(x))
    static.rows = None
    assert torch.equal(answers[0][[0, 2]], answers[1][[0, 2]])
    assert torch.isfinite(answers[1]).all()
    assert not torch.isfinite(answers[0][[1, 3]]).all(1).any()


@pytest.mark.parametrize("form", ["product", "expanded"])
def test_without_memory_for_its_buffers_a_form_is_not_used(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    form: StepForm,
) -> None:
    def none(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert form in proved_forms(torch.float16, CPU)
    monkeypatch.setattr(fused_steps, "fastest", lambda runs, _: form)
    where = (kernels.scratch, "product_buffers")
    monkeypatch.setattr(
        *(where if form == "product" else (kernels.expanded, "expanded_buffer")), none
    )
    adapted, _ = one_layer()
    adapted.make_static(4, 4, (0, 16))
    assert adapted.fused is not None
    assert adapted.fused.steps.form_of("0", 16, 4) == "tiles"
    assert adapted.fused.steps.nbytes == 0
    assert f"No memory for the buffers of steps by {form}" in caplog.text


def test_a_layer_that_the_kernels_do_not_serve_has_no_adapter_in_steps(kernels: Kernels) -> None:
    adapted, _ = one_layer((16, 63))  # rows of an odd number of inputs; as one stored in int8
    static = adapted.make_static(3, 4, (0, 16))
    assert not static.serves("0")
    adapted.install(1, random_factors(adapted.signature, ["0"], rank=4, dtype=torch.float16))
    assert static.obstacle(1) == "storage"
    assert static.obstacle(0) is None


def test_more_rows_are_computed_as_the_next_number_that_was_timed() -> None:
    shape = (8, 8)
    made = StepForms({(shape, 32, 4): "product", (shape, 32, 1): "row"})
    rows = {1: "row", 2: "product", 4: "product", 5: "tiles", 1000: "tiles"}
    assert {one: made.of(shape, 32, one) for one in rows} == rows
    assert made.of(shape, 16, 4) == "tiles"
    assert made.cases("product") == [(shape, 32, 4)]
    assert made.without("product").of(shape, 32, 4) == "tiles"
    assert made.without("product").of(shape, 32, 1) == "row"
