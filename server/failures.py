"""How a request to encode can fail, in the words and codes that its client gets."""

from __future__ import annotations

import torch

from adapters.errors import AdapterError
from adapters.tasks import BY_NAME, Task
from server.inputs.images import Images
from server.inputs.text import Text
from server.messages import EncodeRequest, Failure, ProcessedImage, TokenizedInput

_PIXEL_BYTES = 4  # float32


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

    Args:
        inputs: What the base takes: texts or images.
    """
    row = BY_NAME[request.task]
    kind = "images" if isinstance(inputs, Images) else "texts"
    served = row.lane == "encode" and kind in row.takes
    if not served or (request.version is None and row.head == "adapter"):
        return _mismatch(request, None)
    if not request.inputs:
        return _invalid(request, "There is nothing to encode.", "no inputs", "at least one")
    if isinstance(inputs, Images):
        return _refused_image(request, inputs)
    return _refused_text(request, inputs)


def _refused_image(request: EncodeRequest, images: Images) -> Failure | None:
    channels, height, width = images.shape
    for index, item in enumerate(request.inputs):
        if not isinstance(item, ProcessedImage):
            return _invalid(request, f"Input {index} is no image.", "a text", "an image")
        count = channels * height * width
        if item.shape != images.shape or len(item.pixels) != count * _PIXEL_BYTES:
            return _invalid(
                request,
                f"Input {index} has other pixels than the base takes.",
                f"shape {item.shape}, {len(item.pixels)} bytes",
                f"shape {images.shape}",
            )
    return None


def _refused_text(request: EncodeRequest, text: Text) -> Failure | None:
    targets = request.options.get("targets")
    if targets is not None and (
        not targets or min(targets) < 0 or max(targets) >= (text.vocab_size or 1 << 62)
    ):
        return _invalid(
            request,
            "The targets hold a token that the base does not have.",
            f"token ids {list(targets)[:5]}",
            f"0 to {(text.vocab_size or 0) - 1}",
        )
    for index, item in enumerate(request.inputs):
        if not isinstance(item, TokenizedInput):
            return _invalid(request, f"Input {index} is no text.", "an image", "a text")
        ids = item.token_ids
        if not ids:
            return _invalid(request, f"Input {index} is empty.", "no tokens", "at least one token")
        if len(ids) > text.max_tokens:
            return Failure(
                request.id,
                "input_too_long",
                f"Input {index} is too long.",
                found=f"{len(ids)} tokens",
                expected=f"at most {text.max_tokens} tokens",
                fix="Shorten it or ask for truncation.",
            )
        if min(ids) < 0 or (text.vocab_size is not None and max(ids) >= text.vocab_size):
            return _invalid(
                request,
                f"Input {index} holds a token that the base does not have.",
                f"token ids from {min(ids)} to {max(ids)}",
                f"0 to {(text.vocab_size or 0) - 1}",
            )
        if BY_NAME[request.task].spans and (
            item.text is None or item.offsets is None or len(item.offsets) != len(ids)
        ):
            return _invalid(
                request,
                f"Input {index} comes without what spans are made of.",
                "no text, or offsets for other tokens",
                "the text and an offset for each token",
            )
        if item.type_ids is not None and len(item.type_ids) != len(ids):
            return _invalid(
                request,
                f"Input {index} has types for other tokens.",
                f"{len(item.type_ids)} types, {len(ids)} tokens",
                "a type for each token",
            )
        if BY_NAME[request.task].needs_mask and (text.mask_id is None or text.mask_id not in ids):
            return _invalid(
                request, f"Input {index} has nothing to fill.", "no mask token", "a mask token"
            )
    return None


def too_late(request_id: str, late_s: float) -> Failure:
    """The deadline passed before all of the request's rows had run."""
    return Failure(
        request_id,
        "deadline_exceeded",
        "The deadline passed while the request was waiting.",
        found=f"{late_s * 1000:.0f} ms late",
    )


def not_loaded(request_id: str, error: Exception | None) -> Failure:
    """The adapter version could not be brought to the device."""
    if isinstance(error, AdapterError):
        return Failure(
            request_id, error.code, error.message, error.found, error.expected, error.fix
        )
    return Failure(
        request_id,
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
            fix="Serve the base in a dtype of wider range: --dtype bf16 or fp32.",
        )
    return Failure(
        request_id,
        "base_failed",
        "The base fails on this input, whatever the adapter.",
        found=f"{type(error).__name__}: {error}",
    )


def broken(request: EncodeRequest, error: Exception) -> Failure:
    """The forward of the request's adapter, its head, or what follows them, raised."""
    match error:
        case TaskMismatch():
            return _mismatch(request, error.does)
        case AdapterError():
            return not_loaded(request.id, error)
        case NotFinite():
            return not_finite(request.id, request.version, "NaN or infinity")
        case _:
            return Failure(
                request.id,
                "internal",
                "The forward pass of this request failed.",
                found=f"{type(error).__name__}: {error}",
            )


def not_finite(request_id: str, version: str | None, found: str) -> Failure:
    """The output is NaN or infinite: the adapter's fault, or the base's where there is none."""
    if version is None:
        return Failure(
            request_id,
            "internal",
            "The base's output is not finite.",
            found=found,
            fix="Serve the base in a dtype of wider range: --dtype bf16 or fp32.",
        )
    return Failure(
        request_id,
        "adapter_failed",
        "The adapter's output is not finite.",
        found=found,
        expected="finite numbers",
        fix="Check the adapter: its factors overflow with this base.",
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


def _mismatch(request: EncodeRequest, does: Task | None) -> Failure:
    who = f"The adapter {request.adapter}" if request.version is not None else "The bare base"
    return Failure(
        request.id,
        "task_mismatch",
        f"{who} does not do {request.task}.",
        found=does,
        expected=request.task,
        fix="Name an adapter for this task, or call the endpoint of the adapter's task.",
    )


def _invalid(request: EncodeRequest, message: str, found: str, expected: str) -> Failure:
    return Failure(request.id, "invalid_input", message, found=found, expected=expected)
