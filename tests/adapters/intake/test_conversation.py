"""What an adapter brings for conversations and for generating: read, kept and noted by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.intake.checkpoint import load_adapter
from adapters.intake.conversation import (
    CONVERSATION_FILES,
    MAX_TEMPLATE_BYTES,
    Conversation,
    conversation_bytes,
    read_conversation,
    stored_conversation,
)
from adapters.intake.sources import Sources
from adapters.registry.store import Store, version_of, versions_of
from adapters.signature import describe
from tests.stand.folders import hira_folder, save_with_peft, small_base

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4,
)  # fmt: skip


def write(folder: Path, **files: Any) -> Path:
    """Files of a folder by their names with "_" for "."; values that are no text as JSON."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        stem, _, kind = name.rpartition("_")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{stem}.{kind}").write_text(text)
    return folder


def speak(folder: Path) -> Path:
    return write(
        folder,
        chat_template_jinja="<|im|>{{ messages }}{{ bos_token }}",
        tokenizer_config_json={
            "chat_template": "not this one",
            "eos_token": {"content": "</s>"},
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "added_tokens_decoder": {"7": {"content": "<|im|>"}, "8": {"content": "<other>"}},
        },
        tokenizer_json='{"version": "1.0", "added_tokens": [{"id": 2, "content": "</s>"}], "model',
        generation_config_json={
            "eos_token_id": [3, 5], "temperature": 0.7, "num_beams": 4, "typical_p": 1.0,
            "transformers_version": "5", "a": None, "top_k": 0.5,
        },
    )  # fmt: skip


def llama_folder(folder: Path) -> Path:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = save_with_peft(LlamaForCausalLM(CONFIG), config, folder)
    for name in CONVERSATION_FILES:
        (made / name).unlink(missing_ok=True)
    return made


def test_files_say_templates_tokens_ends_and_defaults(tmp_path: Path) -> None:
    found = read_conversation(speak(tmp_path))
    assert found.templates == {"default": "<|im|>{{ messages }}{{ bos_token }}"}
    assert found.special_tokens == {"eos_token": "</s>", "bos_token": "<s>"}
    assert found.added == {"<|im|>": 7, "<other>": 8, "</s>": 2}
    assert found.token_ids == {"<|im|>": 7, "</s>": 2}
    assert found.end_ids == (3, 5)
    assert found.sampling == {"temperature": 0.7}
    (note,) = found.notes
    assert "num_beams = 4, top_k = 0.5" in note


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"tokenizer_config_json": {"chat_template": "x"}}, ["default"]),
        (
            {
                "tokenizer_config_json": {
                    "chat_template": [
                        {"name": "default", "template": "x"},
                        {"name": "tool_use", "template": "y"},
                        {"name": "rag", "template": "z"},
                    ]
                }
            },
            ["default", "tool_use"],
        ),
        ({"tool_use_jinja": "y"}, ["tool_use"]),
        ({"chat_template_jinja": "x" * (MAX_TEMPLATE_BYTES + 1)}, []),
        ({"chat_template_jinja": "  "}, []),
    ],
)
def test_templates_are_found_where_releases_put_them(
    files: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    assert sorted(read_conversation(write(tmp_path, **files)).templates) == names


def test_a_template_in_a_folder_of_its_own_is_found(tmp_path: Path) -> None:
    nested = tmp_path / "additional_chat_templates"
    nested.mkdir()
    (nested / "tool_use.jinja").write_text("nested")
    assert read_conversation(tmp_path).templates == {"tool_use": "nested"}


@pytest.mark.parametrize("name", [one for one in CONVERSATION_FILES if not one.endswith("jinja")])
def test_a_file_that_cannot_be_read_is_noted_and_refuses_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"added_tokens": [')
    (note,) = read_conversation(tmp_path).notes
    assert name in note
    assert "cannot be read" in note


def test_what_is_kept_reads_back_the_same_and_is_checked(tmp_path: Path) -> None:
    found = read_conversation(speak(tmp_path / "a"))
    kept = found.kept()
    again = stored_conversation(kept)
    assert again.kept() == kept
    assert (again.templates, again.end_ids) == (found.templates, found.end_ids)
    assert Conversation().kept() == b""
    for field, value in (
        ("templates", {"default": 1}),
        ("token_ids", {"a": "b"}),
        ("end_ids", ["x"]),
        ("sampling", {"temperature": -1}),
    ):
        content = {**json.loads(kept), field: value}
        folder = write(tmp_path / field, hira_conversation_json=content)
        assert "malformed" in read_conversation(folder).notes[0] or read_conversation(folder).notes
        assert read_conversation(folder).templates == {}


def test_a_fetched_folder_is_stored_with_what_counts_and_nothing_else(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "root" / "adapter")
    with torch.device("meta"):
        base = describe(LlamaForCausalLM(CONFIG), "small-llama")
    bare = version_of(folder)
    assert load_adapter(folder, base).notes == ()
    store = Store(tmp_path / "store", max_bytes=1 << 20)
    with Sources(tmp_path / "staging", [tmp_path / "root"]).fetch(str(speak(folder))) as copy:
        assert load_adapter(copy, base).conversation.end_ids == (3, 5)
        version = store.add(copy)
    assert version not in (bare, "")
    assert version_of(folder, conversation=False) == bare
    assert {bare, version} <= versions_of(folder)  # what a former release stored stays valid
    assert store.is_sound(version)
    assert not list(store.path(version).glob("*.jinja"))
    stored = store.conversation(version)
    assert stored.templates == read_conversation(folder).templates
    assert load_adapter(store.path(version), base).conversation == stored
    # Other templates are another version, and so are other end tokens.
    (folder / "chat_template.jinja").write_text("{{ messages }}!")
    changed = store.add(folder)
    write(folder, generation_config_json={"eos_token_id": 3})
    assert len({version, changed, store.add(folder)}) == 3
    path = store.path(version) / "hira_conversation.json"
    path.write_bytes(path.read_bytes().replace(b"0.7", b"0.8"))
    assert not store.is_sound(version)


def test_they_mean_nothing_to_a_classifier(tmp_path: Path) -> None:
    folder = hira_folder(tmp_path / "adapter")
    before = version_of(folder)
    weights = load_adapter(speak(folder), small_base())
    assert weights.conversation == Conversation()
    assert not any("template" in note for note in weights.notes)
    assert version_of(folder) == before
    assert conversation_bytes(folder, {"task_type": "SEQ_CLS"}) == b""
