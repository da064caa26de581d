"""The model that is trained: the base under its task's class, wrapped by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from server.training.settings import OTHER_TARGETS, USUAL_TARGETS, Recipe

# Never quantized: they are trained whole, or not at all.
_HEAD_MODULES: Final = ("classifier", "pre_classifier", "score", "lm_head", "embed_out")


def task_config(recipe: Recipe, labels: Sequence[str]) -> Any:
    """Return the base's config with the labels of a classifier, or as it is."""
    if recipe.task_type != "SEQ_CLS":
        return AutoConfig.from_pretrained(recipe.base)
    return AutoConfig.from_pretrained(
        recipe.base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type="single_label_classification",
    )


def load_tokenizer(recipe: Recipe) -> Any:
    """Return the base's tokenizer, padding on the right."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.base)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build(recipe: Recipe, config: Any) -> PeftModel:
    """Load the base and put a fresh adapter on it.

    HiRA: `W' = W0 + W0 ⊙ (B A)`; LoRA: `W' = W0 + alpha/r B A`. B is zero, so nothing changes yet.

    Args:
        recipe: The run.
        config: As `task_config` returns it.

    Raises:
        ValueError: PEFT's, when no layer has a target's name.
    """
    torch.manual_seed(recipe.seed)
    classifies = recipe.task_type == "SEQ_CLS"
    auto: Any = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    arguments: dict[str, Any] = {}
    if recipe.is_quantized:
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=list(_HEAD_MODULES),
        )
        arguments["device_map"] = {"": "cpu" if not torch.cuda.is_available() else "cuda"}
    transformers_logging.disable_progress_bar()
    model = auto.from_pretrained(recipe.base, config=config, dtype=torch.float32, **arguments)
    if config.pad_token_id is None:
        model.config.pad_token_id = config.eos_token_id
    never_repack(model)
    torch.manual_seed(recipe.seed)
    adapted = get_peft_model(model, _peft_config(recipe, model))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def never_repack(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place when the model is evaluated.

    On a CPU with AVX512-BF16 its forward in eval mode lays the packed weight out anew, and every
    later dequantization of it is garbage: an evaluation would ruin the training that follows.
    """
    import bitsandbytes

    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable factors A and B by name; what is trained of a head is not among them."""
    marks = (".lora_A.", ".lora_B.", ".hira_A", ".hira_B")
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(mark in name for mark in marks)
    }


def _peft_config(recipe: Recipe, model: nn.Module) -> Any:
    family = getattr(model.config, "model_type", "")
    targets = list(recipe.targets or USUAL_TARGETS.get(family, OTHER_TARGETS))
    transposed = any(
        type(layer).__name__ == "Conv1D" and name.rsplit(".", 1)[-1] in targets
        for name, layer in model.named_modules()
    )
    shared: dict[str, Any] = {
        "r": recipe.rank,
        "target_modules": targets,
        "task_type": recipe.task_type,
        "fan_in_fan_out": transposed,
    }
    if recipe.method == "hira":
        return HiraConfig(hira_dropout=recipe.dropout, **shared)
    return LoraConfig(lora_alpha=recipe.lora_alpha, lora_dropout=recipe.dropout, **shared)
