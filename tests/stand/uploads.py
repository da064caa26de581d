"""Registers an adapter over HTTP, by its files."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.stand.live import Live


def upload(live: Live, name: str, folder: Path) -> Any:
    names = ("adapter_config.json", "adapter_model.safetensors", "config.json")
    with ExitStack() as stack:
        files = [("files", (one, stack.enter_context((folder / one).open("rb")))) for one in names]
        return live.client.post(
            "/admin/adapters", data={"name": name}, files=files, headers=live.admin
        )
