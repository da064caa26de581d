"""A model card's claims, and what its own parameter counts prove about them.

A card is text that somebody wrote, or a script printed, beside an adapter. Nothing in it is trusted
or ever changes an answer; the findings are for a person to read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from adapters.inspection.known_bases import KNOWN, Fit, fits, known_names

MAX_CARD_CHARACTERS = 1 << 20
_MAX_FITS = 100_000

Severity = Literal["contradiction", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a card or a configuration says, against what the numbers prove."""

    severity: Severity
    subject: str
    claim: str
    proof: str


@dataclass(frozen=True, slots=True)
class CardClaims:
    """What a card says, as far as it can be checked; None or empty where it is silent.

    ``sparsity`` is a share from 0 to 1, ``trainable_share`` likewise; ``size_bytes`` is read with
    1 MB = 2^20 bytes.
    """

    base: str | None = None
    method: str | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    trainable: int | None = None
    total: int | None = None
    trainable_percent: str | None = None
    size_bytes: int | None = None
    sparsity: float | None = None
    model_class: str | None = None

    def to_json_dict(self) -> dict[str, Any]:
        return asdict(self)


_FRONT: Final = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_NUMBER = r"(\d[\d,_]*)\b(?!\.\d|\s*[MBK]\b)"
_PATTERNS: Final = {
    "base": re.compile(
        r"^\W*base[ _]model:[ \t]*(?:\n\s*-[ \t]*)?[\"'\[]*([\w./][\w./-]*)", re.I | re.M
    ),
    "method": re.compile(r"^\W*method:\s*(.+)$", re.I | re.M),
    "rank": re.compile(r"\brank\s*(?:\(r\))?\s*[:=]\s*(\d{1,6})\b", re.I),
    "r": re.compile(r"\br\s*=\s*(\d{1,6})\b"),
    "alpha": re.compile(r"\balpha\s*[:=]\s*(\d+(?:\.\d+)?)", re.I),
    "targets": re.compile(r"\btarget[ _]modules\s*[:=]\s*(\[[^\]]*\]|[^\n]+)", re.I),
    "trainable": re.compile(r"(?<![\w-])trainable param(?:eter)?s\s*[:=]\s*" + _NUMBER, re.I),
    "total": re.compile(r"\b(?:total|all) param(?:eter)?s\s*[:=]\s*" + _NUMBER, re.I),
    "percent": re.compile(
        r"trainable(?:%\s*:\s*| param[^\n(]*\()(\d+(?:\.\d+)?)\s*%?(?:\s*of total)?", re.I
    ),
    "size": re.compile(r"\bmodel size\s*:\s*(\d+(?:\.\d+)?)\s*([KMG])i?B\b", re.I),
    "sparsity": re.compile(r"\bsparsity\s*:\s*(\d+(?:\.\d+)?)\s*%", re.I),
    "class": re.compile(r"\b(AutoModelFor\w+)\.from_pretrained"),
}
_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def read_card(text: str) -> CardClaims:
    """Read the claims of a model card; what cannot be read is left out, nothing is raised.

    Args:
        text: Markdown, with or without YAML front matter.
    """
    text = text[:MAX_CARD_CHARACTERS].replace("\r\n", "\n")
    front = _FRONT.match(text)
    plain = re.sub(r"[*`]", "", text)

    def first(name: str, where: str = plain) -> str | None:
        found = _PATTERNS[name].search(where)
        return found.group(1).strip() if found else None

    rank = first("rank") or first("r")
    alpha, sparsity = first("alpha"), first("sparsity")
    size = _PATTERNS["size"].search(plain)
    targets = re.findall(r"[A-Za-z_][\w.]*", first("targets") or "")
    return CardClaims(
        base=(first("base", front.group(1)) if front else None) or first("base"),
        method=first("method"),
        rank=int(rank) if rank else None,
        alpha=float(alpha) if alpha else None,
        targets=tuple(name for name in targets if name not in ("and", "or")),
        trainable=_whole(first("trainable")),
        total=_whole(first("total")),
        trainable_percent=first("percent"),
        size_bytes=round(float(size.group(1)) * _UNITS[size.group(2).upper()]) if size else None,
        sparsity=float(sparsity) / 100 if sparsity else None,
        model_class=first("class"),
    )


