"""What a stranger's images may cost: the look at a text, and all pixels of one request."""

from __future__ import annotations

import pytest

from server.images import looks_like_image


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
