from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from adapters.errors import (
    AdapterError,
    AdapterFaults,
    BaseMismatch,
    CorruptFile,
    MissingTensors,
    NonFinite,
    ShapeMismatch,
    UnmatchedTensors,
    UnsafeFormat,
    UnsupportedMethod,
    UnsupportedOption,
)
from adapters.intake.checkpoint import load_adapter
from adapters.intake.safetensors_header import MAX_TENSORS, TENSOR_FILE
from adapters.signature import BaseSignature, describe
from tests.stand.folders import (
    change_config,
    change_tensors,
    first_tensor,
    hira_folder,
    lora_folder,
    save_with_peft,
    small_base,
)
from tests.stand.tiny_models import build


@pytest.fixture(scope="module")
def base() -> BaseSignature:
    return small_base()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hira_folder(tmp_path / "adapter")


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_a_hira_folder_made_by_peft_is_read(tmp_path: Path, base: BaseSignature, rank: int) -> None:
    folder = hira_folder(tmp_path / "adapter", rank=rank, labels=3)
    weights = load_adapter(folder, base)
    assert weights.config.method == "hira"
    assert weights.task == "text-classification"
    assert weights.ranks == (rank, rank)
    assert weights.labels is not None
    assert weights.labels.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert sorted(weights.head) == [
        "classifier.bias",
        "classifier.weight",
        "pre_classifier.bias",
        "pre_classifier.weight",
    ]
    assert len(weights.factors) == 4
    stored = load_file(folder / TENSOR_FILE)
    path = "distilbert.transformer.layer.1.attention.v_lin"
    assert torch.equal(weights.factors[path].a, stored[f"base_model.model.{path}.hira_A"])
    assert torch.equal(weights.factors[path].b, stored[f"base_model.model.{path}.hira_B"])
    assert weights.parameters == sum(tensor.numel() for tensor in stored.values())


def test_a_lora_folder_made_by_peft_is_read(tmp_path: Path, base: BaseSignature) -> None:
    weights = load_adapter(lora_folder(tmp_path / "adapter", use_rslora=True), base)
    assert weights.config.method == "lora"
    assert {entry.scale for entry in weights.factors.values()} == {16 / 4**0.5}


def test_factors_of_embeddings_and_transposed_layers_are_read(tmp_path: Path) -> None:
    from peft.tuners.hira import HiraConfig

    model = build("gpt2")
    base = describe(model, "gpt2")
    config = HiraConfig(r=3, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    weights = load_adapter(save_with_peft(model, config, tmp_path / "adapter"), base)
    assert weights.task == "text-generation"
    assert weights.factors["transformer.h.0.attn.c_attn"].a.shape == (3, 64)
    assert weights.factors["transformer.h.0.attn.c_attn"].b.shape == (192, 3)
    assert weights.factors["transformer.wte"].a.shape == (3, 96)


def test_an_adapter_of_the_bare_backbone_is_matched(tmp_path: Path, base: BaseSignature) -> None:
    from peft import LoraConfig
    from transformers import DistilBertConfig, DistilBertModel

    from tests.stand.folders import SMALL

    model = DistilBertModel(DistilBertConfig(**SMALL))
    config = LoraConfig(r=2, target_modules=["q_lin"], task_type="FEATURE_EXTRACTION")
    weights = load_adapter(save_with_peft(model, config, tmp_path / "adapter"), base)
    assert weights.task == "feature-extraction"
    assert all(path.startswith("distilbert.") for path in weights.factors)


def test_labels_come_from_the_config_beside_the_adapter(folder: Path, base: BaseSignature) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good"}
    (folder / "config.json").write_text(json.dumps(config))
    labels = load_adapter(folder, base).labels
    assert labels is not None
    assert labels.names == ("bad", "good")


def test_labels_that_do_not_fit_the_head_are_refused(folder: Path, base: BaseSignature) -> None:
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}}))
    with pytest.raises(ShapeMismatch, match="another number of outputs"):
        load_adapter(folder, base)


def test_a_rank_that_contradicts_the_claim_is_noted(folder: Path, base: BaseSignature) -> None:
    change_config(folder, r=16)
    assert any("claims rank 16" in note for note in load_adapter(folder, base).notes)


def test_the_share_of_zeros_is_counted(folder: Path, base: BaseSignature) -> None:
    stored = load_file(folder / TENSOR_FILE)
    zeroed = {name: tensor.clone() for name, tensor in stored.items() if "hira_" in name}
    for tensor in zeroed.values():
        tensor.view(-1)[::2] = 0
    change_tensors(folder, zeroed)
    assert load_adapter(folder, base).sparsity == pytest.approx(0.5)


