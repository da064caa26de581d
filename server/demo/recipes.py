"""What each demo adapter is: its task, its texts, its shape and how long it is trained."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from server.demo import corpora
from server.demo.corpora import LabelledTexts
from server.demo.vocabulary import CONTEXT_TOKENS

TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """What every adapter states: its name, its method, its rank and its step size."""

    name: str
    method: Literal["hira", "lora"]
    rank: int
    learning_rate: float
    summary: str
    sources: str
    held_out: str


@dataclass(frozen=True)
class ClassifierRecipe(Recipe):
    """An adapter with a `score` head over the last token of a text."""

    labels: tuple[str, ...]
    train: Callable[[Path], LabelledTexts]
    test: Callable[[Path], LabelledTexts]
    epochs: int
    batch_rows: int
    window_tokens: int = CONTEXT_TOKENS
    html: bool = False


@dataclass(frozen=True)
class WriterRecipe(Recipe):
    """An adapter that continues a text, under the base's own language-model head."""

    train: Callable[[Path], tuple[str, ...]]
    test: Callable[[Path], tuple[str, ...]]
    steps: int


RECIPES: Final[tuple[ClassifierRecipe | WriterRecipe, ...]] = (
    ClassifierRecipe(
        name="hira-imdb",
        method="hira",
        rank=16,
        learning_rate=2e-2,
        summary="Says whether a film review is positive or negative.",
        sources="IMDB reviews (Maas et al. 2011), 8,000 rows of the official training part",
        held_out="IMDB, 2,000 rows of the official test part",
        labels=corpora.SENTIMENT_LABELS,
        train=corpora.imdb_train,
        test=corpora.imdb_test,
        epochs=2,
        batch_rows=16,
        window_tokens=256,
        html=True,
    ),
    ClassifierRecipe(
        name="hira-sst2",
        method="hira",
        rank=8,
        learning_rate=2e-2,
        summary="Says whether a sentence about a film is positive or negative.",
        sources="SST-2 (Socher et al. 2013), 55,438 rows of the training part",
        held_out="SST-2, the development part",
        labels=corpora.SENTIMENT_LABELS,
        train=corpora.sst2_train,
        test=corpora.sst2_test,
        epochs=1,
        batch_rows=256,
    ),
    WriterRecipe(
        name="hira-shakespeare",
        method="hira",
        rank=16,
        learning_rate=2e-2,
        summary="Continues a text as a play by Shakespeare.",
        sources="tiny Shakespeare, the first nine tenths",
        held_out="tiny Shakespeare, the last tenth",
        train=corpora.shakespeare_train,
        test=corpora.shakespeare_test,
        steps=200,
    ),
    WriterRecipe(
        name="hira-wiki",
        method="hira",
        rank=8,
        learning_rate=2e-2,
        summary="Continues a text as an encyclopedia article.",
        sources="a prefix of WikiText-103 (Merity et al. 2016), nine tenths of its articles",
        held_out="the last tenth of the same articles",
        train=corpora.wiki_train,
        test=corpora.wiki_test,
        steps=200,
    ),
    ClassifierRecipe(
        name="lora-agnews",
        method="lora",
        rank=8,
        learning_rate=2e-3,
        summary="Names the topic of a piece of news.",
        sources="AG News, 9,991 rows of the official training part",
        held_out="AG News, the official test part",
        labels=corpora.TOPIC_LABELS,
        train=corpora.agnews_train,
        test=corpora.agnews_test,
        epochs=2,
        batch_rows=64,
    ),
)
