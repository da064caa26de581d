"""Logits and hidden states to the plain JSON values that a client reads.

Pure functions over tensors of one input each, in the conventions of transformers' pipelines. No
model, no batch: padding is cut off before. ``POSTPROCESSORS`` says which answers a task.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch

from adapters.tasks import BY_NAME, Task
from server.failures import NotFinite
from server.inputs.text import Text
from server.messages import EncodeRequest, TokenizedInput

Apply = Literal["softmax", "sigmoid", "none"]
Pooling = Literal["mean", "cls", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

ANSWER_TOKENS = 15  # an answer is no longer than this
_WORD_STRATEGIES = ("first", "average", "max")


@dataclass(frozen=True, slots=True)
class Reading:
    """What the answer to one input is made of.

    Args:
        values: Logits of the adapter's head (``[labels]``; of tokens ``[T, labels]``; of questions
            ``[T, 2]``), or of the base's at the masks (``[masks, vocabulary]``), or hidden states
            where no head is (``[T, H]``, without padding).
        item: The input.
        request: What was asked of it.
        text: The base's tokenizer; None on a base of images.
        labels: Names of the logits of the adapter's head.
        problem_type: How these become scores; None where the adapter says nothing.
        pooling: How a vector is made of hidden states.
        normalize: Whether it has length 1.
    """

    values: torch.Tensor
    item: Any  # Encoded
    request: EncodeRequest
    text: Text | None = None
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    pooling: Pooling = "mean"
    normalize: bool = True

    def option(self, name: str, default: Any = None) -> Any:
        return self.request.options.get(name, default)

    @property
    def tokenizer(self) -> Text:
        assert self.text is not None  # tasks of texts are refused on a base of images
        return self.text

    @property
    def top_k(self) -> int | None:
        """Answers for the input: as asked, else as the task's row has it; None for all."""
        return self.request.top_k or BY_NAME[self.request.task].default_top_k


def check_finite(values: torch.Tensor) -> None:
    """Raises NotFinite unless every value is a number."""
    if not bool(torch.isfinite(values).all()):
        raise NotFinite("NaN or infinity in the model's output")


def scores_of_labels(problem_type: str | None, labels: int) -> Apply:
    """How the logits of so many labels become scores.

    Regression gives the bare values, several labels at once (and one label alone) their sigmoids,
    one of several its softmax.
    """
    if problem_type == "regression":
        return "none"
    if problem_type == "multi_label_classification" or labels == 1:
        return "sigmoid"
    return "softmax"


def classify(
    logits: torch.Tensor,
    labels: Sequence[str],
    problem_type: str | None,
    *,
    top_k: int | None = None,
    apply: Apply | None = None,
) -> tuple[dict[str, Any], ...]:
    """Scores of the labels, highest first.

    Args:
        logits: ``[labels]``.
        labels: Their names.
        problem_type: As in a model's config; ``scores_of_labels`` reads it.
        top_k: How many. None: all.
        apply: Overrides what the problem type says.
    """
    check_finite(logits)
    apply = apply or scores_of_labels(problem_type, len(labels))
    scores = logits.float()
    if apply == "softmax":
        scores = scores.softmax(-1)
    elif apply == "sigmoid":
        scores = scores.sigmoid()
    order = torch.argsort(scores, descending=True, stable=True)[:top_k].tolist()
    values = scores.tolist()
    return tuple({"label": labels[index], "score": values[index]} for index in order)


def embed(hidden: torch.Tensor, *, pooling: Pooling, normalize: bool = True) -> tuple[float, ...]:
    """One vector for an input.

    Args:
        hidden: ``[T, H]``, without padding.
        pooling: ``mean`` over the tokens, the first (``cls``) or the ``last`` of them.
        normalize: To length 1.
    """
    check_finite(hidden)
    states = hidden.float()
    vector = {"mean": lambda: states.mean(0), "cls": lambda: states[0], "last": lambda: states[-1]}[
        pooling
    ]()
    if normalize:
        vector = torch.nn.functional.normalize(vector, dim=0)
    values: list[float] = vector.tolist()
    return tuple(values)


