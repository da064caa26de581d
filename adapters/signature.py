"""What a base model looks like to an adapter: the layers it could target, their kinds and shapes.

A signature is made from the model's modules alone, so the meta device is enough, and the same model
has the same signature before and after injection. It decides nothing about checkpoints: whether an
adapter fits is judged by the reader of its tensors, against this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from adapters.errors import ShapeMismatch, UnsupportedOption

LayerKind = Literal["linear", "conv1d_transposed", "embedding", "conv"]
Method = Literal["hira", "lora"]

# Where task classes of transformers have the backbone that its other classes have elsewhere: those
# for question answering on Arcee, Llama, Qwen2, Qwen3, SmolLM3 and their kin say ``transformer``.
TASK_PREFIXES: Final = ("transformer",)
UNBOUNDED_LENGTH_TOKENS = 1 << 20  # for models without absolute positions, such as T5

_CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Subclasses of nn.Linear whose forward is W x + b in other words.
_PLAIN_LINEARS = frozenset({("transformers.models.falcon.modeling_falcon", "FalconLinear")})
_EMBEDDING_INPUT_NAMES = frozenset({"input", "input_ids"})


@dataclass(frozen=True, slots=True)
class LayerSignature:
    """One layer that an adapter could target.

    Args:
        path: The module's path in the base model.
        kind: ``conv1d_transposed`` is GPT-2's Conv1D, plain or quantized.
        in_features: Inputs; an embedding's number of rows, a convolution's channels.
        out_features: Outputs; an embedding's width, a convolution's channels.
        kernel: The kernel of a convolution, else empty.
        groups: The groups of a convolution, else 1.
        has_bias: Whether it adds a bias.
    """

    path: str
    kind: LayerKind
    in_features: int
    out_features: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    has_bias: bool = False

    def factor_shapes(self, rank: int, method: Method) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B as PEFT stores them, for HiRA and for LoRA alike.

        Args:
            rank: At least 1.
            method: Only for the error: the shapes are the same.

        Returns:
            ``(r, in), (out, r)``; for a convolution ``(r, in, *kernel), (out, r, 1, ...)``.

        Raises:
            ShapeMismatch: The rank is not positive.
            UnsupportedOption: A grouped convolution, for which BA has no defined shape.
        """
        if rank < 1:
            raise ShapeMismatch(
                f"The rank of an adapter on {self.path} is not positive.",
                found=str(rank),
                expected="1 or more",
            )
        if self.groups != 1:
            raise UnsupportedOption(
                f"{method} on the grouped convolution {self.path} has no defined modulation.",
                found=f"groups = {self.groups}",
                expected="groups = 1",
                fix="Train the adapter without this layer among its targets.",
            )
        ones = (1,) * len(self.kernel)
        return (rank, self.in_features, *self.kernel), (self.out_features, rank, *ones)


class WeightFiles(Protocol):
    """A base's own weights on disk; ``adapters.intake.base_files.BaseFiles`` is one."""

    def difference(self, path: str, file: BinaryIO, copy: Any) -> Any:
        """How a tensor of an adapter file differs from the base's own; None if in no bit."""


@dataclass(frozen=True)
class BaseSignature:
    """A base model as adapters see it.

    Args:
        name: What the operator called it: a path or a hub id.
        model_type: As in its config, e.g. ``distilbert``.
        architecture: The class that was loaded, e.g. ``DistilBertForMaskedLM``.
        prefix: Where the backbone is inside it: ``distilbert``, ``model``, ``transformer``, ...
        hidden_size: Width of the backbone's output.
        vocab_size: 0 when it has no vocabulary.
        max_length: Tokens that one input may have.
        layers: Every layer that an adapter could target, the language-model head included.
        output_layers: Those that PEFT's ``all-linear`` leaves out.
        files: Its weights on disk, where they are at hand; no part of what a base is.
        digest: Of its weights, as whoever made this knows them; empty when nobody read them.
        config: The values of its config, to compare an adapter's own with.
        token_id: The id of a token of its tokenizer, None for none; itself None where the
            tokenizer is not known. Neither is part of what makes two bases the same.
    """

    name: str
    model_type: str
    architecture: str
    prefix: str
    hidden_size: int
    vocab_size: int
    max_length: int
    layers: Mapping[str, LayerSignature]
    output_layers: frozenset[str]
    digest: str = ""
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    token_id: Callable[[str], int | None] | None = field(default=None, compare=False, repr=False)
    files: WeightFiles | None = field(default=None, compare=False, repr=False)

    def own_path(self, path: str) -> str:
        """``path`` with this base's prefix in place of one that only task classes have."""
        head, _, rest = path.partition(".")
        if not rest or head not in TASK_PREFIXES or head == self.prefix or not self.prefix:
            return path
        if any(layer.startswith((f"{head}.", f"{self.prefix}.{head}.")) for layer in self.layers):
            return path  # a part of this very base
        return f"{self.prefix}.{rest}"

    def resolve(self, path: str) -> LayerSignature | None:
        """Find the layer that ``path`` of a PEFT key means, or None.

        An adapter made on the bare backbone lacks the prefix; one made on a task model of another
        class has it, or that class's own. The path is tried as it is, with the prefix, and without.
        """
        path = self.own_path(path)
        found = self.layers.get(path)
        if found is None and self.prefix:
            found = self.layers.get(f"{self.prefix}.{path}")
            if found is None and path.startswith(f"{self.prefix}."):
                found = self.layers.get(path[len(self.prefix) + 1 :])
        return found


