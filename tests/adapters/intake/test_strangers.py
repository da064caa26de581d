"""Adapters as strangers save them: with copies of the base, odd names, or another program."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering, LlamaConfig, LlamaForCausalLM

from adapters.errors import (
    AdapterError,
    BaseMismatch,
    UnmatchedTensors,
    UnsafeFormat,
    UnsupportedMethod,
    UnsupportedOption,
)
from adapters.intake.checkpoint import CONFIG_FILE, load_adapter
from adapters.intake.config import parse_config
from adapters.intake.convert import convert
from adapters.intake.safetensors_header import TENSOR_FILE
from adapters.signature import TASK_PREFIXES, BaseSignature, describe
from server.base.load import signature_of
from tests.stand import tiny_bases
from tests.stand.folders import change_config, change_tensors, save_with_peft

# What PEFT says when it saves a copy of the base's weight, and when a target is tied to another.
pytestmark = pytest.mark.filterwarnings("ignore:.*save_embedding_layers", "ignore:.*tied")
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))


def base_of(model: Any, folder: Path) -> BaseSignature:
    """A base on disk, as a server knows it before any weight is read."""
    model.save_pretrained(folder)
    return signature_of(tiny_bases.options(folder, folder / "store"))


def lora(model: Any, folder: Path, *targets: str, **options: Any) -> Path:
    from peft import LoraConfig

    chosen: Any = {"r": 4, "target_modules": list(targets), "task_type": "CAUSAL_LM"} | options
    return save_with_peft(copy.deepcopy(model), LoraConfig(**chosen), folder)


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    tensors = load_file(folder / TENSOR_FILE)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / TENSOR_FILE)
    return folder


def on_meta(**changes: Any) -> BaseSignature:
    with torch.device("meta"):
        return describe(LlamaForCausalLM(LlamaConfig(**(SIZES | changes))), "small-llama")


# Copies of the base's own weight.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_true_copy_of_the_bases_weight_is_left_out(
    tmp_path: Path, tied: bool, target: str, dtype: torch.dtype
) -> None:
    model = llama(tie_word_embeddings=tied)
    base = base_of(model, tmp_path / "base")
    # A model loaded in another dtype than its file's has the file's weights, rounded.
    folder = lora(model.to(dtype), tmp_path / "a", target, "q_proj")
    weights = load_adapter(folder, base)
    assert len(weights.factors) == 3
    assert not weights.head
    assert any("the base's own" in note for note in weights.notes)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_another_weight_than_the_bases_is_refused(tmp_path: Path, target: str) -> None:
    model = llama()
    base = base_of(model, tmp_path / "base")
    folder = lora(model, tmp_path / "a", target, "q_proj")
    (name,) = [name for name in load_file(folder / TENSOR_FILE) if "base_layer" in name]
    changed = load_file(folder / TENSOR_FILE)[name]
    changed[3, 5] = torch.nextafter(changed[3, 5], torch.tensor(9.0))
    change_tensors(folder, {name: changed})
    with pytest.raises(UnsupportedOption, match="another one") as caught:
        load_adapter(folder, base)
    assert "1 of 6144 values" in str(caught.value.found)
    assert "that it was trained on" in str(caught.value.fix)
    change_tensors(folder, {name: torch.zeros(97, 64)})
    with pytest.raises(UnsupportedOption) as caught:
        load_adapter(folder, base)
    assert caught.value.expected == "shape (96, 64)"
    assert "resized" in str(caught.value.fix)


def test_untouched_embeddings_saved_on_purpose_are_left_out(tmp_path: Path) -> None:
    model = llama()
    base = base_of(model, tmp_path / "base")
    folder = lora(model, tmp_path / "a", "q_proj")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    state = model.state_dict()
    change_tensors(folder, {f"base_model.model.{name}": state[name].clone() for name in names})
    assert len(load_adapter(folder, base).factors) == 2
    change_tensors(folder, {f"base_model.model.{names[0]}": state[names[0]] + 1})
    with pytest.raises(UnsupportedOption, match="saved whole"):
        load_adapter(folder, base)


# Names.


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        (lambda name: name.replace("base_model.", "_orig_mod.base_model."), "_orig_mod"),
        (lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."), "_orig_mod"),
        (lambda name: f"module.{name}", "module"),
        (lambda name: name.replace(".0.", ".0._fsdp_wrapped_module."), "_fsdp_wrapped_module"),
        (lambda name: name.replace(".weight", ".mine.weight"), "mine"),
    ],
)
def test_parts_that_wrappers_and_adapters_leave_in_names_are_left_out(
    tmp_path: Path, change: Callable[[str], str], noted: str
) -> None:
    folder = rename(lora(llama(), tmp_path / "a", "q_proj"), change)
    weights = load_adapter(folder, on_meta())
    assert len(weights.factors) == 2
    assert any(noted in note for note in weights.notes)


def test_factors_of_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    folder = lora(llama(), tmp_path / "a", "q_proj")
    rename(folder, lambda name: name.replace(".weight", f".a{'.0.' in name}.weight"))
    with pytest.raises(AdapterError, match="several adapters"):
        load_adapter(folder, on_meta())


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda name: name.replace(".layers.", ".language_model.layers."), "language_model"),
        (lambda name: name.removeprefix("base_model.model."), "base_model.model."),
    ],
)
def test_a_part_too_many_or_missing_in_all_names_is_named(
    tmp_path: Path, change: Callable[[str], str], part: str
) -> None:
    folder = rename(lora(llama(), tmp_path / "a", "q_proj"), change)
    with pytest.raises(UnmatchedTensors) as caught:
        load_adapter(folder, on_meta())
    assert part in caught.value.message
    assert part in str(caught.value.fix)


def test_factors_that_do_nothing_are_noted(tmp_path: Path) -> None:
    folder = lora(llama(), tmp_path / "a", "q_proj")
    zeros = {
        name: torch.zeros_like(tensor)
        for name, tensor in load_file(folder / TENSOR_FILE).items()
        if "lora_B" in name
    }
    assert not load_adapter(folder, on_meta()).notes
    (note,) = load_adapter(change_tensors(folder, dict(zeros)), on_meta()).notes
    assert "every B is zero" in note


# Bases.


@pytest.mark.parametrize(
    ("own", "found", "expected"),
    [
        ({"num_hidden_layers": 3}, "3 layers", "2 layers"),
        ({"num_hidden_layers": 1}, "1 layers", "2 layers"),
        ({"hidden_size": 128}, "q_proj 128 to 128", "64 to 64"),
        ({"hidden_size": 128, "num_hidden_layers": 4}, "4 layers", "2 layers"),
    ],
)
def test_an_adapter_of_a_sibling_is_told_so(
    tmp_path: Path, own: dict[str, Any], found: str, expected: str
) -> None:
    folder = lora(llama(**own), tmp_path / "a", "q_proj", "down_proj")
    with pytest.raises(BaseMismatch, match="made for another base") as caught:
        load_adapter(folder, on_meta())
    assert found in str(caught.value.found)
    assert expected in str(caught.value.expected)
    assert "its own base" in str(caught.value.fix)


def test_question_answering_on_a_decoder_is_matched(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = AutoModelForQuestionAnswering.from_config(LlamaConfig(**SIZES))
    config = LoraConfig(
        r=4, target_modules=["q_proj", "embed_tokens"], task_type="QUESTION_ANS",
        modules_to_save=["qa_outputs"],
    )  # fmt: skip
    folder = save_with_peft(model, config, tmp_path / "a")
    tensors = load_file(folder / TENSOR_FILE)
    assert any(name.startswith("base_model.model.transformer.") for name in tensors)
    copied = "base_model.model.transformer.embed_tokens.base_layer.weight"
    change_tensors(folder, {copied: None})
    weights = load_adapter(folder, on_meta())
    assert weights.task == "question-answering"
    assert set(weights.factors) == {
        "model.embed_tokens",
        *(f"model.layers.{index}.self_attn.q_proj" for index in range(2)),
    }
    assert set(weights.head) == {"qa_outputs.weight", "qa_outputs.bias"}
    assert any("keeps its backbone elsewhere" in note for note in weights.notes)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "smollm3", "nemotron", "gpt2"])
def test_backbones_of_task_classes_are_where_the_table_says(model_type: str) -> None:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    own = getattr(transformers, names[model_type]).base_model_prefix
    for mapping in (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ):
        if model_type in mapping:
            prefix = getattr(transformers, mapping[model_type]).base_model_prefix
            assert prefix in (own, *TASK_PREFIXES)


# Other programs and methods.


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "SHIRA", "r": 32}, "SHiRA"),
        ({"peft_type": "HRA", "r": 8}, "Householder"),
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}, "mlx-lm"),
        ({"config": {"architecture": "lora"}, "model_class": "BertModel"}, "AdapterHub"),
        ({"peft_type": "LORA", "r_ab": 32, "lora_alpha": 32}, "hira convert"),
        ({"peft_type": "LORA", "r_ab": 32, "rand_R": True}, "random matrix"),
    ],
)
def test_what_looks_like_an_adapter_of_peft_is_named(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(UnsupportedMethod) as caught:
        load_adapter(tmp_path, on_meta())
    assert said in str(caught.value)


def test_a_sequence_to_sequence_task_says_what_to_do(tmp_path: Path) -> None:
    folder = change_config(lora(llama(), tmp_path / "a", "q_proj"), task_type="SEQ_2_SEQ_LM")
    with pytest.raises(UnsupportedOption, match="CAUSAL_LM"):
        load_adapter(folder, on_meta())


# The HiRA authors' own checkpoints.


def of_the_authors(folder: Path, model: Any, **changes: Any) -> dict[str, torch.Tensor]:
    """A checkpoint as their code saves it: a pickle, names without weight, an unused alpha."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "v_proj")):
            out, width = module.weight.shape
            for side, shape in (("A", (3, width)), ("B", (out, 3))):
                made = torch.randn(shape, generator=generator) * 0.3
                tensors[f"base_model.model.{path}.lora_{side}"] = made
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r_ab": 3, "lora_alpha": 32, "bias": "none",
        "scale_ab": 7.0, "init_a": "kaiming", "init_b": "zero", "rand_R": False, "train_a": True,
        "train_b": True, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05,
        "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True,
        "inference_mode": True, "base_model_name_or_path": "small",
    } | changes  # fmt: skip
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    torch.save(tensors, folder / "adapter_model.bin")
    return tensors


