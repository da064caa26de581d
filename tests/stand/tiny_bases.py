"""Tiny bases in folders of their own, adapters made for them by PEFT, and dense float64 answers.

The dense answers are those of ``tests.stand.float64``.
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
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTModel,
)

from adapters.registry.store import Store
from adapters.tasks import BY_NAME
from server.inputs.text import Text
from server.options import EngineOptions
from tests.stand.float64 import TASK_TYPES, Reference

__all__ = ["TASK_TYPES", "Reference"]

WORDS = ["a", "fine", "dull", "film", "by", "ann", "in", "paris", "##ly", "not", "very", "good"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 96
IMAGE_SIDE = 16
DECODERS = ("llama", "qwen2", "gpt2", "opt")
HEADS = {
    ("distilbert", "text-classification"): ["pre_classifier", "classifier"],
    **{(kind, "text-classification"): ["score"] for kind in DECODERS},
    ("llama", "token-classification"): ["score"],
    ("qwen2", "token-classification"): ["score"],
}
TARGETS = {
    "distilbert": ["q_lin", "v_lin", "lin1"],
    "bert": ["query", "value", "output.dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "vit": ["q_proj", "v_proj", "fc1", "projection"],
    "roberta": ["query", "value", "output.dense"],
    "minilm": ["query", "value", "output.dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "fc1", "fc2"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words and pieces of words; with [CLS] and [SEP] for encoders, with a start for decoders."""
    pieces = SPECIAL + WORDS + [f"word{i}" for i in range(VOCABULARY - len(SPECIAL + WORDS))]
    made = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if kind in DECODERS:
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
        **({"bos_token": "[CLS]", "eos_token": "[SEP]"} if kind in DECODERS else {}),
    )


def qwen2_tokenizer() -> Qwen2Tokenizer:
    """The same words in byte-level BPE: transformers loads no other kind for this family."""
    words = [word for word in WORDS if word.isalpha()]
    vocabulary = [*SPECIAL, "Ġ", *sorted(set("".join(words)))]
    merges: list[tuple[str, str]] = []
    for word in sorted(words, key=len, reverse=True):  # a word within another is merged after it
        pairs = [(word[:end], word[end]) for end in range(1, len(word))]
        merges += [pair for pair in pairs if pair not in merges]
    merges += [("Ġ", word) for word in words]
    vocabulary += dict.fromkeys(left + right for left, right in merges if left + right not in words)
    vocabulary += [word for word in words if word not in vocabulary]
    return Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(vocabulary)},
        merges=merges,
        unk_token="[UNK]",
        eos_token="[SEP]",
        pad_token="[PAD]",
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
    elif kind in DECODERS:
        model = _decoder(kind, bert | sizes | {"bos_token_id": 2, "eos_token_id": 3})
    elif kind == "roberta":
        model = RobertaForMaskedLM(RobertaConfig(**bert, **sizes, type_vocab_size=1))
    else:
        made = {
            "bert": BertForPreTraining,
            "bert-without-pooler": BertForMaskedLM,
            "bert-backbone": BertModel,
            "minilm": BertModel,  # more, narrower heads, and no language-model head
        }[kind]
        heads = {"num_attention_heads": 8} if kind == "minilm" else {}
        model = made(BertConfig(**(bert | heads), **sizes))
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
    (qwen2_tokenizer() if kind == "qwen2" else tokenizer(kind)).save_pretrained(target)
    return target


def _decoder(kind: str, sizes: dict[str, Any]) -> Any:
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=48,
            bos_token_id=2, eos_token_id=3, pad_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=128, word_embed_proj_dim=64))
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    return model_class(config_class(**sizes, num_key_value_heads=2))


def text_of(base: Path) -> Text:
    """The tokenizer as an engine has it."""
    return Text.load(base, max_tokens=47, vocab_size=VOCABULARY, pad_id=0)


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


def heads_of(kind: str, task: str) -> list[str] | None:
    """The modules that an adapter for a task saves whole."""
    row = BY_NAME[task]
    if row.head != "adapter":
        return None
    if task == "question-answering":
        return ["qa_outputs"]
    return HEADS.get((kind, row.narrows or task), ["classifier"])


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
            modules_to_save=heads_of(kind, task),
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
