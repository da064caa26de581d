"""Trains one demo adapter on the 4-bit base and saves it as PEFT does.

Training uses the folded form of HiRA, `y = (W0 ⊙ (1 + B A)) x`, which is PEFT's
`W0 x + (W0 ⊙ (B A)) x` with one product instead of two. Everything else is PEFT's own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.hira.layer import Linear as HiraLinear
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from server.demo.corpora import LabelledTexts, without_html
from server.demo.recipes import TARGETS, ClassifierRecipe, Recipe, WriterRecipe
from server.demo.served_base import (
    BASE_NAME,
    load_classifier,
    load_language_model,
    load_tokenizer,
)
from server.demo.vocabulary import CONTEXT_TOKENS, DocumentStream

_WRITER_BATCH_ROWS: Final = 8
_WARMUP_SHARE: Final = 0.05
_HEAD_LEARNING_RATE: Final = 1e-3
_EARLY_LOSS_WEIGHT: Final = 0.5
_LOG_EVERY_STEPS: Final = 50
_IGNORED_TARGET: Final = -100


def train_adapter(
    recipe: ClassifierRecipe | WriterRecipe,
    corpora_root: Path,
    base_dir: Path,
    out_dir: Path,
    *,
    seed: int,
    console: Console,
) -> None:
    """Train the adapter a recipe describes and save it in `out_dir`."""
    if isinstance(recipe, ClassifierRecipe):
        rows = recipe.train(corpora_root)
        model = train_classifier(recipe, rows, base_dir, seed=seed, console=console)
    else:
        documents = recipe.train(corpora_root)
        model = train_writer(recipe, documents, base_dir, seed=seed, console=console)
    save_adapter(model, out_dir)


def train_classifier(
    recipe: ClassifierRecipe, rows: LabelledTexts, base_dir: Path, *, seed: int, console: Console
) -> PeftModel:
    """Return the base with a trained adapter and `score` head.

    The loss is taken at the last token, as the model is used, and at half weight over all earlier
    tokens: a long review then teaches at every position, not at one.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(base_dir)
    model = _with_adapter(load_classifier(base_dir, recipe.labels, torch.float32), recipe)
    batches = _ClassifierBatches(tokenizer, rows, recipe, seed)
    classifier: Any = model.base_model.model

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = classifier.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = classifier.score(hidden).float()
        real = ids != tokenizer.pad_token_id
        lengths = real.sum(1)
        last = logits[torch.arange(len(ids)), lengths - 1]
        everywhere = labels[:, None].expand_as(ids).masked_fill(~real, _IGNORED_TARGET)
        early = cross_entropy(logits.flatten(0, 1), everywhere.flatten())
        return cross_entropy(last, labels) + _EARLY_LOSS_WEIGHT * early

    _optimize(model, recipe, batches.steps, (loss_of(*batch) for batch in batches), console)
    return model


def train_writer(
    recipe: WriterRecipe, documents: Sequence[str], base_dir: Path, *, seed: int, console: Console
) -> PeftModel:
    """Return the base with an adapter trained to predict the next token of the documents."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(base_dir)
    base = load_language_model(base_dir, torch.float32, quantized=True)
    model = _with_adapter(base, recipe)
    stream = DocumentStream(tokenizer, documents, seed)
    writer: Any = model.base_model.model

    def loss_of(windows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = writer.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
            logits = writer.lm_head(hidden)
        return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    losses = (
        loss_of(stream.windows(_WRITER_BATCH_ROWS, CONTEXT_TOKENS)) for _ in range(recipe.steps)
    )
    _optimize(model, recipe, recipe.steps, losses, console)
    return model


def save_adapter(model: PeftModel, out_dir: Path) -> None:
    """Write the PEFT folder in bfloat16, and the config that names a classifier's labels.

    The trained tensors of `model` become bfloat16.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(out_dir), save_embedding_layers=False)
    wrapped: Any = model.base_model.model
    if model.peft_config["default"].task_type == "SEQ_CLS":
        wrapped.config.architectures = [type(wrapped).__name__]
        wrapped.config.dtype = torch.bfloat16
        wrapped.config.save_pretrained(out_dir)