def _whole(text: str | None) -> int | None:
    digits = re.sub(r"[,_]", "", text or "")
    return int(digits) if digits and len(digits) <= 18 else None


def explain_counts(claims: CardClaims) -> tuple[tuple[Fit, ...], Fit | None, tuple[Finding, ...]]:
    """What the counts of a card prove.

    Returns:
        Every exact solution, the simplest and closest to the claims first; that one, or None
        where there is none; and the findings.
    """
    findings = list(_arithmetic(claims))
    if claims.trainable is None or claims.total is None:
        findings.append(
            Finding("note", "counts", "not both given", "the card's counts prove nothing")
        )
        return (), None, tuple(findings)
    if not 0 < claims.trainable < claims.total:
        findings.append(
            Finding(
                "contradiction",
                "counts",
                f"{claims.trainable:,} trainable of {claims.total:,}",
                "trainable parameters are some, and fewer than all",
            )
        )
        return (), None, tuple(findings)
    frozen = claims.total - claims.trainable
    found = sorted(fits(claims.trainable, frozen), key=lambda fit: _distance(fit, claims))
    if not found:
        findings.append(_unexplained(claims))
        return (), None, tuple(findings)
    best = found[0]
    findings.append(Finding("note", "arithmetic", _sum_claimed(claims), _sum_proven(best)))
    findings += _about_base(claims, best)
    findings += _about_factors(claims, found, best)
    findings += _about_class(claims, found, best)
    return tuple(found[:_MAX_FITS]), best, tuple(findings)


# How target_modules are mostly chosen, most common first.
_ROLES: Final = tuple(
    (word[0], re.compile(rf"(?:{word[0]}|{word})(?:_lin|_proj)?"))
    for word in ("query", "key", "value")
)


def _habit(fit: Fit) -> int:
    """How unusual a set of targets is: q and v; q, k and v; the whole attention; everything."""
    ends = [kind.rsplit(".", 1)[-1] for kind in fit.kinds]
    roles = "".join(
        next((role for role, names in _ROLES if names.fullmatch(end)), "o") for end in ends
    )
    spelled = "".join(sorted(roles))
    if ends == ["c_attn"]:
        return 0
    if spelled in ("qv", "kqv"):
        return len(spelled) - 2
    if spelled == "koqv" and not any("ffn" in kind or "mlp" in kind for kind in fit.kinds):
        return 2
    return 3 if len(fit.kinds) == len(fit.model.kinds) else 3 + len(fit.kinds)


def _distance(fit: Fit, claims: CardClaims) -> tuple[int, ...]:
    """Sorts solutions: those nearest to the claims first, then those that people make."""
    return (
        int(not _names_base(fit, claims)),
        int(not _names_class(fit, claims)),
        int(fit.model.model_class.endswith("Model")),  # GPT-2 without and with its tied head
        abs((fit.labels or 2) - 2),
        int(not fit.copied),
        int(fit.kinds != fit.model.targeted(claims.targets)),
        int(fit.rank != claims.rank),
        int(fit.rank & (fit.rank - 1) != 0),
        _habit(fit),
        fit.rank,
    )


def _names_base(fit: Fit, claims: CardClaims) -> bool:
    return claims.base is not None and known_names(claims.base) == fit.model.names


def _names_class(fit: Fit, claims: CardClaims) -> bool:
    wanted = (claims.model_class or "AutoModelFor").removeprefix("AutoModel")
    name = fit.model.model_class.replace("LMHeadModel", "ForCausalLM")
    return wanted != "For" and name.endswith(wanted)


def _sum_claimed(claims: CardClaims) -> str:
    return f"{claims.trainable:,} trainable of {claims.total:,}"


