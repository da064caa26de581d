"""Layers in steps over fixed buffers, by every form of the kernels: against float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from adapters.errors import UnsupportedOption
from adapters.kernels.reference import modulated_linear
from adapters.modulation import fused_steps, step_forms
from adapters.modulation.kernel_probe import proved_forms
from adapters.modulation.static_rows import StaticRows
from adapters.modulation.step_forms import StepForm, StepForms
from adapters.segments import from_rows
from tests.stand.interpreted import Kernels, assert_relative, one_layer
from tests.stand.tiny_models import random_factors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
CPU = torch.device("cpu")
LAYER_TOLERANCE = 3e-3


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
    wanted = "product_buffers" if form == "product" else "expanded_buffer"
    monkeypatch.setattr(fused_steps, wanted, none)
    adapted, _ = one_layer()
    adapted.make_static(4, 4, (0, 16))
    assert adapted.fused is not None
    assert adapted.fused.steps.form_of("0", 16, 4) == "tiles"
    assert adapted.fused.steps.nbytes == 0
    assert f"No memory for the buffers of steps by {form}" in caplog.text


def test_a_form_that_fails_in_a_step_leaves_it_to_the_fused_kernel(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused_steps, "fastest", lambda runs, _: "product")
    adapted, layer = one_layer()
    static = adapted.make_static(4, 4, (16,))
    adapted.install(1, random_factors(adapted.signature, ["0"], rank=5, dtype=torch.float16))
    tried: list[int] = []

    def fails(*_: Any, **__: Any) -> torch.Tensor:
        tried.append(1)
        raise RuntimeError("Triton Error [CUDA]:\n  out of resource")

    monkeypatch.setattr(kernels.scratch, "product_linear", fails)
    made = StaticRows(4, CPU)
    static.rows = made
    made.fill([1, 0])
    made.shape(2, 16, False)
    x = torch.randn(2, layer.in_features).half()
    with torch.no_grad():
        answers = [adapted.model(x) for _ in range(2)]
    static.rows = None
    slots: Any = {1: ("hira", layer.slots[1].a, layer.slots[1].b, 1.0, None)}
    w0 = layer.quantized.dequantize(dtype=torch.float32)
    truth = modulated_linear(x, w0, slots, from_rows([1, 0]), layer.get_parameter("bias"))
    assert_relative(answers[0], truth, LAYER_TOLERANCE)
    assert torch.equal(*answers)
    assert tried == [1]
    (line,) = [one.getMessage() for one in caplog.records]
    assert line == (
        "The fused kernel computes steps like these (2 rows of rank 16 by 48 x 256), "
        "product failed: RuntimeError: Triton Error [CUDA]: out of resource"
    )
    assert static.fused is not None
    now = [static.fused.form_of("0", 16, rows) for rows in (1, 2, 4)]
    assert now == ["product", "tiles", "tiles"]


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_ends_in_a_step_is_told_and_no_fault_of_the_form(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
) -> None:
    monkeypatch.setattr(fused_steps, "fastest", lambda runs, _: "product")
    adapted, layer = one_layer()
    static = adapted.make_static(4, 4, (16,))

    def fails(*_: Any, **__: Any) -> torch.Tensor:
        raise failure

    monkeypatch.setattr(kernels.scratch, "product_linear", fails)
    made = StaticRows(4, CPU)
    static.rows = made
    made.fill([0, 0])
    made.shape(2, 16, False)
    with pytest.raises(type(failure)) as caught, torch.no_grad():
        adapted.model(torch.randn(2, layer.in_features).half())
    static.rows = None
    assert caught.value is failure
    assert static.fused is not None
    assert static.fused.form_of("0", 16, 2) == "product"
    assert not caplog.records


def test_where_the_fused_kernel_cannot_run_steps_are_refused_with_the_reason(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> torch.Tensor:
        raise kernels.tiles.KernelFailure("out of resource:\n  registers")

    monkeypatch.setattr(kernels.tiles, "few_rows_linear", fails)
    adapted, layer = one_layer()
    static = adapted.make_static(4, 4, (16,))
    assert static.fused is not None
    assert static.fused.nbytes == 0
    assert "The kernels cannot compute steps: 4 rows of rank 16 by 48 x 256" in caplog.text
    made = StaticRows(4, CPU)
    static.rows = made
    made.fill([0])
    made.shape(1, 16, False)
    with pytest.raises(UnsupportedOption) as caught, torch.no_grad():
        adapted.model(torch.randn(1, layer.in_features).half())
    static.rows = None
    assert str(caught.value.found).endswith("TritonError: out of resource: registers")


ANSWER = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))


def gives(answer: torch.Tensor | Exception) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return run


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 5)], ids=str)
def test_a_form_is_chosen_only_if_it_gives_what_the_fused_kernel_gives(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a made-up CUDA device whose graphs take as long as their forms are told to."""
    off_in_a_row, infinite = ANSWER.clone(), ANSWER.clone()
    off_in_a_row[1] *= 1.1
    infinite[0, 0] = float("inf")
    answers: dict[StepForm, torch.Tensor | Exception] = {
        "tiles": ANSWER, "row": off_in_a_row, "product": RuntimeError("no"), "expanded": ANSWER,
    }  # fmt: skip
    runs = {form: gives(one) for form, one in answers.items()}
    ms: dict[object, float] = {runs["tiles"]: 4.0, runs["expanded"]: 3.0}
    ms |= {runs["row"]: 1.0, runs["product"]: 2.0}
    monkeypatch.setattr(step_forms, "_as_graph", lambda run, _: run)
    monkeypatch.setattr(step_forms, "_replay_ms", ms.__getitem__)
    assert step_forms.fastest(runs, device) == "expanded"
    assert [one.getMessage() for one in caplog.records] == [
        "row is not used in steps: off the fused kernel by 0.1",
        "product is not used in steps: RuntimeError: no",
    ]
    assert step_forms.fastest({**runs, "expanded": gives(infinite)}, device) == "tiles"
    nothing = torch.full_like(ANSWER, float("nan"))
    both: dict[StepForm, Any] = {"tiles": gives(nothing), "product": gives(nothing)}
    ms |= dict.fromkeys(both.values(), 1.0)
    assert step_forms.fastest(both, device) == "tiles"
    assert (
        caplog.records[-1].getMessage() == "product is not used in steps: nothing in it is finite"
    )
    with pytest.raises(RuntimeError, match="lost"):
        step_forms.fastest({**runs, "tiles": gives(RuntimeError("lost"))}, device)


