"""Writes what was measured: a page of tables, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from loadtests.compare.measuring import Measured, Served
from loadtests.compare.plan import METHODS, Plan, Task
from loadtests.compare.training import Trained

# As model cards of such adapters print them, with what they were measured on.
CARDS: Final = (
    ("accuracy, HiRA, IMDB", "0.9293", "DistilBERT; how many rows is not said"),
    ("accuracy, QLoRA, SST-2", "0.9220", "DistilBERT; how many rows is not said"),
    (
        "samples/s, LoRA, WikiText-2",
        "181.72",
        "a GPU; texts of unknown length; BERT by name, DistilBERT by its count",
    ),
    ("peak memory, LoRA, WikiText-2", "3.09 GB", "of a GPU"),
    (
        "model size, LoRA, WikiText-2",
        "256.10 MB",
        "67,132,986 float32 numbers: the whole model, not the adapter",
    ),
    ("perplexity, LoRA and Sparse LoRA, WikiText-2", "N/A", "no figure is given"),
)
MIB: Final = 1 << 20


def write(
    plan: Plan,
    trained: Sequence[Trained],
    served: Mapping[str, Served],
    out: Path,
    *,
    machine: Mapping[str, Any],
    command: str,
) -> str:
    """Write `RESULTS.md` and `results.json`.

    Args:
        plan: What was compared.
        trained: Every run.
        served: By kind of task.
        out: Folder.
        machine: What it ran on and with.
        command: What makes it anew.

    Returns:
        The page.
    """
    parts = [
        "# HiRA, LoRA, QLoRA and Sparse LoRA on one server",
        f"Made by `{command}`. Every figure of quality and speed below was measured through HTTP, "
        "on one running server for each base, in NF4, with all adapters of that base registered "
        "at once. Nothing in the tables was typed in but the figures of model cards.",
    ]
    for task in plan.tasks:
        one = served[task.kind]
        parts += [f"## {task.title}", _about(task, plan, one, trained), _table(task, one, trained)]
        if task.key in one.mixed:
            parts.append(_mixed(one.mixed[task.key]))
    parts += ["## Memory of the servers", _servers(served)]
    parts += ["## Beside the figures of model cards", _cards(served)]
    parts += ["## Machine", _machine(machine)]
    page = "\n\n".join(parts) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "RESULTS.md").write_text(page, encoding="utf-8")
    known = {
        "command": command,
        "machine": machine,
        "plan": asdict(plan),
        "trained": [
            {"task": one.task.key, "method": one.method.key, **one.report} for one in trained
        ],
        "served": {kind: asdict(one) for kind, one in served.items()},
    }
    text = json.dumps(known, indent=1, default=str)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    return page


def _about(task: Task, plan: Plan, served: Served, trained: Sequence[Trained]) -> str:
    report = next(one.report for one in trained if one.task.key == task.key)
    what, unit = ("windows", "characters") if task.kind == "CAUSAL_LM" else ("rows", "rows")
    rates = ", ".join(
        f"{rate:g} for {' and '.join(name for name, own in task.rates.items() if own == rate)}"
        for rate in dict.fromkeys(task.rates.values())
    )
    aside = f"{report['eval_rows']:,} more {what} choose which state of a run is kept"
    return (
        f"Base `{served.base}`. Trained on {report['train_rows']:,} {what} of at most "
        f"{task.max_tokens} tokens, the same and in the same order for every method; {aside}. "
        f"Passes: {plan.epochs}, in batches of 16, weight decay 0.01, linear schedule, warm-up "
        f"over 100 steps or half of all. Learning rate: {rates}. Measured on "
        f"{served.rows[task.key]:,} {unit} of the test part."
    )


def _table(task: Task, served: Served, trained: Sequence[Trained]) -> str:
    reports = {one.method.key: one.report for one in trained if one.task.key == task.key}
    found = {one.method: one for one in served.measured if one.task == task.key}
    quality = (
        ("perplexity, token", "perplexity, word", "bits/byte", "tokens/s")
        if task.kind == "CAUSAL_LM"
        else ("accuracy", "F1", "samples/s")
    )
    heads = (
        *("method", *quality, "trainable parameters", "adapter bytes", "zeros"),
        "training peak, MiB",
    )
    rows = []
    if None in found:
        rows.append(("base alone", *_quality(task, found[None]), "0", "0", "", ""))
    for method in METHODS:
        one, report = found[method.key], reports[method.key]
        sparsity = one.record.get("sparsity") or 0.0
        rows.append(
            (
                method.title,
                *_quality(task, one),
                f"{one.record['parameters']:,}",
                f"{one.record['bytes']:,}",
                f"{sparsity:.1%}",
                f"{report['resident_peak_bytes'] / MIB:,.0f}",
            )
        )
    return table(heads, rows)


def _quality(task: Task, one: Measured) -> tuple[str, ...]:
    known = one.figures
    if task.kind == "CAUSAL_LM":
        return (
            f"{known['perplexity']:.2f}",
            f"{known['word_perplexity']:.1f}",
            f"{known['bits_per_byte']:.4f}",
            f"{known['tokens_per_s']:,.0f}",
        )
    return (
        f"{known['accuracy']:.4f} ± {known['margin']:.3f}",
        f"{known['f1']:.4f}",
        f"{known['rows_per_s']:.0f}",
    )


def _mixed(mixed: Mapping[str, float]) -> str:
    return (
        f"All adapters of this task in turn, mixed in the same batches: "
        f"{mixed['rows_per_s']:.0f} samples/s; of {mixed['labels']:,.0f} labels "
        f"{mixed['differing']:.0f} differ from those given alone (bfloat16 rounds by the batch)."
    )


def _servers(served: Mapping[str, Served]) -> str:
    heads = (
        "base",
        "adapters",
        "worker idle, MiB",
        "worker's peak",
        "all processes' peaks",
        "load",
    )
    rows = []
    for one in served.values():
        worker = max(one.idle_bytes.values(), default=0)
        peaks = [f"{one.peak_bytes[name] / MIB:,.0f}" for name in ("worker", "all processes")]
        load = " to ".join(f"{value:.1f}" for value in one.load)
        rows.append((f"`{one.base}`", str(one.adapters), f"{worker / MIB:,.0f}", *peaks, load))
    return table(heads, rows) + (
        "\n\nThe load is the machine's while it was measured. Where it is above the number of "
        "cores, other work took part of them: speeds are what was left, and compare within a table "
        "only."
    )


def _cards(served: Mapping[str, Served]) -> str:
    here = {(one.task, one.method): one for each in served.values() for one in each.measured}
    own = (
        _accuracy(here.get(("imdb", "hira-r8"))),
        _accuracy(here.get(("sst2", "qlora-r8"))),
        _speed(here.get(("sst2", "lora-r8"))),
        f"{max(one.peak_bytes['worker'] for one in served.values()) / (1 << 30):.2f} GB "
        "of main memory, the worker that serves all adapters of a base",
        _bytes(here.get(("wiki", "lora-r8"))),
        _perplexity(here.get(("wiki", "lora-r8")), here.get(("wiki", "sparse-lora-r8"))),
    )
    rows = [(*card, mine) for card, mine in zip(CARDS, own, strict=True)]
    text = table(("figure", "card", "measured there on", "here"), rows)
    return text + (
        "\n\nWhat differs: here the encoder has 6 layers of width 384 (10.6 M parameters below its "
        "embeddings, DistilBERT 42.5 M) and was trained for sentence similarity, a run sees some "
        "hundred or thousand rows, texts are cut earlier, and all runs on "
        "two CPU cores that other work shared, without a GPU. The figures stand beside each "
        "other, they do not compete."
    )


def _accuracy(one: Measured | None) -> str:
    return "not in this plan" if one is None else f"{one.figures['accuracy']:.4f}"


def _speed(one: Measured | None) -> str:
    if one is None:
        return "not in this plan"
    return f"{one.figures['rows_per_s']:.0f} (SST-2 through HTTP, CPU)"


def _bytes(one: Measured | None) -> str:
    return "not in this plan" if one is None else f"{one.record['bytes'] / 1e6:.2f} MB, the adapter"


def _perplexity(*each: Measured | None) -> str:
    found = [f"{one.figures['perplexity']:.2f}" for one in each if one is not None]
    return " and ".join(found) + " per token, demo base" if found else "not in this plan"


def _machine(machine: Mapping[str, Any]) -> str:
    lines = []
    for name, value in machine.items():
        inner = isinstance(value, Mapping)
        shown = ", ".join(f"{a} {b}" for a, b in value.items()) if inner else str(value)
        lines.append(f"- {name}: {shown}")
    return "\n".join(lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
