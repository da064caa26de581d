"""What a stranger's images may cost: the look at a text, and all pixels of one request."""

from __future__ import annotations

import asyncio
import base64
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.datastructures import QueryParams

from server.edge.admit.admission import Admission
from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import SharedLoad
from server.edge.admit.slow_work import LONG_CHARACTERS
from server.edge.endpoints.body import ValidatedBody
from server.edge.endpoints.middleware import RequestContext
from server.edge.endpoints.openai import OpenAI
from server.edge.endpoints.schemas import EmbedRequest
from server.edge.endpoints.schemas_openai import EmbeddingRequest
from server.edge.endpoints.tei_tgi import TeiTgi
from server.edge.target import Target
from server.errors import Refusal
from server.inputs.images import Images, ImageTooLarge, looks_like_image
from tests.stand.tiny_bases import image, image_file


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
        images.tokenize([file] * 3, "image-classification")
    assert (caught.value.code, caught.value.found) == ("input_too_long", "750 pixels in 3 images")
    assert decoded == []
    two = images.tokenize([file] * 2, "image-classification")
    assert [len(one.pixels) for one in two] == [images.pixel_bytes] * 2
    assert len(decoded) == 2


def test_images_that_do_not_fit_beside_others_are_not_even_decoded() -> None:
    def processor(opened: Any, return_tensors: str) -> dict[str, Any]:
        raise AssertionError("an image was decoded")

    images = Images(processor, shape=(3, 2, 2), tokens=5, max_pixels=300, max_request_pixels=500)
    load = SharedLoad(2)
    bounds = Bounds(9, 1000, 9, pixel_bytes=3 * images.pixel_bytes)
    load.set(1, requests=1, tokens=10, pixel_bytes=2 * images.pixel_bytes)
    service: Any = SimpleNamespace(
        settings=SimpleNamespace(max_inputs=8),
        base=SimpleNamespace(inputs=images),
        dispatcher=SimpleNamespace(admission=Admission(load, bounds, 2)),
        deadline=lambda began, asked: began + 60.0,
    )
    scope = {"hira": RequestContext("id", 0.0, adapter="pets")}
    call: Any = SimpleNamespace(scope=scope, headers={})
    files = (image_file(image(10, 25)),) * 2
    with pytest.raises(Refusal, match="overloaded") as caught:
        asyncio.run(
            TeiTgi(service)._tokenized(call, "-", files, "image-classification", truncation=False)
        )
    assert "bytes of pixels" in str(caught.value.faults[0].found)


@pytest.mark.parametrize("verb", ["/embed", "/v1/embeddings"])
def test_a_small_file_of_many_pixels_is_not_decoded_on_the_event_loop(verb: str) -> None:
    lengths: list[int] = []

    class Encoded(Exception):
        """Far enough."""

    async def tokenize(_: Any, characters: int, *__: Any) -> None:
        lengths.append(characters)
        raise Encoded

    async def receive() -> None:
        await asyncio.sleep(30)

    images = Images(None, shape=(3, 2, 2), tokens=5, max_pixels=300, max_request_pixels=500)
    service: Any = SimpleNamespace(
        settings=SimpleNamespace(max_inputs=8),
        base=SimpleNamespace(inputs=images),
        dispatcher=SimpleNamespace(admission=Admission(SharedLoad(1), Bounds(9, 1000, 9), 1)),
        slow_work=SimpleNamespace(tokenize=tokenize),
        deadline=lambda began, asked: began + 30,
        targets=SimpleNamespace(resolve=lambda *_, **__: Target(None, None, "feature-extraction")),
    )
    call: Any = SimpleNamespace(
        scope={"hira": RequestContext("id", time.monotonic())},
        headers={},
        receive=receive,
        query_params=QueryParams(""),
    )
    text = base64.b64encode(image_file(image(10, 25))).decode()
    assert len(text) <= LONG_CHARACTERS
    body = EmbeddingRequest.model_validate({"model": "base", "input": text})
    work = (
        TeiTgi(service).embed(call, None, ValidatedBody(EmbedRequest(inputs=text)))
        if verb == "/embed"
        else OpenAI(service).embeddings(call, body)
    )
    with pytest.raises(Encoded):
        asyncio.run(work)
    assert lengths[0] > LONG_CHARACTERS
