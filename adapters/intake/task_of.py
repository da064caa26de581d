"""What an adapter is for, from its configuration, its head and its base. Pure."""

from __future__ import annotations

from adapters.errors import BaseMismatch
from adapters.intake.config import AdapterConfig
from adapters.intake.model_config import TaskConfig
from adapters.signature import BaseSignature
from adapters.tasks import BY_NAME, IMAGE_MODELS, Task, narrowed, of_class, of_task_type


def said_task(config: AdapterConfig, task_config: TaskConfig) -> Task | None:
    """The task that the configurations alone tell, before it is narrowed; None: they do not."""
    task = of_task_type(config.task_type)
    for name in (config.model_class, task_config.architecture):
        task = task or of_class(name)
    return task


def task_of(
    config: AdapterConfig,
    base: BaseSignature,
    task_config: TaskConfig,
    *,
    has_head: bool,
    outputs: int | None = None,
) -> Task:
    """The task: PEFT's task_type first, then the class it was made on, then what it brings.

    Args:
        has_head: Whether it brings tensors of a task head.
        outputs: How many outputs that head has, where that is known.

    Raises:
        BaseMismatch: The task needs a language-model head that this base does not have.
    """
    own = of_class(base.architecture)
    task = said_task(config, task_config)
    if task is None:
        task = "text-classification" if has_head else own or "feature-extraction"
    task = narrowed(task, "images" if base.model_type in IMAGE_MODELS else "texts", outputs)
    if BY_NAME[task].head == "base" and task != own:
        raise BaseMismatch(
            "The adapter is for a language-model head that this base does not have.",
            found=f"task {task} on {base.architecture}",
            expected=f"a base for {task}",
            fix="Register it on a server whose base has that head.",
        )
    return task
