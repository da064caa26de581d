"""Takes each task's rows from the public files and writes what the recipe reads.

`DIR` is laid out as `sst2/{train,dev}.tsv.gz`, `imdb/{train,test}.jsonl.gz`,
`wikitext2/{train_wt103_prefix,test}.txt.gz`. A task that takes some rows takes the first of a
seeded shuffle, the same for every method.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.compare.plan import Task

_SEED = 7


@dataclass(frozen=True)
class Rows:
    """Texts with the index of the label of each; a causal task has pieces of text and no labels."""

    texts: tuple[str, ...]
    labels: tuple[int, ...] = ()


def training_file(task: Task, root: Path, folder: Path) -> Path:
    """Write the rows a task is trained on, once for all methods; returns the file."""
    if task.kind == "CAUSAL_LM":
        text = _text(root / "wikitext2" / "train_wt103_prefix.txt.gz")
        out = folder / f"{task.key}.txt"
        out.write_text(text[: text.rindex("\n", 0, task.train_rows) + 1], encoding="utf-8")
        return out
    rows = _some(_labelled(task, root, "train"), task.train_rows)
    out = folder / f"{task.key}.jsonl"
    with out.open("w", encoding="utf-8") as file:
        for text, label in rows:
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return out


def test_rows(task: Task, root: Path) -> Rows:
    """Return what a task is measured on, which no training saw."""
    if task.kind == "CAUSAL_LM":
        text = _text(root / "wikitext2" / "test.txt.gz")
        if task.test_rows:
            text = text[: text.rindex("\n", 0, task.test_rows) + 1]
        return Rows((text,))
    rows = _labelled(task, root, "test")
    chosen = _some(rows, task.test_rows) if task.test_rows else rows
    return Rows(tuple(text for text, _ in chosen), tuple(label for _, label in chosen))


def _labelled(task: Task, root: Path, part: str) -> list[tuple[str, int]]:
    if task.source == "sst2":
        name = "dev" if part == "test" else "train"
        lines = _lines(root / "sst2" / f"{name}.tsv.gz")
        read = csv.reader(lines[1:], delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(text, int(label)) for text, label in read]
    lines = _lines(root / "imdb" / f"{part}.jsonl.gz")
    found = [json.loads(line) for line in lines]
    return [(row["text"].replace("<br />", " "), int(row["label"])) for row in found]


def _some(rows: Sequence[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    shuffled = list(rows)
    random.Random(_SEED).shuffle(shuffled)
    return shuffled[:count]


def _text(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def _lines(path: Path) -> list[str]:
    # Not splitlines: a review may hold other line ends of Unicode.
    return _text(path).rstrip("\n").split("\n")
