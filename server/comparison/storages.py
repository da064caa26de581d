"""One adapter on the unquantized base and on the quantized one: the same texts, the same engine.

The two bases are loaded one after the other, so memory holds the larger one, not both. Everything
else is the same for both: dtype, device, kernels, lanes. What an answer means is read here from
the engine's events; how far two of them are apart is in `server.comparison.divergence`.
"""

from __future__ import annotations

import gc
import itertools
import math
import resource
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from adapters.errors import ExplainedError
from adapters.intake.checkpoint import AdapterWeights, load_adapter
from adapters.registry.store import Store
from server.base.load import signature_of
from server.base.plan import plan_base
from server.comparison.divergence import (
    ScoreKind,
    chosen_labels,
    label_divergence,
    token_divergence,
)
from server.encoding.postprocess import scores_of_labels
from server.engine.engine import Engine, EngineFailure
from server.inputs.text_errors import InputTooLong, TextError
from server.messages import (
    EncodeRequest,
    EncodeResult,
    GenerateRequest,
    GenerateResult,
    Likeliest,
    SamplingOptions,
    TokenizedInput,
)
from server.options import EngineOptions
from server.stages import tell_stage

LIKELIEST_TOKENS: Final = 100  # compared one by one at each place of a text
TEXTS_AT_ONCE: Final = 32
WORST_SHOWN: Final = 5


class NotComparable(ExplainedError):
    """Nothing can be compared for this adapter, base or text."""


@dataclass(frozen=True, slots=True)
class TextChange:
    """What the quantized base changes in the answer to one text.

    Args:
        text: Its first characters.
        before, after: Labels and their share, or the perplexity of the text.
        flipped: Whether a label, or the likeliest token at a place, is another one.
        kl_nats: The mean over its answers: one for a classifier, one a token for a generator.
    """

    text: str
    before: str
    after: str
    flipped: bool
    kl_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageComparison:
    """What storing the base as ``storage`` changes for one adapter.

    Args:
        task: Of the adapter.
        method: Of the adapter.
        storage: How the linear layers of the second base are stored.
        dtype, device: Of both.
        texts: How many were compared.
        cut: How many of them were longer than the base takes, and were cut.
        answers: Labels decided (one for each text), or tokens predicted.
        flips: Of those, how many came out different.
        kl_mean_nats, kl_max_nats: Over the answers; None where an answer is no distribution.
        largest_change: Of a value, for an adapter that gives values and not labels; else None.
        perplexity: Of the texts on the first and on the second base; None for a classifier.
        base_bytes: Of the first and the second base in memory.
        peak_bytes: The most memory of the machine that this process held.
        worst: The texts that changed the most.
    """

    task: str
    method: str
    storage: str
    dtype: str
    device: str
    texts: int
    cut: int
    answers: int
    flips: int
    kl_mean_nats: float | None
    kl_max_nats: float | None
    largest_change: float | None
    perplexity: tuple[float, float] | None
    base_bytes: tuple[int, int]
    peak_bytes: int
    worst: tuple[TextChange, ...]

    def to_json_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Scored:
    """One text continued by itself: each token's log-probability, and the likeliest there."""

    logprobs: tuple[float, ...]
    likeliest: tuple[Likeliest, ...]


@dataclass(frozen=True, slots=True)
class _Answered:
    """What one base answered to all texts."""

    logits: list[dict[str, float]]
    scored: list[_Scored]
    cut: int
    base_bytes: int
    storage: str
    dtype: str
    device: str


def compare_storages(
    options: EngineOptions, folder: Path, texts: Sequence[str]
) -> StorageComparison:
    """Ask the adapter in ``folder`` the same texts on the base unquantized, and as ``options`` say.

    Tells its stages by `server.stages`. Loads the two bases one after the other.

    Args:
        options: Of the engine; its folders are not used. Must quantize.
        folder: An adapter's.
        texts: At least one.

    Raises:
        NotComparable: The adapter neither labels texts nor continues them, no text can be used, or
            an answer failed, such as on numbers that are not finite.
        AdapterError: The adapter is broken or does not fit.
        BaseModelError: A base cannot be loaded.
    """
    if plan_base(options).quantized is not None:
        raise NotComparable(
            "The checkpoint of the base is quantized already, so there is nothing to compare with.",
            found=options.base,
            expected="a checkpoint in bfloat16, float16 or float32",
            fix="Give the original checkpoint with --base.",
        )
    weights = load_adapter(folder, signature_of(options))
    if weights.task not in ("text-classification", "text-generation"):
        raise NotComparable(
            "Only adapters that classify texts or generate can be compared.",
            found=weights.task,
            expected="text-classification or text-generation",
        )
    if not any(text.strip() for text in texts):
        raise NotComparable("There is no text to compare with.", expected="a text in each line")
    plain = _ask_base(replace(options, quantization="none"), folder, weights, texts, "unquantized")
    stored = _ask_base(options, folder, weights, texts, "quantized")
    if weights.task == "text-generation":
        return _tokens_compared(weights, texts, plain, stored)
    return _labels_compared(weights, texts, plain, stored)


