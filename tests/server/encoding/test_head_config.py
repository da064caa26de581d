"""What an adapter's own config.json says of its head, against PEFT on the same files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, ModernBertConfig, ModernBertModel

from adapters.errors import CorruptFile, UnsupportedOption
from adapters.intake.checkpoint import load_adapter
from adapters.registry.store import version_of
from server.base.load import load_base
from server.engine.engine import Engine
from server.messages import EncodeRequest, EncodeResult, TokenizedInput
from tests.stand import tiny_bases

LABELS = ("x", "y", "z")
END = 3  # [SEP], the tokenizer's end token


def change(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A base whose config has no pad_token_id, as most decoders are published."""
    return change(tiny_bases.base_folder(tmp_path, "llama"), pad_token_id=None)


@contextmanager
def serving(base: Path, store: Path) -> Iterator[Engine]:
    engine = Engine.build(tiny_bases.options(base, store))
    try:
        yield engine
    finally:
        engine.close()


def logits_of(engine: Engine, version: str, ids: list[int]) -> torch.Tensor:
    result = engine.run(
        EncodeRequest(
            "r", "text-classification", version, version, (TokenizedInput(tuple(ids)),),
            options={"function_to_apply": "none"},
        )
    )  # fmt: skip
    assert isinstance(result, EncodeResult)
    scores = {one["label"]: one["score"] for one in result.outputs[0]}
    return torch.tensor([scores[label] for label in LABELS])


def peft_logits(base: Path, folder: Path, ids: list[int], **config: Any) -> torch.Tensor:
    whole: Any = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, num_labels=len(LABELS), **config
    )
    model: Any = PeftModel.from_pretrained(whole, folder).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("pad", [END, None, 5])
def test_a_decoder_classifier_reads_the_token_that_its_own_padding_id_leaves(
    tmp_path: Path, decoder: Path, pad: int | None
) -> None:
    folder = tiny_bases.adapter(
        tmp_path / "adapter", decoder, "text-classification", method="lora", labels=LABELS
    )
    change(folder, pad_token_id=pad)
    with serving(decoder, tmp_path / "store") as engine:
        version = tiny_bases.stored(tmp_path / "store", folder)
        for ids in ([2, 5, 6, 7, END], [2, 8, 9, 5], [2, 8, 9, END, END]):
            wanted = peft_logits(decoder, folder, ids, pad_token_id=pad)
            got = logits_of(engine, version, ids)
            torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)


def test_adapters_with_different_padding_ids_share_a_base(tmp_path: Path, decoder: Path) -> None:
    made = tiny_bases.adapter(
        tmp_path / "adapter", decoder, "text-classification", method="lora", labels=LABELS
    )
    with serving(decoder, tmp_path / "store") as engine:
        found = []
        for pad in (None, END):
            version = tiny_bases.stored(tmp_path / "store", change(made, pad_token_id=pad))
            found.append(logits_of(engine, version, [2, 5, 6, 7, END]))
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_heads_own_pooling_and_activation_are_used(tmp_path: Path, pooling: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": tiny_bases.VOCABULARY, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0, "cls_token_id": 2,
        "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "max_position_embeddings": 48,
    }  # fmt: skip
    base = tmp_path / "modernbert"
    ModernBertModel(ModernBertConfig(**sizes)).save_pretrained(base)
    tiny_bases.tokenizer("bert").save_pretrained(base)
    own = {"classifier_pooling": pooling, "classifier_activation": "relu"}
    whole: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, **own)
    whole.config.id2label = dict(enumerate(LABELS))
    config = LoraConfig(target_modules=["Wqkv"], modules_to_save=["head", "classifier"],
                        task_type="SEQ_CLS")  # fmt: skip
    model: Any = get_peft_model(whole, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0.0, 0.3)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    whole.config.save_pretrained(folder)
    ids = [2, 5, 6, 7, 8, 3]
    with serving(base, tmp_path / "store") as engine:
        got = logits_of(engine, tiny_bases.stored(tmp_path / "store", folder), ids)
    torch.testing.assert_close(got, peft_logits(base, folder, ids, **own), atol=2e-4, rtol=1e-4)


def test_a_head_that_the_family_cannot_build_is_refused_by_name(
    tmp_path: Path, decoder: Path
) -> None:
    folder = tiny_bases.adapter(tmp_path / "adapter", decoder, "text-classification", labels=LABELS)
    base = load_base(tiny_bases.options(decoder, tmp_path))
    signature = base.adapted.signature
    with pytest.raises(CorruptFile, match="pad_token_id"):
        load_adapter(change(folder, pad_token_id="</s>"), signature)
    with pytest.raises(CorruptFile, match="classifier_pooling"):
        load_adapter(change(folder, pad_token_id=0, classifier_pooling=["cls"]), signature)


def test_a_pooling_that_no_head_has_is_refused_by_name(tmp_path: Path) -> None:
    from server.base.skeletons import Skeletons
    from tests.server.base.test_skeletons import weights

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    skeletons = Skeletons(ModernBertConfig(**sizes), 50, has_pooler=False)
    with pytest.raises(UnsupportedOption, match="classifier_pooling = 'max'"):
        skeletons.check(weights(head_config={"classifier_pooling": "max"}))


def test_what_the_config_says_of_the_body_is_noted_where_the_base_says_other(
    tmp_path: Path, decoder: Path
) -> None:
    folder = tiny_bases.adapter(tmp_path / "adapter", decoder, "text-classification", labels=LABELS)
    base = load_base(tiny_bases.options(decoder, tmp_path))
    signature = base.adapted.signature
    assert load_adapter(folder, signature).notes == ()
    change(folder, rms_norm_eps=0.5, rope_theta=7.0, attention_dropout=0.5, use_cache=False)
    notes = load_adapter(folder, signature).notes
    assert [note.split(" = ")[0] for note in notes] == [
        "config.json says rms_norm_eps",
        "config.json says rope_theta",
    ]


def test_a_version_is_another_where_the_head_is_read_otherwise(
    tmp_path: Path, decoder: Path
) -> None:
    folder = tiny_bases.adapter(tmp_path / "adapter", decoder, "text-classification", labels=LABELS)
    versions = {version_of(change(folder, pad_token_id=pad)) for pad in (None, 0, END)}
    assert len(versions) == 3
    assert version_of(change(folder, use_cache=False)) in versions