def test_a_converted_checkpoint_is_the_authors_forward_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model = llama().double()
    tensors = of_the_authors(tmp_path / "theirs", model)
    made = convert(tmp_path / "theirs", tmp_path / "ours")
    assert (made.layers, made.ranks) == (4, (3,))
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        for path, module in wanted.named_modules():
            if path.endswith(("q_proj", "v_proj")):
                a, b = (tensors[f"base_model.model.{path}.lora_{side}"].double() for side in "AB")
                module.weight.mul_(1 + b @ a)
        ids = torch.arange(9)[None]
        served: Any = PeftModel.from_pretrained(model, tmp_path / "ours")
        torch.testing.assert_close(
            served.double()(ids).logits, wanted(ids).logits, rtol=0, atol=1e-12
        )


def test_a_converted_checkpoint_is_accepted_number_for_number(tmp_path: Path) -> None:
    tensors = of_the_authors(tmp_path / "theirs", llama())
    convert(tmp_path / "theirs", tmp_path / "ours")
    weights = load_adapter(tmp_path / "ours", on_meta())
    assert weights.config.method == "hira"
    for path, factors in weights.factors.items():
        assert torch.equal(factors.a, tensors[f"base_model.model.{path}.lora_A"])
        assert torch.equal(factors.b, tensors[f"base_model.model.{path}.lora_B"])
        assert factors.scale == 1.0
    with pytest.raises(FileExistsError):
        convert(tmp_path / "theirs", tmp_path / "ours")


