"""Registers an adapter over HTTP, by its files."""

from __future__ import annotations
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
import pytest
import torch
from safetensors.torch import load_file
from server.demo import BASE_DIR
from tests.stand.folders import save_with_peft
from tests.stand.live import Live, hira


def upload(live: Live, name: str, folder: Path) -> Any:
    names = ("adapter_config.json", "adapter_model.safetensors", "config.json")
    with ExitStack() as stack:
        files = [("files", (one, stack.enter_context((folder / one).open("rb")))) for one in names]
        return live.client.post(
            "/admin/adapters", data={"name": name}, files=files, headers=live.admin
        )
