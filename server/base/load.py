"""Loads the base model, once, and makes it ready for adapters.

Decides how the plan's model is stored (4 bits, 8 bits, plain), in which dtype and where; refuses
with a typed error what cannot be served. What the layers then compute is the business of the
adapters package, and task heads that of server.encoding.heads.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.errors import UnsupportedOption, in_a_line
from adapters.intake.base_files import BaseFiles
from adapters.layers.adapted import EMBEDDING_BLOCK, AdaptedLinear, quantize_embedding
from adapters.layers.inject import AdaptedModel, inject
from adapters.modulation.autotune import Autotuner
from adapters.modulation.fixed_blocks import FixedBlocks
from adapters.modulation.fused_steps import most_buffer_bytes
from adapters.modulation.quant import QuantizedWeight
from adapters.signature import BaseSignature, describe, own_arithmetic
from adapters.tasks import IMAGE_MODELS
from server.base.captured_steps import LAUNCH_CLASSES
from server.base.memory import available_bytes, static_bytes
from server.base.plan import BaseModelError, BasePlan, is_causal, plan_base
from server.base.weight_progress import weights_told_as
from server.base.weights_digest import weights_digest
from server.options import EngineOptions
from server.stages import tell_stage

__all__ = ["BaseModelError", "LoadedBase", "load_base", "signature_of"]

logger = logging.getLogger(__name__)

_COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STORED = {"nf4": "4 bit NF4", "fp4": "4 bit FP4", "int8": "8 bit"}
_WEIGHT_BITS = {
    "nf4": 4.5625,
    "fp4": 4.5625,
    "int8": 8.0,
}  # a weight, its share of the scales included


@dataclass(frozen=True)
class LoadedBase:
    """A base in memory, ready for adapters.

    Args:
        adapted: The model with its adapted layers.
        config: transformers' config.
        dtype: In which everything is computed.
        device: Where it is.
        folder: Where the base and its tokenizer lie.
        storage: How its linear layers are stored, for people.
        weights_digest: Of its linear layers as they are stored: equal on every device.
    """

    adapted: AdaptedModel
    config: Any
    dtype: torch.dtype
    device: torch.device
    folder: Path
    storage: str
    weights_digest: str = ""

    @property
    def model(self) -> Any:
        return self.adapted.model

    @property
    def kernel(self) -> str:
        """What computes its linear layers: ``Modulator.kernel``."""
        return self.adapted.modulator.kernel(self.dtype, self.device)

    @property
    def backbone(self) -> Any:
        """The part below the language-model head, or the whole of a bare backbone."""
        return self.model.base_model

    @property
    def takes_images(self) -> bool:
        """Whether its inputs are images and not texts."""
        return str(self.config.model_type) in IMAGE_MODELS

    @property
    def fills_masks(self) -> bool:
        """Whether it has a masked-language-model head."""
        return self.adapted.signature.architecture.endswith("ForMaskedLM")

    @property
    def generates(self) -> bool:
        """Whether it has a causal language-model head."""
        return is_causal(self.adapted.signature.architecture)


def signature_of(options: EngineOptions) -> BaseSignature:
    """The signature that the loaded base will have; reads no weights.

    Raises:
        BaseModelError: As ``load_base``, but for memory.
    """
    plan = plan_base(options)
    skeleton = _skeleton(plan)
    signature = describe(skeleton, options.base)
    return replace(signature, files=BaseFiles.of(plan.folder, skeleton, signature.prefix))


def load_base(options: EngineOptions) -> LoadedBase:
    """Load the base in the storage asked for and put adapted layers into it.

    The linear layers of the backbone are quantized (a pooler included); embeddings, the
    language-model head and what is left of it are not. A checkpoint that bitsandbytes quantized
    already is loaded as it is, and what it left unquantized in the dtype asked for. With
    ``quantize_embeddings`` the token embedding, and a head tied to it, are stored in 4 bits as
    well. Sets torch's number of threads on the CPU.

    Raises:
        BaseModelError: No such base, an architecture or device that cannot be served, weights
            missing, or not enough memory.
    """
    plan = plan_base(options)
    device = choose_device(options)
    dtype = choose_dtype(options, device)
    if device.type == "cpu":
        threads = options.threads or _cores()
        if options.deterministic:
            # A tensor is cut into as many pieces: in halves, every piece ends where vectors do.
            threads = 1 << (threads.bit_length() - 1)
        torch.set_num_threads(threads)
    skeleton = _skeleton(plan)
    _check_memory(skeleton, options, plan, dtype, device)
    model = _load(plan, skeleton, options, dtype, device)
    if options.quantize_embeddings:
        _quantize_token_embedding(model, options)
    try:
        adapted = inject(model, name=options.base, strategy=options.modulation)
    except UnsupportedOption as error:  # a strategy that this device or dtype does not have
        raise BaseModelError(
            error.message, found=error.found, expected=error.expected, fix=error.fix
        ) from error
    signature = adapted.signature
    files = BaseFiles.of(plan.folder, skeleton, signature.prefix)
    adapted.signature = replace(signature, files=files)
    if options.deterministic:
        adapted.modulator.fixed = FixedBlocks()
    elif options.modulation == "auto":
        adapted.modulator.tuner = Autotuner(options.cache_dir, device)
    linear = {
        path: one.quantized
        for path, one in adapted.layers.items()
        if isinstance(one, AdaptedLinear)
    }
    tell_stage("hashing the weights")
    digest = weights_digest(linear)
    logger.info("The linear layers of %s as they are served: %s", options.base, digest)
    base = LoadedBase(adapted, model.config, dtype, device, plan.folder, _storage(adapted), digest)
    _tell_kernel(base, options)
    return base


def _tell_kernel(base: LoadedBase, options: EngineOptions) -> None:
    name = str(base.dtype).removeprefix("torch.")
    if base.kernel == "torch" and base.device.type == "cpu" and options.modulation == "auto":
        logger.warning(
            "No compiled kernel serves %s on this processor, or it was not built: torch operators "
            "compute the linear layers, which is slower.",
            name,
        )
    else:
        logger.info("Linear layers are computed in %s by the %s kernel.", name, base.kernel)


def choose_device(options: EngineOptions) -> torch.device:
    """The device asked for; ``auto`` is CUDA where there is one.

    Raises:
        BaseModelError: CUDA was asked for and is not there.
    """
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise BaseModelError(
            "There is no CUDA device.",
            found="none that torch can use",
            expected="a CUDA device, because --device cuda was given",
            fix="Install a driver and a CUDA build of torch, or use --device cpu.",
        )
    wants_cuda = options.device == "cuda" or (options.device == "auto" and has_cuda)
    return torch.device("cuda", torch.cuda.current_device()) if wants_cuda else torch.device("cpu")


def choose_dtype(options: EngineOptions, device: torch.device) -> torch.dtype:
    """The dtype asked for; ``auto`` is bf16 where the device multiplies it natively, else fp32."""
    if options.dtype != "auto":
        return _COMPUTE_DTYPES[options.dtype]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def _skeleton(plan: BasePlan) -> nn.Module:
    try:
        return plan.skeleton()
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise BaseModelError(
            "The base model cannot be built from its config.",
            found=in_a_line(error),
            expected=f"a config that {plan.model_class.__name__} takes",
        ) from error


def _load(
    plan: BasePlan,
    skeleton: nn.Module,
    options: EngineOptions,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    arguments: dict[str, Any] = {}
    where = device
    if plan.quantized is None and options.quantization != "none":
        arguments["quantization_config"] = _quantization(skeleton, options, dtype)
        if options.quantization != "int8":
            # By one code on one kind of device: a GPU's own would round some codes otherwise, and
            # replicas on different devices would serve different weights.
            where = torch.device("cpu")
    supports_sdpa = getattr(plan.model_class, "_supports_sdpa", False)
    try:
        stored = plan.quantized is None and options.quantization != "none"
        name = "loading and quantizing weights" if stored else "loading weights"
        with warnings.catch_warnings(), weights_told_as(name):
            warnings.simplefilter("ignore")  # bitsandbytes' advice on speed: its forward never runs
            model, report = plan.model_class.from_pretrained(
                str(plan.folder),
                dtype=dtype,
                device_map={"": where},
                attn_implementation="sdpa" if supports_sdpa else "eager",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _no_memory(in_a_line(error), options) from error
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise BaseModelError(
            "The base model's weights cannot be loaded.",
            found=in_a_line(error),
            expected=f"a checkpoint of {plan.model_class.__name__}",
            fix="Check that config.json and the weights belong together.",
        ) from error
    wrong = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if wrong:
        raise BaseModelError(
            "The base model's checkpoint lacks weights.",
            found=f"{len(wrong)} missing or of another shape, first {wrong[0]}",
            expected=f"all weights of {plan.model_class.__name__}",
            fix="Check that config.json names the architecture that the checkpoint holds.",
        )
    if plan.quantized is not None:
        _cast(model, dtype)
    if where != device:
        tell_stage("moving the base to the device")
        expand_nested_scales(model)
        try:
            model.to(device)
        except torch.OutOfMemoryError as error:
            raise _no_memory(in_a_line(error), options) from error
    for key in sorted(report["unexpected_keys"])[:5]:
        logger.info("Not part of %s, left out: %s", plan.model_class.__name__, key)
    return model


def expand_nested_scales(model: nn.Module) -> None:
    """Make float32 scales of 8-bit ones in every 4-bit layer, in place, where the layer is now."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            QuantizedWeight.from_linear4bit(module)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """What a quantized checkpoint left unquantized, in ``dtype``: transformers leaves it as it is.

    What an architecture keeps in float32 stays there; so do buffers that no checkpoint holds.
    """
    whole = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        whole |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        own = [one for one in module.parameters(recurse=False) if type(one) is nn.Parameter]
        own += [
            one
            for name, one in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        ]
        wanted = torch.float32 if whole & set(path.split(".")) else dtype
        for one in own:
            if one.is_floating_point() and one.dtype != wanted:
                one.data = one.data.to(wanted)
    model.config.dtype = dtype


def _storage(adapted: AdaptedModel) -> str:
    """How the linear layers are stored, as they were loaded."""
    kinds = {
        one.quantized.kind for one in adapted.layers.values() if isinstance(one, AdaptedLinear)
    }
    told = [_STORED[kind] for kind in sorted(kinds & set(_STORED))]
    model: Any = adapted.model
    config = getattr(model.config, "quantization_config", None)
    double = getattr(config, "bnb_4bit_use_double_quant", False)
    if isinstance(config, dict):
        double = config.get("bnb_4bit_use_double_quant", False)
    if double and kinds & {"nf4", "fp4"}:
        told.append("double quantization")
    return ", ".join(told) or "not quantized"


def _quantization(skeleton: nn.Module, options: EngineOptions, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    skipped = [*_outside_backbone(skeleton), *own_arithmetic(skeleton)]
    if options.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quantization,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def _quantize_token_embedding(model: Any, options: EngineOptions) -> None:
    """Store the token embedding as the linear layers are; a head tied to it shares the bytes."""
    embedding = model.get_input_embeddings()
    kind = options.quantization
    reason = None
    if kind not in ("nf4", "fp4"):
        reason = f"--quantization {kind}"
    elif type(embedding) is not nn.Embedding:
        reason = f"an embedding of class {type(embedding).__name__}"
    elif embedding.embedding_dim % EMBEDDING_BLOCK:
        reason = f"an embedding {embedding.embedding_dim} wide"
    if reason is not None:
        raise BaseModelError(
            "The token embedding of this base cannot be stored in 4 bits.",
            found=reason,
            expected=f"nf4 or fp4, and a plain embedding a multiple of {EMBEDDING_BLOCK} wide",
            fix="Start without --quantize-embeddings.",
        )
    tied = [
        module
        for module in model.modules()
        if module is not embedding and getattr(module, "weight", None) is embedding.weight
    ]
    quantize_embedding(
        embedding,
        "nf4" if kind == "nf4" else "fp4",
        double_quant=options.double_quant,
        tied=tied,
    )


def _outside_backbone(model: Any) -> list[str]:
    """Children that are no part of the backbone: the language-model head, in whatever pieces."""
    backbone = model.base_model
    if backbone is model:
        return []
    return [name for name, child in model.named_children() if child is not backbone]


def _check_memory(
    skeleton: Any,
    options: EngineOptions,
    plan: BasePlan,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Refuse before loading what cannot fit: an honest line instead of the kernel's killer."""
    if plan.quantized is not None:
        return
    linear = sum(
        module.weight.numel()
        for module in skeleton.base_model.modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    )
    if options.quantize_embeddings and isinstance(
        embedding := skeleton.get_input_embeddings(), nn.Embedding
    ):
        linear += embedding.weight.numel()
    every = sum(parameter.numel() for parameter in skeleton.parameters())
    bits = _WEIGHT_BITS.get(options.quantization, dtype.itemsize * 8.0)
    needed = int(linear * bits / 8 + (every - linear) * dtype.itemsize)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    found = f"{needed >> 20} MiB needed"
    static = static_bytes(options, skeleton.config.get_text_config(), dtype, plan.generates)
    if plan.generates:
        needed += options.kv_bytes
        found += f" and {options.kv_bytes >> 20} MiB for the KV cache"
    if static.buffers:
        needed += static.buffers
        found += f" and {static.buffers >> 20} MiB for the buffers of static steps"
    if needed > free:
        raise _no_memory(f"{found}, {free >> 20} MiB free", options)
    budgets = options.device_bytes + options.folded_bytes + options.head_bytes
    if device.type == "cpu":
        budgets += options.host_bytes
    if needed + budgets > free:
        logger.warning(
            "Budgets of adapters are %d MiB, and beside the base %d MiB are free: "
            "lower device_bytes, host_bytes, folded_bytes or head_bytes, or memory may run out",
            budgets >> 20,
            (free - needed) >> 20,
        )
    optional = static.graphs  # what memory does not hold of it is done without
    if device.type == "cuda" and plan.generates and options.decode_steps != "dynamic":
        optional += most_form_bytes(skeleton, options.max_sequences, dtype)
    if device.type == "cuda" and optional and needed + budgets + optional > free:
        logger.warning(
            "Static steps take about %d MiB, and beside the base and the budgets of adapters %d "
            "MiB are free: fewer will be captured. Lower kv_bytes, device_bytes, max_sequences or "
            "max_batch_tokens for more.",
            optional >> 20,
            max(0, free - needed - budgets) >> 20,
        )