def test_a_pickle_is_refused_without_being_opened(folder: Path, base: BaseSignature) -> None:
    (folder / TENSOR_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(UnsafeFormat, match="pickle"):
        load_adapter(folder, base)
    torch.save({"x": torch.zeros(1)}, folder / TENSOR_FILE)
    with pytest.raises(UnsafeFormat, match="pickle"):
        load_adapter(folder, base)


def test_the_method_of_names_and_config_must_agree(folder: Path, base: BaseSignature) -> None:
    change_config(folder, peft_type="LORA", init_weights=None)
    with pytest.raises(UnsupportedMethod, match="contradict"):
        load_adapter(folder, base)


def test_tensors_of_no_layer_are_refused(folder: Path, base: BaseSignature) -> None:
    change_tensors(folder, {"base_model.model.nowhere.hira_A": torch.zeros(4, 64)})
    with pytest.raises(UnmatchedTensors, match="no layer"):
        load_adapter(folder, base)


@pytest.mark.parametrize("ending", ["hira_A", "hira_B", "classifier.weight"])
def test_missing_tensors_are_named(folder: Path, base: BaseSignature, ending: str) -> None:
    names = [name for name in load_file(folder / TENSOR_FILE) if name.endswith(ending)]
    change_tensors(folder, dict.fromkeys(names if "classifier" in ending else names[:1]))
    with pytest.raises(MissingTensors):
        load_adapter(folder, base)


def test_a_target_without_tensors_is_refused(folder: Path, base: BaseSignature) -> None:
    change_config(folder, target_modules=["q_lin", "v_lin", "k_lin"])
    with pytest.raises(MissingTensors, match="Targets"):
        load_adapter(folder, base)


@pytest.mark.parametrize("shape", [(0, 64), (4, 63), (64,), (4, 64, 1)])
def test_factors_that_do_not_fit_are_refused(
    folder: Path, base: BaseSignature, shape: tuple[int, ...]
) -> None:
    name, _ = first_tensor(folder, "hira_A")
    change_tensors(folder, {name: torch.zeros(shape)})
    with pytest.raises(ShapeMismatch):
        load_adapter(folder, base)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(folder: Path, base: BaseSignature, bad: float) -> None:
    name, tensor = first_tensor(folder, "hira_B")
    tensor = tensor.clone()
    tensor.view(-1)[-1] = bad
    change_tensors(folder, {name: tensor})
    with pytest.raises(NonFinite):
        load_adapter(folder, base)


def test_an_adapter_of_another_architecture_is_refused(folder: Path) -> None:
    with pytest.raises(BaseMismatch):
        load_adapter(folder, describe(build("bert"), "bert"))
    (folder / "config.json").unlink()
    with pytest.raises(BaseMismatch):
        load_adapter(folder, describe(build("bert"), "bert"))


def test_a_generation_adapter_on_a_masked_base_is_refused(
    folder: Path, base: BaseSignature
) -> None:
    change_config(folder, task_type="CAUSAL_LM")
    with pytest.raises(BaseMismatch, match="head"):
        load_adapter(folder, base)


def test_layers_of_the_base_saved_whole_are_refused(folder: Path, base: BaseSignature) -> None:
    change_config(folder, modules_to_save=["pre_classifier", "classifier", "k_lin"])
    name = "base_model.model.distilbert.transformer.layer.0.attention.k_lin.weight"
    change_tensors(folder, {name: torch.zeros(64, 64)})
    with pytest.raises(UnsupportedOption, match="saved whole"):
        load_adapter(folder, base)


def test_a_head_that_the_task_has_no_use_for_is_refused(folder: Path, base: BaseSignature) -> None:
    change_config(folder, task_type="FEATURE_EXTRACTION")
    with pytest.raises(UnsupportedOption, match="no use"):
        load_adapter(folder, base)


def test_faults_of_names_and_shapes_come_together(folder: Path, base: BaseSignature) -> None:
    name, _ = first_tensor(folder, "hira_A")
    change_tensors(
        folder, {name: torch.zeros(4, 1), "base_model.model.x.hira_A": torch.zeros(1, 1)}
    )
    with pytest.raises(AdapterFaults) as caught:
        load_adapter(folder, base)
    assert {fault.code for fault in caught.value.faults} == {"shape_mismatch", "unmatched_tensors"}


def test_a_folder_without_files_is_refused(tmp_path: Path, base: BaseSignature) -> None:
    with pytest.raises(CorruptFile, match="adapter_config"):
        load_adapter(tmp_path, base)


def test_two_tensors_for_one_place_are_refused(folder: Path, base: BaseSignature) -> None:
    name = "base_model.model.classifier.modules_to_save.default.weight"
    change_tensors(folder, {name: torch.zeros(2, 64)})
    with pytest.raises(CorruptFile, match="Two tensors"):
        load_adapter(folder, base)


def test_a_lora_rank_that_the_scale_contradicts_is_refused(
    tmp_path: Path, base: BaseSignature
) -> None:
    folder = change_config(lora_folder(tmp_path / "adapter"), r=8)
    with pytest.raises(AdapterFaults) as caught:
        load_adapter(folder, base)
    assert caught.value.code == "shape_mismatch"


@pytest.mark.parametrize("names", [["a", "a"], ["a", ""], ["a", "b\nc"], ["a", 3]])
def test_labels_that_are_no_names_are_refused(
    folder: Path, base: BaseSignature, names: list[object]
) -> None:
    labels = {str(index): name for index, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps({"id2label": labels}))
    with pytest.raises(CorruptFile, match="id2label"):
        load_adapter(folder, base)


@pytest.mark.parametrize("labels", [1e308, 3, [], [{}], [["a"]], {}, {"1": "a"}, "ab", True])
def test_labels_of_the_wrong_type_are_refused(
    folder: Path, base: BaseSignature, labels: object
) -> None:
    (folder / "config.json").write_text(json.dumps({"id2label": labels}))
    with pytest.raises(CorruptFile, match="id2label"):
        load_adapter(folder, base)


def test_a_folder_in_place_of_a_file_is_refused(folder: Path, base: BaseSignature) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(CorruptFile, match="regular"):
        load_adapter(folder, base)


def test_a_pipe_in_place_of_tensors_does_not_hang(folder: Path, base: BaseSignature) -> None:
    (folder / TENSOR_FILE).unlink()
    os.mkfifo(folder / TENSOR_FILE)
    with pytest.raises(CorruptFile, match="regular"):
        load_adapter(folder, base)


def header_of(content: Any, body: bytes = b"") -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw + body


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        header_of(b"[]"),
        header_of({"a": ENTRY}),
        header_of({"a": {**ENTRY, "dtype": "I8"}}, b"\0" * 4),
        header_of({"a": {**ENTRY, "dtype": ["F32"]}}, b"\0" * 4),
        header_of({"a": {**ENTRY, "shape": [-1]}}, b"\0" * 4),
        header_of({"a": {**ENTRY, "shape": [2]}}, b"\0" * 4),
        header_of({"a": {**ENTRY, "data_offsets": [0, 8]}}, b"\0" * 8),
        header_of({"a": {**ENTRY, "data_offsets": [4, 0]}}, b"\0" * 4),
        header_of({"a": {**ENTRY, "extra": 1}}, b"\0" * 4),
        header_of({"a": ENTRY}, b"\0" * 5),
        header_of({"a": ENTRY, "b": ENTRY}, b"\0" * 4),
        header_of({"a": {**ENTRY, "shape": [1 << 40, 1 << 40]}}, b"\0" * 4),
        header_of(b'{"a": 1, "a": 2}'),
        header_of({"__metadata__": {"x": 1}}),
    ],
)
def test_headers_that_lie_are_refused(folder: Path, base: BaseSignature, raw: bytes) -> None:
    (folder / TENSOR_FILE).write_bytes(raw)
    with pytest.raises(CorruptFile):
        load_adapter(folder, base)


