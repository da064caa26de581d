"""Known base models as parameter counts, and the adapters that explain a given pair of counts.

Counts are taken from transformers' own classes on the meta device: no weights, no network. What a
model card says about itself is read by ``cards``; this module knows numbers and shapes only.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from adapters.signature import BaseSignature, describe

MAX_FIT_RANK = 1_024
MAX_FIT_LABELS = 256
_MAX_KINDS = 10  # 2^10 sets of targets at most

# Hub names → (model_type, what differs from the defaults of its transformers configuration).
KNOWN: Final[Mapping[tuple[str, ...], tuple[str, Mapping[str, Any]]]] = {
    tuple(one["names"]): (one["model_type"], one["config"])
    for one in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
}
HEADS: Final[Mapping[str, str]] = {
    "": "AutoModel",
    "SequenceClassification": "AutoModelForSequenceClassification",
    "TokenClassification": "AutoModelForTokenClassification",
    "QuestionAnswering": "AutoModelForQuestionAnswering",
    "MaskedLM": "AutoModelForMaskedLM",
    "CausalLM": "AutoModelForCausalLM",
}
_LABELLED = frozenset({"SequenceClassification", "TokenClassification"})
_DIGITS = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Counted:
    """One class of one known model, without its weights.

    Args:
        names: Hub names, without the owner, of models of this shape.
        model_class: Such as ``DistilBertForMaskedLM``.
        parameters: In all, shared ones once, with two labels where it has any.
        per_label: What one label more adds.
        head: Parameters of each module beside the backbone, with two labels.
        kinds: Where a linear layer sits (its path without the layer's number) → the sum of
            inputs and outputs over all such layers: the parameters of their factors at rank 1.
        signature: Its layers.
    """

    names: tuple[str, ...]
    model_class: str
    parameters: int
    per_label: int
    head: Mapping[str, int]
    kinds: Mapping[str, int]
    signature: BaseSignature

    def targeted(self, targets: tuple[str, ...]) -> frozenset[str]:
        """The kinds that PEFT's ``target_modules`` names, by the ends of their paths."""
        return frozenset(
            kind
            for kind in self.kinds
            if kind in targets or kind.endswith(tuple(f".{target}" for target in targets))
        )

    def short(self, kinds: frozenset[str]) -> tuple[str, ...]:
        """The shortest ``target_modules`` that name exactly these kinds."""
        found: list[str] = []
        for kind in self.kinds:
            if kind not in kinds or kind in self.targeted(tuple(found)):
                continue
            parts = kind.split(".")
            ends = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
            found.append(next(end for end in ends if self.targeted((end,)) <= kinds))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Fit:
    """One model, head, rank and set of targets whose counts are exactly those asked about.

    ``factor_parameters`` = ``rank`` x the sum of inputs and outputs of the targets.
    ``copied``: the trained head is counted beside the original, as PEFT's modules_to_save does;
    else the head itself was trained.
    """

    model: Counted
    labels: int | None
    rank: int
    kinds: frozenset[str]
    head: tuple[str, ...]
    head_parameters: int
    factor_parameters: int
    copied: bool

    @property
    def targets(self) -> tuple[str, ...]:
        return self.model.short(self.kinds)

    @property
    def base_parameters(self) -> int:
        return self.model.parameters + ((self.labels or 2) - 2) * self.model.per_label

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "base": list(self.model.names),
            "model_class": self.model.model_class,
            "labels": self.labels,
            "rank": self.rank,
            "targets": list(self.targets),
            "head": list(self.head),
            "base_parameters": self.base_parameters,
            "head_parameters": self.head_parameters,
            "factor_parameters": self.factor_parameters,
            "head_counted_twice": bool(self.head) and self.copied,
        }


