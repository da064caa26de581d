"""What an adapter's tensors prove, against what its configuration and its model card claim.

For people and for CI, before anything is registered: nothing here decides what is served, and a
contradiction is reported where ``checkpoint`` would raise. Needs no base; with one it says more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapters.architectures import HEADS, KNOWN, Fit, counted, known_names
from adapters.cards import CardClaims, Finding, explain, read_card
from adapters.checkpoint import (
    CONFIG_FILE,
    TASK_CONFIG_FILE,
    TENSOR_FILE,
    load_adapter,
)
from adapters.config import AdapterConfig, parse_config
from adapters.errors import AdapterError, AdapterFaults, CorruptFile, UnsafeFormat
from adapters.header import TensorEntry, inspect_values, open_regular, read_header, read_tensor
from adapters.labels import read_task_config
from adapters.signature import BaseSignature
from adapters.strict_json import MAX_JSON_BYTES
from adapters.tensor_keys import FactorKey, SavedKey, parse_key

_SHOWN = 6
_SHOWN_FITS = 20


@dataclass(frozen=True)
class TensorProof:
    """What the tensors of a file are, whatever anybody says about them.

    Args:
        method: ``hira``, ``lora``, ``mixed``, or None without factors.
        layers: How many layers have factors.
        ranks: Short name of a target → the ranks found under it, ascending.
        factor_parameters: Numbers in all factors.
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
        return self.factor_parameters + self.head_parameters

    @property
    def all_ranks(self) -> tuple[int, ...]:
        return tuple(sorted({rank for ranks in self.ranks.values() for rank in ranks}))