def test_too_many_tensors_are_refused(folder: Path, base: BaseSignature) -> None:
    (folder / TENSOR_FILE).write_bytes(
        save({f"t{index}": torch.zeros(0) for index in range(MAX_TENSORS + 1)})
    )
    with pytest.raises(AdapterError, match="too many"):
        load_adapter(folder, base)


def test_a_file_cut_anywhere_is_refused(folder: Path, base: BaseSignature) -> None:
    whole = (folder / TENSOR_FILE).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    cuts = {0, 1, 7, 8, 9, 8 + length - 1, 8 + length, 8 + length + 1, len(whole) - 1}
    for cut in sorted(cuts):
        (folder / TENSOR_FILE).write_bytes(whole[:cut])
        with pytest.raises(AdapterError) as caught:
            load_adapter(folder, base)
        assert caught.value.code == "corrupt_file"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hira_folder(tmp_path_factory.mktemp("whole") / "adapter")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(flips=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_never_does_more_than_a_typed_error(
    whole: Path, tmp_path: Path, base: BaseSignature, flips: list[tuple[int, int]]
) -> None:
    raw = bytearray((whole / TENSOR_FILE).read_bytes())
    for place, value in flips:
        raw[place] = value
    (tmp_path / TENSOR_FILE).write_bytes(raw)
    for name in ("adapter_config.json", "config.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    with contextlib.suppress(AdapterError):  # anything else is a fault of ours
        assert len(load_adapter(tmp_path, base).factors) == 4
