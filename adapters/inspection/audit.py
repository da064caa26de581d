"""What an adapter's tensors prove, against what its configuration and its model card claim.

For people and for CI, before anything is registered: nothing here decides what is served, and a
contradiction is reported where ``checkpoint`` would raise. Needs no base; with one it says more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adapters.errors import AdapterError, CorruptFile
from adapters.inspection.cards import CardClaims, Finding, explain_counts, read_card
from adapters.inspection.known_bases import Fit, known_names
from adapters.inspection.proofs import FileTensors, TensorProof, as_findings, prove, rank_of
from adapters.intake.checkpoint import CONFIG_FILE, TASK_CONFIG_FILE, load_adapter
from adapters.intake.config import AdapterConfig, parse_config
from adapters.intake.factor_shapes import first_names
from adapters.intake.model_config import read_task_config
from adapters.intake.safetensors_header import open_regular
from adapters.intake.strict_json import MAX_JSON_BYTES
from adapters.signature import BaseSignature

_SHOWN_FITS = 20


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
    found, best, findings = explain_counts(card)
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
    proof, layout, wrong = prove(folder)
    findings += wrong
    if config is not None:
        findings += _against_config(config, proof, layout)
    if labels is not None and proof.outputs not in (None, len(labels)):
        findings.append(
            Finding(
                # LABEL_0, LABEL_1 are what transformers writes when nobody named any.
                "note" if labels == ("LABEL_0", "LABEL_1") else "contradiction",
                "labels",
                f"{len(labels)} labels",
                f"{proof.outputs} outputs",
            )
        )
    if base is not None:
        findings += _against_base(folder, base)
    report = AuditReport() if card is None else audit_card(card)
    if report.card is not None:
        findings += _against_tensors(report.card, proof, config)
    findings += report.findings
    return replace(
        report,
        tensors=proof,
        config=config,
        labels=labels,
        findings=tuple(dict.fromkeys(findings)),
    )


def _claims(
    folder: Path, findings: list[Finding]
) -> tuple[AdapterConfig | None, tuple[str, ...] | None]:
    config, labels = None, None
    try:
        config = parse_config(_read_claims(folder / CONFIG_FILE))
    except AdapterError as fault:
        findings += as_findings(fault)
    if (folder / TASK_CONFIG_FILE).exists():
        try:
            labels = read_task_config(_read_claims(folder / TASK_CONFIG_FILE)).names
        except AdapterError as fault:
            findings += as_findings(fault)
    return config, labels


def _against_config(
    config: AdapterConfig, proof: TensorProof, layout: FileTensors
) -> Iterator[Finding]:
    if proof.method not in (None, config.method):
        yield Finding(
            "contradiction", "method", f"peft_type {config.method}", f"{proof.method} tensors"
        )
    claimed: dict[tuple[int, int], list[str]] = {}
    untargeted = []
    for path, pair in layout.pairs.items():
        rank = rank_of(pair)
        if rank is not None and rank != config.claimed_rank(path):
            claimed.setdefault((config.claimed_rank(path), rank), []).append(path)
        if not config.targets(path):
            untargeted.append(path)
    for (said, rank), paths in claimed.items():
        yield Finding(
            "contradiction", "rank", f"r = {said} for {first_names(paths)}", f"r = {rank}"
        )
    if untargeted:
        yield Finding(
            "contradiction",
            "targets",
            f"target_modules {config.target_modules}",
            f"factors of {first_names(untargeted)}",
        )
    if isinstance(config.target_modules, tuple):
        absent = [
            name
            for name in config.target_modules
            if not any(path == name or path.endswith(f".{name}") for path in layout.pairs)
        ]
        if absent:
            yield Finding(
                "contradiction", "targets", first_names(absent), "no factors of any such layer"
            )
    unsaved = [
        name
        for name in config.modules_to_save
        if not any(part.endswith(name) for head in proof.head for part in head.split("."))
    ]
    # PEFT names every usual head; a model has some of them.
    if config.modules_to_save and len(unsaved) == len(config.modules_to_save):
        yield Finding(
            "contradiction", "head", f"modules_to_save {first_names(unsaved)}", "no such tensors"
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
        yield from as_findings(fault)
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


def _read_claims(path: Path) -> bytes:
    if not path.exists():
        raise CorruptFile(f"{path.name} is missing.", found="no file", expected=path.name)
    with open_regular(path) as file:
        return file.read(MAX_JSON_BYTES + 1)
