"""What a stranger's images may cost: the look at a text, and all pixels of one request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from server.images import Images, ImageTooLarge, looks_like_image
from tests.server.tiny_bases import image, image_file


@pytest.mark.timeout(20)
@pytest.mark.parametrize("filler", [" ", "A", "= ", "A="])
def test_the_look_at_a_long_text_does_not_try_again_and_again(filler: str) -> None:
    size = 1 << 20
    assert not looks_like_image("/9j/" + filler * size + "!")
    assert not looks_like_image("data:image/" + filler * size)


@pytest.mark.parametrize("end", ["", "=", "==", "==\n", "\n", " \n "])
def test_base64_is_known_with_its_padding_and_its_lines(end: str) -> None:
    assert looks_like_image("/9j/" + "A b\n" * 40 + end)
    assert not looks_like_image("/9j/" + "A b\n" * 40 + "=" + end + "A")


def test_all_pixels_of_a_request_are_bounded_before_any_is_decoded() -> None:
    pytest.importorskip("PIL", reason="Pillow is an extra of the project (vision)")
    decoded: list[tuple[int, int]] = []

    def processor(opened: Any, return_tensors: str) -> dict[str, Any]:
        decoded.append(opened.size)
        return {"pixel_values": np.zeros((1, 3, 2, 2), np.float32)}

    images = Images(processor, shape=(3, 2, 2), tokens=5, max_pixels=300, max_request_pixels=500)
    file = image_file(image(10, 25))
    with pytest.raises(ImageTooLarge) as caught:
        images.encode([file] * 3, "image-classification")
    assert (caught.value.code, caught.value.found) == ("input_too_long", "750 pixels in 3 images")
    assert decoded == []
    assert len(images.encode([file] * 2, "image-classification")) == 2
    assert len(decoded) == 2
