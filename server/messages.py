"""What passes between the HTTP processes and the worker: requests down, events up.

Frozen dataclasses that pickle small and import no torch. A request names an adapter *version* that
the HTTP process resolved when it admitted the request, so a replacement never changes an answer
half-way. Every request ends with exactly one terminal event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from adapters.tasks import Task

FinishReason = Literal["length", "eos_token", "stop_sequence"]


@dataclass(frozen=True, slots=True)
class TokenizedInput:
    """One input of an encode request.

    ``token_ids`` include the special tokens; ``text`` and ``offsets`` (character start and stop of
    each token, equal for special tokens) are there for tasks that answer with spans of the text.
    ``type_ids`` tell the two texts of a pair apart, for models that were taught to.
    """

    token_ids: tuple[int, ...]
    text: str | None = None
    offsets: tuple[tuple[int, int], ...] | None = None
    type_ids: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class ProcessedImage:
    """One image of an encode request, as the base's image processor left it.

    Args:
        pixels: float32, ``[channels, height, width]``, row by row.
        shape: Those three.
        tokens: Patches that the base makes of it: what it costs.
    """

    pixels: bytes
    shape: tuple[int, int, int]
    tokens: int


ModelInput = TokenizedInput | ProcessedImage


@dataclass(frozen=True, slots=True)
class Origin:
    """Which call a request belongs to, for logs, counts and traces: no answer depends on it.

    Args:
        request_id: Of the HTTP call, which may make several requests.
        key: The name of the key that it was admitted with.
        traceparent: Of the span that its own belong to, as W3C's Trace Context writes it.
    """

    request_id: str = ""
    key: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class EncodeRequest:
    """Run the encode lane on one or more inputs with one adapter version (None: the bare base)."""

    id: str
    task: Task
    adapter: str | None
    version: str | None
    inputs: tuple[ModelInput, ...]
    top_k: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    submitted: float = 0.0  # time.monotonic(), seconds
    deadline: float | None = None  # time.monotonic(), seconds
    origin: Origin = Origin()

    @property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.inputs)

    @property
    def pixel_bytes(self) -> int:
        return sum(len(item.pixels) for item in self.inputs if isinstance(item, ProcessedImage))


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer is held to, checked already.

    Args:
        text: As the grammar engine takes it.
        digest: Of the text, in hexadecimal: requests with the same one share what is compiled.
    """

    text: str
    digest: str


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to choose tokens: greedily unless ``do_sample``; penalty 1.0 and top_p 1.0 are off.

    Token ids that the base does not have are refused by the generation lane.
    """

    max_new_tokens: int = 20
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off
    typical_p: float = 1.0  # 1: off
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # once for each token that was generated
    frequency_penalty: float = 0.0  # as often as it was generated
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to the logit of an id; each id once
    bad_words: tuple[tuple[int, ...], ...] = ()  # tokens that must not follow each other; none ()
    allowed_ids: tuple[int, ...] | None = None  # no other token comes; None: every one may
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    ignore_eos: bool = False
    end_ids: tuple[int, ...] | None = None  # tokens that end the answer; None: the base's
    stop_ids: tuple[int, ...] = ()  # more of them, which ``ignore_eos`` does not concern
    shown_ids: tuple[int, ...] = ()  # special tokens that are part of the text
    min_tokens: int = 0  # before so many nothing ends the answer: no end token, no stop string
    alternatives: int = 0  # likeliest tokens told beside each, where log-probabilities are
    prompt_logprobs: bool = False  # of the prompt's own tokens; then max_new_tokens may be 0
    grammar: Grammar | None = None  # what the answer's text is held to


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Continue one prompt with one adapter version (None: the bare base)."""

    id: str
    adapter: str | None
    version: str | None
    token_ids: tuple[int, ...]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stream: bool = False
    submitted: float = 0.0
    deadline: float | None = None
    origin: Origin = Origin()

    @property
    def tokens(self) -> int:
        """Tokens that the request may come to hold: the prompt and all that it may generate."""
        return len(self.token_ids) + self.sampling.max_new_tokens

    @property
    def pixel_bytes(self) -> int:
        return 0

    @property
    def kept_tokens(self) -> int:
        """Those whose keys and values are needed: not the last one's, if it is generated."""
        return max(self.tokens - 1, len(self.token_ids))


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for request ``id`` any more: stop its work within a step."""

    id: str


@dataclass(frozen=True, slots=True)
class Preload:
    """Bring ``version`` to the device before anybody asks for it."""

    version: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep these versions, and no others, on the device whatever is asked for.

    ``named`` are all versions that a name is on: what is in memory of others is let go as soon as
    no request needs it. None: nothing is known of names.
    """

    versions: tuple[str, ...]
    named: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ReleaseQuarantine:
    """Try ``version`` again, whatever it did: its operator has seen to it."""

    version: str


Message = EncodeRequest | GenerateRequest | Cancel | Preload | Pin | ReleaseQuarantine


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """Terminal. ``outputs`` holds one plain JSON value per input, in order."""

    id: str
    outputs: tuple[Any, ...]
    version: str | None
    prompt_tokens: int
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have come in the place of another, or is that other.

    ``text`` is what it would have added; where that is nothing, or what a likelier one or the
    token itself adds too, the vocabulary's spelling.
    """

    id: int
    text: str
    logprob: float
    special: bool = False


Likeliest = tuple[tuple[int, float], ...]  # ids and log-probabilities, the likeliest first


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token of a streamed request.

    ``text`` is what this token adds to the readable text; it is empty while a character is
    incomplete or while the tail could still turn into a stop string. ``spelling`` is what it adds
    to the text as such, as in ``GeneratedToken``; None where that is ``text``.
    """

    id: str
    token_id: int
    text: str
    logprob: float | None
    special: bool
    alternatives: tuple[Alternative, ...] = ()
    spelling: str | None = None


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    id: int
    text: str
    logprob: float | None
    special: bool
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """Terminal. ``tail`` is text that no TokenEvent has carried yet.

    ``prompt_logprobs``, where they were asked for, hold one value per token of the prompt; the
    first, which nothing comes before, is None. ``prompt_likeliest``, where alternatives were, has
    the likeliest tokens in the place of each, none for the first.
    """

    id: str
    text: str
    tail: str
    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason
    version: str | None
    prompt_tokens: int
    queue_ms: float
    compute_ms: float
    prompt_logprobs: tuple[float | None, ...] = ()
    prompt_likeliest: tuple[Likeliest, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """Terminal. ``code`` is a row of the table in server/errors.py."""

    id: str
    code: str
    message: str
    found: str | None = None
    expected: str | None = None
    fix: str | None = None
    retry_after_s: int | None = None
    limit_tokens: int | None = None  # of the context, where that was exceeded


Request = EncodeRequest | GenerateRequest
Event = EncodeResult | TokenEvent | GenerateResult | Failure
TERMINAL = (EncodeResult, GenerateResult, Failure)


def log_fields(request: Request) -> dict[str, str | None]:
    """What a line of a log about a request has beside its text, where logs are JSON."""
    origin = request.origin
    return {
        "request_id": origin.request_id or request.id,
        "key": origin.key,
        "adapter": request.adapter,
        "version": request.version,
        "trace_id": trace_id_of(origin.traceparent),
    }


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace that a ``traceparent`` belongs to."""
    return None if traceparent is None else traceparent.split("-")[1]
