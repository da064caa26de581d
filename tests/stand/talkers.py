"""Adapters that bring a chat template, end tokens and defaults, and what transformers answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from server.inputs.tokenizer import load_tokenizer
from tests.stand.tiny_bases import adapter, tokenizer

SHORT = "{% for m in messages %}word1 {{ m.content }} {% endfor %}word2"
LONG = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} word7 {{ m.content | trim }} "
    "{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}word8 word9{% endif %}"
)


@dataclass(frozen=True)
class Said:
    """What transformers makes of a conversation."""

    text: str
    prompt_tokens: int
    ids: tuple[int, ...]


def talker(
    folder: Path,
    base: Path,
    template: str | None,
    *,
    seed: int = 0,
    generation: Mapping[str, Any] | None = None,
    **tokens: str,
) -> Path:
    """An adapter that generates, with its tokenizer beside it as a training leaves it.

    Args:
        folder: To be made.
        base: A folder of ``tests.stand.tiny_bases.base_folder``.
        template: Its chat template.
        seed: Of its factors.
        generation: ``generation_config.json``; None for none.
        tokens: Special tokens in place of the base's, such as ``eos_token``.
    """
    adapter(folder, base, "text-generation", seed=seed)
    own = tokenizer("llama")
    for name, token in tokens.items():
        setattr(own, name, token)
    own.chat_template = template
    own.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        GenerationConfig(**generation).save_pretrained(folder)
    return folder


def said(
    base: Path, folder: Path, messages: Sequence[Mapping[str, str]], *, new_tokens: int
) -> Said:
    """The greedy answer of PEFT's model, written and ended as the adapter's own files say."""
    own = load_tokenizer(folder).tokenizer
    prompt: str = own.apply_chat_template(
        [dict(one) for one in messages], tokenize=False, add_generation_prompt=True
    )
    ids = own(prompt, add_special_tokens=False)["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    own_file = folder / "generation_config.json"
    config = (
        GenerationConfig(**json.loads(own_file.read_text()))
        if own_file.exists()
        else GenerationConfig(eos_token_id=own.eos_token_id)
    )
    config.update(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            generation_config=config,
        )[0, len(ids) :].tolist()
    return Said(own.decode(found, skip_special_tokens=True), len(ids), tuple(found))
