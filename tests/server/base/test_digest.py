from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from server.base.digest import checkpoint_digest
from server.base.plan import BaseModelError


def folder_with(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    folder.mkdir()
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    places: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"small": (3, 5), "wide": (64, 512), "bias": (7,)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def test_the_same_weights_are_the_same_base_however_they_lie(tmp_path: Path) -> None:
    one = checkpoint_digest(folder_with(tmp_path / "one", weights(1)))
    assert one == checkpoint_digest(folder_with(tmp_path / "shards", weights(1), shards=2))
    assert len(one) == 32


@pytest.mark.parametrize("change", ["seed", "one number", "dtype", "name", "shape"])
def test_other_weights_are_another_base(tmp_path: Path, change: str) -> None:
    other = weights(2 if change == "seed" else 1)
    if change == "one number":
        other["small"][1, 1] += 1e-3
    elif change == "dtype":
        other["bias"] = other["bias"].half()
    elif change == "name":
        other["bias2"] = other.pop("bias")
    elif change == "shape":
        other["small"] = other["small"].reshape(5, 3)
    one = checkpoint_digest(folder_with(tmp_path / "one", weights(1)))
    assert one != checkpoint_digest(folder_with(tmp_path / "other", other))


def test_a_file_that_ends_early_is_a_typed_error(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "one", weights(1))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="cannot be read"):
        checkpoint_digest(folder)
