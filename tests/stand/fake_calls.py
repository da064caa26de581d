"""Calls of the server around the fake engine."""

from __future__ import annotations
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
import httpx
import psutil
import pytest
from tests.stand.fake_engine import SLOW_SEED
from tests.stand.live import Live, fake


def predict(live: Live, **parameters: Any) -> httpx.Response:
    return live.client.post(
        "/predict?adapter=imdb", json={"inputs": "hello", "parameters": parameters}
    )

def generate(live: Live, tokens: int, **more: Any) -> httpx.Response:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": tokens}}
    return live.client.post("/generate?adapter=story", json=body, **more)
