"""Tiny bases in folders of their own, adapters made for them by PEFT, and dense float64 answers.

The reference is the task class of transformers in float64 with W ⊙ (1 + B A), or W + s B A, written
over its weights: it shares with the engine neither the layers, nor the batching, nor the heads.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from adapters.store import Store
from server.options import EngineOptions

WORDS = ["a", "fine", "dull", "film", "by", "ann", "in", "paris", "##ly", "not", "very", "good"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 96
IMAGE_SIDE = 16
TASK_TYPES = {
    "text-classification": ("SEQ_CLS", AutoModelForSequenceClassification),
    "token-classification": ("TOKEN_CLS", AutoModelForTokenClassification),
    "question-answering": ("QUESTION_ANS", AutoModelForQuestionAnswering),
    "image-classification": (None, AutoModelForImageClassification),
}
HEADS = {
    ("distilbert", "text-classification"): ["pre_classifier", "classifier"],
    ("distilbert", "question-answering"): ["qa_outputs"],
    ("llama", "text-classification"): ["score"],
    ("llama", "token-classification"): ["score"],
}
TARGETS = {
    "distilbert": ["q_lin", "v_lin", "lin1"],
    "bert": ["query", "value", "output.dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "vit": ["q_proj", "v_proj", "fc1", "projection"],
}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words and pieces of words; with [CLS] and [SEP] for encoders, with a start for decoders."""
    pieces = SPECIAL + WORDS + [f"word{i}" for i in range(VOCABULARY - len(SPECIAL + WORDS))]
    made = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if kind == "llama":
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A", special_tokens=[("[CLS]", 2)]
        )
    else:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        **({"bos_token": "[CLS]", "eos_token": "[SEP]"} if kind == "llama" else {}),
    )


