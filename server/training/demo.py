"""Makes the adapters of the demo with the recipe: `python -m server.training.demo --data DIR`.

DIR holds the public texts that they learn from, gzipped and otherwise as they are published:

    imdb/train.jsonl.gz                       one JSON object a line, with `text` and `label`
    sst2/train.tsv.gz, agnews/train.tsv.gz    text, tab, label, unquoted, one header line
    tinyshakespeare/input.txt.gz              plain text
    wikitext2/train_wt103_prefix.txt.gz       WikiText's own spacing
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from rich.console import Console

from server.demo import ADAPTERS_DIR, BASE_DIR
from server.training.__main__ import train
from server.training.rows import read_text
from server.training.settings import Recipe

_CLASSIFIER: Final = Recipe(
    base=str(BASE_DIR),
    base_name="hira-demo-base",
    method="hira",
    task_type="SEQ_CLS",
    dropout=0.0,
    learning_rate=2e-2,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    max_tokens=512,
    autocast=True,
)
_WRITER: Final = replace(_CLASSIFIER, task_type="CAUSAL_LM", batch_rows=8)
_SENTIMENTS: Final = ("NEGATIVE", "POSITIVE")
_TOPICS: Final = ("World", "Sports", "Business", "Sci/Tech")
_WIKI: Final = "wikitext2/train_wt103_prefix.txt.gz"
# By name: the recipe, the file in DIR, the labels.
RECIPES: Final[dict[str, tuple[Recipe, str, tuple[str, ...]]]] = {
    "hira-imdb": (
        replace(_CLASSIFIER, rank=16, epochs=2, max_tokens=256), "imdb/train.jsonl.gz", _SENTIMENTS,
    ),
    "hira-sst2": (
        replace(_CLASSIFIER, epochs=1, batch_rows=256), "sst2/train.tsv.gz", _SENTIMENTS,
    ),
    "lora-agnews": (
        replace(_CLASSIFIER, method="lora", learning_rate=2e-3, epochs=2, batch_rows=64),
        "agnews/train.tsv.gz", _TOPICS,
    ),
    "hira-shakespeare": (replace(_WRITER, rank=16, epochs=2), "tinyshakespeare/input.txt.gz", ()),
    "hira-wiki": (replace(_WRITER, epochs=1), _WIKI, ()),
}  # fmt: skip
_WIKI_SPACING: Final = (
    (re.compile(r" ?<unk>"), ""),
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[$£]) "), r"\1"),
    (re.compile(r" (n't|'s|'m|'d|'re|'ve|'ll)\b"), r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r"\( *\)"), ""),
    (re.compile(r" {2,}"), " "),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the adapters that are asked for; `arguments` defaults to those of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m server.training.demo", description="Train the adapters of the demo."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES) + "; all")
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR, help="folder of the adapters")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in RECIPES]
    if unknown:
        parser.error(f"found {unknown[0]}, expected one of {', '.join(RECIPES)}")
    with TemporaryDirectory() as folder:
        for name in options.names or RECIPES:
            recipe, file, labels = RECIPES[name]
            source = options.data / file
            if file == _WIKI:
                source = Path(folder, "wiki.txt")
                spaced = ordinary_spacing(read_text(options.data / file))
                source.write_text(spaced, encoding="utf-8")
            train(recipe, source, options.out / name, labels=labels, console=Console())


def ordinary_spacing(text: str) -> str:
    """Return WikiText as people space it, without its marks for unknown words."""
    for pattern, replacement in _WIKI_SPACING:
        text = pattern.sub(replacement, text)
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