def _ask_base(
    options: EngineOptions, folder: Path, weights: AdapterWeights, texts: Sequence[str], name: str
) -> _Answered:
    with tempfile.TemporaryDirectory(prefix="hira-compare-") as scratch:
        store = Path(scratch) / "store"
        version = Store(store).add(folder)
        engine = Engine.build(replace(options, store_dir=store, cache_dir=Path(scratch) / "cache"))
        try:
            tell_stage(f"asking the {name} base")
            return _answers_of(engine, version, weights, texts)
        except EngineFailure as error:
            failure = error.failure
            raise NotComparable(
                f"The {name} base gives no answer: {failure.message}",
                found=failure.found,
                expected=failure.expected,
                fix=failure.fix,
            ) from error
        finally:
            engine.close()
            del engine
            _give_memory_back()


def _answers_of(
    engine: Engine, version: str, weights: AdapterWeights, texts: Sequence[str]
) -> _Answered:
    asking = _Asking(engine, version)
    logits: list[dict[str, float]] = []
    scored: list[_Scored] = []
    if weights.task == "text-generation":
        scored = [asking.scored(place, one) for place, one in enumerate(texts)]
    else:
        logits = asking.logits(texts)
    base = engine.base
    return _Answered(
        logits=logits,
        scored=scored,
        cut=asking.cut,
        base_bytes=sum(base.adapted.base_bytes()),
        storage=base.storage,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
    )