@dataclass(frozen=True)
class AuditReport:
    """Claims, proofs, and where they differ.

    Args:
        tensors: Of an adapter folder; None for a card alone.
        config: What ``adapter_config.json`` claims; None where it is missing or refused.
        labels: Names of the head's outputs, as ``config.json`` claims them.
        card: What the card claims; None without one.
        fit: The model, head, rank and targets that the card's counts prove, or None.
        fits: Every exact solution of the card's counts, the simplest first.
        findings: Contradictions and notes, in the order they were found.
    """

    tensors: TensorProof | None = None
    config: AdapterConfig | None = None
    labels: tuple[str, ...] | None = None
    card: CardClaims | None = None
    fit: Fit | None = None
    fits: tuple[Fit, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def contradictions(self) -> tuple[Finding, ...]:
        """What must not be believed."""
        return tuple(entry for entry in self.findings if entry.severity == "contradiction")

    def to_json_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings."""
        return {
            "tensors": None
            if self.tensors is None
            else {**asdict(self.tensors), "parameters": self.tensors.parameters},
            "config": None if self.config is None else asdict(self.config),
            "labels": None if self.labels is None else list(self.labels),
            "card": None if self.card is None else self.card.to_json_dict(),
            "fit": None if self.fit is None else self.fit.to_json_dict(),
            "fits": [fit.to_json_dict() for fit in self.fits[:_SHOWN_FITS]],
            "fits_total": len(self.fits),
            "findings": [asdict(finding) for finding in self.findings],
            "contradictions": len(self.contradictions),
        }


def audit_card(text: str) -> AuditReport:
    """What a model card's own parameter counts prove, without the adapter.

    Args:
        text: Markdown. A card without counts proves nothing, and the report says so.
    """
    card = read_card(text)
    found, best, findings = explain(card)
    return AuditReport(card=card, fit=best, fits=found, findings=findings)


def audit(folder: Path, base: BaseSignature | None = None, card: str | None = None) -> AuditReport:
    """Compare an adapter's tensors with its configuration, its card and, if given, a base.

    Args:
        folder: As PEFT saves it. Nothing in it changes.
        base: The base that it should fit; everything that would refuse it is then a finding.
        card: The text of a model card, or None.

    Raises:
        CorruptFile, UploadTooLarge: The tensors cannot be read, so nothing can be proved.
        UnsafeFormat: They are a pickle, which is never opened.
        AdapterFaults: Several of these.
    """
    findings: list[Finding] = []
    config, labels = _claims(folder, findings)
    proof, layout = _prove(folder, findings)
    if config is not None:
        findings += _against_config(config, proof, layout)
    if labels is not None and proof.outputs not in (None, len(labels)):
        findings.append(
            Finding("contradiction", "labels", f"{len(labels)} labels", f"{proof.outputs} outputs")
        )
    if base is not None:
        findings += _against_base(folder, base)
    report = AuditReport(proof, config, labels, findings=tuple(findings))
    if card is None:
        return report
    counted_card = audit_card(card)
    assert counted_card.card is not None
    findings += _against_tensors(counted_card.card, proof, config)
    findings += counted_card.findings
    return AuditReport(
        proof,
        config,
        labels,
        counted_card.card,
        counted_card.fit,
        counted_card.fits,
        tuple(dict.fromkeys(findings)),
    )


@dataclass
class _Layout:
    """Factors by layer, and what is no factor."""

    pairs: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)
    saved: list[tuple[SavedKey, TensorEntry]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    dtypes: Counter[str] = field(default_factory=Counter)
    factor_parameters: int = 0
    nonzero: int = 0


def _claims(
    folder: Path, findings: list[Finding]
) -> tuple[AdapterConfig | None, tuple[str, ...] | None]:
    config, labels = None, None
    try:
        config = parse_config(_read(folder / CONFIG_FILE))
    except AdapterError as fault:
        findings += _as_findings(fault)
    if (folder / TASK_CONFIG_FILE).exists():
        try:
            labels = read_task_config(_read(folder / TASK_CONFIG_FILE)).names
        except AdapterError as fault:
            findings += _as_findings(fault)
    return config, labels


def _prove(folder: Path, findings: list[Finding]) -> tuple[TensorProof, _Layout]:
    path = folder / TENSOR_FILE
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise UnsafeFormat(
            "The adapter is a pickle, which can run code when it is read.",
            found="adapter_model.bin",
            expected=TENSOR_FILE,
            fix="Save it with save_pretrained(safe_serialization=True).",
        )
    layout = _Layout()
    tensor_bytes = 0
    with open_regular(path) as file:
        for entry in read_header(file).values():
            values = inspect_values(read_tensor(file, entry), entry.name)
            if values.fault is not None:
                findings += _as_findings(values.fault)
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
            else:
                layout.unknown.append(entry.name)
    if layout.unknown:
        findings.append(
            Finding("contradiction", "tensors", _some(layout.unknown), "no tensors of an adapter")
        )
    ranks: dict[str, set[int]] = {}
    for layer, pair in layout.pairs.items():
        if _rank(pair) is None:
            shapes = ", ".join(f"{side} {list(entry.shape)}" for side, entry in pair.items())
            findings.append(
                Finding("contradiction", "factors", layer, f"{shapes}: no product of A and B")
            )
        else:
            ranks.setdefault(layer.rsplit(".", 1)[-1], set()).add(_rank(pair) or 0)
    count = layout.factor_parameters
    methods = sorted(layout.methods)
    return TensorProof(
        method=None if not methods else methods[0] if len(methods) == 1 else "mixed",
        layers=len(layout.pairs),
        ranks={name: tuple(sorted(found)) for name, found in sorted(ranks.items())},
        factor_parameters=count,
        head_parameters=sum(entry.elements for _, entry in layout.saved),
        nonzero=layout.nonzero,
        sparsity=round(1 - layout.nonzero / count, 6) if count else 0.0,
        dtypes=dict(layout.dtypes),
        tensor_bytes=tensor_bytes,
        head=tuple(sorted({key.path for key, _ in layout.saved})),
        outputs=_outputs(layout),
        fits=tuple(_known_fits(layout)),
    ), layout


def _rank(pair: Mapping[str, TensorEntry]) -> int | None:
    if set(pair) != {"A", "B"}:
        return None
    a, b = pair["A"].shape, pair["B"].shape
    return a[0] if len(a) >= 2 and len(b) >= 2 and a[0] == b[1] >= 1 else None


def _outputs(layout: _Layout) -> int | None:
    # The head's modules come in the order of their bytes, which says nothing; the last layer is
    # the one that no other could follow: the fewest outputs.
    return min(
        (entry.shape[0] for key, entry in layout.saved if len(entry.shape) == 2), default=None
    )


def _known_fits(layout: _Layout) -> Iterator[str]:
    if not layout.pairs:
        return
    for names in KNOWN:
        for head in HEADS:
            # The layers are those of the backbone: the first class that a model has will do.
            model = counted(names, head)
            if model is None:
                continue
            if not _misfits(layout, model.signature):
                yield from names
            break


def _misfits(layout: _Layout, base: BaseSignature) -> list[str]:
    """Layers with factors that are not in ``base``, or not of these shapes."""
    paths = {f".{path}": layer for path, layer in base.layers.items()}
    wrong = []
    for path, pair in layout.pairs.items():
        layer = base.resolve(path) or paths.get(f".{path.partition('.')[2]}")
        rank = _rank(pair)
        shapes = {side: entry.shape for side, entry in pair.items()}
        try:
            expected = None if layer is None or not rank else layer.factor_shapes(rank, "lora")
        except AdapterError:
            expected = None
        if expected != (shapes.get("A"), shapes.get("B")):
            wrong.append(path)
    return wrong


def _against_config(
    config: AdapterConfig, proof: TensorProof, layout: _Layout
) -> Iterator[Finding]:
    if proof.method not in (None, config.method):
        yield Finding(
            "contradiction", "method", f"peft_type {config.method}", f"{proof.method} tensors"
        )
    claimed: dict[tuple[int, int], list[str]] = {}
    untargeted = []
    for path, pair in layout.pairs.items():
        rank = _rank(pair)
        if rank is not None and rank != config.claimed_rank(path):
            claimed.setdefault((config.claimed_rank(path), rank), []).append(path)
        if not config.targets(path):
            untargeted.append(path)
    for (said, rank), paths in claimed.items():
        yield Finding("contradiction", "rank", f"r = {said} for {_some(paths)}", f"r = {rank}")
    if untargeted:
        yield Finding(
            "contradiction",
            "targets",
            f"target_modules {config.target_modules}",
            f"factors of {_some(untargeted)}",
        )
    if isinstance(config.target_modules, tuple):
        absent = [
            name
            for name in config.target_modules
            if not any(path == name or path.endswith(f".{name}") for path in layout.pairs)
        ]
        if absent:
            yield Finding("contradiction", "targets", _some(absent), "no factors of any such layer")
    unsaved = [
        name
        for name in config.modules_to_save
        if not any(part.endswith(name) for head in proof.head for part in head.split("."))
    ]
    # PEFT names every usual head; a model has some of them.
    if config.modules_to_save and len(unsaved) == len(config.modules_to_save):
        yield Finding(
            "contradiction", "head", f"modules_to_save {_some(unsaved)}", "no such tensors"
        )
    names = known_names(config.base_name or "")
    if names is not None and proof.layers and names[0] not in proof.fits:
        fits = ", ".join(proof.fits) or "none that is known"
        yield Finding(
            "contradiction",
            "base model",
            f"{config.base_name} in {CONFIG_FILE}",
            f"the factors fit other models: {fits}",
        )


def _against_base(folder: Path, base: BaseSignature) -> Iterator[Finding]:
    try:
        weights = load_adapter(folder, base)
    except AdapterError as fault:
        yield from _as_findings(fault)
        return
    yield from (Finding("note", "base", base.name, note) for note in weights.notes)


def _against_tensors(
    card: CardClaims, proof: TensorProof, config: AdapterConfig | None
) -> Iterator[Finding]:
    if card.rank is not None and proof.all_ranks not in ((), (card.rank,)):
        shown = ", ".join(map(str, proof.all_ranks))
        yield Finding("contradiction", "rank", f"card: r = {card.rank}", f"tensors: r = {shown}")
    if card.targets and set(card.targets) != set(proof.ranks):
        yield Finding(
            "contradiction",
            "targets",
            f"card: {', '.join(card.targets)}",
            f"tensors: {', '.join(proof.ranks)}",
        )
    if card.trainable is not None and card.trainable != proof.parameters:
        yield Finding(
            "contradiction",
            "trainable",
            f"card: {card.trainable:,}",
            f"tensors: {proof.parameters:,} ({proof.factor_parameters:,} of factors, "
            f"{proof.head_parameters:,} of the head)",
        )
    said = {method for method in ("hira", "lora") if method in (card.method or "").lower()}
    if len(said) == 1 and proof.method in ("hira", "lora") and proof.method not in said:
        yield Finding("contradiction", "method", f"card: {card.method}", f"{proof.method} tensors")
    if card.sparsity is not None and abs(card.sparsity - proof.sparsity) > 0.01:
        yield Finding(
            "contradiction",
            "sparsity",
            f"card: {card.sparsity:.1%}",
            f"tensors: {proof.sparsity:.1%} of the factors are zero",
        )
    own = None if config is None else config.base_name
    if card.base and own and card.base.rsplit("/", 1)[-1] != own.rstrip("/").rsplit("/", 1)[-1]:
        yield Finding("contradiction", "base model", f"card: {card.base}", f"{CONFIG_FILE}: {own}")


def _as_findings(fault: AdapterError) -> Iterator[Finding]:
    for each in fault.faults if isinstance(fault, AdapterFaults) else (fault,):
        expected = f", expected {each.expected}" if each.expected else ""
        yield Finding("contradiction", each.code, each.message, f"{each.found or ''}{expected}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _read(path: Path) -> bytes:
    if not path.exists():
        raise CorruptFile(f"{path.name} is missing.", found="no file", expected=path.name)
    with open_regular(path) as file:
        return file.read(MAX_JSON_BYTES + 1)
