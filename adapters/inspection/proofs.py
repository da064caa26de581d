"""What the tensors of an adapter file are, whatever its configuration or its card says of them.

Shapes, ranks, counts, zeros, dtypes, and the known models with such layers. Reads no claim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import AdapterError, AdapterFaults
from adapters.inspection.cards import Finding
from adapters.inspection.known_bases import HEADS, KNOWN, counted
from adapters.intake.factor_shapes import first_names
from adapters.intake.keys import BiasKey, FactorKey, SavedKey, parse_key
from adapters.intake.safetensors_header import (
    TensorEntry,
    inspect_values,
    open_tensors,
    read_header,
    read_tensor,
)
from adapters.signature import BaseSignature


@dataclass(frozen=True)
class TensorProof:
    """What the tensors of a file are, whatever anybody says about them.

    Args:
        method: ``hira``, ``lora``, ``mixed``, or None without factors.
        layers: How many layers have factors.
        ranks: Short name of a target → the ranks found under it, ascending.
        factor_parameters: Numbers in all factors.
        bias_parameters: Numbers in all biases of targets.
        head_parameters: Numbers in all modules saved whole.
        nonzero: Of the factors.
        sparsity: The share of zeros in the factors, 0 to 1.
        dtypes: Name of a dtype → tensors.
        tensor_bytes: As stored.
        head: Modules saved whole.
        outputs: Of the head's last layer; None without a head.
        fits: Known models that have every layer, in every shape.
    """

    method: str | None
    layers: int
    ranks: Mapping[str, tuple[int, ...]]
    factor_parameters: int
    bias_parameters: int
    head_parameters: int
    nonzero: int
    sparsity: float
    dtypes: Mapping[str, int]
    tensor_bytes: int
    head: tuple[str, ...]
    outputs: int | None
    fits: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Everything that was trained."""
        return self.factor_parameters + self.bias_parameters + self.head_parameters

    @property
    def all_ranks(self) -> tuple[int, ...]:
        return tuple(sorted({rank for ranks in self.ranks.values() for rank in ranks}))


@dataclass
class FileTensors:
    """Factors by layer, and what is no factor."""

    pairs: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)
    saved: list[tuple[SavedKey, TensorEntry]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    dtypes: Counter[str] = field(default_factory=Counter)
    factor_parameters: int = 0
    bias_parameters: int = 0
    nonzero: int = 0


def prove(folder: Path) -> tuple[TensorProof, FileTensors, list[Finding]]:
    """Read the tensors in ``folder``.

    Returns:
        The proof, its layout, and what is wrong with the tensors themselves.

    Raises:
        UnsafeFormat: They are a pickle, which is never opened.
        CorruptFile, UploadTooLarge: They cannot be read.
        AdapterFaults: Several of these.
    """
    findings: list[Finding] = []
    layout = FileTensors()
    tensor_bytes = 0
    with open_tensors(folder) as file:
        for entry in read_header(file).values():
            values = inspect_values(read_tensor(file, entry), entry.name)
            if values.fault is not None:
                findings += as_findings(values.fault)
            layout.dtypes[str(entry.dtype).removeprefix("torch.")] += 1
            tensor_bytes += entry.stop - entry.start
            key = parse_key(entry.name)
            if isinstance(key, FactorKey):
                layout.methods.add(key.method)
                layout.pairs.setdefault(key.path, {})[key.side] = entry
                layout.factor_parameters += entry.elements
                layout.nonzero += values.nonzero
            elif isinstance(key, SavedKey):
                layout.saved.append((key, entry))
            elif isinstance(key, BiasKey):
                layout.bias_parameters += entry.elements
            else:
                layout.unknown.append(entry.name)
    if layout.unknown:
        findings.append(
            Finding(
                "contradiction", "tensors", first_names(layout.unknown), "no tensors of an adapter"
            )
        )
    ranks: dict[str, set[int]] = {}
    for layer, pair in layout.pairs.items():
        if rank_of(pair) is None:
            shapes = ", ".join(f"{side} {list(entry.shape)}" for side, entry in pair.items())
            findings.append(
                Finding("contradiction", "factors", layer, f"{shapes}: no product of A and B")
            )
        else:
            ranks.setdefault(layer.rsplit(".", 1)[-1], set()).add(rank_of(pair) or 0)
    count = layout.factor_parameters
    methods = sorted(layout.methods)
    proof = TensorProof(
        method=None if not methods else methods[0] if len(methods) == 1 else "mixed",
        layers=len(layout.pairs),
        ranks={name: tuple(sorted(found)) for name, found in sorted(ranks.items())},
        factor_parameters=count,
        bias_parameters=layout.bias_parameters,
        head_parameters=sum(entry.elements for _, entry in layout.saved),
        nonzero=layout.nonzero,
        sparsity=round(1 - layout.nonzero / count, 6) if count else 0.0,
        dtypes=dict(layout.dtypes),
        tensor_bytes=tensor_bytes,
        head=tuple(sorted({key.path for key, _ in layout.saved})),
        outputs=_outputs(layout),
        fits=tuple(_known_fits(layout)),
    )
    return proof, layout, findings


def rank_of(pair: Mapping[str, TensorEntry]) -> int | None:
    """The rank of A [r, in] and B [out, r], or None where they have no product."""
    if set(pair) != {"A", "B"}:
        return None
    a, b = pair["A"].shape, pair["B"].shape
    return a[0] if len(a) >= 2 and len(b) >= 2 and a[0] == b[1] >= 1 else None


def _outputs(layout: FileTensors) -> int | None:
    """Outputs of the head's last layer: the one that no other saved layer could follow."""
    shapes = [entry.shape for _, entry in layout.saved if len(entry.shape) == 2]
    last = [
        shape[0]
        for place, shape in enumerate(shapes)
        if all(shape[0] != other[1] for other in shapes[:place] + shapes[place + 1 :])
    ]
    return last[0] if len(last) == 1 else None


def _known_fits(layout: FileTensors) -> Iterator[str]:
    for names in KNOWN if layout.pairs else ():
        plain = counted(names, "")
        wrong = [] if plain is None else _misfits(layout.pairs, plain.signature)
        if wrong and len(wrong) < len(layout.pairs):  # some layers are in classes with a head only
            for head in HEADS:
                model = counted(names, head) if wrong else None
                if model is not None:
                    left = {path: layout.pairs[path] for path in wrong}
                    wrong = _misfits(left, model.signature)
        if not wrong:
            yield from names


def _misfits(pairs: Mapping[str, Mapping[str, TensorEntry]], base: BaseSignature) -> list[str]:
    """Layers among ``pairs`` that are not in ``base``, or not of these shapes."""
    paths = {f".{path}": layer for path, layer in base.layers.items()}
    wrong = []
    for path, pair in pairs.items():
        layer = base.resolve(path) or paths.get(f".{path.partition('.')[2]}")
        rank = rank_of(pair)
        shapes = {side: entry.shape for side, entry in pair.items()}
        try:
            expected = None if layer is None or not rank else layer.factor_shapes(rank, "lora")
        except AdapterError:
            expected = None
        if expected != (shapes.get("A"), shapes.get("B")):
            wrong.append(path)
    return wrong


def as_findings(fault: AdapterError) -> Iterator[Finding]:
    """A refusal, each of its faults as a contradiction."""
    for each in fault.faults if isinstance(fault, AdapterFaults) else (fault,):
        expected = f", expected {each.expected}" if each.expected else ""
        yield Finding("contradiction", each.code, each.message, f"{each.found or ''}{expected}")
