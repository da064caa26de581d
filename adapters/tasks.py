"""What an adapter can be for: one row for each task, from which all other tables of tasks follow.

A new task is a name and a row here, a postprocessor in ``server.encoding.postprocess`` and a test.
What a server does with a task is said there; this module knows none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Task = Literal[
    "text-classification",
    "token-classification",
    "fill-mask",
    "text-generation",
    "feature-extraction",
    "question-answering",
    "image-classification",
    "text-ranking",
]
Lane = Literal["encode", "generate"]
Head = Literal["adapter", "base"]
Kind = Literal["texts", "images"]
Cut = Literal["second", "longest"]
# Families whose backbone is a row of patches for each image, whatever its size: those served.
IMAGE_MODELS: Final = frozenset({"vit", "deit", "dinov2"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """All that is particular to one task.

    Args:
        name: Of the task, as the Hugging Face hub calls it.
        path: The call that answers it. Calls that other servers have in other shapes lead to it.
        also: Other tasks that an adapter for this one can be asked for.
        lane: Whether one forward answers a request, or it is continued token by token.
        head: Whose task head makes the answer: the adapter brings it, the base has it, or None.
        takes: What an input may be.
        task_type: PEFT's word for it; None where PEFT has none.
        auto_class: Of transformers, that loads a model for it. None for the bare backbone.
        other_classes: Ends of class names that mean it, besides that of ``auto_class``.
        narrows: The task that ``task_type`` and ``auto_class`` alone would mean, of which this is
            the one for its inputs and its number of outputs.
        outputs: How many outputs of a head make it this one; None for any number.
        output_names: Of the outputs, in order, where they are not the adapter's to name.
        parameters: Of ``path``, those that some of its other tasks have no use for.
        default_top_k: Answers for each input where the request does not say; None for all.
        spans: The answer names places in the text, so text and offsets travel with the tokens.
        needs_pair: An input is two texts.
        cuts: Which of a pair that is too long is cut.
        needs_mask: An input has mask tokens.
    """

    name: Task
    path: str
    also: tuple[Task, ...] = ("feature-extraction",)
    lane: Lane = "encode"
    head: Head | None = "adapter"
    takes: frozenset[Kind] = frozenset({"texts"})
    task_type: str | None = None
    auto_class: str | None = None
    other_classes: tuple[str, ...] = ()
    narrows: Task | None = None
    outputs: int | None = None
    output_names: tuple[str, ...] | None = None
    parameters: tuple[str, ...] = ()
    default_top_k: int | None = None
    spans: bool = False
    needs_pair: bool = False
    cuts: Cut = "second"
    needs_mask: bool = False

    @property
    def class_ends(self) -> tuple[str, ...]:
        """Ends of the names of transformers' classes that are made for it."""
        own = "Model" if self.auto_class is None else self.auto_class.removeprefix("AutoModel")
        return (own, *self.other_classes)


ROWS: Final[tuple[TaskRow, ...]] = (
    TaskRow(
        name="text-classification",
        path="/predict",
        task_type="SEQ_CLS",
        auto_class="AutoModelForSequenceClassification",
        parameters=("function_to_apply",),
    ),
    TaskRow(
        name="token-classification",
        path="/predict",
        task_type="TOKEN_CLS",
        auto_class="AutoModelForTokenClassification",
        parameters=("aggregation_strategy", "ignore_labels"),
        spans=True,
    ),
    TaskRow(
        name="question-answering",
        path="/predict",
        task_type="QUESTION_ANS",
        auto_class="AutoModelForQuestionAnswering",
        output_names=("start", "end"),
        default_top_k=1,
        spans=True,
        needs_pair=True,
    ),
    TaskRow(
        name="image-classification",
        path="/predict",
        takes=frozenset({"images"}),
        auto_class="AutoModelForImageClassification",
        narrows="text-classification",
        parameters=("function_to_apply",),
    ),
    TaskRow(
        name="text-ranking",
        path="/rerank",
        also=("text-classification", "feature-extraction"),
        task_type="SEQ_CLS",
        auto_class="AutoModelForSequenceClassification",
        narrows="text-classification",
        outputs=1,
        needs_pair=True,
        cuts="longest",
    ),
    TaskRow(
        name="fill-mask",
        path="/predict",
        head="base",
        auto_class="AutoModelForMaskedLM",
        parameters=("targets",),
        default_top_k=5,
        needs_mask=True,
    ),
    TaskRow(
        name="text-generation",
        path="/generate",
        lane="generate",
        head="base",
        task_type="CAUSAL_LM",
        auto_class="AutoModelForCausalLM",
        other_classes=("LMHeadModel",),
    ),
    TaskRow(  # the last: every class of transformers without a head ends as its own
        name="feature-extraction",
        path="/embed",
        also=(),
        head=None,
        takes=frozenset({"texts", "images"}),
        task_type="FEATURE_EXTRACTION",
    ),
)
BY_NAME: Final[Mapping[str, TaskRow]] = {row.name: row for row in ROWS}
TASK_TYPES: Final = frozenset(row.task_type for row in ROWS if row.task_type is not None)


def asked_at(task: Task, path: str) -> Task | None:
    """What an adapter for ``task`` is asked for by the call ``path``; None: nothing."""
    own = BY_NAME[task]
    return next((one for one in (own.name, *own.also) if BY_NAME[one].path == path), None)


def tasks_at(path: str) -> tuple[Task, ...]:
    """The tasks of adapters that the call ``path`` serves, in the order of the table."""
    return tuple(row.name for row in ROWS if asked_at(row.name, path) is not None)


def of_task_type(task_type: str | None) -> Task | None:
    """The task that PEFT calls so, before it is narrowed."""
    rows = (row for row in ROWS if row.narrows is None and row.task_type is not None)
    return next((row.name for row in rows if row.task_type == task_type), None)


def of_class(name: str | None) -> Task | None:
    """The task that a class of transformers is made for, before it is narrowed."""
    if name is None:
        return None
    return next((row.name for row in ROWS if name.endswith(row.class_ends)), None)


def narrowed(task: Task, kind: Kind, outputs: int | None) -> Task:
    """The task for what the base takes, and for the outputs of the head where they are known."""
    for row in ROWS:
        if row.narrows == task and kind in row.takes and row.outputs in (None, outputs):
            return row.name
    return task
