"""Another base under a data folder: the start says which adapters fit, and no other is served."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from server.demo import BASE_DIR
from tests.stand.live import Live, hira
from tests.stand.made import make_adapter

pytestmark = pytest.mark.http

TEXT = {"inputs": "A fine film, warmly played."}


def other_base(folder: Path) -> Path:
    """A base of the same shapes as the demo's, with other weights: nothing but its digest tells."""
    shutil.copytree(BASE_DIR, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.flip(0).contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def register(live: Live, name: str, source: Path) -> Any:
    body = {"name": name, "source": str(source)}
    answer = live.client.post("/admin/adapters", json=body, headers=live.admin)
    assert answer.status_code == 201, answer.text
    return answer.json()


def told(live: Live) -> tuple[str, str]:
    """How many adapters the start says that fit, and which do not."""
    line = re.search(r"(\d+ of \d+) adapters fit the base .*: (.*)$", live.log.read_text(), re.M)
    assert line is not None, live.log.read_text()
    return line.group(1), line.group(2)


def scores(live: Live, name: str) -> dict[str, float]:
    answer = live.client.post(f"/predict?adapter={name}", json=TEXT)
    assert answer.status_code == 200, answer.text
    return {one["label"]: one["score"] for one in answer.json()}


def listed(live: Live) -> set[str]:
    return {one["id"] for one in live.client.get("/v1/models").json()["data"]}


def test_adapters_of_another_base_are_named_at_the_start_and_not_served(tmp_path: Path) -> None:
    data, sources = tmp_path / "data", tmp_path / "sources"
    first = make_adapter(sources / "first", seed=1, labels=("LOW", "HIGH"))
    second = make_adapter(sources / "second", seed=2, labels=("LOW", "HIGH"))
    base = other_base(tmp_path / "other")
    root = f"--source-root={sources}"

    with hira(data, f"--base={BASE_DIR}", root, dtype="fp32") as live:
        register(live, "first", first)
        known = scores(live, "first")

    with hira(data, f"--base={base}", root, dtype="fp32") as live:
        assert told(live) == ("0 of 1", "first")
        assert "first" not in listed(live)
        refused = live.client.post("/predict?adapter=first", json=TEXT)
        assert refused.json()["code"] == "base_mismatch"
        shown = live.client.get("/admin/adapters/first", headers=live.admin).json()
        assert shown["served"] is False
        register(live, "second", second)
        assert live.client.post("/predict?adapter=second", json=TEXT).status_code == 200
        assert "second" in listed(live)

    with hira(data, f"--base={BASE_DIR}", root, dtype="fp32") as live:
        assert told(live) == ("1 of 2", "second")
        assert listed(live) & {"first", "second"} == {"first"}
        assert scores(live, "first") == pytest.approx(known, abs=1e-4)
        refused = live.client.post("/predict?adapter=second", json=TEXT)
        assert refused.json()["code"] == "base_mismatch"
