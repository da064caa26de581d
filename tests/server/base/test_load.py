"""What is loaded as a base, how it is stored, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import segments
from adapters.layers.adapted import AdaptedLinear
from server.base.load import BaseModelError, choose_dtype, load_base, signature_of
from server.base.plan import plan_base
from tests.stand import tiny_bases

KINDS = ("distilbert", "bert", "bert-without-pooler", "bert-backbone", "llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny_bases.base_folder(root, kind) for kind in KINDS}


def options(base: Path, **changes: Any) -> Any:
    return tiny_bases.options(base, base.parent / "store", **changes)


def copied(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    known = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(known | config))
    return target


def refused(base: Path | str, **changes: Any) -> BaseModelError:
    with pytest.raises(BaseModelError) as caught:
        load_base(options(Path(base), **changes))
    assert caught.value.code == "base_unusable"
    assert caught.value.found
    assert caught.value.expected
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_signature_without_weights_equals_that_of_the_loaded_base(
    folders: dict[str, Path], kind: str, quantization: str
) -> None:
    chosen = options(folders[kind], quantization=quantization)
    loaded = load_base(chosen)
    assert signature_of(chosen) == loaded.adapted.signature
    assert not any(parameter.is_meta for parameter in loaded.model.parameters())
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("kind", "architecture", "has_pooler"),
    [
        ("distilbert", "DistilBertForMaskedLM", False),
        ("bert", "BertForMaskedLM", True),
        ("bert-without-pooler", "BertForMaskedLM", False),
        ("bert-backbone", "BertModel", True),
        ("llama", "LlamaForCausalLM", False),
    ],
)
def test_the_language_model_head_and_the_pooler_come_along_where_the_checkpoint_has_them(
    folders: dict[str, Path], kind: str, architecture: str, has_pooler: bool
) -> None:
    loaded = load_base(options(folders[kind]))
    assert loaded.adapted.signature.architecture == architecture
    assert (getattr(loaded.backbone, "pooler", None) is not None) == has_pooler
    assert loaded.generates == (kind == "llama")
    if kind == "bert":
        stored = load_file(folders[kind] / "model.safetensors")["bert.pooler.dense.weight"]
        assert torch.equal(loaded.backbone.pooler.dense.weight, stored)


def test_a_bare_backbone_without_pooler_weights_gets_no_random_pooler(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    base = copied(folders["bert-backbone"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    loaded = load_base(options(base))
    assert loaded.backbone.pooler is None
    assert signature_of(options(base)) == loaded.adapted.signature


def test_a_classifier_checkpoint_is_loaded_as_its_backbone(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(folders["bert"])
    model.save_pretrained(tmp_path / "base")
    loaded = load_base(options(tmp_path / "base"))
    signature = loaded.adapted.signature
    assert signature.architecture == "BertModel"
    for path in ("bert.encoder.layer.0.output.dense", "encoder.layer.0.output.dense"):
        assert signature.resolve(path) is not None, "adapters of a task class, and of a backbone"
    assert signature_of(options(tmp_path / "base")) == signature
    assert loaded.backbone.pooler is not None


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_every_linear_layer_of_the_backbone_is_quantized_and_nothing_else(
    folders: dict[str, Path], kind: str, quantization: str
) -> None:
    loaded = load_base(options(folders[kind], quantization=quantization, dtype="bf16"))
    prefix = f"{loaded.model.base_model_prefix}."
    seen = set()
    for path, layer in loaded.adapted.layers.items():
        if isinstance(layer, AdaptedLinear):
            inside = path.startswith(prefix)
            assert layer.quantized.kind == (quantization if inside else "dense"), path
            seen.add(inside)
    assert seen == {True, False}
    assert loaded.dtype == torch.bfloat16


def test_a_checkpoint_quantized_already_is_loaded_as_it_is(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        folders["llama"],
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["lm_head"]
        ),
    )
    model.save_pretrained(tmp_path / "base")
    loaded = load_base(options(tmp_path / "base", quantization="nf4"))
    fresh = load_base(options(folders["llama"], quantization="fp4"))
    path = "model.layers.0.mlp.down_proj"
    one, other = (x.adapted.layers[path].quantized for x in (loaded, fresh))  # type: ignore[attr-defined]
    assert one.kind == "fp4"
    assert torch.equal(one.stored, other.stored)
    assert signature_of(options(tmp_path / "base")) == loaded.adapted.signature


def test_auto_dtype_follows_the_processor(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, cpu = options(folders["llama"], dtype="auto"), torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert choose_dtype(chosen, cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert choose_dtype(chosen, cpu) == torch.float32


def test_what_cannot_be_a_base_is_refused_with_the_reason(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    llama = folders["llama"]
    assert "does not exist" in refused(tmp_path / "absent").message
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty").message
    unknown = copied(llama, tmp_path / "unknown", model_type="nobody-knows")
    assert "config.json" in refused(unknown).message
    t5 = copied(llama, tmp_path / "t5", model_type="t5", architectures=["T5Model"])
    assert "Encoder-decoder" in refused(t5).message
    pickled = copied(llama, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pytorch_model.bin" in str(refused(pickled).found)
    broken = copied(llama, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "cannot be read" in refused(broken).message
    (broken / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors"}})
    )
    assert "incomplete" in refused(broken).message
    awq = copied(llama, tmp_path / "awq", quantization_config={"quant_method": "awq"})
    assert refused(awq).found == "awq"


def test_weights_that_are_missing_or_misshapen_are_refused_and_never_random(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    base = copied(folders["llama"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in str(refused(base).found)
    tensors["model.layers.1.mlp.up_proj.weight"] = lost[:-1].contiguous()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused(base)


def test_a_base_larger_than_memory_is_refused_before_it_is_loaded(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    error = refused(folders["llama"], quantization="none")
    assert "memory" in error.message
    assert "nf4" in str(error.fix)


def test_cuda_that_is_not_there_is_refused(folders: dict[str, Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert "CUDA" in refused(folders["llama"], device="cuda").message


def test_a_plan_reads_no_weights(folders: dict[str, Path]) -> None:
    model = plan_base(options(folders["bert"])).skeleton()
    assert all(parameter.is_meta for parameter in model.parameters())


QUANTIZED: dict[str, dict[str, Any]] = {
    "8 bit": {"load_in_8bit": True},
    "4 bit FP4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "4 bit NF4, double quantization": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}


@pytest.mark.parametrize("storage", QUANTIZED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_quantized_checkpoint_left_plain_has_the_dtype_asked_for(
    folders: dict[str, Path], tmp_path: Path, storage: str, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"], **QUANTIZED[storage])
    model: Any = AutoModelForCausalLM.from_pretrained(
        folders["llama"], dtype=torch.float16, quantization_config=config
    )
    model.save_pretrained(tmp_path / "base")
    loaded = load_base(options(tmp_path / "base", dtype=dtype))
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    plain = [one for one in loaded.model.parameters() if type(one) is torch.nn.Parameter]
    assert {one.dtype for one in plain if one.is_floating_point()} == {wanted}
    assert (loaded.dtype, loaded.model.dtype, loaded.storage) == (wanted, wanted, storage)
    if dtype == "fp32":
        _assert_exact(loaded)


def _assert_exact(loaded: Any) -> None:
    """The base's logits are those of its dequantized weights in float64."""
    from transformers import LlamaForCausalLM

    config = type(loaded.config).from_dict(loaded.config.to_dict())
    del config.quantization_config
    oracle: Any = LlamaForCausalLM(config).eval()
    known = dict(loaded.model.named_parameters())
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            path = name.removesuffix(".weight")
            layer = loaded.adapted.layers.get(path)
            dense = (
                layer.quantized.dequantize() if isinstance(layer, AdaptedLinear) else known[name]
            )
            parameter.copy_(dense)
        ids = torch.tensor([[2, 7, 11, 5, 9]])
        wanted = oracle.double()(ids).logits
        with loaded.adapted.batch(segments.from_runs([(segments.BASE_SLOT, 5)])):
            got = loaded.model(ids).logits
    assert torch.allclose(got.double(), wanted, atol=1e-4, rtol=1e-5), (got - wanted).abs().max()


@pytest.mark.parametrize(
    ("quantization", "double_quant", "storage"),
    [
        ("nf4", True, "4 bit NF4, double quantization"),
        ("fp4", False, "4 bit FP4"),
        ("int8", True, "8 bit"),
        ("none", True, "not quantized"),
    ],
)
def test_the_storage_that_is_told_is_that_of_what_was_loaded(
    folders: dict[str, Path], quantization: Any, double_quant: bool, storage: str
) -> None:
    chosen = options(folders["llama"], quantization=quantization, double_quant=double_quant)
    assert load_base(chosen).storage == storage
