"""Trains the demo's base model from nothing: a six-layer Llama of six million parameters.

Hidden matrices are updated by Muon, the embedding and the norms by AdamW; weights stay in float32
while the products run in bfloat16. The result is saved in bfloat16 in the Hugging Face layout.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from server.demo import corpora
from server.demo.vocabulary import CONTEXT_TOKENS, DocumentStream, train_tokenizer

BASE_STEPS: Final = 2400
BATCH_TOKENS: Final = 4096
_SHORT_WINDOW_TOKENS: Final = 256
_SHORT_WINDOW_SHARE: Final = 0.65
_WARMUP_STEPS: Final = 50
_DECAY_STARTS_AT_STEP: Final = 1300
_RATE_IS_ZERO_AT_STEP: Final = 2600  # beyond the last step: the run stops at 15 % of the rate
_MATRIX_LEARNING_RATE: Final = 0.02
_VECTOR_LEARNING_RATE: Final = 3e-3
_LOG_EVERY_STEPS: Final = 50


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the architecture: 6 layers, width 256, 4 query heads over 2 key-value heads of 64."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_base(
    corpora_root: Path,
    out_dir: Path,
    *,
    seed: int,
    console: Console,
) -> None:
    """Train tokenizer and model on the training texts and save both in `out_dir`."""
    torch.manual_seed(seed)
    documents = corpora.pretraining_documents(corpora_root)
    tokenizer = train_tokenizer(documents)
    model = LlamaForCausalLM(base_config(tokenizer))
    stream = DocumentStream(tokenizer, documents, seed)
    console.print(
        f"{model.num_parameters():,} parameters, {len(documents):,} documents, "
        f"{stream.tokens:,} tokens a pass"
    )

    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, _rate_factor) for optimizer in optimizers
    ]
    loss_of: Callable[[Tensor], Tensor] = torch.compile(_next_token_loss(model), dynamic=False)
    started_s = time.monotonic()
    tokens_seen, smooth_loss = 0, 0.0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("base", total=BASE_STEPS)
        for step in range(BASE_STEPS):
            short = step < BASE_STEPS * _SHORT_WINDOW_SHARE
            window_tokens = _SHORT_WINDOW_TOKENS if short else CONTEXT_TOKENS
            loss = loss_of(stream.windows(BATCH_TOKENS // window_tokens, window_tokens))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            tokens_seen += BATCH_TOKENS
            smooth_loss = loss.item() if step == 0 else 0.98 * smooth_loss + 0.02 * loss.item()
            progress.update(bar, advance=1, description=f"base, loss {smooth_loss:.3f}")
            if (step + 1) % _LOG_EVERY_STEPS == 0:
                rate = tokens_seen / (time.monotonic() - started_s)
                console.print(f"step {step + 1}: loss {smooth_loss:.3f}, {rate:,.0f} tokens/s")
    save_base(model, tokenizer, out_dir)


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Write model (in bfloat16), generation defaults and tokenizer; `model` is not changed."""
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    stored.to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def _next_token_loss(model: LlamaForCausalLM) -> Callable[[Tensor], Tensor]:
    def loss_of(windows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    return loss_of


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=_MATRIX_LEARNING_RATE, weight_decay=0.1),
        torch.optim.AdamW(
            others, lr=_VECTOR_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        ),
    ]


def _rate_factor(step: int) -> float:
    """Return warm-up, a plateau, then a straight line down that the run leaves before zero."""
    decay_steps = _RATE_IS_ZERO_AT_STEP - _DECAY_STARTS_AT_STEP
    return min(1.0, (step + 1) / _WARMUP_STEPS, (_RATE_IS_ZERO_AT_STEP - step) / decay_steps)