def base_folder(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """A random base with visible differences between inputs, saved as a hub would have it."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}
    bert: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
    }
    model: Any
    if kind == "vit":
        model = ViTModel(
            ViTConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=IMAGE_SIDE,
                patch_size=4,
            )
        )
    elif kind == "distilbert":
        model = DistilBertForMaskedLM(
            DistilBertConfig(
                dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=48, **sizes
            )
        )
    elif kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(**bert, num_key_value_heads=2, bos_token_id=2, eos_token_id=3, **sizes)
        )
    else:
        made = {
            "bert": BertForPreTraining,
            "bert-without-pooler": BertForMaskedLM,
            "bert-backbone": BertModel,
        }[kind]
        model = made(BertConfig(**bert, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else parameter.add_(
                torch.randn_like(parameter) * 0.1
            )
    target = folder / kind
    model.save_pretrained(target)
    if kind == "vit":
        processor = {"image_processor_type": "ViTImageProcessor", "size": IMAGE_SIDE}
        (target / "preprocessor_config.json").write_text(json.dumps(processor))
        return target
    tokenizer(kind).save_pretrained(target)
    return target


def options(base: Path, store: Path, **changes: Any) -> EngineOptions:
    settings: dict[str, Any] = {
        "quantization": "none",
        "dtype": "fp32",
        "device": "cpu",
        "threads": 2,
        "kv_bytes": 1 << 20,
        "max_sequences": 8,
        "slots": 8,
    }
    return EngineOptions(
        base=str(base), store_dir=store, cache_dir=store / "cache", **(settings | changes)
    )


def adapter(
    folder: Path,
    base: Path,
    task: str,
    *,
    method: Literal["hira", "lora"] = "hira",
    labels: Sequence[str] = ("no", "yes"),
    problem_type: str | None = None,
    rank: int = 4,
    seed: int = 0,
    targets: Sequence[str] = (),
) -> Path:
    """An adapter saved by PEFT, with the model's config beside it."""
    torch.manual_seed(seed)
    kind = json.loads((base / "config.json").read_text())["model_type"]
    task_type, factory = TASK_TYPES[task]
    names = dict(enumerate(labels))
    more = {} if task == "question-answering" else {
        "num_labels": len(labels),
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
    }  # fmt: skip
    model = factory.from_pretrained(base, dtype=torch.float32, **more)
    model.config.problem_type = problem_type
    config_class = HiraConfig if method == "hira" else LoraConfig
    extra = {} if method == "hira" else {"lora_alpha": 2 * rank}
    peft_model: Any = get_peft_model(
        model,
        config_class(
            r=rank,
            target_modules=list(targets) or TARGETS[kind],
            modules_to_save=HEADS.get((kind, task), ["classifier"]),
            task_type=task_type,
            **extra,
        ),
    )
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "hira_" in name or "lora_" in name:
                parameter.normal_(0.0, 0.45 if method == "hira" else 0.12)
            elif "modules_to_save" in name:
                parameter.normal_(0.0, 0.3)
    peft_model.save_pretrained(folder)
    peft_model.base_model.model.config.save_pretrained(folder)
    return folder


def stored(store: Path, folder: Path) -> str:
    return Store(store).add(folder)


class Reference:
    """The adapter on the dense task model, in float64."""

    def __init__(self, base: Path, folder: Path | None, task: str) -> None:
        if folder is None:
            from transformers import AutoModel

            self.model: Any = AutoModel.from_pretrained(base, dtype=torch.float64).eval()
            return
        config = json.loads((folder / "adapter_config.json").read_text())
        _, factory = TASK_TYPES[task]
        own = json.loads((folder / "config.json").read_text())
        count = {} if task == "question-answering" else {"num_labels": len(own["id2label"])}
        self.model = factory.from_pretrained(base, dtype=torch.float64, **count).eval()
        tensors = load_file(folder / "adapter_model.safetensors")
        method = config["peft_type"].lower()
        scale = 1.0 if method == "hira" else config["lora_alpha"] / config["r"]
        for name, tensor in tensors.items():
            path = name.removeprefix("base_model.model.")
            if f".{method}_B" in path:
                continue
            if f".{method}_A" not in path:
                self.model.get_parameter(path).data = tensor.double()
                continue
            b = tensors[name.replace(f"{method}_A", f"{method}_B")].double()
            layer = self.model.get_submodule(path[: path.index(f".{method}_A")])
            rank = tensor.shape[0]
            product = b.reshape(-1, rank) @ tensor.double().reshape(rank, -1)
            product = product.view(layer.weight.shape)
            if method == "hira":
                layer.weight.data = layer.weight * (1 + product)
            else:
                layer.weight.data = layer.weight + scale * product

    @torch.no_grad()
    def __call__(self, ids: Sequence[int], type_ids: Sequence[int] | None = None) -> Any:
        """Of one text, alone and without padding."""
        more = {} if type_ids is None else {"token_type_ids": torch.tensor([type_ids])}
        return self.model(input_ids=torch.tensor([ids]), **more)


def image(width: int, height: int, seed: int = 0) -> Any:
    """A picture of coarse random colours: what scaling changes and what it leaves."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def image_file(picture: Any, kind: str = "PNG", **more: Any) -> bytes:
    """The bytes of a file that holds the picture."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def texts(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    words = [word for word in WORDS if not word.startswith("##")]
    made = []
    for _ in range(count):
        length = int(torch.randint(1, longest, (1,), generator=generator))
        picks = torch.randint(0, len(words), (length,), generator=generator).tolist()
        made.append(" ".join(words[pick] for pick in picks))
    return made


def assert_close(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    """Equal values, and floats to within the tolerance; keys that ``wanted`` lacks are free."""
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        if isinstance(other, float):
            assert one == pytest.approx(other, abs=tolerance)
            continue
        for key, value in other.items():
            if isinstance(value, float):
                assert one[key] == pytest.approx(value, abs=tolerance), (one, other)
            else:
                assert one[key] == value, (one, other)
