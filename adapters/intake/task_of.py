"""What an adapter is for, from its configuration, its head and its base. Pure."""

from __future__ import annotations

from typing import Final

from adapters.errors import BaseMismatch
from adapters.intake.config import AdapterConfig
from adapters.intake.model_config import TaskConfig
from adapters.signature import BaseSignature
from adapters.tasks import IMAGE_MODELS, Task

_BY_TASK_TYPE: Final[dict[str, Task]] = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
# The end of a class name in transformers; the first that fits counts.
_BY_CLASS: Final[tuple[tuple[str, Task], ...]] = (
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForImageClassification", "image-classification"),
    ("ForMaskedLM", "fill-mask"),
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("Model", "feature-extraction"),
)


def task_of(
    config: AdapterConfig, base: BaseSignature, task_config: TaskConfig, *, has_head: bool
) -> Task:
    """The task: PEFT's task_type first, then the class it was made on, then what it brings.

    Raises:
        BaseMismatch: The task needs a language-model head that this base does not have.
    """
    task = _BY_TASK_TYPE.get(config.task_type or "")
    for name in (config.model_class, task_config.architecture):
        task = task or _of_class(name)
    own = _of_class(base.architecture)
    if task is None:
        task = "text-classification" if has_head else own or "feature-extraction"
    if task == "text-classification" and base.model_type in IMAGE_MODELS:
        task = "image-classification"
    if task in ("text-generation", "fill-mask") and task != own:
        raise BaseMismatch(
            "The adapter is for a language-model head that this base does not have.",
            found=f"task {task} on {base.architecture}",
            expected=f"a base for {task}",
            fix="Register it on a server whose base has that head.",
        )
    return task


def _of_class(name: str | None) -> Task | None:
    if name is None:
        return None
    return next((task for end, task in _BY_CLASS if name.endswith(end)), None)
