"""Writes the folder of a trained adapter as PEFT does, and the config that names its labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from server.training.settings import Recipe


def save(model: PeftModel, config: Any, recipe: Recipe, out: Path) -> None:
    """Save factors, head and configurations; optimizer and base are not kept.

    Args:
        model: Trained.
        config: Of the task, without a word on how the base was quantized in training: the server
            decides for itself how it holds the base.
        recipe: The run.
        out: Folder; what it holds under the same names is replaced.
    """
    adapter: Any = model.peft_config["default"]
    adapter.base_model_name_or_path = recipe.base_name
    model.save_pretrained(str(out), save_embedding_layers=False)
    if recipe.task_type == "SEQ_CLS":
        chosen = AutoModelForSequenceClassification._model_mapping[type(config)]
        config.architectures = [chosen.__name__]
        if config.pad_token_id is None:
            config.pad_token_id = config.eos_token_id
        config.save_pretrained(out)