def test_where_the_fused_kernel_cannot_be_captured_nothing_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("not while a stream is captured")

    monkeypatch.setattr(step_forms, "_as_graph", fails)
    with pytest.raises(RuntimeError, match="captured"):
        step_forms.fastest({"tiles": gives(ANSWER)}, torch.device("cuda", 5))


@pytest.mark.parametrize("form", ["product", "expanded", "tiles"])
def test_buffers_of_steps_are_those_of_the_chosen_form_alone(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, form: StepForm
) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(1))
    most = fused_steps.most_buffer_bytes([(48, 256)], 1, (0, 16), torch.float16)

    def every(runs: Mapping[StepForm, Any], device: torch.device) -> StepForm:
        for one in runs.values():
            one()  # takes its buffers
        return form if form in runs else "tiles"

    monkeypatch.setattr(fused_steps, "fastest", every)
    adapted, _ = one_layer()
    adapted.make_static(4, 1, (16,))
    assert adapted.fused is not None
    held = adapted.fused.steps.nbytes
    w0, expanded, products = 2 * 48 * 256, 2 * 128 * 256, 256 * (2 * 256 + 4 * 48)
    assert held == {"product": w0 + products, "expanded": expanded, "tiles": 0}[form]
    assert most == w0 + products + expanded
    assert given_back == [1]


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


def test_a_case_goes_to_the_fused_kernel_alone() -> None:
    cases = [
        (shape, rank, rows) for shape in ((8, 8), (8, 16)) for rank in (32, 128) for rows in (4, 16)
    ]
    made = StepForms(dict.fromkeys(cases, "product"))
    left = made.by_tiles((8, 16), 32, 7)  # as 16
    assert left.cases("product") == [one for one in cases if one != ((8, 16), 32, 16)]
    assert left.of((8, 16), 32, 16) == "tiles"
    assert made.by_tiles((8, 16), 32, 1000).cases("product") == cases
