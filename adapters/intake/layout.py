"""The tensors of an adapter file, sorted to the layers of one base; collects what does not fit.

Which other base an adapter may be for, and which part of a name is one too many, are the business
of ``mismatches``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import (
    AdapterError,
    BaseMismatch,
    CorruptFile,
    MissingTensors,
    ShapeMismatch,
    UnmatchedTensors,
    UnsupportedMethod,
    UnsupportedOption,
)
from adapters.intake.config import AdapterConfig
from adapters.intake.factor_shapes import bias_faults, first_names, pair_faults
from adapters.intake.keys import BiasKey, FactorKey, SavedKey, parse_key, wrappers
from adapters.intake.mismatches import odd_part, other_base
from adapters.intake.safetensors_header import TensorEntry
from adapters.signature import BaseSignature, LayerSignature, Method
from adapters.tasks import BY_NAME, Task


@dataclass
class Layout:
    """The entries of a file, sorted to the layers of a base; collects what does not fit.

    ``brings_head``: The configurations say that the adapter's own head answers.
    """

    config: AdapterConfig
    base: BaseSignature
    brings_head: bool = False
    pairs: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    biases: dict[str, TensorEntry] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)  # base path → path in the file
    saved: list[tuple[SavedKey, TensorEntry]] = field(default_factory=list)
    # Of the base's own tensors, by their paths in the base; harmless if they are true copies.
    copies: list[tuple[str, TensorEntry]] = field(default_factory=list)
    _wrappers: set[str] = field(default_factory=set)
    _adapters: dict[str | None, str] = field(default_factory=dict)  # name → a tensor that has it
    _unmatched: list[str] = field(default_factory=list)
    _other_method: list[str] = field(default_factory=list)
    _of_head: list[str] = field(default_factory=list)  # factors
    _faults: list[AdapterError] = field(default_factory=list)

    def take(self, entry: TensorEntry) -> None:
        key = parse_key(entry.name)
        self._wrappers.update(wrappers(entry.name))
        if isinstance(key, FactorKey):
            self._adapters.setdefault(key.adapter, entry.name)
        if key is None:
            self._unmatched.append(entry.name)
        elif isinstance(key, SavedKey):
            self._take_saved(key, entry)
        elif isinstance(key, BiasKey):
            self._take_bias(key, entry)
        elif key.method != self.config.method:
            self._other_method.append(entry.name)
        else:
            self._take_factor(key, entry)

    def _take_factor(self, key: FactorKey, entry: TensorEntry) -> None:
        layer = self.base.resolve(key.path)
        if layer is None or key.embedding != (layer.kind == "embedding"):
            self._unmatched.append(entry.name)
            return
        if self._in_own_head(layer):
            self._of_head.append(entry.name)
            return
        pair = self.pairs.setdefault(layer.path, {})
        if key.side in pair:
            self._faults.append(
                CorruptFile(
                    f"Two tensors claim to be factor {key.side} of {layer.path}.",
                    found=f"{pair[key.side].name} and {entry.name}",
                    expected="one",
                )
            )
            return
        pair[key.side] = entry
        self.spelled[layer.path] = key.path

    def _take_bias(self, key: BiasKey, entry: TensorEntry) -> None:
        layer = self.base.resolve(key.path)
        if (
            layer is not None
            and layer.path in self.base.output_layers
            and layer.has_bias
            and self.config.bias == "none"
        ):
            self.copies.append((f"{layer.path}.bias", entry))  # beside the weight's
        elif layer is None or self.config.bias == "none" or layer.path in self.biases:
            self._unmatched.append(entry.name)
        else:
            self.biases[layer.path] = entry

    def _take_saved(self, key: SavedKey, entry: TensorEntry) -> None:
        path = self.base.own_path(key.path.removesuffix(".base_layer"))
        layer = self.base.resolve(path)
        inside = self.base.prefix and path.startswith(f"{self.base.prefix}.")
        is_copy = key.path.endswith(".base_layer") or not self._in_own_head(layer)
        if inside or (layer is not None and is_copy):
            own = path if layer is None else layer.path
            self.copies.append((f"{own}.{key.parameter}", entry))
        elif not self.config.saves(key.path):
            self._unmatched.append(entry.name)
        elif any(key.name == other.name for other, _ in self.saved):
            self._faults.append(
                CorruptFile(
                    f"Two tensors claim to be {key.name}.", found=entry.name, expected="one"
                )
            )
        else:
            self.saved.append((key, entry))

    def _in_own_head(self, layer: LayerSignature | None) -> bool:
        """Whether a path that the base's language-model head has is one of the adapter's head.

        ModernBERT's classifiers begin as its language-model head does, with a ``head.dense``.
        """
        prefix = self.base.prefix
        return bool(
            self.brings_head
            and prefix
            and layer is not None
            and not layer.path.startswith(f"{prefix}.")
        )

    def faults(self, task: Task) -> list[AdapterError]:
        """Everything that is wrong with names and shapes."""
        if self._other_method:
            other: Method = "lora" if self.config.method == "hira" else "hira"
            return [
                UnsupportedMethod(
                    "The tensors contradict the configuration's method.",
                    found=f"{other} tensors ({first_names(self._other_method)})",
                    expected=f"{self.config.method} tensors, as peft_type says",
                    fix="Set peft_type to the method that it was trained with. The authors' own "
                    "HiRA code names its tensors lora_A and lora_B: rename them to hira_A, hira_B.",
                )
            ]
        found = [*self._faults]
        names = set(self._adapters) - {"default"} if len(self._adapters) == 2 else self._adapters
        if len(names) > 1:
            found.append(
                UnmatchedTensors(
                    "The file holds the factors of several adapters.",
                    found=first_names([self._adapters[name] for name in names]),
                    expected="one adapter",
                    fix="Save each alone: save_pretrained(folder, selected_adapters=[NAME]).",
                )
            )
        part = odd_part(self._unmatched, self.base)
        if part is not None:
            found.append(part)
            return found
        sibling = other_base(
            self._unmatched, self.pairs, self._missing(task), self.base, self.config.base_name
        )
        if sibling is not None:
            found.append(sibling)
            return found
        if self._unmatched and not self.pairs:
            found.append(
                BaseMismatch(
                    "No tensor of the adapter belongs to this base.",
                    found=first_names(self._unmatched),
                    expected=f"layers of {self.base.architecture} such as "
                    + first_names(list(self.base.layers)[-2:]),
                    fix="Register it on a server of its own base.",
                )
            )
            return found
        if self._unmatched:
            found.append(
                UnmatchedTensors(
                    "Some tensors belong to no layer of this base.",
                    found=f"{len(self._unmatched)}: {first_names(self._unmatched)}",
                    expected="every tensor matched",
                    fix="Check that the adapter was made for this base and task.",
                )
            )
        if not self.pairs:
            found.append(
                MissingTensors(
                    "The adapter has no factors.", found="0 layers", expected="at least one"
                )
            )
        for path, pair in self.pairs.items():
            found += pair_faults(self.base.layers[path], pair, self.config.method)
            found += self._scale_faults(path, pair)
        untargeted = [
            path
            for path in self.pairs
            if self.config.target_modules is not None
            and not self.config.targets(self.spelled[path])
        ]
        if untargeted:
            found.append(
                UnmatchedTensors(
                    "There are factors of layers that the configuration does not target.",
                    found=f"{len(untargeted)}: {first_names(untargeted)}",
                    expected=f"layers of target_modules = {self.config.target_modules}"[:200],
                    fix="Correct target_modules, or save the adapter again.",
                )
            )
        found += bias_faults(self.base.layers, self.pairs, self.biases, self.config.bias)
        missing = self._missing(task)
        if missing:
            found.append(
                MissingTensors(
                    "Targets of the configuration have no tensors.",
                    found=f"{len(missing)} without: {first_names(missing)}",
                    expected="A and B for every target",
                    fix="Save the adapter again, or correct target_modules.",
                )
            )
        if self._of_head:
            found.append(
                UnsupportedOption(
                    "Layers of the task head have factors, and heads are served as they are saved.",
                    found=first_names(self._of_head),
                    expected="factors of the backbone's layers",
                    fix="Leave the head out of target_modules and name it in modules_to_save.",
                )
            )
        if BY_NAME[task].head != "adapter" and self.saved:
            found.append(
                UnsupportedOption(
                    f"Saved modules have no use in {task}.",
                    found=first_names([key.name for key, _ in self.saved]),
                    expected="none, because the base's own head answers",
                    fix="Set task_type to the task of the saved head, or train without it.",
                )
            )
        if BY_NAME[task].head == "adapter" and not self.saved:
            found.append(
                MissingTensors(
                    "The adapter brings no task head.",
                    found="no saved module",
                    expected="the classifier's tensors",
                    fix="Name the head in modules_to_save and save the adapter again.",
                )
            )
        return found

    def _scale_faults(self, path: str, pair: Mapping[str, TensorEntry]) -> Iterator[AdapterError]:
        """LoRA's answer depends on the rank that alpha is divided by, so claim and proof agree."""
        shape = pair["A"].shape if "A" in pair else ()
        claimed = self.config.claimed_rank(self.spelled[path])
        if self.config.method == "lora" and shape and shape[0] != claimed:
            yield ShapeMismatch(
                f"The rank of {path} is not the one that the configuration scales by.",
                found=f"rank {shape[0]} in the tensors",
                expected=f"rank {claimed}, as r and rank_pattern say",
                fix="Correct r or rank_pattern in adapter_config.json.",
            )

    def _missing(self, task: Task) -> list[str]:
        """Paths of this base that the configuration targets, and the file has no factors of."""
        return [path for path in self._expected(task) if path not in self.pairs]

    def _expected(self, task: Task) -> Iterator[str]:
        """Paths of this base that the configuration targets."""
        prefix = f"{self.base.prefix}." if self.base.prefix else ""
        # What the file says in place of the prefix: nothing, or the prefix of a task class.
        others = (
            spelled.removesuffix(layer.removeprefix(prefix))
            for layer, spelled in self.spelled.items()
            if layer != spelled
        )
        other = next(others, None)
        for path, layer in self.base.layers.items():
            in_backbone = path.startswith(prefix)
            # The language-model head is not part of a classifier's model, or of a bare backbone.
            if not in_backbone and (other is not None or BY_NAME[task].head != "base"):
                continue
            spelled = path
            if other is not None and in_backbone:
                spelled = other + path.removeprefix(prefix)
            is_linear = layer.kind not in ("embedding", "conv")
            if self.config.all_linear and not (is_linear and path not in self.base.output_layers):
                continue
            if self.config.targets(spelled):
                yield path

    def notes(self) -> Iterator[str]:
        """What changes no answer, for a person to read."""
        if self._wrappers:
            yield "left out of the tensors' names: " + ", ".join(sorted(self._wrappers))
        for adapter in set(self._adapters) - {None, "default"}:
            yield f"the tensors' names carry the adapter's own name, {adapter}, which is left out"
        if any(path != self.base.own_path(path) for path in self.spelled.values()):
            yield (
                "made on a class that keeps its backbone elsewhere: transformers 5.23 loads no "
                "weight of a plain checkpoint into it, and an adapter of what it draws fits no base"
            )
        if self.copies:
            copied = first_names([path for path, _ in self.copies])
            yield f"left out, because they are the base's own to the bit: {copied}"
        claims: dict[tuple[int, int], list[str]] = {}
        for path, pair in self.pairs.items():
            proven = pair["A"].shape[0]
            claimed = self.config.claimed_rank(self.spelled[path])
            if proven != claimed:
                claims.setdefault((claimed, proven), []).append(path)
        for (claimed, proven), paths in claims.items():
            yield (
                f"the configuration claims rank {claimed} for {first_names(paths)}, "
                f"the tensors have rank {proven}"
            )
        name = self.config.base_name
        if name is not None and Path(name).name != Path(self.base.name).name:
            yield f"the adapter names {name} as its base, this server calls it {self.base.name}"
