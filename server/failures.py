"""How a request can fail in the engine, in the words and codes that its client gets.

What both lanes say; refusals of the generation lane are in ``server.generation.failures``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from adapters.errors import AdapterError
from adapters.tasks import BY_NAME, Task
from server.inputs.images import Images
from server.inputs.text import Text
from server.messages import (
    EncodeRequest,
    Failure,
    ModelInput,
    ProcessedImage,
    Request,
    TokenizedInput,
)

WIDER = "Serve the base in a dtype of wider range: --dtype bf16 or fp32."

T = TypeVar("T")


class NotFinite(Exception):
    """The model's output for one input holds NaN or infinity."""


class TaskMismatch(Exception):
    """The adapter (None: the bare base) does another task than the one asked for."""

    def __init__(self, asked: Task, does: Task | None) -> None:
        super().__init__(f"asked for {asked}, does {does}")
        self.asked = asked
        self.does = does


def refusal(request: EncodeRequest, inputs: Text | Images) -> Failure | None:
    """Why a request can never run, or None.

    Inputs are checked where they are made, in the HTTP process. What would be a danger to others
    here, such as a token that the embedding does not have, is looked at once more.

    Args:
        inputs: What the base takes: texts or images.
    """
    row = BY_NAME[request.task]
    kind = "images" if isinstance(inputs, Images) else "texts"
    served = row.lane == "encode" and kind in row.takes
    if not served or (request.version is None and row.head == "adapter"):
        return _mismatch(request, None)
    if request.inputs and all(_is_whole(item, inputs) for item in request.inputs):
        return None
    return Failure(
        request.id,
        "invalid_input",
        "The inputs are none that the base takes.",
        found=f"{len(request.inputs)} inputs, one of them empty, too long or of another kind",
        expected="inputs as Text.encode or Images.encode makes them",
    )


def _is_whole(item: ModelInput, inputs: Text | Images) -> bool:
    if isinstance(inputs, Images):
        return isinstance(item, ProcessedImage) and item.shape == inputs.shape
    return (
        isinstance(item, TokenizedInput)
        and 0 < len(item.token_ids) <= inputs.max_tokens
        and min(item.token_ids) >= 0
        and (inputs.vocab_size is None or max(item.token_ids) < inputs.vocab_size)
    )


def split_apart(items: Sequence[T], version: Callable[[T], str | None]) -> list[list[T]]:
    """What failed together, to be run again: by adapter where there are several, else in halves.

    One adapter alone may be at fault; of its own items, those at fault are found by halves.

    Args:
        items: Two at least; keep their order.
        version: The adapter version of one.
    """
    by_version: dict[str | None, list[T]] = {}
    for item in items:
        by_version.setdefault(version(item), []).append(item)
    if len(by_version) > 1:
        return list(by_version.values())
    half = len(items) // 2
    return [list(items[:half]), list(items[half:])]


def too_late(request_id: str, place: str, late_s: float) -> Failure:
    """The deadline passed while the request was ``place``, waiting or running."""
    return Failure(
        request_id,
        "deadline_exceeded",
        f"The deadline passed while the request was {place}.",
        found=f"{late_s * 1000:.0f} ms late",
    )


def not_loaded(request: Request, error: Exception | None) -> Failure:
    """The adapter version could not be brought to the device."""
    if isinstance(error, AdapterError):
        return Failure(
            request.id, error.code, error.message, error.found, error.expected, error.fix
        )
    return Failure(
        request.id,
        "adapter_failed",
        "The adapter could not be loaded.",
        found=f"{type(error).__name__}: {error}" if error is not None else None,
    )


def of_base(request_id: str, error: Exception) -> Failure:
    """The bare base fails on the same input, so that no adapter is to blame."""
    if isinstance(error, NotFinite):
        return Failure(
            request_id,
            "base_failed",
            "The base's output for this input is not finite.",
            found="NaN or infinity",
            fix=WIDER,
        )
    return Failure(
        request_id,
        "base_failed",
        "The base fails on this input, whatever the adapter.",
        found=f"{type(error).__name__}: {error}",
    )


def broken(request: Request, error: Exception) -> Failure:
    """The forward of the request's adapter, its head, or what follows them, raised."""
    match error:
        case TaskMismatch():
            return _mismatch(request, error.does, error.asked)
        case AdapterError():
            return not_loaded(request, error)
        case NotFinite():
            return not_finite(request)
        case _:
            return Failure(
                request.id,
                "internal",
                "The forward pass of this request failed.",
                found=f"{type(error).__name__}: {error}",
            )


def not_finite(request: Request) -> Failure:
    """The output is NaN or infinite: the adapter's fault, or the base's where there is none."""
    own = request.version is not None
    return Failure(
        request.id,
        "adapter_failed" if own else "internal",
        f"The {'adapter' if own else 'base'}'s output is not finite.",
        found="NaN or infinity",
        expected="finite numbers",
        fix="Check the adapter: its factors overflow with this base." if own else WIDER,
    )


def is_expected(error: Exception) -> bool:
    """Whether the error says all there is to say, so that no stack trace is needed."""
    return isinstance(error, TaskMismatch | AdapterError | NotFinite)


def is_told(error: Exception) -> bool:
    """Whether the error says itself who is at fault: the request, or the adapter's files."""
    return isinstance(error, TaskMismatch | AdapterError)


def is_lost(error: Exception) -> bool:
    """Whether the device itself has failed: no later forward can succeed in this process."""
    return isinstance(error, torch.AcceleratorError)


def stopping(request_id: str) -> Failure:
    return Failure(request_id, "draining", "The server is stopping.")


def _mismatch(request: Request, does: Task | None, asked: Task | None = None) -> Failure:
    asked = request.task if isinstance(request, EncodeRequest) else asked
    who = f"The adapter {request.adapter}" if request.version is not None else "The bare base"
    return Failure(
        request.id,
        "task_mismatch",
        f"{who} does not do {asked}.",
        found=does,
        expected=asked,
        fix="Name an adapter for this task, or call the endpoint of the adapter's task.",
    )