def fill(
    logits: torch.Tensor,
    item: TokenizedInput,
    text: Text,
    *,
    top_k: int | None = None,
    targets: Sequence[int] | None = None,
) -> tuple[Any, ...]:
    """Words for the masks of an input, most probable first.

    Args:
        logits: ``[masks, vocabulary]``, of the mask tokens in order.
        item: The input.
        text: The base's tokenizer.
        top_k: Words per mask. None: all.
        targets: Token ids to choose from; their scores stay those among the whole vocabulary, so
            they are the probabilities that a perplexity is made of.

    Returns:
        A dictionary per word; for several masks a tuple of them per mask.
    """
    check_finite(logits)
    places = [index for index, one in enumerate(item.token_ids) if one == text.mask_id]
    scores = logits.float().softmax(-1)
    if targets is None:
        scores, tokens = scores.topk(min(top_k or scores.shape[-1], scores.shape[-1]), dim=-1)
    else:
        chosen = torch.tensor(targets, device=scores.device)
        scores, order = scores[:, chosen].sort(dim=-1, descending=True)
        scores, tokens = scores[:, :top_k], chosen[order][:, :top_k]
    filled = []
    for place, row_scores, row_tokens in zip(places, scores.tolist(), tokens.tolist(), strict=True):
        words = []
        for score, token in zip(row_scores, row_tokens, strict=True):
            ids = list(item.token_ids)
            ids[place] = token
            words.append(
                {
                    "score": score,
                    "token": token,
                    "token_str": text.decode([token], skip_special_tokens=False),
                    "sequence": text.decode(ids, skip_special_tokens=len(places) == 1),
                }
            )
        filled.append(tuple(words))
    return filled[0] if len(filled) == 1 else tuple(filled)


def entities(
    logits: torch.Tensor,
    item: TokenizedInput,
    labels: Sequence[str],
    text: Text,
    *,
    strategy: str = "simple",
    ignored: Collection[str] = ("O",),
) -> tuple[dict[str, Any], ...]:
    """Labelled spans of a text.

    Args:
        logits: ``[T, labels]``.
        item: The input, with its text and offsets. Tokens without characters are left out.
        labels: Their names; ``B-`` starts a span, ``I-`` continues one.
        text: The base's tokenizer.
        strategy: ``none``: a dictionary per token, with ``entity``. ``simple``: neighbours of one
            label are joined. ``first``, ``average``, ``max``: the tokens of a word agree first.
        ignored: Labels to leave out, as they stand in the answer.
    """
    check_finite(logits)
    assert item.text is not None
    assert item.offsets is not None
    rows = logits.float().softmax(-1)
    found: list[dict[str, Any]] = []
    for index, (start, end) in enumerate(item.offsets):
        if start == end:
            continue
        found.append(
            {
                "pieces": [text.piece(item.token_ids[index], item.text[start:end])],
                "start": start,
                "end": end,
                "index": index,
                "scores": rows[index],
            }
        )
    if strategy in _WORD_STRATEGIES:
        found = [_agree(word, strategy, text) for word in _group_words(found, item.text)]
    for one in found:
        best = int(one["scores"].argmax())
        one["entity"] = labels[best]
        one["score"] = float(one["scores"][best])
    if strategy == "none":
        return tuple(
            {
                "entity": one["entity"],
                "score": one["score"],
                "index": one["index"],
                "word": one["pieces"][0],
                "start": one["start"],
                "end": one["end"],
            }
            for one in found
            if one["entity"] not in ignored
        )
    groups: list[list[dict[str, Any]]] = []
    for one in found:
        continues = not one["entity"].startswith("B-")
        if groups and continues and _bare(groups[-1][-1]["entity"]) == _bare(one["entity"]):
            groups[-1].append(one)
        else:
            groups.append([one])
    joined = (_join(group, text) for group in groups)
    return tuple(one for one in joined if one["entity_group"] not in ignored)


def answers(
    logits: torch.Tensor, item: TokenizedInput, *, top_k: int = 1
) -> tuple[dict[str, Any], ...]:
    """Spans of the context that answer the question, most probable first.

    The score of a span is softmax(start) · softmax(end), both over the tokens of the context.

    Args:
        logits: ``[T, 2]``, start and end.
        item: The pair of question and context; offsets are those of the context.
        top_k: How many answers.
    """
    check_finite(logits)
    assert item.text is not None
    assert item.offsets is not None
    inside = [index for index, (start, end) in enumerate(item.offsets) if start != end]
    if not inside:
        return ()
    found = []
    for score, first, last in best_spans(logits[inside], top_k):
        start, end = item.offsets[inside[first]][0], item.offsets[inside[last]][1]
        found.append({"score": score, "start": start, "end": end, "answer": item.text[start:end]})
    return tuple(found)


