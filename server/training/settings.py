"""What one run of the recipe is: method, task, shape and schedule, with their usual values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

TrainingMethod = Literal["hira", "lora", "qlora", "sparse-lora"]
TaskType = Literal["SEQ_CLS", "CAUSAL_LM"]
METHODS: Final[tuple[TrainingMethod, ...]] = ("hira", "lora", "qlora", "sparse-lora")
TRAINED_TASK_TYPES: Final[tuple[TaskType, ...]] = ("SEQ_CLS", "CAUSAL_LM")

# The height of the learning rate: HiRA's product starts smaller than LoRA's and wants a larger one.
LEARNING_RATES: Final[dict[TrainingMethod, float]] = {
    "hira": 2e-2,
    "lora": 2e-3,
    "qlora": 2e-3,
    "sparse-lora": 2e-3,
}

# Query and value of the attention, by the name that each family has for them.
USUAL_TARGETS: Final[dict[str, tuple[str, ...]]] = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "electra": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "phi3": ("qkv_proj",),
}
OTHER_TARGETS: Final = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Recipe:
    """One run.

    Args:
        base: Folder or hub id of the base.
        base_name: What the adapter and its card call it.
        method: `qlora` is LoRA trained on an NF4 base, `sparse-lora` LoRA of which a share of the
            numbers is zero.
        task_type: PEFT's name of the task.
        rank: r.
        alpha: LoRA's; None for 2 r. HiRA has none.
        dropout: Before the factors.
        targets: Ends of the names of adapted layers; empty for the family's query and value.
        epochs: Passes over the rows.
        batch_rows: Rows, or windows of text, a step.
        learning_rate: At its height; None for the method's of ``LEARNING_RATES``.
        weight_decay: AdamW's.
        warmup_steps: Until the height; then linear to zero. At most half of all steps.
        max_tokens: Longer texts are cut; the length of a window of plain text.
        sparsity: Share of each factor that `sparse-lora` sets to zero.
        dense_share: Share of the steps before it does so.
        evaluations: Evaluations an epoch.
        patience: Evaluations without a gain after which training ends; 0 for never.
        seed: Of everything.
        autocast: Multiply in bfloat16; weights, loss and optimizer stay in float32.
    """

    base: str
    base_name: str
    method: TrainingMethod
    task_type: TaskType
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.1
    targets: tuple[str, ...] = ()
    epochs: int = 3
    batch_rows: int = 16
    learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup_steps: int = 100
    max_tokens: int = 128
    sparsity: float = 0.5
    dense_share: float = 0.5
    evaluations: int = 4
    patience: int = 0
    seed: int = 7
    autocast: bool = False

    @property
    def top_learning_rate(self) -> float:
        """The learning rate at its height."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def is_quantized(self) -> bool:
        """Whether the base is held in NF4 while the adapter is trained."""
        return self.method == "qlora"

    @property
    def is_pruned(self) -> bool:
        """Whether a share of the factors is set to zero."""
        return self.method == "sparse-lora"

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class Report:
    """What a run did; times in seconds, memory in bytes."""

    out: Path
    train_rows: int
    eval_rows: int
    steps: int
    seconds: float
    rows_per_s: float
    best_step: int
    best: dict[str, float]
    history: tuple[dict[str, float], ...]
    resident_before_bytes: int
    resident_peak_bytes: int
