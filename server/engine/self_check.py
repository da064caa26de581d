"""The first steps of a base: each lane answers a few short inputs before anybody else may ask.

What a family of models does with padding, positions or its cache shows in no config. So every lane
runs once as it will run, alone and in a batch of mixed lengths, and the answers are compared with
each other and with the model's own forward. A base that raises, or answers something else, ends the
start. What adapters add to it is not tried here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from adapters.tasks import Task
from server.base.captured_steps import GraphPool
from server.base.load import BaseModelError, LoadedBase
from server.encoding.lane import EncodeLane
from server.failures import is_lost
from server.generation.lane import GenerateLane
from server.inputs.images import Images
from server.inputs.text import Text
from server.messages import (
    EncodeRequest,
    EncodeResult,
    Failure,
    GenerateRequest,
    GenerateResult,
    ProcessedImage,
    SamplingOptions,
    TokenizedInput,
)
from server.options import EngineOptions

if TYPE_CHECKING:
    from adapters.residency.slots import Residency

LENGTHS_TOKENS = (12, 5, 9)
NEW_TOKENS = 2
# Of float32: what a sum in another order costs, with room. Of half precision: the median, because
# a rounding may send a token to another expert; what is wrong by its kind is off by more.
RELATIVE_ERROR = {torch.float32: 1e-3}
RELATIVE_ERROR_HALF = 0.1
# Families whose answers differ only beyond a window. That is thousands of tokens in real models,
# and a step that fills it would take minutes of every start; so they are named here, after such a
# step of a tiny one (tests.stand.families) went wrong.
_OTHER_WINDOW = frozenset({"moshi"})
_COMPARED_WORDS = 8  # words that masks are compared by


def try_base(
    base: LoadedBase, inputs: Text | Images, encode: EncodeLane, generate: GenerateLane | None
) -> None:
    """Run a few short forwards of each lane over the bare base; the lanes must be idle.

    Args:
        base: The loaded base.
        inputs: What makes its inputs.
        encode, generate: The lanes; None: the base does not continue texts.

    Raises:
        BaseModelError: A lane raises, or its answers differ.
    """
    if generate is not None and base.config.model_type in _OTHER_WINDOW:
        raise _self_check_failed(
            base.adapted.signature.architecture,
            "its config names a sliding window that its own forward does not keep",
        )
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(0)
        trial = _SelfCheck(base, inputs)
        trial.vectors(encode)
        if isinstance(inputs, Text):
            if base.fills_masks and inputs.mask_id is not None:
                trial.masks(encode, inputs)
            if generate is not None:
                trial.generation(generate)


def generate_lane(
    base: LoadedBase,
    inputs: Text,
    residency: Residency,
    options: EngineOptions,
    graphs: GraphPool | None = None,
) -> GenerateLane:
    """The lane that continues texts.

    Args:
        base, inputs, residency, options, graphs: As of ``GenerateLane``.

    Raises:
        BaseModelError: No cache of keys and values can be made for this base.
    """
    try:
        return GenerateLane(base.adapted, inputs.tokenizer, residency, options, graphs)
    except BaseModelError:
        raise
    except Exception as error:
        if is_lost(error) or isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        name = base.adapted.signature.architecture
        raise _self_check_failed(name, f"its cache: {type(error).__name__}: {error}") from error


class _SelfCheck:
    def __init__(self, base: LoadedBase, inputs: Text | Images) -> None:
        self._base = base
        self._inputs = inputs
        self._name = base.adapted.signature.architecture

    def vectors(self, lane: EncodeLane) -> None:
        items = self._items()
        options = {"pooling": "mean", "normalize": False}
        task: Task = "feature-extraction"
        alone = [self._encoded(lane, [one], task, "alone", **options)[0] for one in items[:2]]
        mixed = self._encoded(lane, items, task, "in a batch", **options)[:2]
        self._exact(mixed, alone, "vectors")
        errors = [_relative(found, wanted) for found, wanted in zip(mixed, alone, strict=True)]
        self._hold(errors, "vectors of a text alone and beside longer and shorter ones")

    def masks(self, lane: EncodeLane, text: Text) -> None:
        assert text.mask_id is not None
        items = [TokenizedInput((text.mask_id, *one.token_ids[1:])) for one in self._items()[:2]]
        targets = tuple(
            range(min(_COMPARED_WORDS, self._base.adapted.signature.vocab_size or _COMPARED_WORDS))
        )
        words = self._encoded(lane, items, "fill-mask", "in a batch", targets=targets)
        errors = []
        for item, found in zip(items, words, strict=True):
            logits = self._plain(item.token_ids)
            wanted = logits[0].softmax(-1)
            scores = {word["token"]: word["score"] for word in found}
            errors.append(_relative([scores[one] for one in targets], wanted[list(targets)]))
        self._hold(errors, "words for a mask from this server and from the model alone")

    def generation(self, lane: GenerateLane) -> None:
        room = lane.room_tokens - NEW_TOKENS
        if room < 1:
            return  # a cache that holds less has answers for nobody: every request is refused
        prompts = [one.token_ids[:room] for one in self._items()]
        alone = self._generated(lane, prompts[:1], "alone")
        mixed = self._generated(lane, prompts, "in a batch")
        told = [[token.logprob for token in one.tokens] for one in (*alone, mixed[0])]
        self._exact(told[1:], told[:1], "log-probabilities")
        pairs = zip([*prompts[:1], *prompts[:2]], [*alone, *mixed[:2]], strict=True)
        errors = []
        for prompt, found in pairs:
            ids = [*prompt, *(token.id for token in found.tokens)]
            logits = self._plain(ids[:-1]).log_softmax(-1)
            scores = [*found.prompt_logprobs[1:], *(token.logprob for token in found.tokens)]
            for row, score in enumerate(scores):
                wanted = float(logits[row, ids[row + 1]])
                assert score is not None
                errors.append(abs(score - wanted) / max(1.0, abs(wanted)))
        self._hold(errors, "log-probabilities of this server and of the model alone")

    # What is asked

    def _items(self) -> list[Any]:
        if isinstance(self._inputs, Images):
            shape = self._inputs.shape
            return [
                ProcessedImage(torch.randn(shape).numpy().tobytes(), shape, self._inputs.tokens)
                for _ in LENGTHS_TOKENS
            ]
        text = self._inputs
        vocabulary = self._base.adapted.signature.vocab_size or len(text.tokenizer)
        special = {*text.tokenizer.all_special_ids, *_named_ids(self._base.config)}
        ids = [one for one in range(min(vocabulary, 4096)) if one not in special] or [0]
        lengths = [max(1, min(one, text.max_tokens - NEW_TOKENS)) for one in LENGTHS_TOKENS]
        return [
            TokenizedInput(tuple(ids[i] for i in torch.randint(len(ids), (length,)).tolist()))
            for length in lengths
        ]

    def _encoded(
        self, lane: EncodeLane, items: Sequence[Any], task: Task, how: str, **options: Any
    ) -> list[Any]:
        for index, item in enumerate(items):
            lane.submit(EncodeRequest(f"trial-{index}", task, None, None, (item,), None, options))
        events = self._ended(lane.step, lane.has_work, f"{task}, {how}")
        found = [events[f"trial-{index}"] for index in range(len(items))]
        assert all(isinstance(one, EncodeResult) for one in found)
        return [one.outputs[0] for one in found]

    def _generated(
        self, lane: GenerateLane, prompts: Sequence[tuple[int, ...]], how: str
    ) -> list[GenerateResult]:
        options = SamplingOptions(
            max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=True, prompt_logprobs=True
        )
        for index, ids in enumerate(prompts):
            lane.submit(GenerateRequest(f"trial-{index}", None, None, ids, options))
        events = self._ended(lane.step, lane.has_work, f"text-generation, {how}")
        return [events[f"trial-{index}"] for index in range(len(prompts))]

    def _ended(
        self, step: Callable[[], list[Any]], has_work: Callable[[], bool], what: str
    ) -> dict[str, Any]:
        """The answers, by request; the first failure ends the start."""
        events: list[Any] = []
        try:
            while has_work():
                events += step()
        except Exception as error:
            if is_lost(error):
                raise
            raise self._unusable(f"{what}: {type(error).__name__}: {error}") from error
        for event in events:
            if isinstance(event, Failure):
                raise self._unusable(f"{what}: {event.found or event.message}", event.fix)
        return {event.id: event for event in events}

    def _plain(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits ``[T, vocabulary]`` of transformers' own forward over one text, in float32."""
        try:
            with torch.inference_mode():
                out = self._base.model(input_ids=torch.tensor([ids], device=self._base.device))
        except Exception as error:
            if is_lost(error):
                raise
            raise self._unusable(f"its own forward: {type(error).__name__}: {error}") from error
        logits: torch.Tensor = out.logits[0].float()
        return logits

    # What is expected

    def _hold(self, errors: Sequence[float], what: str) -> None:
        """Raise unless the relative errors are those of rounding."""
        if not errors:
            return
        most = RELATIVE_ERROR.get(self._base.dtype, RELATIVE_ERROR_HALF)
        worst = max(errors) if self._base.dtype == torch.float32 else median(errors)
        if not (isfinite(worst) and worst <= most):
            raise self._unusable(
                f"the {what} differ by {worst:.1e}", expected=f"{most:.0e} at most"
            )

    def _exact(self, mixed: Sequence[Any], alone: Sequence[Any], what: str) -> None:
        """Raise where answers should not depend on their batch and do, in a single bit."""
        if self._base.adapted.modulator.fixed is not None and list(mixed) != list(alone):
            raise self._unusable(
                f"{what} of a text alone and beside others differ in their last bits",
                expected="equal in every bit, because of --deterministic",
                fix="Leave --deterministic out, or set --threads 1.",
            )

    def _unusable(self, found: str, fix: str | None = None, **more: str) -> BaseModelError:
        return _self_check_failed(self._name, found, fix, **more)


def _self_check_failed(
    name: str, found: str, fix: str | None = None, *, expected: str = "an answer"
) -> BaseModelError:
    return BaseModelError(
        f"{name} cannot be served: its first steps went wrong.",
        found=" ".join(found.split())[:400],
        expected=f"{expected}, before the start",
        fix=fix or "Serve a base of another family.",
    )


def _relative(found: Any, wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    one, other = (torch.as_tensor(values, dtype=torch.float32).cpu() for values in (found, wanted))
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


def _named_ids(config: Any) -> set[int]:
    """Token ids that a config names: for images, for padding, ...; they are no words."""
    named: set[int] = set()
    for one in {id(one): one for one in (config, config.get_text_config())}.values():
        for name, value in vars(one).items():
            if name.endswith(("_token_id", "_token_index")):
                listed = value if isinstance(value, list | tuple) else [value]
                named.update(one for one in listed if isinstance(one, int))
    return named


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, the lanes log nothing: what goes wrong is said once, in the error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
