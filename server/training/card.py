"""Writes the card of a trained adapter: what its saved tensors show, and what was measured.

Nothing that could be counted is typed in: method, rank, targets, parameters, zeros and bytes come
from the file that was saved, through the same audit that `hira inspect` makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapters.inspection.audit import audit
from adapters.intake.file_names import CARD_FILE
from adapters.tasks import of_task_type
from server.training.curve import CURVE_FILE, write_curve
from server.training.settings import Recipe, Report

_TENSORS = "adapter_model.safetensors"
_TITLES = {"hira": "HiRA", "lora": "LoRA"}


def write_card(folder: Path, recipe: Recipe, report: Report, labels: Sequence[str]) -> str:
    """Write `README.md` beside the tensors and return its text.

    Args:
        folder: Of the saved adapter.
        recipe: How it was trained.
        report: What training measured.
        labels: Of a classifier, in the order of its outputs; else empty.
    """
    found = audit(folder).tensors
    assert found is not None
    method = _TITLES.get(found.method or "", str(found.method))
    ranks = ", ".join(map(str, found.all_ranks))
    scaling = f"{recipe.lora_alpha / recipe.rank:g}"
    law = "W0 + W0 ⊙ (B A)" if found.method == "hira" else f"W0 + {scaling} B A"
    parts = [
        f"- **Method:** {method}, `W' = {law}`",
        f"- **Rank (r):** {ranks}",
        f"- **Target Modules:** {', '.join(f'`{target}`' for target in sorted(found.ranks))}",
        f"- **Adapted layers:** {found.layers}",
        f"- **Trainable Parameters:** {found.parameters:,}",
        f"- Of these in the factors: {found.factor_parameters:,}; "
        f"in the head: {found.head_parameters:,}",
        f"- **File:** {(folder / _TENSORS).stat().st_size:,} bytes, {', '.join(found.dtypes)}",
    ]
    if found.method == "lora":
        parts.insert(2, f"- **Alpha:** {recipe.lora_alpha:g}")
    if recipe.is_pruned:
        parts.append(f"- **Sparsity:** {found.sparsity:.1%} of the factors are zero")
    if labels:
        named = ", ".join(f"{place} `{label}`" for place, label in enumerate(labels))
        parts.append(f"- **Labels:** {named}")
    measured = "\n".join(
        f"- **{name.replace('_', ' ').capitalize()}:** {value:.4f}"
        for name, value in report.best.items()
    )
    held = "NF4 with double quantization" if recipe.is_quantized else "float32"
    pruned = (
        f"\n- **Pruning:** {recipe.sparsity:.0%} of each factor by magnitude after "
        f"{recipe.dense_share:.0%} of the steps; zeros stay zero through the rest"
        if recipe.is_pruned
        else ""
    )
    what = "windows of text" if recipe.task_type == "CAUSAL_LM" else "rows"
    text = f"""\
---
base_model: {recipe.base_name}
library_name: peft
pipeline_tag: {of_task_type(recipe.task_type)}
tags: [{recipe.method}]
---
# {folder.resolve().name}

## What is in the file
{chr(10).join(parts)}

## How it was trained
- **Rows:** {report.train_rows:,} {what} of at most {recipe.max_tokens} tokens
- **Epochs:** {recipe.epochs}; {report.steps:,} steps were run
- **Batch Size:** {recipe.batch_rows}
- **Learning Rate:** {recipe.top_learning_rate:g}, linear decay
- **Warmup Steps:** {min(recipe.warmup_steps, report.steps // 2)}
- **Weight Decay:** {recipe.weight_decay:g}
- **Dropout:** {recipe.dropout:g}
- **Optimizer:** AdamW
- **Base in training:** {held}{pruned}

## What was measured
On {report.eval_rows:,} {what} that no step learned from, but that chose the state which was
kept (step {report.best_step:,}); so an upper estimate.

{measured}

![Learning curve]({CURVE_FILE})
"""
    write_curve(folder, report.history, report.best_step)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    return text
