"""Whether the tensors that an adapter brings to one layer fit it; read from their headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from adapters.errors import AdapterError, MissingTensors, ShapeMismatch
from adapters.intake.safetensors_header import TensorEntry
from adapters.signature import LayerSignature, Method

_NAMES_SHOWN = 5  # names in one message


def pair_faults(
    layer: LayerSignature, pair: Mapping[str, TensorEntry], method: Method
) -> list[AdapterError]:
    """What is wrong with A and B of one layer: one missing, no rank, or shapes that do not fit."""
    if set(pair) != {"A", "B"}:
        (side,) = pair
        return [
            MissingTensors(
                f"{layer.path} has one factor of two.", found=f"only {side}", expected="A and B"
            )
        ]
    a, b = pair["A"].shape, pair["B"].shape
    if not a or a[0] < 1:
        return [
            ShapeMismatch(
                f"The rank of {layer.path} is not positive.", found=f"A {a}", expected="rank >= 1"
            )
        ]
    try:
        expected = layer.factor_shapes(a[0], method)
    except AdapterError as fault:
        return [fault]
    if (a, b) == expected:
        return []
    return [
        ShapeMismatch(
            f"The factors of {layer.path} do not fit the layer.",
            found=f"A {a}, B {b}",
            expected=f"A {expected[0]}, B {expected[1]}",
            fix="Check that the adapter was made for this base.",
        )
    ]


def bias_faults(
    layers: Mapping[str, LayerSignature],
    pairs: Mapping[str, Mapping[str, TensorEntry]],
    biases: Mapping[str, TensorEntry],
    mode: str,
) -> Iterator[AdapterError]:
    """What is wrong with the trained biases of an adapter.

    Args:
        layers: Of the base, by path.
        pairs: Factors by layer.
        biases: Biases by layer.
        mode: The configuration's ``bias``; ``lora_only`` trains those of the targets, all of them.
    """
    for path, entry in biases.items():
        layer = layers[path]
        if path not in pairs or not layer.has_bias:
            yield ShapeMismatch(
                f"A bias for {path}, which " + ("has none." if path in pairs else "is no target."),
                found=entry.name,
                expected="biases of targets that have one",
            )
        elif entry.shape != (layer.out_features,):
            yield ShapeMismatch(
                f"The bias for {path} does not fit.",
                found=str(tuple(entry.shape)),
                expected=str((layer.out_features,)),
            )
    absent = [path for path in pairs if layers[path].has_bias and path not in biases]
    if mode == "lora_only" and absent:
        yield MissingTensors(
            "Trained biases are missing.",
            found=f"{len(absent)} targets without: {first_names(absent)}",
            expected='a bias for every target that has one, as bias = "lora_only" says',
            fix="Save the adapter again with save_pretrained.",
        )


def first_names(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