def _sum_proven(fit: Fit) -> str:
    each = fit.factor_parameters // fit.rank
    head = f"{fit.head_parameters:,} ({', '.join(fit.head)}) + " if fit.head else ""
    frozen = f"{fit.base_parameters:,}"
    if fit.head and not fit.copied:
        frozen += f" - {fit.head_parameters:,}"
    return (
        f"frozen {frozen} = {fit.model.model_class} of {fit.model.names[0]}; trainable {head}"
        f"{fit.rank} x {each:,} (r x (in + out) of {', '.join(fit.targets)})"
    )


def _arithmetic(claims: CardClaims) -> Iterator[Finding]:
    if claims.trainable and claims.total and claims.trainable_percent:
        digits = len(claims.trainable_percent.partition(".")[2])
        share = 100 * claims.trainable / claims.total
        if abs(share - float(claims.trainable_percent)) > 0.51 * 10**-digits:
            yield Finding(
                "contradiction",
                "share",
                f"{claims.trainable_percent} % trainable",
                f"{claims.trainable:,} of {claims.total:,} is {share:.{digits + 1}f} %",
            )
    if claims.size_bytes and claims.total:
        width = claims.size_bytes / claims.total
        near = min((0.5, 1, 2, 4), key=lambda size: abs(size - width))
        shown = f"{claims.size_bytes / (1 << 20):.2f} MiB"
        if abs(near - width) < 0.01 * near:
            proof = f"{near} bytes for each of {claims.total:,} parameters"
            yield Finding("note", "size", shown, f"{proof}: the whole model, not the adapter alone")
        else:
            yield Finding("note", "size", shown, f"{width:.2f} bytes for each parameter")


def _unexplained(claims: CardClaims) -> Finding:
    known = claims.base is not None and known_names(claims.base) is not None
    if known:
        return Finding(
            "contradiction",
            "base model",
            f"{claims.base}, {_sum_claimed(claims)}",
            f"no head, rank and targets give these counts on it, nor on {len(KNOWN) - 1} others",
        )
    return Finding(
        "note",
        "base model",
        claims.base or "not named",
        f"none of {len(KNOWN)} known models has these counts",
    )


def _about_base(claims: CardClaims, best: Fit) -> Iterator[Finding]:
    if claims.base is None or _names_base(best, claims):
        return
    proof = f"{best.base_parameters:,} frozen parameters are {best.model.model_class} of "
    proof += " or ".join(best.model.names)
    if known_names(claims.base) is None:
        yield Finding("note", "base model", f"{claims.base}, not known here", proof)
    else:
        yield Finding("contradiction", "base model", claims.base, proof)


def _about_factors(claims: CardClaims, found: list[Fit], best: Fit) -> Iterator[Finding]:
    """Rank and targets, judged on the model that the frozen parameters prove."""
    same = [fit for fit in found if fit.model is best.model and fit.head == best.head]
    ranks = {fit.rank for fit in same}
    others = sorted(ranks - {best.rank})
    proof = (
        f"{best.factor_parameters:,} parameters of factors are r = {best.rank} on "
        f"{', '.join(best.targets)}"
    )
    if others:
        proof += f" (other targets: r = {', '.join(map(str, others[:8]))})"
    wanted = best.model.targeted(claims.targets)
    targets = ", ".join(claims.targets)
    if claims.targets and not wanted:
        yield Finding("contradiction", "targets", targets, f"no such layers in it; {proof}")
    elif claims.targets and wanted != best.kinds:
        yield Finding("contradiction", "targets", targets, proof)
    if claims.rank is None or claims.rank == best.rank:
        return
    if claims.rank in ranks:
        with_it = min(
            (fit for fit in same if fit.rank == claims.rank), key=lambda fit: _distance(fit, claims)
        )
        proof += f"; r = {claims.rank} would take {', '.join(with_it.targets)}"
    where = f" on {targets}" if wanted == best.kinds else ""
    yield Finding("contradiction", "rank", f"r = {claims.rank}{where}", proof)


def _about_class(claims: CardClaims, found: list[Fit], best: Fit) -> Iterator[Finding]:
    if claims.model_class is not None and not any(_names_class(fit, claims) for fit in found):
        yield Finding(
            "contradiction",
            "model class",
            f"the card loads it with {claims.model_class}",
            f"the counts are those of {best.model.model_class}",
        )
