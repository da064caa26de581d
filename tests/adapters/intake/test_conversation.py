"""What an adapter brings for generating and that is not used is noted by name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.intake.checkpoint import load_adapter
from adapters.intake.conversation import CONVERSATION_FILES, conversation_notes
from adapters.intake.sources import Sources
from adapters.signature import describe
from tests.stand.folders import hira_folder, save_with_peft, small_base

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4,
)  # fmt: skip


def speak(folder: Path) -> Path:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (folder / "generation_config.json").write_text(
        json.dumps(
            {"eos_token_id": [3, 5], "temperature": 0.7, "transformers_version": "5", "a": None}
        )
    )
    return folder


def test_each_file_is_named_after_a_fetch_and_refuses_nothing(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = save_with_peft(LlamaForCausalLM(CONFIG), config, tmp_path / "root" / "adapter")
    for name in CONVERSATION_FILES:
        (folder / name).unlink(missing_ok=True)
    with torch.device("meta"):
        base = describe(LlamaForCausalLM(CONFIG), "small-llama")
    assert load_adapter(folder, base).notes == ()
    with Sources(tmp_path / "staging", [tmp_path / "root"]).fetch(str(speak(folder))) as copy:
        notes = load_adapter(copy, base).notes
    assert len(notes) == 3
    assert "chat_template.jinja" in notes[0]
    assert "tokenizer_config.json" in notes[1]
    assert "eos_token_id = [3, 5], temperature = 0.7)" in notes[2]


def test_they_mean_nothing_to_a_classifier(tmp_path: Path) -> None:
    folder = speak(hira_folder(tmp_path / "adapter"))
    assert not any("template" in note for note in load_adapter(folder, small_base()).notes)


def test_a_file_that_cannot_be_read_is_noted_too(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[")
    (note,) = conversation_notes(tmp_path)
    assert "cannot be read" in note