_FIT = (
    "Use --quantization nf4, a smaller base or a larger machine.",
    "Use a smaller base or a larger machine.",
)
_FIT_STATIC = " Static steps take less with lower max_sequences and max_batch_tokens."


def most_form_bytes(skeleton: Any, most_rows: int, dtype: torch.dtype) -> int:
    """What the kernels' forms may keep for decode steps over fixed buffers, at most.

    Args:
        skeleton: The model, of which shapes count.
        most_rows: Of a step.
        dtype: To compute in.
    """
    shapes: set[tuple[int, int]] = set()
    for module in skeleton.base_model.modules():
        is_conv1d = type(module).__name__ == "Conv1D"  # in, out
        if is_conv1d or isinstance(module, nn.Linear):
            first, second = (int(size) for size in module.weight.shape)
            shapes.add((second, first) if is_conv1d else (first, second))
    return most_buffer_bytes(shapes, most_rows, [rank for rank, _ in LAUNCH_CLASSES], dtype)


def _no_memory(found: str, options: EngineOptions) -> BaseModelError:
    return BaseModelError(
        "The base model does not fit into memory.",
        found=found,
        expected="room for all of its weights, the KV cache and what static steps read and write",
        fix=_FIT[options.quantization in ("nf4", "fp4")]
        + _FIT_STATIC * ((options.decode_steps, options.encode_batches) != ("dynamic",) * 2),
    )


def _cores() -> int:
    """Physical cores that this process may use."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(allowed or 1, psutil.cpu_count(logical=False) or 1))