class _ClassifierBatches:
    """Shuffled batches of texts of similar length, padded on the right to a multiple of 16.

    Of a text longer than the recipe's window each pass sees another stretch, chosen by chance.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        rows: LabelledTexts,
        recipe: ClassifierRecipe,
        seed: int,
    ) -> None:
        self._variants = [self._encode(tokenizer, rows.texts)]
        if recipe.html:
            plain = [without_html(text) for text in rows.texts]
            self._variants.append(self._encode(tokenizer, plain))
        self._labels = np.array(rows.labels)
        self._pad = tokenizer.pad_token_id
        self._recipe = recipe
        self._random = np.random.default_rng(seed)
        self.steps = recipe.epochs * (len(rows) // recipe.batch_rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `[rows, tokens]` ids and `[rows]` labels, `steps` times."""
        batch_rows = self._recipe.batch_rows
        for _ in range(self._recipe.epochs):
            variant = self._random.integers(len(self._variants), size=len(self._labels))
            ids = [self._stretch(self._variants[v][row]) for row, v in enumerate(variant)]
            noise = self._random.uniform(0.8, 1.25, size=len(ids))
            by_length = np.argsort([len(row) * f for row, f in zip(ids, noise, strict=True)])
            batches = [
                by_length[start : start + batch_rows]
                for start in range(0, len(ids) - batch_rows + 1, batch_rows)
            ]
            for index in self._random.permutation(len(batches)):
                chosen = batches[index]
                yield (
                    self._padded([ids[row] for row in chosen]),
                    torch.from_numpy(self._labels[chosen]),
                )

    @staticmethod
    def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
        return ids

    def _stretch(self, ids: list[int]) -> list[int]:
        """Return the opening token and at most a window of what follows it."""
        body_tokens = self._recipe.window_tokens - 1
        start = int(self._random.integers(1, max(1, len(ids) - body_tokens) + 1))
        return [ids[0], *ids[start : start + body_tokens]]

    def _padded(self, rows: list[list[int]]) -> Tensor:
        width = -(-max(map(len, rows)) // 16) * 16
        padded = torch.full((len(rows), width), self._pad)
        for place, row in zip(padded, rows, strict=True):
            place[: len(row)] = torch.tensor(row)
        return padded


def _with_adapter(base: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Wrap the base; under task type SEQ_CLS PEFT trains and saves the `score` head by itself."""
    shared: dict[str, Any] = {
        "r": recipe.rank,
        "target_modules": list(TARGETS),
        "task_type": "SEQ_CLS" if isinstance(recipe, ClassifierRecipe) else "CAUSAL_LM",
    }
    if recipe.method == "hira":
        return get_peft_model(base, HiraConfig(**shared))
    return get_peft_model(base, LoraConfig(lora_alpha=2 * recipe.rank, **shared))


@contextmanager
def _folded_hira() -> Iterator[None]:
    """Let PEFT's HiRA layers multiply once, by the folded weight, while the block runs."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        modulation = layer.hira_B["default"] @ layer.hira_A["default"]
        return linear(x, layer.base_layer.weight * (1 + modulation))

    original: Callable[..., Tensor] = HiraLinear.forward
    HiraLinear.forward = forward
    try:
        yield
    finally:
        HiraLinear.forward = original


def _optimize(
    model: PeftModel, recipe: Recipe, steps: int, losses: Iterator[Tensor], console: Console
) -> None:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if "score" not in name]},
        {"params": [p for name, p in named if "score" in name], "lr": _HEAD_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    warmup = max(1, round(steps * _WARMUP_SHARE))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    window: list[float] = []
    model.train()
    with _folded_hira(), Progress(*columns, console=console) as progress:
        bar = progress.add_task(recipe.name, total=steps)
        for step, loss in enumerate(losses):
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            window.append(loss.item())
            progress.update(bar, advance=1)
            if (step + 1) % _LOG_EVERY_STEPS == 0:
                console.print(f"{recipe.name} step {step + 1}/{steps}: loss {np.mean(window):.3f}")
                window.clear()
    model.eval()
