"""Classifiers whose head has names of the base's language-model head, against PEFT alone.

ModernBERT's is the case: its classifiers begin with the ``head`` that its language model has too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    EuroBertConfig,
    EuroBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from adapters.errors import MissingTensors, UnsupportedOption
from adapters.intake.checkpoint import load_adapter
from server.base.load import load_base, signature_of
from server.base.plan import plan_base
from server.base.skeletons import Skeletons, beside_backbone
from server.engine.engine import Engine
from server.messages import EncodeRequest, TokenizedInput
from tests.stand import tiny_bases

LABELS = ("x", "y", "z")
TEXTS = ([2, 5, 6, 7, 8, 3], [2, 9, 3], [2, 11, 12, 13, 14, 15, 16, 3])
SIZES: dict[str, Any] = {
    "vocab_size": tiny_bases.VOCABULARY, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 3, "max_position_embeddings": 48,
}  # fmt: skip


def base_of(folder: Path, kind: str) -> Path:
    """A masked language model whose head differs from what a new model draws."""
    torch.manual_seed(0)
    model: Any
    if kind == "modernbert":
        config: Any = ModernBertConfig(**SIZES, cls_token_id=2, sep_token_id=3)
        model = ModernBertForMaskedLM(config)
    else:
        model = EuroBertForMaskedLM(EuroBertConfig(**SIZES, num_key_value_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / kind)
    tiny_bases.tokenizer("bert").save_pretrained(folder / kind)
    return folder / kind


def saved(folder: Path, base: Path, factory: Any, modules: list[str], targets: list[str]) -> Path:
    """An adapter as PEFT saves it; PEFT itself adds ``classifier`` and ``score`` to the modules."""
    torch.manual_seed(1)
    whole = factory.from_pretrained(base, num_labels=len(LABELS), dtype=torch.float32)
    whole.config.id2label = dict(enumerate(LABELS))
    task_type = "SEQ_CLS" if "Sequence" in factory.__name__ else "TOKEN_CLS"
    config = LoraConfig(target_modules=targets, modules_to_save=modules, task_type=task_type)
    model: Any = get_peft_model(whole, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    whole.config.save_pretrained(folder)
    return folder


def check_head(base: Path, folder: Path) -> None:
    """What a registration does, without any weights of the base."""
    options = tiny_bases.options(base, base / "none")
    plan, signature = plan_base(options), signature_of(options)
    beside = beside_backbone(plan.skeleton(), signature.prefix)
    skeletons = Skeletons(plan.config, signature.vocab_size, has_pooler=False, beside=beside)
    skeletons.check(load_adapter(folder, signature))


def answers(base: Path, store: Path, folder: Path, task: Any) -> list[Any]:
    engine = Engine.build(tiny_bases.options(base, store))
    try:
        version = tiny_bases.stored(store, folder)
        items = tuple(TokenizedInput(tuple(ids)) for ids in TEXTS)
        options: dict[str, Any] = {"function_to_apply": "none"}
        if task == "token-classification":
            items = tuple(
                TokenizedInput(
                    tuple(ids), "a" * len(ids), tuple((i, i + 1) for i in range(len(ids)))
                )
                for ids in TEXTS
            )
            options = {"aggregation_strategy": "none", "ignore_labels": []}
        result: Any = engine.run(EncodeRequest("r", task, version, version, items, None, options))
        return list(result.outputs)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("modernbert", []),  # its head is the base's own, as transformers fills it
        ("modernbert", ["head", "classifier"]),  # a head of its own under the same names
        ("eurobert", ["dense", "classifier"]),
    ],
)
def test_a_classifier_is_peft_alone(tmp_path: Path, kind: str, modules: list[str]) -> None:
    base = base_of(tmp_path, kind)
    targets = ["Wqkv"] if kind == "modernbert" else ["q_proj", "v_proj"]
    factory = AutoModelForSequenceClassification
    folder = saved(tmp_path / "adapter", base, factory, modules, targets)
    check_head(base, folder)
    whole: Any = factory.from_pretrained(base, num_labels=len(LABELS), dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(whole, folder).eval()
    for found, ids in zip(
        answers(base, tmp_path / "store", folder, "text-classification"), TEXTS, strict=True
    ):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids])).logits[0]
        scores = {one["label"]: one["score"] for one in found}
        got = torch.tensor([scores[label] for label in LABELS])
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)


def test_a_token_classifier_is_peft_alone(tmp_path: Path) -> None:
    base = base_of(tmp_path, "modernbert")
    factory = AutoModelForTokenClassification
    folder = saved(tmp_path / "adapter", base, factory, [], ["Wqkv"])
    whole: Any = factory.from_pretrained(base, num_labels=len(LABELS), dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(whole, folder).eval()
    for found, ids in zip(
        answers(base, tmp_path / "store", folder, "token-classification"), TEXTS, strict=True
    ):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        best = wanted.max(-1)
        for entity in found:
            at = entity["start"]
            assert entity["entity"] == LABELS[int(best.indices[at])]
            assert entity["score"] == pytest.approx(float(best.values[at]), abs=1e-4)


def test_a_quantized_base_gives_its_head_too(tmp_path: Path) -> None:
    base = base_of(tmp_path, "modernbert")
    loaded = load_base(tiny_bases.options(base, tmp_path / "store", quantization="nf4"))
    signature = loaded.adapted.signature
    options = tiny_bases.options(base, tmp_path / "none")
    beside = beside_backbone(loaded.model, signature.prefix)
    assert beside == beside_backbone(plan_base(options).skeleton(), signature.prefix)


def test_what_nobody_has_is_refused_by_name(tmp_path: Path) -> None:
    base = base_of(tmp_path, "eurobert")
    factory = AutoModelForSequenceClassification
    folder = saved(tmp_path / "adapter", base, factory, [], ["q_proj"])
    with pytest.raises(MissingTensors, match=r"dense\.weight"):
        check_head(base, folder)


def test_factors_of_the_head_are_refused_by_name(tmp_path: Path) -> None:
    base = base_of(tmp_path, "modernbert")
    factory = AutoModelForSequenceClassification
    folder = saved(tmp_path / "adapter", base, factory, [], ["Wqkv", "dense"])
    with pytest.raises(UnsupportedOption, match=r"head\.dense"):
        check_head(base, folder)


def test_a_bare_backbone_has_no_head_to_give(tmp_path: Path) -> None:
    base = base_of(tmp_path, "modernbert")
    folder = saved(tmp_path / "adapter", base, AutoModelForSequenceClassification, [], ["Wqkv"])
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    ModernBertForMaskedLM.from_pretrained(base).base_model.save_pretrained(bare)
    with pytest.raises(MissingTensors, match=r"head\.dense"):
        check_head(bare, folder)
