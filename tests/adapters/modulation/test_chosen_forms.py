"""Which form computes a call, and which never does: by made-up forms, no kernel runs here."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from adapters.modulation.autotune import Autotuner
from adapters.modulation.chosen_forms import TILES, CallKind, ChosenForms, Forms
from adapters.modulation.form_agreement import FORM_TOLERANCE, row_difference
from adapters.modulation.strategy import Bucket, Candidate, Computation
from adapters.modulation.workspace import Workspace

CPU = torch.device("cpu")
PRODUCT: Candidate = ("triton", "product")
SCRATCH: Candidate = ("triton", "scratch")
KIND = CallKind(
    Bucket(20, 10, "nf4 float16 call", 4, 2, 5), (8, 16), (True, 64), frozenset({16}), False
)
ANSWER = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class _CompilerError(Exception):
    """As a compiler's: no RuntimeError."""


class MadeUpForms:
    """Forms that give what they are told, take as long as they are told, and are counted."""

    def __init__(self, *beside: Computation) -> None:
        forms: tuple[Candidate, ...] = (TILES, *(("triton", one) for one in beside))
        self.answers: dict[Candidate, torch.Tensor | Exception] = dict.fromkeys(forms, ANSWER)
        self.ns = dict.fromkeys(forms, 100)
        self.buffer_bytes = dict.fromkeys(forms, 0)
        self.ran: list[str] = []
        self.now = 0
        self.tuner = Autotuner(clock=lambda: self.now)
        self.chosen = ChosenForms(beside)

    def with_buffers(self, room: Workspace) -> Forms:
        def run_of(one: Candidate) -> Callable[[], torch.Tensor]:
            def run() -> torch.Tensor:
                self.ran.append(one[1])
                self.now += self.ns[one]
                if self.buffer_bytes[one]:
                    room.take(one[1], (self.buffer_bytes[one],), torch.uint8, CPU)
                answer = self.answers[one]
                if isinstance(answer, Exception):
                    raise answer
                return answer.clone()

            return run

        return {one: run_of(one) for one in self.answers}

    def compute(self, times: int = 1, kind: CallKind = KIND) -> tuple[torch.Tensor, list[str]]:
        """The answer to the last of so many calls, and the forms that it ran."""
        for _ in range(times):
            self.ran.clear()
            self.tuner.begin_forward()
            y = self.chosen.compute(kind, self.with_buffers, self.tuner)
        return y, list(self.ran)


def settled(*beside: Computation) -> MadeUpForms:
    """Where the first of them was compared, is the fastest and computes."""
    made = MadeUpForms(*beside)
    made.ns["triton", beside[0]] = 10
    assert made.compute(4)[1] == [beside[0]]
    return made


def test_a_form_that_differs_never_computes(caplog: pytest.LogCaptureFixture) -> None:
    made = MadeUpForms("product", "scratch")
    wrong = ANSWER.clone()
    wrong[2] *= 1 + 3 * FORM_TOLERANCE  # one row
    made.answers[PRODUCT] = wrong
    made.ns |= {PRODUCT: 1, SCRATCH: 10}
    ran: list[str] = []
    for _ in range(20):
        y, now = made.compute()
        ran += now
        assert torch.equal(y, ANSWER)
    assert ran.count("product") == 1  # when it was compared
    assert now == ["scratch"]
    (line,) = [one.getMessage() for one in caplog.records]
    assert line == (
        "The form product does not compute about 16 rows by 8 x 16, padded ranks 16: "
        "off the fused kernel by 0.06"
    )


def test_a_form_that_the_start_has_not_proved_is_not_even_tried() -> None:
    made = MadeUpForms("product", "scratch")
    made.chosen = ChosenForms({"scratch"})
    made.ns[PRODUCT] = 1
    assert all("product" not in made.compute()[1] for _ in range(10))


def test_times_of_a_former_run_count_once_the_form_was_compared() -> None:
    made = settled("product")
    made.chosen = ChosenForms({"product"})
    assert made.compute()[1] == ["tiles", "product"]
    assert made.compute()[1] == ["product"]


def test_calls_of_another_kind_are_compared_anew() -> None:
    made = settled("product")
    for other in (
        replace(KIND, shape=(16, 8)),
        replace(KIND, ranks=frozenset({16, 32})),
        replace(KIND, biased=True),
        replace(KIND, order=(False, 64)),
    ):
        y, ran = made.compute(kind=other)
        assert torch.equal(y, ANSWER)
        assert ran[:2] == ["tiles", "product"]
        assert made.compute(kind=other)[1][-1] == "product"


