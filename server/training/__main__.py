"""Trains one adapter and writes its folder: `python -m server.training --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from server.training.adapted import build, load_tokenizer, task_config
from server.training.card import write_card
from server.training.rows import RowsError, read_labelled, read_text, split_off
from server.training.save import save
from server.training.settings import LEARNING_RATES, METHODS, TRAINED_TASK_TYPES, Recipe, Report
from server.training.train import Classified, Examples, Windows, fit

_DEFAULTS = Recipe(base="", base_name="", method="hira", task_type="SEQ_CLS")


def main(
    arguments: Sequence[str] | None = None, *, program: str = "python -m server.training"
) -> Report:
    """Run one command; `arguments` defaults to those of the process."""
    options = _parser(program).parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = Recipe(
        base=options.base,
        base_name=options.base_name or Path(options.base).name,
        targets=tuple(options.targets.split(",")) if options.targets else (),
        **{name: getattr(options, name) for name in _OWN_NAMES},
    )
    try:
        return train(
            recipe,
            options.train,
            options.out,
            held_out=options.eval,
            eval_rows=options.eval_rows,
            labels=tuple(options.labels.split(",")) if options.labels else (),
            report=options.report,
            console=Console(),
        )
    except RowsError as error:
        raise SystemExit(str(error)) from error


def train(
    recipe: Recipe,
    source: Path,
    out: Path,
    *,
    held_out: Path | None = None,
    eval_rows: int | None = None,
    labels: Sequence[str] = (),
    report: Path | None = None,
    console: Console,
) -> Report:
    """Train an adapter on the rows of a file and save it with its card.

    Args:
        recipe: The run.
        source: `.tsv` or `.jsonl` for a classifier, any text for CAUSAL_LM; `.gz` or not.
        out: Folder that is written.
        held_out: A file of the same kind for the evaluations; None: rows set aside from `source`.
        eval_rows: How many to set aside; None for a tenth, 256 at most.
        labels: Names of the labels.
        report: File for the report as JSON, or None.
        console: Progress goes there.

    Raises:
        RowsError: Rows that cannot be learned from.
    """
    tokenizer = load_tokenizer(recipe)
    names: tuple[str, ...] = ()
    learned: Examples
    measured: Examples
    if recipe.task_type == "SEQ_CLS":
        rows = read_labelled(source, labels)
        names = rows.names
        if held_out is not None:
            aside = read_labelled(held_out, names)
        else:
            rows, aside = split_off(rows, eval_rows, recipe.seed)
        learned = Classified(tokenizer, rows, recipe.max_tokens)
        measured = Classified(tokenizer, aside, recipe.max_tokens)
    else:
        text = read_text(source)
        if held_out is not None:
            last = read_text(held_out)
        else:
            # The end of the text: what stands between learned windows would be half learned.
            cut = text.find("\n", int(len(text) * 0.95)) + 1 or int(len(text) * 0.95)
            text, last = text[:cut], text[cut:]
        learned = Windows(tokenizer, text, recipe.max_tokens)
        measured = Windows(tokenizer, last, recipe.max_tokens)
    config = task_config(recipe, names)
    model = build(recipe, config)
    console.print(
        f"{recipe.method}, r = {recipe.rank}, {len(learned):,} rows, {len(measured):,} set aside"
    )
    done = fit(recipe, model, learned, measured, out=out, console=console)
    save(model, config, recipe, out)
    write_card(out, recipe, done, names)
    if report is not None:
        written = asdict(replace(done, out=Path(out.name)))
        report.write_text(json.dumps(written, indent=2, default=str), encoding="utf-8")
    console.print(f"wrote {out}")
    return done


_OWN_NAMES = (
    *("method", "task_type", "rank", "alpha", "dropout", "epochs", "batch_rows", "learning_rate"),
    *("weight_decay", "warmup_steps", "max_tokens", "sparsity", "dense_share", "evaluations"),
    *("patience", "seed", "autocast"),
)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Train one adapter with PEFT and write its folder, card included.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    own = _DEFAULTS
    parser.add_argument("--base", required=True, help="folder or hub id of the base")
    parser.add_argument("--base-name", help="what the adapter calls its base; the folder's name")
    parser.add_argument(
        "--train", type=Path, required=True, help=".tsv, .jsonl or text, .gz or not"
    )
    parser.add_argument("--eval", type=Path, help="rows for the evaluations; else some set aside")
    parser.add_argument("--eval-rows", type=int, help="how many to set aside; a tenth, 256 at most")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--method", choices=METHODS, default=own.method)
    parser.add_argument("--task-type", choices=TRAINED_TASK_TYPES, default=own.task_type)
    parser.add_argument("--labels", default="", help="names of labels 0, 1, ..., by commas")
    parser.add_argument("--targets", default="", help="adapted layers, by commas: query and value")
    parser.add_argument("--rank", type=int, default=own.rank)
    parser.add_argument("--alpha", type=float, help="LoRA's alpha; 2 r")
    parser.add_argument("--dropout", type=float, default=own.dropout)
    parser.add_argument("--epochs", type=int, default=own.epochs)
    parser.add_argument("--batch-rows", type=int, default=own.batch_rows)
    usual = ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items())
    parser.add_argument("--learning-rate", type=float, help=f"at its height; {usual}")
    parser.add_argument("--weight-decay", type=float, default=own.weight_decay)
    parser.add_argument("--warmup-steps", type=int, default=own.warmup_steps)
    parser.add_argument("--max-tokens", type=int, default=own.max_tokens)
    parser.add_argument("--sparsity", type=float, default=own.sparsity, help="of sparse-lora")
    parser.add_argument("--dense-share", type=float, default=own.dense_share, help="then it prunes")
    parser.add_argument("--evaluations", type=int, default=own.evaluations, help="an epoch")
    parser.add_argument("--patience", type=int, default=own.patience, help="evaluations; 0: never")
    parser.add_argument("--seed", type=int, default=own.seed)
    parser.add_argument("--autocast", action="store_true", help="multiply in bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch decides")
    parser.add_argument("--report", type=Path, help="write what was measured as JSON")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