def best_spans(logits: torch.Tensor, count: int) -> list[tuple[float, int, int]]:
    """The most probable spans of at most ``ANSWER_TOKENS``, equal ones by start and end.

    Only the band of pairs that may be an answer is made: memory is linear in the tokens.

    Args:
        logits: ``[n, 2]``, of starts and ends.
        count: How many spans.

    Returns:
        (score, first token, last token), highest score first; without scores of 0.
    """
    starts, ends = logits.float().softmax(0).unbind(-1)
    # Ends beyond the last token have probability 0, and so no score.
    band = torch.nn.functional.pad(ends, (0, ANSWER_TOKENS - 1)).unfold(0, ANSWER_TOKENS, 1)
    scores = (starts[:, None] * band).flatten()
    values, places = scores.sort(descending=True, stable=True)
    found = []
    for score, place in zip(values[:count].tolist(), places[:count].tolist(), strict=True):
        if score <= 0.0:
            break
        first, length = divmod(place, ANSWER_TOKENS)
        found.append((score, first, first + length))
    return found


def _group_words(tokens: Sequence[dict[str, Any]], text: str) -> list[list[dict[str, Any]]]:
    """Tokens of one word: those between which the text has neither space nor punctuation."""
    words: list[list[dict[str, Any]]] = []
    for one in tokens:
        inside = (
            bool(words)
            and words[-1][-1]["end"] == one["start"]
            and text[one["start"] - 1].isalnum()
            and text[one["start"]].isalnum()
        )
        if inside:
            words[-1].append(one)
        else:
            words.append([one])
    return words


def _agree(word: Sequence[dict[str, Any]], strategy: str, text: Text) -> dict[str, Any]:
    choose: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "first": lambda rows: rows[0],
        "average": lambda rows: rows.mean(0),
        "max": lambda rows: rows[int(rows.amax(-1).argmax())],
    }
    return {
        "pieces": [text.join([piece for one in word for piece in one["pieces"]])],
        "start": word[0]["start"],
        "end": word[-1]["end"],
        "index": word[0]["index"],
        "scores": choose[strategy](torch.stack([one["scores"] for one in word])),
    }


def _join(group: Sequence[dict[str, Any]], text: Text) -> dict[str, Any]:
    return {
        "entity_group": _bare(group[0]["entity"]),
        "score": sum(one["score"] for one in group) / len(group),
        "word": text.join([piece for one in group for piece in one["pieces"]]),
        "start": group[0]["start"],
        "end": group[-1]["end"],
    }


def _bare(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _classified(one: Reading) -> Any:
    return classify(
        one.values,
        one.labels,
        one.problem_type,
        top_k=one.top_k,
        apply=one.option("function_to_apply"),
    )


def _entities(one: Reading) -> Any:
    found = entities(
        one.values,
        one.item,
        one.labels,
        one.tokenizer,
        strategy=one.option("aggregation_strategy", "simple"),
        ignored=one.option("ignore_labels", ("O",)),
    )
    return found[: one.top_k]


def _filled(one: Reading) -> Any:
    targets = one.option("targets")
    # All words that were named, but not all of the vocabulary.
    top_k = one.top_k if targets is None else one.request.top_k
    return fill(one.values, one.item, one.tokenizer, top_k=top_k, targets=targets)


def _relevance(one: Reading) -> float:
    """How relevant the second text of a pair is to the first: a probability, or the bare logit."""
    check_finite(one.values)
    score = one.values.float()[0]
    return float(score if one.option("raw_scores") else score.sigmoid())


# The answer to one input, for each task that one forward answers.
POSTPROCESSORS: Final[Mapping[Task, Callable[[Reading], Any]]] = {
    "text-classification": _classified,
    "token-classification": _entities,
    "question-answering": lambda one: answers(one.values, one.item, top_k=one.top_k or 1),
    "image-classification": _classified,
    "text-ranking": _relevance,
    "fill-mask": _filled,
    "feature-extraction": lambda one: embed(
        one.values, pooling=one.pooling, normalize=one.normalize
    ),
}
