"""PEFT's ``adapter_config.json`` as one typed, checked configuration.

Every option is honoured, known to be without effect on inference, or refused by name: an option
that would change the answer is never ignored. What the tensors say is ``checkpoint``'s affair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import (
    AdapterError,
    AdapterFaults,
    CorruptFile,
    UnsupportedMethod,
    UnsupportedOption,
)
from adapters.intake import patterns
from adapters.intake.foreign import LOOKALIKES, foreign_format
from adapters.intake.strict_json import show, strict_json
from adapters.signature import Method
from adapters.tasks import TASK_TYPES

ALL_LINEAR = "all-linear"

_TASK_FIXES: Final = {
    "SEQ_2_SEQ_LM": "If it was trained on a decoder such as Llama, or GPT-2: set task_type to "
    "CAUSAL_LM in adapter_config.json, which changes no tensor. Encoder-decoders are not served.",
}

# The options of peft.LoraConfig and peft.HiraConfig, each in exactly one of three sets.
_HONOURED_BY_BOTH: Final = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",  # names the class that the adapter was made on, and so its task
        "base_model_name_or_path",
        "r",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
    }
)
HONOURED: Final[Mapping[Method, frozenset[str]]] = {
    "hira": _HONOURED_BY_BOTH,
    "lora": _HONOURED_BY_BOTH
    | {
        "lora_alpha",
        "alpha_pattern",
        "use_rslora",
        "bias",  # "none" and "lora_only"
        "init_lora_weights",  # only those that leave the base weight as it was
    },
}
OPTIONS_WITHOUT_EFFECT: Final[Mapping[Method, frozenset[str]]] = {
    "hira": frozenset(
        {"peft_version", "revision", "inference_mode", "hira_dropout", "init_weights"}
    ),
    "lora": frozenset(
        {
            "peft_version",
            "revision",
            "inference_mode",
            "lora_dropout",
            "runtime_config",
            "megatron_core",  # read only with megatron_config
            "qalora_group_size",  # read only with use_qalora
            "loftq_config",  # these four are read only with their init_lora_weights
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "velora_config",  # another backward pass, the same forward pass
        }
    ),
}
REFUSED: Final[Mapping[Method, Mapping[str, str]]] = {
    "hira": {},
    "lora": {
        "use_dora": "Train without DoRA, or merge it into a base model of its own.",
        "lora_bias": "Train with lora_bias=False.",
        "megatron_config": "Export the adapter to plain LoRA.",
        "trainable_token_indices": "Train without trainable_token_indices.",
        "alora_invocation_tokens": "Train a plain LoRA adapter.",
        "use_qalora": "Train with use_qalora=False.",
        "monteclora_config": "Train a plain LoRA adapter.",
        "layer_replication": "Train on the base as it is, without replicated layers.",
        "target_parameters": "Target modules, not bare parameters.",
        "use_bdlora": "Train a plain LoRA adapter.",
        "arrow_config": "Register the experts one by one, without Arrow routing.",
        "kasa_config": "Train a plain LoRA adapter.",
        "ensure_weight_tying": "Train with ensure_weight_tying=False.",
    },
}
# How LoRA factors may have been initialised without changing the base weight (peft
# tuners/lora/layer.py: pissa, olora, corda, loftq and lora_ga write to it, mica and eva do not).
_KEEPS_BASE: Final = frozenset({"gaussian", "eva", "orthogonal", "mica"})


MAX_RANK: Final = 4_096
_FEW: Final = Field(max_length=10_000)
Item = TypeVar("Item", str, int)


def _optional(expected: str) -> Any:
    return Field(default=None, description=expected)


_ShortText = Annotated[str, Field(max_length=4_096)]
_NamesField = (
    str | Annotated[list[Annotated[str, Field(min_length=1, max_length=512)]], _FEW] | None
)
_FiniteField = Annotated[float, Field(gt=-1e9, lt=1e9)]
_RankField = Annotated[int, Field(ge=1, le=MAX_RANK)]


class _AutoMapping(BaseModel):
    base_model_class: Annotated[str, Field(max_length=200)]


class _TypedOptions(BaseModel):
    """The types of the honoured options; a description is what an error says was expected."""

    model_config = ConfigDict(strict=True)

    r: _RankField = Field(default=0, description=f"an integer from 1 to {MAX_RANK}")
    base_model_name_or_path: _ShortText | None = _optional("a short string or null")
    task_type: _ShortText | None = _optional("a short string or null")
    auto_mapping: _AutoMapping | None = _optional('an object with "base_model_class", or null')
    target_modules: _NamesField = _optional("a string, a list of strings, or null")
    exclude_modules: _NamesField = _optional("a string, a list of strings, or null")
    layers_pattern: _NamesField = _optional("a string, a list of strings, or null")
    modules_to_save: _NamesField = _optional("a string, a list of strings, or null")
    layers_to_transform: int | Annotated[list[int], _FEW] | None = _optional(
        "an integer, a list of integers, or null"
    )
    rank_pattern: Annotated[dict[str, _RankField], _FEW] | None = _optional(
        f"an object of integers from 1 to {MAX_RANK}"
    )
    lora_alpha: _FiniteField = Field(default=8.0, description="a finite number")
    alpha_pattern: Annotated[dict[str, _FiniteField], _FEW] | None = _optional(
        "an object of finite numbers"
    )
    use_rslora: bool | None = _optional("true or false")
    fan_in_fan_out: bool | None = _optional("true or false")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's configuration says, in one form for HiRA and LoRA.

    ``rank`` and ``rank_pattern`` are claims: PEFT itself ignores ``rank_pattern`` for the first
    HiRA adapter of a model, so ranks are taken from the tensors.
    """

    method: Method
    rank: int
    base_name: str | None
    task_type: str | None
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha: float = 0.0
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    bias: Literal["none", "lora_only"] = "none"
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    model_class: str | None = None

    def scale(self, path: str, rank: int) -> float:
        """LoRA's s = alpha / r, or alpha / √r with rsLoRA; 1 for HiRA, which has no scaling.

        Args:
            path: The layer's path as the adapter file spells it (patterns may be anchored to it).
            rank: The layer's rank, from its tensors.
        """
        if self.method == "hira":
            return 1.0
        key = patterns.pattern_key(self.alpha_pattern, path, option="alpha_pattern")
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def claimed_rank(self, path: str) -> int:
        """The rank that the configuration gives the layer at ``path``."""
        key = patterns.pattern_key(self.rank_pattern, path, option="rank_pattern")
        return self.rank if key is None else self.rank_pattern[key]

    @property
    def all_linear(self) -> bool:
        """Whether the targets are PEFT's ``all-linear``: every linear layer but the output's."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def targets(self, path: str) -> bool:
        """Whether the configuration names the module at ``path`` as a target.

        With ``all-linear`` every path that is not excluded counts; the caller knows which are
        linear. Source: ``peft/tuners/tuners_utils.py``, ``check_target_module_exists``.
        """
        if _is_named(self.exclude_modules, path, "exclude_modules") or self.saves(path):
            return False
        if self.all_linear:
            return True
        if self.target_modules is None or not _is_named(
            self.target_modules, path, "target_modules"
        ):
            return False
        if not self.layers_to_transform or isinstance(self.target_modules, str):
            return True
        return patterns.layer_index(path, self.layers_pattern) in self.layers_to_transform

    def saves(self, path: str) -> bool:
        """Whether ``path`` is, or lies in, a module that ``modules_to_save`` names.

        PEFT compares by plain ``endswith``: ``classifier`` also saves ``pre_classifier``.
        """
        parts = path.split(".")
        heads = (".".join(parts[: end + 1]) for end in range(len(parts)))
        return any(head.endswith(self.modules_to_save) for head in heads)


def parse_config(raw: bytes) -> AdapterConfig:
    """Read and check the bytes of an ``adapter_config.json``.

    Args:
        raw: The file's bytes, UTF-8 JSON, at most ``MAX_JSON_BYTES``.

    Returns:
        The configuration, with nothing in it that would be ignored at inference.

    Raises:
        CorruptFile: Not JSON, duplicate keys, or a value of the wrong type.
        UnsupportedMethod: Another PEFT method than HiRA and LoRA.
        UnsupportedOption: An option that would change the answer and is not honoured; its name is
            in the message and ``fix`` says what to do.
        AdapterFaults: Several of these.
    """
    content = strict_json(raw, "adapter_config.json")
    peft_type = content.get("peft_type")
    foreign = foreign_format(content)
    if foreign is not None:
        raise foreign
    if peft_type not in ("HIRA", "LORA"):
        raise UnsupportedMethod(
            "This PEFT method is not served." + LOOKALIKES.get(str(peft_type), ""),
            found=f"peft_type {show(peft_type)}",
            expected="HIRA or LORA",
            fix="Train the adapter with peft.HiraConfig or peft.LoraConfig.",
        )
    method: Method = "hira" if peft_type == "HIRA" else "lora"
    faults: list[AdapterError] = list(_refusals(content, method))
    options = _validated_fields(content, method, faults)
    config = AdapterConfig(
        method=method,
        rank=options.r or (32 if method == "hira" else 8),
        base_name=options.base_model_name_or_path or None,
        task_type=options.task_type or None,
        target_modules=_sorted_names(options.target_modules),
        exclude_modules=_sorted_names(options.exclude_modules) or (),
        layers_to_transform=tuple(_as_list(options.layers_to_transform)),
        layers_pattern=tuple(sorted(_as_list(options.layers_pattern))),
        rank_pattern=options.rank_pattern or {},
        alpha=options.lora_alpha if method == "lora" else 0.0,
        alpha_pattern=options.alpha_pattern or {},
        rslora=bool(options.use_rslora),
        bias="lora_only" if content.get("bias") == "lora_only" and method == "lora" else "none",
        fan_in_fan_out=bool(options.fan_in_fan_out),
        modules_to_save=tuple(dict.fromkeys(sorted(_as_list(options.modules_to_save)))),
        model_class=options.auto_mapping.base_model_class if options.auto_mapping else None,
    )
    faults += _pattern_faults(config)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise AdapterFaults(faults)
    return config


def _validated_fields(
    content: Mapping[str, Any], method: Method, faults: list[AdapterError]
) -> _TypedOptions:
    """The options of a method with their types; what has another type is a fault, and left out."""
    honoured = {name: value for name, value in content.items() if name in HONOURED[method]}
    try:
        return _TypedOptions.model_validate(honoured)
    except ValidationError as error:
        wrong = dict.fromkeys(str(one["loc"][0]) for one in error.errors(include_url=False))
    faults += [
        CorruptFile(
            f"adapter_config.json: {name} has a value of the wrong kind.",
            found=show(content.get(name)),
            expected=_TypedOptions.model_fields[name].description,
        )
        for name in wrong
    ]
    return _TypedOptions.model_validate({k: v for k, v in honoured.items() if k not in wrong})


def _sorted_names(value: str | list[str] | None) -> str | tuple[str, ...] | None:
    """A string as it is, or a list sorted: PEFT writes sets in any order."""
    return tuple(sorted(value)) if isinstance(value, list) else value or None


def _as_list(value: Item | list[Item] | None) -> list[Item]:
    if isinstance(value, list):
        return value
    return [] if value is None or value == "" else [value]


def _is_named(names: str | tuple[str, ...], path: str, option: str) -> bool:
    if isinstance(names, str):
        return patterns.full_match(names, path, option=option) if names else False
    return path in names or path.endswith(tuple(f".{name}" for name in names))


def _refusals(content: Mapping[str, Any], method: Method) -> list[AdapterError]:
    faults: list[AdapterError] = []
    known = HONOURED[method] | OPTIONS_WITHOUT_EFFECT[method]
    for option, value in content.items():
        if option in known or value in (None, False, "", [], {}):
            continue
        fix = REFUSED[method].get(
            option, "Remove it if it has no effect on inference, or train without it."
        )
        faults.append(
            UnsupportedOption(
                f"The option {option[:80]} is not supported.",
                found=f"{option[:80]} = {show(value)}",
                expected="not set",
                fix=fix,
            )
        )
    if method == "lora":
        faults += _lora_refusals(content)
    task_type = content.get("task_type")
    if isinstance(task_type, str) and task_type not in TASK_TYPES:
        faults.append(
            UnsupportedOption(
                "This task is not served.",
                found=f"task_type = {show(task_type)}",
                expected="one of " + ", ".join(sorted(TASK_TYPES)) + ", or null",
                fix=_TASK_FIXES.get(task_type),
            )
        )
    return faults


def _lora_refusals(content: Mapping[str, Any]) -> list[AdapterError]:
    faults: list[AdapterError] = []
    init = content.get("init_lora_weights")
    if not (
        init is None or isinstance(init, bool) or (isinstance(init, str) and init in _KEEPS_BASE)
    ):
        faults.append(
            UnsupportedOption(
                "This initialisation changed the base weight that the adapter was trained on.",
                found=f"init_lora_weights = {show(init)}",
                expected="true, false, or one of " + ", ".join(sorted(_KEEPS_BASE)),
                fix="Save it by save_pretrained(path_initial_model_for_weight_conversion=...): it "
                "becomes plain LoRA on the unchanged base.",
            )
        )
    bias = content.get("bias", "none")
    if bias not in ("none", "lora_only", None):
        faults.append(
            UnsupportedOption(
                "Trained biases of layers that are no targets are not supported.",
                found=f"bias = {show(bias)}",
                expected='bias = "none" or "lora_only"',
                fix='Train with bias="lora_only": the biases of the targets alone.',
            )
        )
    return faults


def _pattern_faults(config: AdapterConfig) -> list[AdapterError]:
    options: list[tuple[str, str]] = [("rank_pattern", key) for key in config.rank_pattern]
    options += [("alpha_pattern", key) for key in config.alpha_pattern]
    options += [("layers_pattern", key) for key in config.layers_pattern]
    for option, value in (
        ("target_modules", config.target_modules),
        ("exclude_modules", config.exclude_modules),
    ):
        if isinstance(value, str) and not (option == "target_modules" and config.all_linear):
            options.append((option, value))
    faults: list[AdapterError] = []
    for option, pattern in options:
        try:
            patterns.check_pattern(pattern, option=option)
        except UnsupportedOption as fault:
            faults.append(fault)
    return faults