def describe(model: nn.Module, name: str) -> BaseSignature:
    """The signature of ``model``; reads shapes only, so the meta device is enough.

    Args:
        model: A transformers model, before or after injection, quantized or not.
        name: What to call it.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    return BaseSignature(
        name=name,
        model_type=str(getattr(config, "model_type", "")),
        architecture=type(model).__name__,
        prefix=_prefix(model),
        hidden_size=int(getattr(text, "hidden_size", 0) or 0),
        vocab_size=int(getattr(text, "vocab_size", 0) or 0),
        max_length=_max_length(model, text),
        layers={layer.path: layer for layer, _ in target_modules(model)},
        output_layers=_output_layers(model),
        config=config.to_dict() if hasattr(config, "to_dict") else {},
    )


def target_modules(model: nn.Module) -> Iterator[tuple[LayerSignature, nn.Module]]:
    """Every module that an adapter could target, with its signature, in the model's order."""
    opaque: list[str] = []  # their projections are read as tensors, never called
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            opaque.append(path + ".")
        if any(path.startswith(prefix) for prefix in opaque):
            continue
        layer = _layer_signature(path, module)
        if layer is not None:
            yield layer, module


def own_arithmetic(model: nn.Module) -> list[str]:
    """Paths of linear layers that compute something else than W x + b.

    No adapter can target them, and they must not be quantized: bitsandbytes' layers in their place
    would be plain products.
    """
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _is_plain(type(module))
    ]


def _is_plain(cls: type[nn.Linear]) -> bool:
    if cls.forward is nn.Linear.forward or cls.__module__.startswith("bitsandbytes."):
        return True
    return (cls.__module__, cls.__name__) in _PLAIN_LINEARS and _computes_the_product(cls)


def _computes_the_product(cls: type[nn.Linear]) -> bool:
    """Whether a class that is known by name still is what it was known for."""
    layer = cls(3, 2, device="cpu", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
        x = torch.randn(4, 3, dtype=torch.float64, generator=generator, device="cpu")
        return torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias))


def _layer_signature(path: str, module: nn.Module) -> LayerSignature | None:
    known = getattr(module, "layer_signature", None)
    if isinstance(known, LayerSignature):
        return known
    cls = type(module)
    has_bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        if not _is_plain(type(module)):
            return None  # its own arithmetic, which an adapter would not follow
        transposed = getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"
        kind: LayerKind = "conv1d_transposed" if transposed else "linear"
        return LayerSignature(
            path, kind, module.in_features, module.out_features, has_bias=has_bias
        )
    if cls.__name__ == "Conv1D" and hasattr(module, "nf"):
        inputs, outputs = module.weight.shape  # type: ignore[misc]
        return LayerSignature(
            path, "conv1d_transposed", int(inputs), int(outputs), has_bias=has_bias
        )
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or not _takes_ids(cls):
            return None
        return LayerSignature(path, "embedding", module.num_embeddings, module.embedding_dim)
    if isinstance(module, _CONV_TYPES):
        if cls not in _CONV_TYPES or module.padding_mode != "zeros":
            return None
        return LayerSignature(
            path,
            "conv",
            module.in_channels,
            module.out_channels,
            tuple(module.kernel_size),
            module.groups,
            has_bias,
        )
    return None


def _takes_ids(cls: type[nn.Module]) -> bool:
    names = list(inspect.signature(cls.forward).parameters)
    return len(names) > 1 and names[1] in _EMBEDDING_INPUT_NAMES


def _prefix(model: nn.Module) -> str:
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _output_layers(model: nn.Module) -> frozenset[str]:
    read = getattr(model, "get_output_embeddings", None)
    output = read() if callable(read) else None
    if output is None:
        return frozenset()
    return frozenset(path for path, module in model.named_modules() if module is output)


def _max_length(model: nn.Module, config: Any) -> int:
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        return UNBOUNDED_LENGTH_TOKENS
    for path, module in model.named_modules():
        # RoBERTa numbers its positions from padding_idx + 1, so it has fewer than rows.
        if (
            path.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return min(length, module.num_embeddings - module.padding_idx - 1)
    return length
