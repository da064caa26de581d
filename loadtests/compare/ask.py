"""Asks the server what is measured: labels of texts, and how likely a text's own tokens are."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx2

IN_FLIGHT = 4
TEXTS_A_CALL = 16
PIECE_CHARACTERS = 400


@dataclass(frozen=True)
class Labelled:
    """Answers to texts: the index of each label, the versions that gave them, and the time."""

    predicted: tuple[int, ...]
    seconds: float

    @property
    def rows_per_s(self) -> float:
        return len(self.predicted) / self.seconds


@dataclass(frozen=True)
class Likelihood:
    """Of a text: nats in all, the tokens they are over, words and bytes of the text, the time."""

    nats: float
    tokens: int
    words: int
    text_bytes: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """Per token of this base's own vocabulary."""
        return math.exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """The same total over words, as WikiText counts them; comparable across vocabularies."""
        return math.exp(self.nats / self.words)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes


def classify(
    client: httpx2.Client,
    adapters: Sequence[str],
    texts: Sequence[str],
    labels: Sequence[str],
) -> dict[str, Labelled]:
    """Ask every adapter for the label of every text; calls of all adapters take turns.

    Args:
        client: With the server's address.
        adapters: Names. One: its speed alone. Several: mixed traffic, and one time for all.
        texts: Sent some a call, some calls at one time.
        labels: Names of the labels in the order of their indices.

    Raises:
        httpx2.HTTPStatusError: An answer that is none.
    """
    calls = [
        (adapter, start, texts[start : start + TEXTS_A_CALL])
        for start in range(0, len(texts), TEXTS_A_CALL)
        for adapter in adapters
    ]

    def ask(call: tuple[str, int, Sequence[str]]) -> tuple[str, int, list[int]]:
        adapter, start, chunk = call
        reply = client.post(
            "/predict",
            params={"adapter": adapter},
            json={"inputs": list(chunk), "parameters": {"truncation": True, "top_k": 1}},
        )
        reply.raise_for_status()
        if reply.headers["x-adapter"] != adapter:
            raise SystemExit(f"{adapter} was asked and {reply.headers['x-adapter']} answered")
        return adapter, start, [labels.index(_best(one)) for one in reply.json()]

    began = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        answers = sorted(pool.map(ask, calls), key=lambda one: one[:2])
    seconds = time.perf_counter() - began
    return {
        adapter: Labelled(
            tuple(index for name, _, found in answers if name == adapter for index in found),
            seconds / len(adapters),
        )
        for adapter in adapters
    }


def likelihood(client: httpx2.Client, model: str, text: str) -> Likelihood:
    """How likely a model finds a text, from the log-probabilities of a prompt's own tokens.

    The text goes in pieces of some hundred characters, cut between words; each is predicted from
    its own beginning, and the token that opens it is not counted.

    Args:
        client: With the server's address.
        model: An adapter's name, or the base's.
        text: As the file has it.
    """

    def ask(piece: str) -> tuple[float, int]:
        reply = client.post(
            "/v1/completions",
            json={"model": model, "prompt": piece, "max_tokens": 0, "echo": True, "logprobs": 0},
        )
        reply.raise_for_status()
        found = reply.json()["choices"][0]["logprobs"]["token_logprobs"]
        known = [one for one in found if one is not None]
        return -sum(known), len(known)

    pieces = list(cut(text, PIECE_CHARACTERS))
    began = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT * 4) as pool:
        answers = list(pool.map(ask, pieces))
    return Likelihood(
        nats=sum(nats for nats, _ in answers),
        tokens=sum(tokens for _, tokens in answers),
        words=len(text.split()) + text.count("\n"),
        text_bytes=len(text.encode()),
        seconds=time.perf_counter() - began,
    )


def cut(text: str, most: int) -> Iterator[str]:
    """Cut a text into pieces of at most `most` characters, at line ends or else between words.

    Joined, the pieces are the text. A word longer than `most` is a piece of its own.
    """
    start = 0
    while start < len(text):
        stop = start + most
        if stop < len(text):
            line = text.rfind("\n", start, stop) + 1
            word = text.rfind(" ", start + 1, stop)
            if line > start + most // 2:
                stop = line
            elif word > start:
                stop = word
            else:
                following = [at for at in (text.find(c, stop) for c in " \n") if at >= 0]
                stop = min(following, default=len(text))
        yield text[start:stop]
        start = stop


def _best(answer: list[dict[str, object]] | dict[str, object]) -> str:
    row = answer[0] if isinstance(answer, list) else answer
    return str(row["label"])
