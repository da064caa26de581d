"""Images to the pixels that a base takes: the one place that touches the image processor.

Used by the HTTP processes. Whatever arrives is a stranger's: the format is one of a few, size and
shape are read from the header and checked before anything is decoded, and nothing is fetched. What
is then done to an image (size, scale, mean) is the affair of the processor beside the base.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from adapters.errors import ExplainedError
from adapters.tasks import Task
from server.inputs.text import Side
from server.inputs.text_errors import InvalidInput
from server.messages import ProcessedImage

ImageInput = str | bytes | tuple[str, str]  # base64 or a data URL, a file; a pair is refused

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
PROCESSOR_FILE: Final = "preprocessor_config.json"
# A processor that scales the short side up makes an image of so many times its height.
ASPECT_MAX: Final = 50
# Families that fit their positions to the size of the image.
_ANY_SIZE: Final = frozenset({"dinov2"})
# Possessive: texts come from strangers, and a pattern that tries again would take squared time.
_DATA_URL: Final = re.compile(r"data:image/[a-z0-9.+-]++;base64,", re.IGNORECASE)
# How the base64 of PNG, JPEG, GIF and WebP files begins.
_BASE64_STARTS: Final = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
_BASE64_CHARACTERS_MIN: Final = 64
_BASE64: Final = re.compile(r"[A-Za-z0-9+/\s]++={0,2}\s*+")


class ImageTooLarge(InvalidInput):
    """More pixels than the server decodes."""

    code = "input_too_long"


class ImageProcessorError(ExplainedError):
    """The base's folder has no image processor that this server can use."""

    code = "base_unusable"


