"""Calls of the server around the fake engine."""

from __future__ import annotations

from typing import Any

import httpx2

from tests.stand.live import Live


def predict(live: Live, **parameters: Any) -> httpx2.Response:
    return live.client.post(
        "/predict?adapter=imdb", json={"inputs": "hello", "parameters": parameters}
    )


def generate(live: Live, tokens: int, **more: Any) -> httpx2.Response:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": tokens}}
    return live.client.post("/generate?adapter=story", json=body, **more)