def test_targets_that_the_authors_match_by_any_ending_are_spelled_out(tmp_path: Path) -> None:
    of_the_authors(tmp_path / "theirs", llama(), target_modules=["q_proj", "_proj"])
    convert(tmp_path / "theirs", tmp_path / "ours")
    config = parse_config((tmp_path / "ours" / CONFIG_FILE).read_bytes())
    assert config.targets("model.layers.1.self_attn.v_proj")
    assert load_adapter(tmp_path / "ours", on_meta()).factors


def test_a_random_matrix_is_refused_by_name_and_by_tensor(tmp_path: Path) -> None:
    tensors = of_the_authors(tmp_path / "claimed", llama(), rand_R=True)
    of_the_authors(tmp_path / "silent", llama())
    torch.save(tensors | {f"{FIRST}.lora_R": torch.ones(64, 64)}, tmp_path / "silent" / BIN)
    for name in ("claimed", "silent"):
        with pytest.raises(UnsupportedMethod, match="rand_R"):
            convert(tmp_path / name, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


BIN = "adapter_model.bin"


def test_a_pickle_of_more_than_tensors_is_not_read(tmp_path: Path) -> None:
    of_the_authors(tmp_path / "theirs", llama())
    torch.save({f"{FIRST}.lora_A": Path("harmless")}, tmp_path / "theirs" / BIN)
    with pytest.raises(UnsafeFormat, match="more than tensors"):
        convert(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"bias": "lora_only"}, "unsupported_option"), ({"bias": "all"}, "unsupported_option")],
)
def test_what_hira_in_peft_does_not_have_is_not_converted(
    tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    of_the_authors(tmp_path / "theirs", llama(), **changes)
    with pytest.raises(AdapterError) as caught:
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert caught.value.code == code


def test_an_adapter_of_peft_is_not_converted(tmp_path: Path) -> None:
    folder = lora(llama(), tmp_path / "a", "q_proj")
    with pytest.raises(UnsupportedMethod, match="r_ab"):
        convert(folder, tmp_path / "ours")


def test_the_command_converts_and_says_what_is_wrong(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from server.cli.main import app

    of_the_authors(tmp_path / "theirs", llama())
    arguments = ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "4 layers, rank 3" in done.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "exists already" in again.stderr