def known_names(name: str) -> tuple[str, ...] | None:
    """The entry of ``KNOWN`` that a base's name, path or hub id means, or None."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return next((names for names in KNOWN if last in {known.lower() for known in names}), None)


def fits(trainable: int, frozen: int) -> Iterator[Fit]:
    """Every known model with an adapter of ``trainable`` parameters over ``frozen`` others.

        trainable = head + r Σ (in + out),   frozen = base    (PEFT keeps the head and its copy)
                                             frozen = base - head    (the head itself was trained)

    Args:
        trainable: Parameters of the factors and of the trained head.
        frozen: All the others: total - trainable.

    Yields:
        Each exact solution with at most ``MAX_FIT_RANK`` and ``MAX_FIT_LABELS``.
    """
    for names in KNOWN:
        plain = counted(names, "")
        if plain is None or not _reachable(plain, frozen):
            continue
        for head in HEADS:
            # An encoder's decoder class is of no interest where it has a masked language model.
            model = counted(names, head) if head != "CausalLM" or causal(names) else None
            if model is not None:
                yield from _fits_of(model, trainable, frozen)


def causal(names: tuple[str, ...]) -> bool:
    """Whether the known model of these names writes text, left to right."""
    return counted(names, "MaskedLM") is None


def _reachable(plain: Counted, frozen: int) -> bool:
    """Whether ``frozen`` may be this backbone with some head; spares building the heads."""
    hidden, vocabulary = plain.signature.hidden_size, plain.signature.vocab_size
    head = max(vocabulary, MAX_FIT_LABELS) * (hidden + 1) + 4 * hidden * hidden
    # BERT's pooler is in the backbone, but not in every class with a head.
    return plain.parameters - 2 * hidden * hidden <= frozen <= plain.parameters + head


def _fits_of(model: Counted, trainable: int, frozen: int) -> Iterator[Fit]:
    for trained in _subsets(model.head):
        at_two = sum(model.head[name] for name in trained)
        grows = model.per_label if any(model.head[name] for name in trained) else 0
        for copied in (True, False) if trained else (True,):
            # What is frozen decides the number of labels, if the labels are frozen at all.
            here = model.parameters - (0 if copied else at_two)
            slope = model.per_label - (0 if copied else grows)
            for labels in _labels(model, frozen - here, slope):
                head = at_two + ((labels or 2) - 2) * grows
                factors = trainable - head
                for kinds, weight in _target_sets(model):
                    rank, rest = divmod(factors, weight)
                    if not rest and 1 <= rank <= MAX_FIT_RANK:
                        yield Fit(model, labels, rank, kinds, trained, head, factors, copied)


def _labels(model: Counted, more: int, slope: int) -> Iterator[int | None]:
    if not model.per_label:
        if more == 0:
            yield None
    elif not slope:
        if more == 0:
            yield from range(1, MAX_FIT_LABELS + 1)
    elif more % slope == 0 and 1 <= 2 + more // slope <= MAX_FIT_LABELS:
        yield 2 + more // slope


def _subsets(names: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    for count in range(len(names) + 1):
        yield from itertools.combinations(names, count)


def _target_sets(model: Counted) -> Iterator[tuple[frozenset[str], int]]:
    kinds = list(model.kinds)[:_MAX_KINDS]
    for count in range(1, len(kinds) + 1):
        for chosen in itertools.combinations(kinds, count):
            yield frozenset(chosen), sum(model.kinds[kind] for kind in chosen)


@cache
def counted(names: tuple[str, ...], head: str) -> Counted | None:
    """Count one class of one known model; None where transformers has no such class.

    Args:
        names: A key of ``KNOWN``.
        head: ``""`` for the backbone, or ``SequenceClassification`` and the like.
    """
    model = _on_meta(names, head, labels=2)
    if model is None:
        return None
    signature = describe(model, names[0])
    prefix = signature.prefix
    beside = (
        {
            name: sum(p.numel() for p in child.parameters())
            for name, child in model.named_children()
            if name != prefix
        }
        if prefix and head not in ("MaskedLM", "CausalLM")
        else {}
    )
    kinds: dict[str, int] = {}
    for layer in signature.layers.values():
        if layer.kind in ("linear", "conv1d_transposed") and (
            not prefix or layer.path.startswith(f"{prefix}.")
        ):
            kind = _DIGITS.sub(".*", f".{layer.path}.")[1:-1]
            kinds[kind] = kinds.get(kind, 0) + layer.in_features + layer.out_features
    size = sum(parameter.numel() for parameter in model.parameters())
    more = _on_meta(names, head, labels=3) if head in _LABELLED else None
    return Counted(
        names,
        type(model).__name__,
        size,
        0 if more is None else sum(p.numel() for p in more.parameters()) - size,
        {name: count for name, count in beside.items() if count},
        kinds,
        signature,
    )


def _on_meta(names: tuple[str, ...], head: str, labels: int) -> Any:
    import torch
    import transformers

    model_type, changes = KNOWN[names]
    config = transformers.AutoConfig.for_model(model_type, **changes, num_labels=labels)
    auto = getattr(transformers, HEADS[head])
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except ValueError:  # this model has no such class
        return None