class Images:
    """An image processor with the limits of one base.

    Args:
        processor: Of transformers, on Pillow.
        shape: ``(channels, height, width)`` of what it makes of any image.
        tokens: Patches in that.
        max_pixels: Of an image as it arrives.
        max_request_pixels: Of all images of one request.
    """

    def __init__(
        self,
        processor: Any,
        *,
        shape: tuple[int, int, int],
        tokens: int,
        max_pixels: int,
        max_request_pixels: int,
    ) -> None:
        self.processor = processor
        self.shape = shape
        self.tokens = tokens
        self.max_pixels = max_pixels
        self.max_request_pixels = max_request_pixels

    @property
    def apart(self) -> Images:
        """As ``Text.apart``: images have one thread, so there is nobody to be kept apart from."""
        return self

    @property
    def pixel_bytes(self) -> int:
        """Of one image as it is encoded: float32."""
        return math.prod(self.shape) * 4

    @classmethod
    def load(cls, folder: Path, config: Any, *, max_pixels: int, max_request_pixels: int) -> Images:
        """Load the processor that lies beside a base, and try it on two images.

        Args:
            folder: The base's.
            config: The base's.
            max_pixels: Of an image as it arrives.
            max_request_pixels: Of all images of one request.

        Raises:
            ImageProcessorError: Pillow is not installed, there is no processor, or it makes
                something else of an image than the base takes.
        """
        try:
            from PIL import Image
        except ImportError as error:
            raise ImageProcessorError(
                "A base for images needs Pillow.",
                found="not installed",
                expected="the extra vision",
                fix='Install it: pip install "hira-server[vision]".',
            ) from error
        from transformers import AutoImageProcessor

        if not (folder / PROCESSOR_FILE).is_file():
            raise _unusable_processor(f"no {PROCESSOR_FILE} in {folder}")
        channels = int(config.num_channels)
        mode = "L" if channels == 1 else "RGB"
        try:
            processor: Any = AutoImageProcessor.from_pretrained(
                str(folder), backend="pil", trust_remote_code=False, local_files_only=True
            )
            made = {
                tuple(processor(Image.new(mode, size), return_tensors="np")["pixel_values"].shape)
                for size in ((40, 30), (24, 56))
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            line = str(error).strip().splitlines() or [""]
            raise _unusable_processor(f"{type(error).__name__}: {line[0][:200]}") from error
        size = _pair(config.image_size)
        _, found_channels, height, width = next(iter(made))
        fits = (height, width) == size or config.model_type in _ANY_SIZE
        if len(made) > 1 or found_channels != channels or not fits:
            raise _unusable_processor(
                "pixels of " + " and ".join(sorted(map(str, made))),
                expected=f"(1, {channels}, {size[0]}, {size[1]}) for every image, as config.json",
            )
        patch_height, patch_width = _pair(config.patch_size)
        tokens = (height // patch_height) * (width // patch_width) + 1
        return cls(
            processor,
            shape=(channels, height, width),
            tokens=tokens,
            max_pixels=max_pixels,
            max_request_pixels=max_request_pixels,
        )

    def tokenize(
        self,
        images: Sequence[ImageInput],
        task: Task,
        *,
        truncation: bool = False,
        side: Side | None = None,
    ) -> tuple[ProcessedImage, ...]:
        """Decode and prepare the images of one request.

        Args:
            images: Files as they are, or as text: base64, with or without ``data:image/…;base64,``.
            task: For symmetry with ``Text.tokenize``; images are prepared alike for all tasks.
            truncation, side: There is nothing to cut.

        Raises:
            InvalidInput: Not an image, of a format that is not read, damaged, or as good as a line.
            ImageTooLarge: More pixels than ``max_pixels``, or in all than ``max_request_pixels``.
        """
        # All headers before any pixel: a request that asks for too much costs next to nothing.
        opened = [self._open(one, index) for index, one in enumerate(images)]
        pixels = sum(one.size[0] * one.size[1] for one in opened)
        if pixels > self.max_request_pixels:
            raise ImageTooLarge(
                "The images have too many pixels together.",
                found=f"{pixels} pixels in {len(opened)} images",
                expected=f"at most {self.max_request_pixels} pixels",
                fix="Scale them down, or send several requests.",
            )
        found: list[ProcessedImage] = []
        while opened:  # each decoded image is let go before the next
            found.append(self._encode(opened.pop(0), len(found)))
        return tuple(found)

    def _encode(self, opened: Any, index: int) -> ProcessedImage:
        upright = self._decoded(opened, index)
        found = self.processor(upright, return_tensors="np")["pixel_values"][0]
        return ProcessedImage(found.astype("<f4").tobytes(), self.shape, self.tokens)

    def _open(self, image: ImageInput, index: int) -> Any:
        """An image of which no more than the header is read."""
        import io

        from PIL import Image

        raw = image if isinstance(image, bytes) else _from_text(image, index)
        try:
            opened = Image.open(io.BytesIO(raw), formats=FORMATS)
            width, height = opened.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise self._too_large(index, str(error)[:120]) from error
        except Exception as error:  # decoders raise what they like at bytes from strangers
            raise _not_an_image(index, f"{len(raw)} bytes of another kind") from error
        if width * height > self.max_pixels:
            raise self._too_large(index, f"{width} x {height} pixels")
        if max(width, height) > ASPECT_MAX * min(width, height):
            raise InvalidInput(
                f"Input {index} is too narrow.",
                found=f"{width} x {height} pixels",
                expected=f"no side longer than {ASPECT_MAX} times the other",
                fix="Crop the image.",
            )
        return opened

    def _decoded(self, opened: Any, index: int) -> Any:
        """The image upright, in the base's number of channels."""
        from PIL import ImageOps

        try:
            upright = ImageOps.exif_transpose(opened)
            return upright.convert("L" if self.shape[0] == 1 else "RGB")
        except Exception as error:
            raise _not_an_image(
                index, f"a damaged {opened.format} file: {str(error)[:100]}"
            ) from error

    def _too_large(self, index: int, found: str) -> ImageTooLarge:
        return ImageTooLarge(
            f"Input {index} has too many pixels.",
            found=found,
            expected=f"at most {self.max_pixels} pixels",
            fix="Scale it down: the base sees "
            f"{self.shape[2]} x {self.shape[1]} pixels of it anyway.",
        )


def looks_like_image(text: str) -> bool:
    """Whether a text is an image in base64: a data URL, or what such files begin with."""
    if _DATA_URL.match(text):
        return True
    return (
        len(text) >= _BASE64_CHARACTERS_MIN
        and text.startswith(_BASE64_STARTS)
        and _BASE64.fullmatch(text) is not None
    )


def _from_text(text: str | tuple[str, str], index: int) -> bytes:
    if not isinstance(text, str):
        raise _not_an_image(index, "a pair of texts")
    if text.startswith(("http://", "https://")):
        raise _not_an_image(index, "an address, and nothing is fetched from addresses")
    found = _DATA_URL.match(text)
    content = text[found.end() :] if found is not None else text
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _not_an_image(
            index, f"text that is not base64, beginning {content[:20]!r}"
        ) from error


def _not_an_image(index: int, found: str) -> InvalidInput:
    return InvalidInput(
        f"Input {index} is not an image.",
        found=found,
        expected=f"a {', '.join(FORMATS)} file in base64, or as a multipart upload",
        fix="This base classifies images: send the bytes of one.",
    )


def _unusable_processor(found: str, expected: str | None = None) -> ImageProcessorError:
    return ImageProcessorError(
        "The base's image processor cannot be used.",
        found=found,
        expected=expected or f"{PROCESSOR_FILE} of an image processor that transformers knows",
        fix="Save the processor with processor.save_pretrained(<base folder>).",
    )


def _pair(size: Any) -> tuple[int, int]:
    """``(height, width)`` of a size that a config gives as one number or two."""
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    return int(size), int(size)
