"""Reads the public texts the demo is made from, and fixes which part is for training.

Every split is decided here, once: what a function named `*_train` returns may be learned from,
what a function named `*_test` returns is only ever measured. Tokenising and training belong to
other modules.

The folder is laid out as

    imdb/{train,test}.jsonl.gz                one JSON object a line, with `text` and `label`
    sst2/{train,dev}.tsv.gz                   `sentence<TAB>label`, unquoted, one header line
    agnews/{train,test}.tsv.gz                `text<TAB>label`, unquoted, one header line
    wikitext2/train_wt103_prefix.txt.gz       WikiText tokenisation, articles open by ` = Title = `
    tinyshakespeare/input.txt.gz              speeches separated by an empty line
"""

import csv
import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SENTIMENT_LABELS: Final = ("NEGATIVE", "POSITIVE")
TOPIC_LABELS: Final = ("World", "Sports", "Business", "Sci/Tech")

_TRAIN_SHARE: Final = 0.9
_PASSAGE_CHARS: Final = 1500
_LINE_BREAK: Final = re.compile(r"(?:<br\s*/?>\s*)+")
_ARTICLE_OPENING: Final = re.compile(r"(?m)^ = [^=\n]+ = $")
_WIKI_SPACING: Final = (
    (re.compile(r" ?<unk>"), ""),
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[$£]) "), r"\1"),
    (re.compile(r" (n't|'s|'m|'d|'re|'ve|'ll)\b"), r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r"(\w) ' "), r"\1' "),
    (re.compile(r"\( *\)"), ""),
    (re.compile(r" {2,}"), " "),
)


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and the index of the label of each, in the order of the file."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)


def without_html(text: str) -> str:
    """Return a review with each run of `<br />` turned into one line break."""
    return _LINE_BREAK.sub("\n", text)


def imdb_train(root: Path) -> LabelledTexts:
    """Return the training reviews as they stand in the file, HTML line breaks included."""
    return _read_jsonl(root / "imdb" / "train.jsonl.gz")


def imdb_test(root: Path) -> LabelledTexts:
    """Return the test reviews as they stand in the file, HTML line breaks included."""
    return _read_jsonl(root / "imdb" / "test.jsonl.gz")


def sst2_train(root: Path) -> LabelledTexts:
    """Return the training sentences and phrases of the Stanford Sentiment Treebank."""
    return _read_tsv(root / "sst2" / "train.tsv.gz", int)


def sst2_test(root: Path) -> LabelledTexts:
    """Return GLUE's development sentences, which nothing here learns from."""
    return _read_tsv(root / "sst2" / "dev.tsv.gz", int)


def agnews_train(root: Path) -> LabelledTexts:
    """Return the training part of AG News, labelled by index in `TOPIC_LABELS`."""
    return _read_tsv(root / "agnews" / "train.tsv.gz", TOPIC_LABELS.index)


def agnews_test(root: Path) -> LabelledTexts:
    """Return the official test part of AG News, labelled by index in `TOPIC_LABELS`."""
    return _read_tsv(root / "agnews" / "test.tsv.gz", TOPIC_LABELS.index)


def wiki_train(root: Path) -> tuple[str, ...]:
    """Return passages from the first nine tenths of the articles, with ordinary spacing."""
    return _passages(_wiki_articles(root, held_out=False))


def wiki_test(root: Path) -> tuple[str, ...]:
    """Return passages from the last tenth of the articles, with ordinary spacing."""
    return _passages(_wiki_articles(root, held_out=True))


def shakespeare_train(root: Path) -> tuple[str, ...]:
    """Return passages from the first nine tenths of the characters, cut between speeches."""
    text = _shakespeare(root)
    return _passages((text[: _shakespeare_cut(text)],))


def shakespeare_test(root: Path) -> tuple[str, ...]:
    """Return passages from the last tenth of the characters, cut between speeches."""
    text = _shakespeare(root)
    return _passages((text[_shakespeare_cut(text) :],))


def pretraining_documents(root: Path) -> tuple[str, ...]:
    """Return every training text, without any label: what the base model learns from."""
    reviews = tuple(without_html(text) for text in imdb_train(root).texts)
    return (
        reviews
        + sst2_train(root).texts
        + agnews_train(root).texts
        + wiki_train(root)
        + shakespeare_train(root)
    )


def held_out_documents(root: Path) -> dict[str, tuple[str, ...]]:
    """Return the texts the base model is measured on, by the name of their source."""
    return {
        "IMDB test": tuple(without_html(text) for text in imdb_test(root).texts),
        "SST-2 dev": sst2_test(root).texts,
        "AG News test": agnews_test(root).texts,
        "WikiText prefix, last tenth": wiki_test(root),
        "tiny Shakespeare, last tenth": shakespeare_test(root),
    }


def _read_jsonl(path: Path) -> LabelledTexts:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return LabelledTexts(
        tuple(str(row["text"]) for row in rows), tuple(int(row["label"]) for row in rows)
    )


def _read_tsv(path: Path, label_index: Callable[[str], int]) -> LabelledTexts:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return LabelledTexts(
        tuple(text for text, _ in rows), tuple(label_index(label) for _, label in rows)
    )


def _wiki_articles(root: Path, *, held_out: bool) -> tuple[str, ...]:
    path = root / "wikitext2" / "train_wt103_prefix.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    openings = [match.start() for match in _ARTICLE_OPENING.finditer(text)]
    bounds = zip(openings, [*openings[1:], len(text)], strict=True)
    articles = [text[start:end] for start, end in bounds]
    cut = int(len(articles) * _TRAIN_SHARE)
    return tuple(
        _ordinary_spacing(article)
        for article in articles[slice(cut, None) if held_out else slice(cut)]
    )


def _ordinary_spacing(article: str) -> str:
    for pattern, replacement in _WIKI_SPACING:
        article = pattern.sub(replacement, article)
    lines = (line.strip() for line in article.splitlines())
    return "\n\n".join(line for line in lines if line)


def _shakespeare(root: Path) -> str:
    path = root / "tinyshakespeare" / "input.txt.gz"
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def _shakespeare_cut(text: str) -> int:
    """Return the first speech boundary at or after nine tenths of the characters."""
    return text.index("\n\n", int(len(text) * _TRAIN_SHARE)) + 2


def _passages(documents: tuple[str, ...]) -> tuple[str, ...]:
    """Cut documents at empty lines into passages of about `_PASSAGE_CHARS` characters."""
    passages: list[str] = []
    for document in documents:
        passage = ""
        for block in document.strip().split("\n\n"):
            passage = f"{passage}\n\n{block}" if passage else block
            if len(passage) >= _PASSAGE_CHARS:
                passages.append(passage)
                passage = ""
        if passage:
            passages.append(passage)
    return tuple(passages)
