"""Every method on every kind of layer for every task, through one engine, against float64.

A *stage* is one tiny base in one storage, with an adapter of every method for every task that its
family has and every kind of layer that it has. All of them are asked in one mixed batch.
``tests/server/engine/test_coverage.py`` holds the errors to their bounds, and

    python -m tests.stand.coverage

runs every stage and writes the table ``tests/COVERAGE.md``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.engine.engine import Engine
from server.messages import (
    EncodeRequest,
    EncodeResult,
    Failure,
    GenerateRequest,
    GenerateResult,
    SamplingOptions,
)
from tests.stand import tiny_bases
from tests.stand.coverage_adapters import LABELS, TASKS, make
from tests.stand.float64 import Reference

TABLE = Path(__file__).parents[1] / "COVERAGE.md"
TEST = "tests/server/engine/test_coverage.py::test_every_answer_equals_float64"

METHODS = ("HiRA", "LoRA", "sparse LoRA", "QLoRA", "base")
ENCODER = (*tuple(TASKS)[:6], "feature-extraction")
BARE = (*tuple(TASKS)[:5], "feature-extraction")
DECODER = ("text-classification", "multi-label", "regression", "text-generation")
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "distilbert": ENCODER,
    "bert": ENCODER,
    "roberta": ENCODER,
    "minilm": BARE,
    "opt": DECODER,
    "gpt2": (*DECODER, "token-classification", "feature-extraction"),
    "llama": (*DECODER, "token-classification"),
    "qwen2": (*DECODER, "token-classification"),
    "vit": ("image-classification", "feature-extraction"),
}
EMBEDDINGS = {"distilbert": "word_embeddings", "bert": "word_embeddings",
              "roberta": "word_embeddings", "minilm": "word_embeddings", "opt": "embed_tokens",
              "gpt2": "wte", "llama": "embed_tokens", "qwen2": "embed_tokens"}  # fmt: skip
# Storage of the linear layers, and whether the token embedding is in 4 bits, too.
STORAGES = {"fp32": ("none", False), "nf4": ("nf4", False), "fp4": ("fp4", False),
            "int8": ("int8", False), "nf4, embedding too": ("nf4", True)}  # fmt: skip
STAGES: tuple[tuple[str, str], ...] = (
    *((family, storage) for family in FAMILIES for storage in ("fp32", "nf4")),
    *((family, storage) for family in ("distilbert", "gpt2") for storage in ("fp4", "int8")),
    ("bert", "nf4, embedding too"),
    ("llama", "nf4, embedding too"),
)
NEW_TOKENS = 6


@dataclass(frozen=True)
class Cell:
    """One figure of the table."""

    method: str
    layer: str
    task: str
    family: str
    storage: str
    error: float


@dataclass(frozen=True)
class Made:
    """One adapter on a stage."""

    method: str
    layer: str
    column: str
    folder: Path | None
    version: str | None

    @property
    def task(self) -> str:
        return TASKS[self.column][0]


def layers_of(family: str) -> dict[str, list[str]]:
    """Kind of layer → the ``target_modules`` that name such layers of a family."""
    kinds = {"Conv1D" if family == "gpt2" else "Linear": tiny_bases.TARGETS[family]}
    if family == "vit":
        return {"Linear": ["q_proj", "v_proj", "fc1"], "Conv2d": ["projection"]}
    return kinds | {"Embedding": [EMBEDDINGS[family]]}


def run(family: str, storage: str, root: Path) -> list[Cell]:
    """Build a stage below ``root``, ask everything at once, and compare with float64.

    The base and the adapters of a family are the same in every storage: what a stage finds below
    ``root`` is not made again.
    """
    quantization, embeddings = STORAGES[storage]
    base = root / family
    if not base.exists():
        tiny_bases.base_folder(root, family)
    store = root / f"store of {storage}"
    options = tiny_bases.options(
        base,
        store,
        quantization=quantization,
        quantize_embeddings=embeddings,
        slots=128,
        threads=1,  # so small that threads would only wait for each other
        max_batch_rows=512,
        max_batch_tokens=1 << 20,
        max_sequences=128,
        kv_bytes=16 << 20,
    )
    made = list(_made(root, base, store, family, storage))
    engine = Engine.build(options)
    try:
        answers = ask(engine, made)
        return [
            Cell(
                one.method,
                one.layer,
                one.column,
                family,
                storage,
                error_of(
                    one, answers[index], base,
                    quantization=quantization, quantize_embeddings=embeddings,
                ),
            )
            for index, one in enumerate(made)
        ]  # fmt: skip
    finally:
        engine.close()


def _made(root: Path, base: Path, store: Path, family: str, storage: str) -> Iterator[Made]:
    for column in FAMILIES[family]:
        task = TASKS[column][0]
        if task in ("fill-mask", "text-generation", "feature-extraction"):
            yield Made("base", "none", column, None, None)
        for layer, targets in layers_of(family).items():
            for method in METHODS[:4]:
                # Trained on the 4-bit layers, which embeddings and convolutions are not.
                if method == "QLoRA" and (storage != "nf4" or layer in ("Embedding", "Conv2d")):
                    continue
                folder = root / f"{column}-{layer}-{method}".replace(" ", "-")
                if not folder.exists():
                    make(folder, base, column, method, targets)
                yield Made(method, layer, column, folder, tiny_bases.stored(store, folder))


# Questions, answers and their errors


def questions(task: str) -> list[Any]:
    if task == "image-classification":
        return [tiny_bases.image_file(tiny_bases.image(20 + 9 * i, 18, seed=i)) for i in range(3)]
    if task == "question-answering":
        return [("ann in paris", "a very good film by ann in paris"), ("a", "not a dull film")]
    if task == "fill-mask":
        return ["a very [MASK] film by [MASK]", "[MASK] is good"]
    return tiny_bases.texts(3, seed=11, longest=20)


def request_of(engine: Engine, one: Made, name: str, which: slice = slice(None)) -> Any:
    """What asks one adapter all of its questions, or those of ``which``; generation asks one."""
    task: Any = one.task
    if task == "text-generation":
        ids = engine.text.tokenize_prompt(questions(task)[0], max_new_tokens=NEW_TOKENS)
        sampling = SamplingOptions(max_new_tokens=NEW_TOKENS, logprobs=True, ignore_eos=True)
        return GenerateRequest(name, one.version, one.version, ids, sampling)
    sees = task == "feature-extraction" and engine.base.takes_images
    asked: Any = questions("image-classification" if sees else task)[which]
    known: dict[str, dict[str, Any]] = {
        "token-classification": {"aggregation_strategy": "none", "ignore_labels": ()},
        "fill-mask": {"targets": tuple(range(tiny_bases.VOCABULARY))},
        "feature-extraction": {"normalize": False, "pooling": "mean"},
    }
    options = known.get(task, {})
    encoded = engine.inputs.tokenize(asked, task)
    top_k = 20 if task == "question-answering" else None
    return EncodeRequest(name, task, one.version, one.version, encoded, top_k, options)


def ask(engine: Engine, made: Sequence[Made]) -> list[Any]:
    """The answers of all adapters, asked at once: encoding in one batch, generation beside it."""
    from server.messages import Preload

    for one in made:
        if one.version is not None:
            engine.submit(Preload(one.version))
    until = time.monotonic() + 60
    while any(
        one.version is not None and engine.residency.state(one.version) != "ready" for one in made
    ):
        assert time.monotonic() < until
        engine.wait(0.05)
    for index, one in enumerate(made):
        engine.submit(request_of(engine, one, str(index)))
    found: dict[str, Any] = {}
    while len(found) < len(made):
        for event in engine.step():
            assert not isinstance(event, Failure), event
            if isinstance(event, EncodeResult | GenerateResult):
                found[event.id] = event
    steps = engine.snapshot()
    assert not any(steps.queue_depth.values())
    return [found[str(index)] for index in range(len(made))]


def error_of(one: Made, answer: Any, base: Path, **storage: Any) -> float:
    """The relative error of an adapter's answers: the norm of their errors over their norm."""
    pairs = list(_compared(one, answer, base, Reference(base, one.folder, one.task, **storage)))
    found, wanted = (
        torch.tensor([value for pair in pairs for value in pair[side]], dtype=torch.float64)
        for side in (0, 1)
    )
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def _compared(
    one: Made, answer: Any, base: Path, reference: Reference
) -> Iterator[tuple[list[float], list[float]]]:
    """Found and wanted numbers, question by question."""
    task = one.task
    if isinstance(answer, GenerateResult):
        yield _generation(reference, base, answer)
        return
    if base.name == "vit":
        from tests.stand.pictures import prepared

        asked = [tiny_bases.image(20 + 9 * i, 18, seed=i) for i in range(3)]
        for picture, output in zip(asked, answer.outputs, strict=True):
            with torch.no_grad():
                out = reference.model(pixel_values=prepared(picture)[None])
            yield _scores(one, out, output, None)
        return
    text = tiny_bases.text_of(base)
    kind: Any = task
    for item, output in zip(text.tokenize(questions(task), kind), answer.outputs, strict=True):
        out = reference(item.token_ids, item.type_ids if base.name in ("bert", "minilm") else None)
        yield _scores(one, out, output, item)


