"""What a base model is before any of its weights are read: folder, config, class and pooler.

Both the HTTP side, which needs only a signature, and the worker, which loads the weights, go by
this plan, so they cannot disagree. Reads config.json and the names of the tensors.

Which class is loaded, by the first entry of ``architectures`` in the config:

    XForCausalLM, XLMHeadModel, XForMaskedLM    that class, its language-model head with it
    XForPreTraining                             the masked (else causal) LM class of the family
    XModel                                      the bare backbone, of images too
    any other head, or none named               the bare backbone; the checkpoint's head is left
                                                out, because heads come with adapters

A bare backbone stands under the name that it has in the family's task classes (``bert``,
``model``), so its layers have the paths that adapters made on those classes know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.errors import ExplainedError, in_a_line
from adapters.intake.base_files import INDEX_FILE
from adapters.tasks import IMAGE_MODELS
from server.options import EngineOptions

_SINGLE = "model.safetensors"
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")

PAGE_TOKENS = 16  # of the KV cache
# The first pages of the cache are never given to a sequence: rows and tables of nobody have them.
TRASH_BLOCKS = 2


class BaseModelError(ExplainedError):
    """A base model that cannot be served; the start ends with it."""

    code = "base_unusable"


@dataclass(frozen=True)
class BasePlan:
    """What to load.

    Args:
        folder: Where config, tokenizer and weights are.
        config: transformers' config of the base.
        model_class: The class to build; it brings a pooler where the checkpoint has one.
        quantized: How the checkpoint is quantized already: bitsandbytes' settings, or None.
    """

    folder: Path
    config: Any
    model_class: type[Any]
    quantized: dict[str, Any] | None

    @property
    def takes_images(self) -> bool:
        return _sees(self.model_class)

    @property
    def generates(self) -> bool:
        """Whether it has a causal language-model head."""
        return is_causal(self.model_class.__name__)

    def skeleton(self) -> nn.Module:
        """The model on the meta device, without a single weight."""
        with torch.device("meta"):
            model: nn.Module = self.model_class(self.config)
        return model


def plan_base(options: EngineOptions) -> BasePlan:
    """Read what the base is; no weights, no network unless it is a hub id.

    Raises:
        BaseModelError: There is no such base, or it is none that can be served.
    """
    folder = base_folder(options)
    config = _load_config(folder)
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None and quantized.get("quant_method") not in (None, "bitsandbytes"):
        raise BaseModelError(
            "The base is quantized in a way that adapters cannot be computed on.",
            found=str(quantized.get("quant_method")),
            expected="a plain checkpoint, or one quantized by bitsandbytes",
            fix="Serve the original checkpoint with --quantization nf4.",
        )
    names = _tensor_names(folder)
    model_class = _model_class(config)
    _check_kv_bytes(config, model_class, options)
    return BasePlan(folder, config, _with_pooler(model_class, config, names), quantized)


def kv_too_small(given: int, least: int) -> BaseModelError:
    """The budget of keys and values does not hold a single block of tokens."""
    return BaseModelError(
        "The KV cache is too small for this base.",
        found=f"{given} bytes",
        expected=f"at least {least} bytes",
        fix="Give more with --kv-bytes, such as 256MiB.",
    )


def _check_kv_bytes(config: Any, model_class: type[Any], options: EngineOptions) -> None:
    """Refuse at once what no cache can be made of; the cache itself knows its size exactly."""
    if not is_causal(model_class.__name__):
        return
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    layers, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    if not heads or not layers or not width:
        return
    try:
        head_width = getattr(text, "head_dim", None) or width // heads
        heads = getattr(text, "num_key_value_heads", None) or heads
    except Exception:  # noqa: BLE001  # transformers' own, where layers differ in it
        return
    number = 4 if options.dtype == "fp32" else 2
    least = (TRASH_BLOCKS + 1) * PAGE_TOKENS * layers * 2 * heads * head_width * number
    if options.kv_bytes < least:
        raise kv_too_small(options.kv_bytes, least)


def base_folder(options: EngineOptions) -> Path:
    """The folder of the base: the one named, or the download of a hub id (``org/name``).

    Raises:
        BaseModelError: Neither exists.
    """
    folder = Path(options.base).expanduser()
    if folder.is_dir():
        return folder
    if options.base.count("/") > 1 or options.base.startswith((".", "/", "~")):
        raise BaseModelError(
            "The base model's folder does not exist.",
            found=options.base,
            expected="a folder with config.json and safetensors, or a hub id such as org/name",
            fix="Check the path given to --base.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            options.base, revision=options.revision, allow_patterns=list(_HUB_FILES)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            "The base model is neither a folder nor could it be downloaded.",
            found=f"{options.base} ({type(error).__name__})",
            expected="a folder, or the id of a model on the hub that can be reached",
            fix="Check the name, the network and the access rights, or download it beforehand.",
        ) from error
    return Path(found)


def _load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise BaseModelError(
            "The base model has no config.json.",
            found=f"{folder} without it",
            expected="a folder made by save_pretrained",
            fix="Point --base at the folder that holds config.json and model.safetensors.",
        )
    try:
        config = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(
            "The base model's config.json cannot be used.",
            found=in_a_line(error),
            expected="the config of an architecture that transformers knows by itself",
            fix="Models that bring their own code are never run; choose another base.",
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise BaseModelError(
            "Encoder-decoder models are not supported as a base.",
            found=str(config.model_type),
            expected="an encoder such as BERT, or a decoder such as Llama",
        )
    return config


def _tensor_names(folder: Path) -> frozenset[str]:
    from safetensors import SafetensorError, safe_open

    try:
        if (folder / INDEX_FILE).is_file():
            index = json.loads((folder / INDEX_FILE).read_bytes())
            shards = sorted(set(index["weight_map"].values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise BaseModelError(
                    "The base model's weights are incomplete.",
                    found=f"{len(missing)} of {len(shards)} files missing, first {missing[0]}",
                    expected=f"every file that {INDEX_FILE} names",
                    fix="Download the base again.",
                )
            return frozenset(index["weight_map"])
        if (folder / _SINGLE).is_file():
            with safe_open(str(folder / _SINGLE), framework="pt") as opened:
                return frozenset(opened.keys())
    except (SafetensorError, ValueError, KeyError, AttributeError, OSError) as error:
        raise BaseModelError(
            "The base model's weights cannot be read.",
            found=f"{type(error).__name__}: {error}",
            expected=f"a sound {_SINGLE}, or shards with {INDEX_FILE}",
            fix="Download the base again.",
        ) from error
    raise BaseModelError(
        "The base model has no safetensors weights.",
        found=", ".join(sorted(path.name for path in folder.glob("*.bin"))[:3]) or "no weights",
        expected=f"{_SINGLE}, or shards with {INDEX_FILE}",
        fix="Convert it with save_pretrained; pickled weights are never read.",
    )


def _model_class(config: Any) -> type[Any]:
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_MAPPING,
    )

    name = (getattr(config, "architectures", None) or [""])[0]
    named = getattr(transformers, name, None) if name else None
    found: Any = None
    if (
        name.endswith((*_LANGUAGE_MODELS, "Model"))
        and isinstance(named, type)
        and getattr(named, "config_class", None) is type(config)
    ):
        found = named
    elif name.endswith("ForPreTraining"):
        masked = MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None)
        found = masked or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None:
        found = MODEL_MAPPING.get(type(config), None)
    if isinstance(found, tuple):
        found = found[0]
    if found is None:
        raise BaseModelError(
            "The base model's architecture is not supported.",
            found=name or str(config.model_type),
            expected="a text encoder or decoder of transformers, or a vision transformer",
        )
    if _sees(found) and config.model_type not in IMAGE_MODELS:
        raise BaseModelError(
            "Bases of this kind for images are not supported.",
            found=str(config.model_type),
            expected="one of " + ", ".join(sorted(IMAGE_MODELS)),
        )
    chosen: type[Any] = found
    return chosen if name_is_headed(chosen.__name__) else _under_its_name(chosen)


def _sees(model_class: Any) -> bool:
    """Whether it takes images."""
    return str(getattr(model_class, "main_input_name", "")) == "pixel_values"


def is_causal(architecture: str) -> bool:
    """Whether a class of this name continues texts."""
    return architecture.endswith(("ForCausalLM", "LMHeadModel"))


def name_is_headed(architecture: str) -> bool:
    """Whether a class of this name has a language-model head."""
    return architecture.endswith(_LANGUAGE_MODELS)


def _under_its_name(backbone_class: type[Any]) -> type[Any]:
    """A model that is nothing but the backbone, as the child that task classes have it as."""
    prefix = backbone_class.base_model_prefix
    if not prefix:
        return backbone_class

    def __init__(self: Any, config: Any) -> None:  # noqa: N807
        super(bare, self).__init__(config)
        setattr(self, prefix, backbone_class(config))
        self.post_init()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, prefix)(*args, **kwargs)

    family = next(base for base in backbone_class.__mro__[1:] if hasattr(base, "from_pretrained"))
    bare: Any = type(
        backbone_class.__name__,
        (family,),
        {"__init__": __init__, "forward": forward, "__module__": backbone_class.__module__},
    )
    result: type[Any] = bare
    return result


def _with_pooler(model_class: type[Any], config: Any, names: frozenset[str]) -> type[Any]:
    """The class as it fits the checkpoint: with the backbone's pooler if its weights are there.

    Masked language models are built without the pooler that the family's classifiers read, and
    bare backbones are built with one even where the checkpoint has none.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    backbone_class = MODEL_MAPPING.get(type(config), None)
    if not isinstance(backbone_class, type):
        return model_class
    with torch.device("meta"):
        whole: Any = backbone_class(config)
        pooler = getattr(whole, "pooler", None)
        if not isinstance(pooler, nn.Module):
            return model_class
        wanted = {f"pooler.{key}" for key in pooler.state_dict()}
        prefix = model_class.base_model_prefix
        has_it = wanted <= names or {f"{prefix}.{key}" for key in wanted} <= names
        built = model_class(config)
    there = isinstance(getattr(_backbone(built), "pooler", None), nn.Module)
    if there == has_it:
        return model_class

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        super(adjusted, self).__init__(config, *args, **kwargs)
        own = _backbone(self)
        fresh = backbone_class(config) if has_it else None
        for child in ("pooler", "pooler_activation"):
            if hasattr(own, child):
                setattr(own, child, getattr(fresh, child, None))

    adjusted: Any = type(
        model_class.__name__,
        (model_class,),
        {"__init__": __init__, "__module__": model_class.__module__},
    )
    result: type[Any] = adjusted
    return result


def _backbone(model: Any) -> Any:
    return getattr(model, model.base_model_prefix, model)


def one_id(value: Any) -> int | None:
    """A token id of a config that may list several, or have none."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return value if isinstance(value, int) else None
