"""Why an adapter's tensors fit no layer here: another base, or a part of the names too many."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from adapters.errors import BaseMismatch, UnmatchedTensors
from adapters.intake.factor_shapes import first_names
from adapters.intake.keys import PEFT_PREFIX, BiasKey, FactorKey, parse_key
from adapters.intake.safetensors_header import TensorEntry
from adapters.signature import BaseSignature, LayerSignature

_LOOKED_AT = 64  # names; what is wrong with these is wrong with the others
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def odd_part(names: Sequence[str], base: BaseSignature) -> UnmatchedTensors | None:
    """The one part that unmatched names have too many, or lack, if it is the same in all."""
    looked_at = (_odd(name, base) for name in names[:_LOOKED_AT])
    parts = {found for found in looked_at if found is not None}
    if len(parts) != 1:
        return None
    ((too_many, is_extra),) = parts
    return UnmatchedTensors(
        f"The tensors' names have a part too many: {too_many}"
        if is_extra
        else f"The tensors' names do not begin with {too_many}",
        found=f"{len(names)}: {first_names(list(names))}",
        expected=f"names such as {PEFT_PREFIX}{next(iter(base.layers))}...",
        fix=f"Take {too_many} out of the names, if the adapter was made for this base."
        if is_extra
        else f"Save the adapter with save_pretrained, or put {too_many} before every name.",
    )


def _odd(name: str, base: BaseSignature) -> tuple[str, bool] | None:
    key = parse_key(name)
    if key is None:
        key = parse_key(PEFT_PREFIX + name)
        lacks = isinstance(key, FactorKey) and base.resolve(key.path) is not None
        return (PEFT_PREFIX, False) if lacks else None
    if not isinstance(key, FactorKey):
        return None
    parts = key.path.split(".")
    for length in range(1, len(parts)):
        for start in range(len(parts) - length):
            left = ".".join(parts[:start] + parts[start + length :])
            layer = base.layers.get(left) if start == 0 else base.resolve(left)
            # Another family's prefix in place of this base's is no part too many.
            if layer is not None and (layer.kind == "embedding") == key.embedding:
                return ".".join(parts[start : start + length]), True
    return None


def other_base(
    unmatched: Sequence[str],
    pairs: Mapping[str, Mapping[str, TensorEntry]],
    missing: Sequence[str],
    base: BaseSignature,
    base_name: str | None,
) -> BaseMismatch | None:
    """The fault of an adapter of a larger or smaller sibling of this base; None for any other.

    Args:
        unmatched: Names that fit no layer.
        pairs: Factors by layer.
        missing: Targets without factors.
        base: What it should fit.
        base_name: What its configuration says that it is for.
    """
    found: list[str] = []
    expected: list[str] = []
    for kind, path, shape in _other_widths(base, pairs):
        layer = base.layers[path]
        found.append(f"{kind} {shape[0]} to {shape[1]}")
        expected.append(f"{layer.in_features} to {layer.out_features}")
    depths = _depths(base, unmatched, pairs, missing)
    if depths is not None:
        found.append(f"{depths[0]} layers")
        expected.append(f"{depths[1]} layers")
    if not found:
        return None
    named = "" if base_name is None else f" for {PurePath(base_name).name}"
    return BaseMismatch(
        "The adapter was made for another base.",
        found=", ".join(found) + named,
        expected=", ".join(expected) + f" as in {PurePath(base.name).name}",
        fix="Register it on a server of its own base.",
    )


def _other_widths(
    base: BaseSignature, pairs: Mapping[str, Mapping[str, TensorEntry]]
) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Each kind of layer whose factors are all sound, and all for another width than this base's:
    its short name, a path, and inputs and outputs as the factors have them."""
    kinds: dict[str, list[str]] = {}
    for path in pairs:
        kinds.setdefault(_LAYER_NUMBER.sub("*", path), []).append(path)
    for kind, paths in kinds.items():
        shapes = {_width(base.layers[path], pairs[path]) for path in paths}
        if len(paths) < 2 or len(shapes) != 1:  # one layer alone may as well be damaged
            continue
        (shape,) = shapes
        layer = base.layers[paths[0]]
        if shape is not None and shape != (layer.in_features, layer.out_features):
            yield kind.rsplit(".", 1)[-1], paths[0], shape


def _width(layer: LayerSignature, pair: Mapping[str, TensorEntry]) -> tuple[int, int] | None:
    if set(pair) != {"A", "B"} or layer.kind == "conv":
        return None
    a, b = pair["A"].shape, pair["B"].shape
    return (a[1], b[0]) if len(a) == len(b) == 2 and a[0] == b[1] else None


def _depths(
    base: BaseSignature,
    unmatched: Sequence[str],
    pairs: Mapping[str, Mapping[str, TensorEntry]],
    missing: Sequence[str],
) -> tuple[int, int] | None:
    """How many layers the adapter's base has, and how many this one; None where they agree."""
    own = _layer_count(base.layers)
    keys = [key for name in unmatched if isinstance(key := parse_key(name), FactorKey | BiasKey)]
    beyond = [base.own_path(key.path) for key in keys]
    if _layer_count(beyond) > own and len(beyond) == len(unmatched):
        known = {_LAYER_NUMBER.sub("*", path) for path in base.layers}
        kinds = {_LAYER_NUMBER.sub("*", path) for path in beyond}
        spelled = {f"{base.prefix}.{kind}" if base.prefix else kind for kind in kinds}
        if kinds <= known or spelled <= known:
            return _layer_count(beyond), own
    if missing and pairs and not unmatched:
        # All of the last layers are missing, and none of the others.
        reached, first = _layer_count(pairs), min((_index(path) for path in missing), default=0)
        if 0 < reached == first < own:
            return reached, own
    return None


def _layer_count(paths: Mapping[str, object] | Sequence[str]) -> int:
    """Layers by the highest number in the paths."""
    return max((_index(path) for path in paths), default=-1) + 1


def _index(path: str) -> int:
    numbers = _LAYER_NUMBER.findall(path)
    return int(numbers[0]) if numbers else -1
