"""The table of ``tests.stand.coverage`` as Markdown, and what it says where a figure cannot be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from tests.stand.coverage import FAMILIES, METHODS, STAGES, STORAGES, TEST, Cell, layers_of
from tests.stand.coverage_adapters import TASKS

# Why there is no figure, by letter.
REASONS = {
    "a": "Only GPT-2 has Conv1D layers: a decoder, which fills no masks; its question answering is "
    "not tried. Only ViT has Conv2d layers and classifies images, and it has no embedding table.",
    "b": "QLoRA is trained on 4-bit layers; embeddings, convolutions and plain layers are none.",
    "c": "The bare base does what needs no head of an adapter.",
}
INTRODUCTION = """\
# Method x layer x task

Made by `python -m tests.stand.coverage`. A figure is the largest relative error, ‖answer −
float64‖ / ‖float64‖ over the scores, log-probabilities or vectors that the engine answered, of all
families and storages of its row; computed in float32, one mixed batch per stage. The test that
serves a cell is `{test}[family-storage]`; it holds every figure below {bound:.0e}.

| layer | families | storages of the linear layers |
| --- | --- | --- |
{layers}

"""
BOUND = 1e-4
# Layers that no family here has: served alone.
ALONE = """
`Conv1d`, `Conv3d` and grouped convolutions occur in no family above. They are held to float64, and
to PEFT, as layers:
`tests/adapters/layers/test_layers.py::test_convolution_equals_its_merged_kernel`,
`tests/adapters/layers/test_peft_oracle.py::test_convolution_targets_equal_peft`; groups are
refused: `tests/server/engine/test_peft_options.py::test_grouped_convolutions_are_refused`.

Options of PEFT (patterns, layers, biases, rsLoRA, fan-in-fan-out) against PEFT itself in float64:
`tests/server/engine/test_peft_options.py::test_an_option_is_served_as_peft_computes_it`. All
methods in one batch, in float32 and in bfloat16: `tests/server/engine/test_mixed_methods.py`.
"""


def table(cells: Iterable[Cell]) -> str:
    """The whole document.

    Args:
        cells: Of every stage.
    """
    worst: dict[tuple[str, str, str], float] = defaultdict(float)
    for cell in cells:
        key = (cell.method, cell.layer, cell.task)
        worst[key] = max(worst[key], cell.error)
    rows = rows_of()
    lines = ["| method | layer | " + " | ".join(TASKS) + " |", "| --- " * (len(TASKS) + 2) + "|"]
    for method, layer in rows:
        figures = [
            f"{worst[method, layer, task]:.0e}"
            if (method, layer, task) in worst
            else reason(method, layer, task)
            for task in TASKS
        ]
        lines.append(f"| {method} | {layer} | " + " | ".join(figures) + " |")
    notes = [f"({letter}) {text}" for letter, text in REASONS.items()]
    return (
        INTRODUCTION.format(test=TEST, bound=BOUND, layers="\n".join(_layers()))
        + "\n".join(lines)
        + "\n\n"
        + "\n\n".join(notes)
        + "\n"
        + ALONE
    )


def rows_of() -> list[tuple[str, str]]:
    """Method and layer of every row, in order."""
    layers = list(dict.fromkeys(layer for family in FAMILIES for layer in layers_of(family)))
    rows = [(method, layer) for method in METHODS[:4] for layer in sorted(layers, key=_place)]
    return [*rows, ("base", "none")]


def reason(method: str, layer: str, task: str) -> str:
    """Why a cell has no figure, as the letter of a note."""
    if method == "base":
        return "(c)"
    if method == "QLoRA" and layer in ("Embedding", "Conv2d"):
        return "(b)"
    return "(a)"


def _layers() -> Sequence[str]:
    found: dict[str, tuple[list[str], list[str]]] = {}
    for family, storage in STAGES:
        for layer in layers_of(family):
            families, storages = found.setdefault(layer, ([], []))
            families.append(family)
            storages.append(storage)
    return [
        f"| {layer} | {', '.join(dict.fromkeys(found[layer][0]))} "
        f"| {'; '.join(one for one in STORAGES if one in found[layer][1])} |"
        for layer in sorted(found, key=_place)
    ]


def _place(layer: str) -> int:
    return ("Linear", "Conv1D", "Embedding", "Conv2d").index(layer)