def _scores(one: Made, out: Any, output: Any, item: Any) -> tuple[list[float], list[float]]:
    """What was answered and what should have been, as two lists of numbers in one order."""
    problem = TASKS[one.column][1]
    if one.task in ("text-classification", "image-classification"):
        logits = out.logits[0]
        wanted = logits if problem == "regression" else logits.softmax(-1)
        wanted = logits.sigmoid() if problem == "multi_label_classification" else wanted
        names = ("LABEL_0",) if problem == "regression" else LABELS
        by_label = {entry["label"]: entry["score"] for entry in output}
        return [by_label[name] for name in names], wanted.tolist()
    if one.task == "feature-extraction":
        return list(output), out.last_hidden_state[0].mean(0).tolist()
    if one.task == "fill-mask":
        rows = [i for i, token in enumerate(item.token_ids) if token == 4]
        parts = [output] if len(rows) == 1 else list(output)
        wanted = out.logits[0, rows].softmax(-1)
        found = [entry["score"] for part in parts for entry in sorted(part, key=_token)]
        return found, wanted.flatten().tolist()
    if one.task == "token-classification":
        rows = [i for i, (start, stop) in enumerate(item.offsets) if start != stop]
        probabilities = out.logits[0, rows].softmax(-1)
        assert [entry["entity"] for entry in output] == [
            LABELS[int(row.argmax())] for row in probabilities
        ]
        return [entry["score"] for entry in output], probabilities.amax(-1).tolist()
    inside = [i for i, (start, stop) in enumerate(item.offsets) if start != stop]
    begin, end = (logits[0, inside].softmax(-1) for logits in (out.start_logits, out.end_logits))
    spans = {
        (item.offsets[inside[i]][0], item.offsets[inside[j]][1]): float(begin[i] * end[j])
        for i in range(len(inside))
        for j in range(i, len(inside))
    }
    best = sorted(spans.values(), reverse=True)[: len(output)]
    assert [entry["score"] for entry in output] == sorted(
        (entry["score"] for entry in output), reverse=True
    )
    found = [entry["score"] for entry in output]
    named = [spans[entry["start"], entry["end"]] for entry in output]
    return [*found, *found], [*best, *named]