def _give_memory_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Asking:
    """Asks one engine; counts the texts that had to be cut."""

    def __init__(self, engine: Engine, version: str) -> None:
        self._engine = engine
        self._version = version
        self._ids = itertools.count()
        self.cut = 0

    def logits(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The logits of every text by label."""
        items = [self._encoded(place, one) for place, one in enumerate(texts)]
        found: list[dict[str, float]] = []
        for start in range(0, len(items), TEXTS_AT_ONCE):
            request = EncodeRequest(
                id=f"compare-{next(self._ids)}",
                task="text-classification",
                adapter=self._version,
                version=self._version,
                inputs=tuple(items[start : start + TEXTS_AT_ONCE]),
                options={"function_to_apply": "none"},
            )
            result = self._engine.run(request)
            assert isinstance(result, EncodeResult)
            found += [{row["label"]: row["score"] for row in rows} for rows in result.outputs]
        return found

    def scored(self, place: int, text: str) -> _Scored:
        """The log-probabilities of the tokens of a text, each from all before it."""
        request = GenerateRequest(
            id=f"compare-{next(self._ids)}",
            adapter=self._version,
            version=self._version,
            token_ids=self._prompt(place, text),
            sampling=SamplingOptions(
                max_new_tokens=0, prompt_logprobs=True, alternatives=LIKELIEST_TOKENS
            ),
        )
        result = self._engine.run(request)
        assert isinstance(result, GenerateResult)
        told = [one for one in result.prompt_logprobs if one is not None]
        return _Scored(tuple(told), result.prompt_likeliest[1:])

    def _encoded(self, place: int, text: str) -> TokenizedInput:
        tokenizer = self._engine.text
        try:
            try:
                return tokenizer.tokenize([text], "text-classification")[0]
            except InputTooLong:
                self.cut += 1
                return tokenizer.tokenize([text], "text-classification", truncation=True)[0]
        except TextError as error:
            raise _not_a_text(place, error) from error

    def _prompt(self, place: int, text: str) -> tuple[int, ...]:
        tokenizer = self._engine.text
        try:
            try:
                return tokenizer.tokenize_prompt(text)
            except InputTooLong:
                self.cut += 1
                return tokenizer.tokenize_prompt(text, truncation=True)
        except TextError as error:
            raise _not_a_text(place, error) from error


def _not_a_text(place: int, error: TextError) -> NotComparable:
    return NotComparable(
        f"Text {place + 1} cannot be given to this base: {error.message}",
        found=error.found,
        expected=error.expected,
        fix=error.fix,
    )


def _labels_compared(
    weights: AdapterWeights, texts: Sequence[str], plain: _Answered, stored: _Answered
) -> StorageComparison:
    names = tuple(plain.logits[0]) if weights.labels is None else weights.labels.names
    problem = None if weights.labels is None else weights.labels.problem_type
    kind: ScoreKind = scores_of_labels(problem, len(names))
    changes, largest = [], 0.0
    for text, first, second in zip(texts, plain.logits, stored.logits, strict=True):
        one, other = [first[name] for name in names], [second[name] for name in names]
        largest = max([largest, *(abs(a - b) for a, b in zip(one, other, strict=True))])
        changes.append(
            TextChange(
                text=_shortened(text),
                before=_label_shares(one, names, kind),
                after=_label_shares(other, names, kind),
                flipped=chosen_labels(one, kind) != chosen_labels(other, kind),
                kl_nats=label_divergence(one, other, kind),
            )
        )
    has_labels = kind != "none"
    divergences = [change.kl_nats for change in changes]
    return StorageComparison(
        **_common(weights, texts, plain, stored),
        answers=len(changes),
        flips=sum(change.flipped for change in changes),
        kl_mean_nats=math.fsum(divergences) / len(divergences) if has_labels else None,
        kl_max_nats=max(divergences) if has_labels else None,
        largest_change=None if has_labels else largest,
        perplexity=None,
        worst=_worst(changes),
    )


def _tokens_compared(
    weights: AdapterWeights, texts: Sequence[str], plain: _Answered, stored: _Answered
) -> StorageComparison:
    changes: list[TextChange] = []
    divergences: list[float] = []
    flips, before, after = 0, 0.0, 0.0
    for text, first, second in zip(texts, plain.scored, stored.scored, strict=True):
        if not first.logprobs:
            continue  # one token alone is predicted from nothing
        pairs = list(zip(first.likeliest, second.likeliest, strict=True))
        found = [token_divergence(one, other) for one, other in pairs]
        moved = sum(one[0][0] != other[0][0] for one, other in pairs)
        nats, other_nats = -math.fsum(first.logprobs), -math.fsum(second.logprobs)
        count = len(found)
        changes.append(
            TextChange(
                text=_shortened(text),
                before=f"{math.exp(nats / count):.2f}",
                after=f"{math.exp(other_nats / count):.2f}",
                flipped=moved > 0,
                kl_nats=math.fsum(found) / count,
            )
        )
        divergences += found
        flips, before, after = flips + moved, before + nats, after + other_nats
    if not divergences:
        raise NotComparable(
            "No text has a token that follows another.",
            found=f"{len(texts)} texts of one token",
            expected="texts of two tokens or more",
        )
    count = len(divergences)
    return StorageComparison(
        **_common(weights, texts, plain, stored),
        answers=count,
        flips=flips,
        kl_mean_nats=math.fsum(divergences) / count,
        kl_max_nats=max(divergences),
        largest_change=None,
        perplexity=(math.exp(before / count), math.exp(after / count)),
        worst=_worst(changes),
    )


def _common(
    weights: AdapterWeights, texts: Sequence[str], plain: _Answered, stored: _Answered
) -> dict[str, Any]:
    return {
        "task": weights.task,
        "method": str(weights.config.method),
        "storage": stored.storage,
        "dtype": stored.dtype,
        "device": stored.device,
        "texts": len(texts),
        "cut": plain.cut,
        "base_bytes": (plain.base_bytes, stored.base_bytes),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _worst(changes: Sequence[TextChange]) -> tuple[TextChange, ...]:
    order = sorted(changes, key=lambda one: (one.flipped, one.kl_nats), reverse=True)
    return tuple(order[:WORST_SHOWN])


def _label_shares(logits: Sequence[float], names: Sequence[str], kind: ScoreKind) -> str:
    """The labels that were chosen, with their probability, or the values."""
    if kind == "none":
        return ", ".join(f"{one:.4f}" for one in logits)
    values = torch.tensor(logits, dtype=torch.float64)
    shares = values.softmax(-1) if kind == "softmax" else values.sigmoid()
    chosen = chosen_labels(logits, kind)
    return ", ".join(f"{names[place]} {float(shares[place]):.3f}" for place in chosen) or "none"


def _shortened(text: str, characters: int = 60) -> str:
    return text if len(text) <= characters else f"{text[: characters - 3]}..."
