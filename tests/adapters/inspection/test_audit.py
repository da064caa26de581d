from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import CorruptFile, UnsafeFormat
from adapters.inspection.audit import audit
from adapters.intake.checkpoint import CONFIG_FILE
from adapters.intake.safetensors_header import TENSOR_FILE
from tests.adapters.inspection.test_cards import about, card, subjects
from tests.stand.folders import (
    change_config,
    change_tensors,
    first_tensor,
    hira_folder,
    lora_folder,
    save_with_peft,
    small_base,
)

UNCASED = ("distilbert-base-uncased",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hira_folder(tmp_path / "adapter", labels=3)


def test_an_honest_folder_has_no_contradiction(folder: Path) -> None:
    report = audit(folder)
    proof = report.tensors
    assert report.contradictions == ()
    assert proof is not None
    assert (proof.method, proof.layers) == ("hira", 4)
    assert proof.ranks == {"q_lin": (4,), "v_lin": (4,)}
    assert proof.factor_parameters == 4 * 4 * (64 + 64)
    assert proof.head_parameters == 64 * 64 + 64 + 64 * 3 + 3
    assert (proof.head, proof.outputs) == (("classifier", "pre_classifier"), 3)
    assert proof.dtypes == {"float32": 8 + 4 - 4 + 4}
    assert proof.tensor_bytes == 4 * proof.parameters
    assert proof.sparsity == 0.0
    assert audit(folder, small_base()).contradictions == ()


def test_sparsity_and_dtype_are_measured(folder: Path) -> None:
    name, tensor = first_tensor(folder, "hira_A")
    change_tensors(folder, {name: torch.zeros_like(tensor, dtype=torch.bfloat16)})
    proof = audit(folder).tensors
    assert proof is not None
    assert proof.sparsity == pytest.approx(1 / 8)
    assert proof.dtypes["bfloat16"] == 1


def test_a_rank_that_the_tensors_do_not_have_is_a_contradiction(folder: Path) -> None:
    report = audit(change_config(folder, r=8))
    finding = about(report, "rank")
    assert finding.claim.startswith("r = 8")
    assert finding.proof == "r = 4"


def test_lora_tensors_under_a_hira_configuration_are_a_contradiction(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "adapter")
    content = json.loads((folder / CONFIG_FILE).read_text())
    kept = ("r", "target_modules", "modules_to_save", "task_type", "base_model_name_or_path")
    changed = {"peft_type": "HIRA", **{name: content[name] for name in kept}}
    (folder / CONFIG_FILE).write_text(json.dumps(changed))
    assert subjects(audit(folder)) == {"method"}
    assert "unsupported_method" in subjects(audit(folder, small_base()))


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"target_modules": ["q_lin", "v_lin", "lin1"]}, "targets"),
        ({"target_modules": ["q_lin"]}, "targets"),
        ({"modules_to_save": ["score"]}, "head"),
        ({"base_model_name_or_path": "bert-base-uncased"}, "base model"),
        ({"peft_type": "IA3"}, "unsupported_method"),
        ({"some_option": 1}, "unsupported_option"),
        ({"r": "eight"}, "corrupt_file"),
    ],
)
def test_what_the_configuration_says_wrongly_is_found(
    folder: Path, changes: dict[str, Any], subject: str
) -> None:
    assert subjects(audit(change_config(folder, **changes))) == {subject}


def test_a_missing_configuration_is_found(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    report = audit(folder)
    assert subjects(report) == {"corrupt_file"}
    assert report.tensors is not None


def test_labels_that_the_head_does_not_have_are_found(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b"}}))
    assert subjects(audit(folder)) == {"labels"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_found(folder: Path, value: float) -> None:
    name, tensor = first_tensor(folder, "hira_B")
    change_tensors(folder, {name: torch.full_like(tensor, value)})
    assert subjects(audit(folder)) == {"non_finite"}


def test_factors_that_have_no_product_are_found(folder: Path) -> None:
    name, tensor = first_tensor(folder, "hira_B")
    change_tensors(folder, {name: tensor[:, :2].contiguous()})
    assert subjects(audit(folder)) == {"factors"}
    change_tensors(folder, {name: None})
    assert "factors" in subjects(audit(folder))


def test_a_card_is_held_against_the_tensors(folder: Path) -> None:
    text = card("bert-base-uncased", 8, "query", (10, 20), "- **Method:** LoRA\nSparsity: 50%")
    change_config(folder, base_model_name_or_path="small")
    found = subjects(audit(folder, card=text))
    assert found >= {"rank", "targets", "trainable", "method", "sparsity", "base model"}


def test_an_honest_card_beside_its_adapter_has_no_contradiction(tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    torch.manual_seed(0)
    model = DistilBertForMaskedLM(DistilBertConfig())
    config = LoraConfig(r=8, target_modules=["q_lin", "v_lin"])
    made = save_with_peft(model, config, tmp_path / "adapter")
    change_config(made, base_model_name_or_path="distilbert/distilbert-base-uncased")
    text = card("distilbert-base-uncased", 8, "q_lin, v_lin", (147_456, 67_132_986))
    report = audit(made, card=text)
    assert report.contradictions == ()
    assert report.tensors is not None
    assert report.tensors.fits[:1] == UNCASED
    assert "bert-base-uncased" not in report.tensors.fits


def test_nothing_can_be_proved_without_readable_tensors(folder: Path) -> None:
    (folder / TENSOR_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(UnsafeFormat):
        audit(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CorruptFile):
        audit(folder)


@pytest.mark.parametrize("with_card", [True, False])
def test_a_report_is_json(folder: Path, with_card: bool) -> None:
    text = card("distilbert-base-uncased", 8, "q_lin, v_lin", (147_456, 67_132_986))
    report = audit(folder, small_base(), text if with_card else None)
    content = json.loads(json.dumps(report.to_json_dict()))
    assert content["tensors"]["method"] == "hira"
    assert content["contradictions"] == len(report.contradictions)
    if with_card:
        assert content["fit"]["rank"] == 8
        assert content["fits_total"] >= len(content["fits"]) > 0