def _token(entry: Mapping[str, Any]) -> int:
    return int(entry["token"])


def _generation(
    reference: Reference, base: Path, answer: GenerateResult
) -> tuple[list[float], list[float]]:
    """Log-probabilities of the tokens, each of which must be the likeliest in float64."""
    ids = list(
        tiny_bases.text_of(base).tokenize_prompt(questions("")[0], max_new_tokens=NEW_TOKENS)
    )
    wanted = []
    for token in answer.tokens:
        scores = reference(ids).logits[0, -1].log_softmax(-1)
        assert token.id == int(scores.argmax())
        wanted.append(float(scores.max()))
        ids.append(token.id)
    assert len(wanted) == NEW_TOKENS
    return [float(token.logprob or 0.0) for token in answer.tokens], wanted


def main() -> None:
    from tests.stand.coverage_table import table

    torch.set_num_threads(1)
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        for family, storage in STAGES:
            began = time.perf_counter()
            stage = run(family, storage, Path(folder) / f"of {family}")
            cells += stage
            worst = max(cell.error for cell in stage)
            sys.stderr.write(
                f"{family}, {storage}: {worst:.1e} ({time.perf_counter() - began:.1f} s)\n"
            )
    TABLE.write_text(table(cells))


if __name__ == "__main__":
    main()