@pytest.mark.parametrize(
    "failure",
    [
        _CompilerError("out of resource: shared memory"),
        RuntimeError("Triton Error [CUDA]: out of resource"),
        torch.OutOfMemoryError("no room\n  for it"),
    ],
)
def test_where_a_chosen_form_fails_the_fused_kernel_computes(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    made = settled("product")
    made.buffer_bytes[PRODUCT] = 64
    made.compute()
    made.answers[PRODUCT] = failure
    y, ran = made.compute()
    assert torch.equal(y, ANSWER)
    assert ran == ["product", "tiles"]
    assert made.chosen.buffer_bytes == 0
    assert made.compute(10)[1] == ["tiles"]
    (line,) = [one.getMessage() for one in caplog.records]
    assert line.endswith(f": {type(failure).__name__}: {' '.join(str(failure).split())}")


def test_where_both_fail_it_is_the_fused_kernels_failure_that_is_raised() -> None:
    made = settled("product")
    made.answers |= {PRODUCT: RuntimeError("of the form"), TILES: RuntimeError("of the kernel")}
    with pytest.raises(RuntimeError, match="of the kernel"):
        made.compute()


def test_a_form_that_fails_when_it_is_compared_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = MadeUpForms("product", "scratch")
    made.answers[PRODUCT] = _CompilerError("out of registers")
    made.ns[SCRATCH] = 10
    assert made.compute(10)[1] == ["scratch"]
    assert [one.getMessage().rpartition(": ")[2] for one in caplog.records] == ["out of registers"]


def test_rows_that_overflow_say_nothing_of_a_form() -> None:
    made = MadeUpForms("product")
    made.ns[PRODUCT] = 10
    nothing = torch.full_like(ANSWER, float("nan"))
    made.answers |= {TILES: nothing, PRODUCT: ANSWER * 2}
    for _ in range(8):
        assert made.compute()[0].isnan().all()
    half = ANSWER.clone()
    half[1] = float("inf")
    made.answers |= {TILES: half, PRODUCT: ANSWER}
    made.compute(2)
    assert made.compute()[1] == ["product"]


def test_buffers_of_forms_that_lost_are_not_kept() -> None:
    made = MadeUpForms("product", "scratch")
    made.buffer_bytes |= {PRODUCT: 1000, SCRATCH: 300}
    made.ns |= {TILES: 50, PRODUCT: 100, SCRATCH: 10}
    made.compute(4)
    assert made.chosen.buffer_bytes == 300
    made.ns[SCRATCH] = 100  # from now on: the fused kernel is the fastest
    made.compute(300)
    assert made.compute()[1] == ["tiles"]
    assert made.chosen.buffer_bytes == 0


def test_layers_of_one_bucket_with_different_forms_keep_their_buffers() -> None:
    made = settled("product", "scratch")
    made.ns[SCRATCH] = 50
    other = replace(KIND, shape=(16, 8))
    made.answers[PRODUCT] = ANSWER * 2
    made.compute(3, other)  # for these, product is dropped
    made.answers[PRODUCT] = ANSWER
    made.buffer_bytes |= {PRODUCT: 64, SCRATCH: 300}
    assert made.compute(20, other)[1] == ["scratch"]
    for kind, form in [(KIND, "product"), (other, "scratch")] * 3:
        assert made.compute(kind=kind)[1][-1] == form
        assert made.chosen.buffer_bytes == 300 + 64


def by_rows(found: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """``row_difference`` as its words say it."""
    worst: float | None = None
    for mine, right in zip(found.tolist(), wanted.tolist(), strict=True):
        if not all(map(math.isfinite, right)):
            continue
        largest = max(map(abs, right))
        pairs = zip(mine, right, strict=True)
        off = max(math.inf if math.isnan(one) else abs(one - other) for one, other in pairs)
        worst = max(worst or 0.0, 0.0 if off == 0 else off / max(largest, 1e-30))
    return worst


def test_the_difference_is_that_of_the_worst_row() -> None:
    chance = random.Random(5)
    for seed in range(40):
        torch.manual_seed(seed)
        wanted = torch.randn(chance.choice((1, 5, 300)), 6) * 10.0 ** chance.randint(-4, 4)
        found = wanted + torch.randn_like(wanted) * chance.choice((0.0, 1e-3, 1.0))
        for tensor, value in ((wanted, "nan"), (wanted, "inf"), (found, "nan"), (found, "-inf")):
            if chance.random() < 0.3:
                tensor[chance.randrange(len(wanted)), 2] = float(value)
        truth, told = by_rows(found, wanted), row_difference(found, wanted)
        if truth is None or told is None:
            assert truth is told is None
        elif truth == math.inf:
            assert told > 1e30
        else:
            assert told == pytest.approx(truth, rel=1e-4)
    assert row_difference(torch.zeros(2, 3), torch.zeros(2, 3)) == 0.0


def test_nothing_is_said_in_the_log_of_forms_that_agree(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        settled("product").compute(50)
    assert not caplog.records
