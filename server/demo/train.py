"""Command line that makes the embedded demo, or measures it again.

    python -m server.demo.train base --data DIR            train and measure the base
    python -m server.demo.train adapter NAME --data DIR    train and measure one adapter on it
    python -m server.demo.train all --data DIR             the base, then every adapter
    python -m server.demo.train measure NAME --data DIR    score one of them (or base, or all) again
                                                           and rewrite its card

DIR is a folder laid out as `server.demo.corpora` says. Every run is seeded.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from server.demo import ADAPTERS_DIR, BASE_DIR, cards, corpora, scores
from server.demo.recipes import RECIPES, ClassifierRecipe, WriterRecipe
from server.demo.train_adapters import train_adapter
from server.demo.train_base import BASE_STEPS, BATCH_TOKENS, train_base

_AS_IN_FILE: Final = "as in the file"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; `arguments` defaults to those of the process."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    name = getattr(options, "name", options.command)
    if name in ("base", "all"):
        if options.command != "measure":
            train_base(options.data, options.base, seed=options.seed, console=console)
        _measure_base(options.data, options.base, console)
    for recipe in RECIPES:
        if name not in (recipe.name, "all"):
            continue
        folder = options.adapters / recipe.name
        if options.command != "measure":
            train_adapter(
                recipe, options.data, options.base, folder, seed=options.seed, console=console
            )
        _measure_adapter(recipe, options.data, options.base, folder, console)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="a folder laid out as imdb/ sst2/ agnews/ wikitext2/ tinyshakespeare/; see corpora.py",
    )
    shared.add_argument("--base", type=Path, default=BASE_DIR, help="folder of the base")
    shared.add_argument(
        "--adapters", type=Path, default=ADAPTERS_DIR, help="folder of the adapters"
    )
    shared.add_argument("--seed", type=int, default=7)
    shared.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser = argparse.ArgumentParser(description="Make the embedded demo, or measure it again.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("base", parents=[shared], help="train and measure the base")
    names = [recipe.name for recipe in RECIPES]
    adapter = commands.add_parser("adapter", parents=[shared], help="train and measure one adapter")
    adapter.add_argument("name", choices=names)
    commands.add_parser("all", parents=[shared], help="the base, then every adapter")
    measure = commands.add_parser(
        "measure", parents=[shared], help="score again, rewrite the cards"
    )
    measure.add_argument("name", choices=["base", *names, "all"])
    return parser


def _measure_base(corpora_root: Path, base_dir: Path, console: Console) -> None:
    measured: dict[str, tuple[scores.WriterScore, scores.WriterScore]] = {}
    for source, documents in corpora.held_out_documents(corpora_root).items():
        plain = scores.base_score(base_dir, documents, quantized=False)
        four_bit = scores.base_score(base_dir, documents, quantized=True)
        measured[source] = (plain, four_bit)
        console.print(f"{source}: {plain}; 4 bits: {four_bit}")
    tokens = BASE_STEPS * BATCH_TOKENS
    cards.write_base_card(base_dir, measured, steps=BASE_STEPS, tokens=tokens)


def _measure_adapter(
    recipe: ClassifierRecipe | WriterRecipe,
    corpora_root: Path,
    base_dir: Path,
    adapter_dir: Path,
    console: Console,
) -> None:
    if isinstance(recipe, ClassifierRecipe):
        rows = recipe.test(corpora_root)
        forms = {_AS_IN_FILE: rows}
        if recipe.html:
            plain = tuple(corpora.without_html(text) for text in rows.texts)
            forms["HTML line breaks removed"] = corpora.LabelledTexts(plain, rows.labels)
        measured = {
            form: scores.classifier_score(recipe, texts, base_dir, adapter_dir)
            for form, texts in forms.items()
        }
        console.print(f"{recipe.name}: {measured}")
        cards.write_classifier_card(adapter_dir, recipe, measured)
    else:
        documents = recipe.test(corpora_root)
        adapted = scores.writer_score(recipe, documents, base_dir, adapter_dir)
        base = scores.base_score(base_dir, documents, quantized=True)
        console.print(f"{recipe.name}: {adapted}; base alone: {base}")
        cards.write_writer_card(adapter_dir, recipe, adapted, base)


if __name__ == "__main__":
    main()
