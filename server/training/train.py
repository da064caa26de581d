"""The loop: AdamW, warm-up, linear decay, evaluation while it trains, the best state kept.

Evaluation is early: several times an epoch, and what is saved is the state that did best, not the
last one. A pruned adapter is only judged once it is pruned.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy

from server.training import scores
from server.training.adapted import factors
from server.training.pruning import Pruning
from server.training.rows import LabelledTexts
from server.training.settings import Recipe, Report

_PAD_MULTIPLE = 8
_BUCKET_BATCHES = 32
_EVAL_BATCH_ROWS = 32


class Examples(Protocol):
    """What can be learned from and measured."""

    def __len__(self) -> int:
        """Return the number of rows or windows."""

    def batches(self, rows: int, random: np.random.Generator | None) -> Iterator[list[int]]:
        """Yield places of rows, in an order that `random` decides, or in their own."""

    def loss(self, model: Any, places: Sequence[int]) -> Tensor:
        """Return the mean loss of some rows, for training."""

    def measure(self, model: Any) -> dict[str, float]:
        """Return what is reported of an evaluation, `loss` among it; the model is in eval mode."""


class Classified:
    """Labelled texts, tokenised and cut.

    Args:
        tokenizer: Of the base.
        rows: Texts and labels.
        max_tokens: Longer texts are cut.
    """

    def __init__(self, tokenizer: Any, rows: LabelledTexts, max_tokens: int) -> None:
        self._pad = int(tokenizer.pad_token_id)
        self._labels = torch.tensor(rows.labels)
        self._outputs = len(rows.names)
        self._ids: list[list[int]] = tokenizer(
            list(rows.texts), truncation=True, max_length=max_tokens
        )["input_ids"]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._ids)

    def batches(self, rows: int, random: np.random.Generator | None) -> Iterator[list[int]]:
        """Yield batches of texts of similar length, from shuffled buckets."""
        order = np.arange(len(self))
        if random is not None:
            random.shuffle(order)
        found: list[list[int]] = []
        bucket = rows * _BUCKET_BATCHES
        for start in range(0, len(order), bucket):
            near = sorted(order[start : start + bucket], key=lambda row: len(self._ids[row]))
            found += [[int(row) for row in near[i : i + rows]] for i in range(0, len(near), rows)]
        if random is not None:
            random.shuffle(found)
        yield from found

    def loss(self, model: Any, places: Sequence[int]) -> Tensor:
        """Return the mean cross-entropy of the labels."""
        return cross_entropy(self._logits(model, places), self._labels[list(places)])

    def measure(self, model: Any) -> dict[str, float]:
        """Return accuracy, macro F1 and loss."""
        nats, predicted, actual = 0.0, [], []
        for places in self.batches(_EVAL_BATCH_ROWS, None):
            logits, labels = self._logits(model, places), self._labels[places]
            nats += float(cross_entropy(logits, labels, reduction="sum"))
            predicted += logits.argmax(-1).tolist()
            actual += labels.tolist()
        return {
            "loss": nats / len(self),
            "accuracy": scores.accuracy(predicted, actual),
            "macro_f1": scores.macro_f1(predicted, actual, self._outputs),
        }

    def _logits(self, model: Any, places: Sequence[int]) -> Tensor:
        chosen = [self._ids[place] for place in places]
        width = -(-max(map(len, chosen)) // _PAD_MULTIPLE) * _PAD_MULTIPLE
        ids = torch.full((len(chosen), width), self._pad)
        mask = torch.zeros(len(chosen), width, dtype=torch.long)
        for row, one in enumerate(chosen):
            ids[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits.float()


class Windows:
    """A text as windows of tokens, each predicted from its own beginning.

    Args:
        tokenizer: Of the base. Its opening token, where it has one, opens every window.
        text: Tokenised line by line; lines follow each other without a gap.
        max_tokens: Of a window.
    """

    def __init__(self, tokenizer: Any, text: str, max_tokens: int) -> None:
        lines = text.splitlines(keepends=True)
        encoded = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
        stream = np.concatenate([np.array(ids, dtype=np.int64) for ids in encoded])
        opening = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        body = max_tokens - len(opening)
        count = max(1, len(stream) // body)
        cut = stream[: count * body].reshape(count, -1)
        front = np.tile(np.array(opening, dtype=np.int64), (count, 1))
        self._windows = torch.from_numpy(np.concatenate([front, cut], axis=1))

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self._windows)

    def batches(self, rows: int, random: np.random.Generator | None) -> Iterator[list[int]]:
        """Yield places of windows."""
        order = np.arange(len(self))
        if random is not None:
            random.shuffle(order)
        for start in range(0, len(order), rows):
            yield [int(place) for place in order[start : start + rows]]

    def loss(self, model: Any, places: Sequence[int]) -> Tensor:
        """Return the mean cross-entropy of the next token."""
        return self._nats(model, places, "mean")

    def measure(self, model: Any) -> dict[str, float]:
        """Return perplexity per token and its logarithm."""
        nats = 0.0
        for places in self.batches(_EVAL_BATCH_ROWS, None):
            nats += float(self._nats(model, places, "sum"))
        tokens = len(self) * (self._windows.shape[1] - 1)
        return {"loss": nats / tokens, "perplexity": scores.perplexity(nats, tokens)}

    def _nats(self, model: Any, places: Sequence[int], reduction: str) -> Tensor:
        ids = self._windows[list(places)]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction
        )


@dataclass
class _Best:
    step: int = 0
    measured: dict[str, float] | None = None
    state: dict[str, Tensor] | None = None

    def offer(self, step: int, measured: dict[str, float], model: PeftModel) -> bool:
        """Keep the state if it is the best so far; says whether it is."""
        if self.measured is not None and _rank(measured) <= _rank(self.measured):
            return False
        self.step, self.measured = step, measured
        self.state = {name: one.detach().clone() for name, one in _trained(model).items()}
        return True


def fit(
    recipe: Recipe,
    model: PeftModel,
    train: Examples,
    held_out: Examples,
    *,
    out: Path,
    console: Console,
) -> Report:
    """Train, and leave the best state in the model.

    Args:
        recipe: The run.
        model: With a fresh adapter; changed in place.
        train: Learned from, in the same order for the same seed whatever the method.
        held_out: Measured several times an epoch; decides which state is kept.
        out: Where the adapter will be saved, for the report.
        console: Progress and evaluations go there.
    """
    batches_an_epoch = -(-len(train) // recipe.batch_rows)
    steps = recipe.epochs * batches_an_epoch
    optimizer = torch.optim.AdamW(
        list(_trained(model).values()),
        lr=recipe.top_learning_rate,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, steps, min(recipe.warmup_steps, steps // 2))
    )
    every = max(1, batches_an_epoch // recipe.evaluations)
    prune_at = int(steps * recipe.dense_share) if recipe.is_pruned else None
    random = np.random.default_rng(recipe.seed)
    before = _process_resident_bytes()
    best, history, idle, pruning = _Best(), [], 0, None
    trained_s, rows, step = 0.0, 0, 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(recipe.method, total=steps)
        for places in _endless(train, recipe.batch_rows, random):
            if step >= steps or (recipe.patience and idle >= recipe.patience):
                break
            if step == prune_at:
                pruning = Pruning(factors(model), recipe.sparsity)
            began = time.perf_counter()
            model.train()
            with _products(recipe):
                loss = train.loss(model, places)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(list(_trained(model).values()), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if pruning is not None:
                pruning.apply()
            trained_s += time.perf_counter() - began
            step, rows = step + 1, rows + len(places)
            progress.update(bar, advance=1)
            if step % every and step != steps:
                continue
            measured = _evaluate(recipe, model, held_out)
            history.append({"step": float(step), "train_loss": float(loss.detach()), **measured})
            shown = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
            if prune_at is not None and step <= prune_at:
                console.print(f"step {step}/{steps}: {shown} (not pruned yet)")
                continue
            better = best.offer(step, measured, model)
            idle = 0 if better else idle + 1
            console.print(f"step {step}/{steps}: {shown}{' (best)' if better else ''}")
    assert best.state is not None
    assert best.measured is not None
    with torch.no_grad():
        for name, parameter in _trained(model).items():
            parameter.copy_(best.state[name])
    model.eval()
    return Report(
        out=out,
        train_rows=len(train),
        eval_rows=len(held_out),
        steps=step,
        seconds=trained_s,
        rows_per_s=rows / trained_s,
        best_step=best.step,
        best=best.measured,
        history=tuple(history),
        resident_before_bytes=before,
        resident_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _endless(train: Examples, rows: int, random: np.random.Generator) -> Iterator[list[int]]:
    while True:
        yield from train.batches(rows, random)


def _evaluate(recipe: Recipe, model: PeftModel, held_out: Examples) -> dict[str, float]:
    model.eval()
    with torch.no_grad(), _products(recipe):
        return held_out.measure(model)


def _products(recipe: Recipe) -> torch.autocast:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(kind, torch.bfloat16, enabled=recipe.autocast)


def _rank(measured: dict[str, float]) -> tuple[float, float]:
    """Accuracy first where there is one; the lower loss decides between equals."""
    return measured.get("accuracy", 0.0), -measured["loss"]


def _rate(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate at a step: up to 1 over the warm-up, then down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def _trained(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def _process_resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
