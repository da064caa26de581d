"""Reads what an adapter is trained on: labelled texts from TSV or JSONL, plain text for writing.

Every file may be gzipped (`.gz`). Choosing, shuffling and tokenising belong to other modules.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

ASIDE_MOST: Final = 256
_STRETCH_WORDS: Final = 5


class RowsError(ValueError):
    """A file of rows that cannot be learned from; the message says what to change."""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, the index of the label of each, and the labels' names in the order of the indices."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)

    def part(self, rows: Sequence[int]) -> LabelledTexts:
        """Return the rows at these places, in this order."""
        texts = tuple(self.texts[row] for row in rows)
        return LabelledTexts(texts, tuple(self.labels[row] for row in rows), self.names)


def read_labelled(path: Path, names: Sequence[str] = ()) -> LabelledTexts:
    """Read labelled texts.

    Args:
        path: `.tsv` with a header line, unquoted, first column the text, second the label; or
            `.jsonl` with a `text` and a `label` a line. Either may end in `.gz`.
        names: What the labels are called. A label of the file is one of them, or an index into
            them. Empty: the distinct labels of the file, sorted.

    Raises:
        RowsError: Another kind of file, a row without text or label, or a label that is not named.
    """
    found = list(_read_pairs(path, names))
    if not found:
        raise RowsError(f"{path} has no rows; expected at least one text with a label")
    if not names:
        distinct = {label for _, label in found}
        numeric = all(label.isascii() and label.isdigit() for label in distinct)
        ordered = sorted(distinct, key=int) if numeric else sorted(distinct)
        if numeric and [int(label) for label in ordered] == list(range(len(ordered))):
            names = tuple(f"LABEL_{label}" for label in ordered)
        else:
            names = tuple(ordered)
    index = {name: place for place, name in enumerate(names)}
    index |= {str(place): place for place in range(len(names)) if str(place) not in index}
    for row, (_, label) in enumerate(found):
        if label not in index:
            raise RowsError(
                f"{path}, row {row + 1}: found label {label!r}, expected one of {', '.join(names)}"
            )
    texts = tuple(text for text, _ in found)
    return LabelledTexts(texts, tuple(index[label] for _, label in found), tuple(names))


def read_text(path: Path) -> str:
    """Read a text file, gzipped or not.

    Raises:
        RowsError: It is empty.
    """
    with _open(path) as file:
        text = file.read()
    if not text.strip():
        raise RowsError(f"{path} is empty; expected text to learn from")
    return text


def split_off(
    rows: LabelledTexts, count: int | None, seed: int
) -> tuple[LabelledTexts, LabelledTexts]:
    """Set some rows aside for evaluation while training.

    A row that is a row set aside, or shares a stretch with it (one holds the other and the shorter
    has five words), is dropped from training: the phrases of a treebank repeat one another, and an
    evaluation on what was learned would flatter.

    Args:
        rows: All of them, at least two.
        count: How many to set aside; None for a tenth, ``ASIDE_MOST`` at most.
        seed: Decides which.

    Raises:
        RowsError: Nothing would be left to learn from.

    Returns:
        Training rows in their own order, then the rows set aside.
    """
    if count is None:
        count = max(1, min(ASIDE_MOST, len(rows) // 10))
    if not 0 < count < len(rows):
        raise RowsError(
            f"{count} of {len(rows)} rows were to be set aside; expected 1 to {len(rows) - 1}, "
            "or give --eval a file of its own"
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    aside = sorted(order[:count])
    held = {" ".join(rows.texts[row].split()) for row in aside}
    joined = "\n".join(f" {text} " for text in sorted(held))
    long = [f" {text} " for text in sorted(held) if _count_words(text) >= _STRETCH_WORDS]

    def overlaps(text: str) -> bool:
        text = " ".join(text.split())
        if text in held:
            return True
        padded = f" {text} "
        return (_count_words(text) >= _STRETCH_WORDS and padded in joined) or any(
            one in padded for one in long
        )

    kept = [row for row in sorted(set(order) - set(aside)) if not overlaps(rows.texts[row])]
    if not kept:
        raise RowsError("every row repeats a row that is set aside; give --eval a file of its own")
    return rows.part(kept), rows.part(aside)


def _count_words(text: str) -> int:
    return text.count(" ") + 1


def _read_pairs(path: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    with _open(path) as file:
        if kind == "tsv":
            lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = next(lines, None)
            labels = set(names)
            for number, columns in enumerate(lines, 2):
                if len(columns) != 2:
                    raise RowsError(
                        f"{path}, line {number}: found {len(columns)} columns, expected 2"
                    )
                labels.add(columns[1].strip())
                yield columns[0], columns[1].strip()
            if header is not None and len(header) == 2 and header[1].strip() in labels:
                raise RowsError(
                    f"{path}, line 1: found a row with the label {header[1].strip()!r}, expected a "
                    "header line; put text and label, with a tab between, before the rows"
                )
        elif kind == "jsonl":
            for number, line in enumerate(file, 1):
                row = _json(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise RowsError(f"{path}, line {number}: expected a text and a label")
                if not isinstance(row.get("label"), int | str):
                    raise RowsError(f"{path}, line {number}: expected an int or str label")
                yield row["text"], str(row["label"])
        else:
            raise RowsError(f"{path}: found .{kind}, expected .tsv or .jsonl, gzipped or not")


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _open(path: Path) -> TextIO:
    if not path.is_file():
        raise RowsError(f"{path} is not there; expected a file to learn from")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
