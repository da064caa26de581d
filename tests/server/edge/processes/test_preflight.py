"""What is told before anything heavy is loaded: bases and sources that cannot be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.edge.processes.failed_start import StartFailed
from server.edge.processes.preflight import check_before_loading, exclusive
from server.settings import Settings, load_settings
from tests.stand.live import free_port


def settings(folder: Path, **flags: object) -> Settings:
    return load_settings({"data_dir": folder / "data", "port": free_port(), **flags})


def base_with(folder: Path, config: str | None, *files: str) -> str:
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    for name in files:
        (folder / name).write_bytes(b"")
    return str(folder)


@pytest.mark.parametrize(
    ("config", "files", "said", "found"),
    [
        (None, ["model.safetensors"], "the base model has no config.json", "base"),
        ("[]", ["model.safetensors"], "the base model's config.json is no object", "config.json"),
        ("{", ["model.safetensors"], "the base model's config.json cannot be read", "Expecting"),
        ("{}", ["pytorch_model.bin"], "has no weights in safetensors", "pytorch_model.bin"),
        ("{}", ["adapter_config.json", "adapter_model.safetensors"], "is an adapter", "adapter"),
    ],
)
def test_a_folder_that_is_no_base_is_told_what_it_is(
    config: str | None, files: list[str], said: str, found: str, tmp_path: Path
) -> None:
    base = base_with(tmp_path / "base", config, *files)
    with pytest.raises(StartFailed) as caught:
        check_before_loading(settings(tmp_path, base=base))
    (fault,) = caught.value.faults
    assert said in fault.message
    assert found in str(fault.found)


@pytest.mark.parametrize("files", [["model.safetensors"], ["model.safetensors.index.json"]])
def test_what_can_be_right_passes_and_leaves_nothing(files: list[str], tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", json.dumps({"model_type": "bert"}), *files)
    for one in (base, "org/name", "name", None):
        check_before_loading(settings(tmp_path, base=one, adapter={"a": "hf://org/a"}))
    assert [one.name for one in tmp_path.iterdir()] == ["base"]


def test_a_base_of_no_possible_name_is_told(tmp_path: Path) -> None:
    for base in ("./a", "a/b/c", "what is this?", "~/nothing-here"):
        with pytest.raises(StartFailed, match="does not exist"):
            check_before_loading(settings(tmp_path, base=base))


def test_a_data_folder_in_use_is_told(tmp_path: Path) -> None:
    with exclusive(tmp_path / "data"), pytest.raises(StartFailed, match="in use by another"):
        check_before_loading(settings(tmp_path))
    check_before_loading(settings(tmp_path))


def test_several_faults_are_one_error_that_has_them_all(tmp_path: Path) -> None:
    sources = {"a": str(tmp_path / "x"), "b": str(tmp_path / "y.zip")}
    (tmp_path / "y.zip").write_bytes(b"")
    with pytest.raises(StartFailed) as caught:
        check_before_loading(settings(tmp_path, adapter=sources))
    assert [one.fix for one in caught.value.faults] == [
        "check the path",
        "unpack the archive first",
    ]
