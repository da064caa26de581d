"""One batch with every method in it, and heads of three tasks, on an NF4 base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.intake.checkpoint import load_adapter
from server.engine.engine import Engine
from server.messages import EncodeResult, Preload
from tests.stand import coverage, tiny_bases
from tests.stand.coverage import Made
from tests.stand.coverage_adapters import make

pytest.importorskip("peft", reason="PEFT is an extra of the project (train)")

TARGETS = tiny_bases.TARGETS["distilbert"]
# Three heads: a classifier, a tagger, and spans; and the base's own for masks.
ADAPTERS = (
    ("HiRA", "text-classification"),
    ("LoRA", "token-classification"),
    ("sparse LoRA", "question-answering"),
    ("QLoRA", "multi-label"),
    ("base", "fill-mask"),
    ("base", "feature-extraction"),
)
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bases.base_folder(tmp_path_factory.mktemp("mixed"), "distilbert")


@pytest.fixture(scope="module")
def made(base: Path) -> list[Made]:
    root, found = base.parent, []
    for method, column in ADAPTERS:
        if method == "base":
            found.append(Made(method, "none", column, None, None))
            continue
        folder = make(root / method.replace(" ", "-"), base, column, method, TARGETS)
        version = tiny_bases.stored(root / "store", folder)
        found.append(Made(method, "Linear", column, folder, version))
    return found


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def engine(request: pytest.FixtureRequest, base: Path) -> Iterator[Engine]:
    options = tiny_bases.options(
        base, base.parent / "store", quantization="nf4", dtype=request.param
    )
    built = Engine.build(options)
    yield built
    built.close()


def dtype_of(engine: Engine) -> str:
    return "fp32" if engine.base.dtype == torch.float32 else "bf16"


def numbers(output: Any) -> torch.Tensor:
    """Every score or coordinate of an answer, in the order of its labels, tokens or places."""
    if isinstance(output, tuple) and output and isinstance(output[0], float):
        return torch.tensor(output, dtype=torch.float64)
    if isinstance(output, tuple) and output and isinstance(output[0], tuple):
        return torch.cat([numbers(part) for part in output])
    key = next((one for one in ("label", "token", "index", "start") if one in output[0]), "start")
    entries = sorted(output, key=lambda one: (one[key], one.get("end", 0)))
    return torch.tensor([entry["score"] for entry in entries], dtype=torch.float64)


def test_each_row_of_a_batch_of_all_methods_equals_its_answer_alone_and_float64(
    engine: Engine, made: list[Made], base: Path
) -> None:
    for one in made:
        if one.version is not None:
            engine.submit(Preload(one.version))
    while any(
        one.version is not None and engine.residency.state(one.version) != "ready" for one in made
    ):
        engine.wait(0.05)
    for index, one in enumerate(made):
        engine.submit(coverage.request_of(engine, one, str(index)))
    events = engine.step()
    step = engine.last_step
    assert step is not None
    assert step.adapters == 4
    assert step.rows == sum(len(coverage.questions(one.task)) for one in made), "one batch"
    mixed = {event.id: event for event in events if isinstance(event, EncodeResult)}
    bound = TOLERANCE[dtype_of(engine)]
    for index, one in enumerate(made):
        answer = mixed[str(index)]
        if dtype_of(engine) == "fp32" or one.task != "question-answering":
            error = coverage.error_of(one, answer, base, quantization="nf4")
            assert error < bound, (one.method, one.column)
        for place, output in enumerate(answer.outputs):
            single = coverage.request_of(engine, one, "alone", slice(place, place + 1))
            engine.submit(single)
            (alone,) = (e for e in engine.step() if isinstance(e, EncodeResult))
            found, wanted = numbers(output), numbers(alone.outputs[0])
            assert found.shape == wanted.shape
            assert (found - wanted).norm() / wanted.norm() < bound, (one.method, place)


def test_the_adapters_are_what_they_are_called(engine: Engine, made: list[Made]) -> None:
    signature = engine.base.adapted.signature
    weights = {
        one.method: load_adapter(one.folder, signature) for one in made if one.folder is not None
    }
    assert {name: one.config.method for name, one in weights.items()} == {
        "HiRA": "hira", "LoRA": "lora", "sparse LoRA": "lora", "QLoRA": "lora",
    }  # fmt: skip
    assert weights["sparse LoRA"].sparsity == pytest.approx(0.5, abs=0.01)
    assert weights["LoRA"].sparsity < 0.01
    heads = {name: tuple(sorted(one.head)) for name, one in weights.items()}
    assert len(set(heads.values())) == 3
    trained = weights["QLoRA"].factors.values()
    assert all(float(one.b.abs().max()) > 0.05 for one in trained), "training left B at zero"
