"""Every family of texts that transformers knows, as a tiny random base: served exactly, or refused.

    python -m tests.stand.families [--rows FILE] [FAMILY ...]

makes docs/families.md. Each family runs in a process of its own, under a time limit; rows that are
in FILE already are not made again.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto
from transformers.utils import logging as transformers_logging

from adapters.errors import AdapterError
from adapters.intake.checkpoint import load_adapter
from adapters.tasks import Task
from server.base.load import BaseModelError
from server.engine.engine import Engine, EngineFailure
from server.inputs.text import Text
from server.messages import EncodeRequest, GenerateRequest, SamplingOptions, TokenizedInput
from tests.stand import tiny_bases

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
LIMIT_S = 60.0
AT_ONCE = 2
BOUND = 1e-4
PARAMETERS_MAX = 20_000_000
LENGTHS = (3, 22, 9, 30)
NEW_TOKENS = 3
# Fields that many configs share, whatever they call them.
SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "n_vocab"), tiny_bases.VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim",
         "embedding_size", "n_embed", "embed_dim", "decoder_hidden_size", "attention_hidden_size"),
        64,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
         "decoder_layers", "num_decoder_layers", "num_blocks", "depth"),
        2,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads"),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "encoder_ffn_dim",
         "decoder_ffn_dim", "ffn_hidden_size", "shared_intermediate_size", "intermediate_size_mlp"),
        96,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_dim"), 32
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "attention_window", "local_attention"), 16),
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "vocab_size_per_layer_input": tiny_bases.VOCABULARY, "hidden_size_per_layer_input": 16,
    "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "image_size": 32, "patch_size": 8,
    "num_kv_shared_layers": 0, "time_step_rank": 8, "conv_kernel": 4, "lru_width": 64,
    "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
# All heads have keys of their own; the rotary part of a head is counted apart.
LATENT = (
    "axk1",
    "axk2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "longcat_flash",
    "minicpm3",
    "mistral4",
    "youtu",
    "glm_moe_dsa",
    "glm4_moe_lite",
    "dots3_note",
    "dots3_note_text",
    "esmc",
)
# Attention in every fourth layer only, or third.
MIXED = (
    "qwen3_5",
    "qwen3_5_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
    "qwen4_exp",
    "qwen4_exp_text",
    "kimi_linear",
    "lfm3",
    "recurrent_gemma",
)
OWN: Mapping[str, dict[str, Any]] = {
    **{family: {"num_key_value_heads": 4} for family in LATENT},
    **{
        family: {"num_key_value_heads": 4, "head_dim": 8}
        for family in ("axk1", "deepseek_v3", "longcat_flash", "mistral4", "youtu", "glm4_moe_lite")
    },
    **{family: {"num_hidden_layers": 4} for family in MIXED},
    "roberta": {"type_vocab_size": 1},
    "xlnet": {"d_inner": 96},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32],
                 "attn_layers": ["local", "local"], "attention_head_size": 16,
                 "feed_forward_size": 96},
    "longformer": {"attention_window": [16, 16]},
    "big_bird": {"attention_type": "original_full"},
    "gptj": {"rotary_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bailing_hybrid": {"layer_group_size": 2, "num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "lilt": {"channel_shrink_ratio": 4, "max_2d_position_embeddings": 64, "hidden_size": 96},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "canine": {"local_transformer_stride": 16, "max_position_embeddings": 64},
    "codegen": {"rotary_dim": 8},
    "mpt": {"expansion_ratio": 2},
    "deberta": {"pos_att_type": ["c2p", "p2c"]},
    "squeezebert": {"q_groups": 1, "k_groups": 1, "v_groups": 1, "post_attention_groups": 1,
                    "intermediate_groups": 1, "output_groups": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What became of one class of one family."""

    family: str
    architecture: str
    outcome: str  # served, refused, not makeable; wrong is a defect
    detail: str


def known() -> dict[str, list[str]]:
    """Family → the classes that are tried: its language models, else its bare backbone."""
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    classes: dict[str, list[str]] = {}
    for family in sorted({*causal, *masked, *auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES}):
        named = [mapping[family] for mapping in (causal, masked) if family in mapping]
        if not named:
            backbone = auto.MODEL_MAPPING_NAMES.get(family)
            named = [backbone[0] if isinstance(backbone, tuple) else str(backbone)]
        classes[family] = list(dict.fromkeys(named))
    return classes


def small(config_class: Any, family: str) -> dict[str, Any]:
    """Arguments for a tiny config of a class, and of the configs within it."""
    default = config_class()
    given = inspect.signature(config_class.__init__).parameters
    fields = {*vars(default), *given, *getattr(config_class, "attribute_map", {})}
    found = {name: value for name, value in SMALL.items() if name in fields}
    for name, value in vars(default).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            found[name] = small(type(value), value.model_type)
    return found | OWN.get(family, {})


def build(family: str, architecture: str) -> Any:
    """A tiny random model whose answers differ visibly between inputs."""
    import transformers

    model_class: Any = getattr(transformers, architecture)
    config_class: Any = model_class.config_class or CONFIG_MAPPING[family]
    config = config_class(**small(config_class, family))
    if architecture in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        config.is_decoder = True
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > PARAMETERS_MAX:
        raise ValueError(f"{count / 1e6:.0f} million parameters with the common fields small")
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and float(parameter.std()) < 0.05:
                parameter.mul_(4.0)
    return model


def sequences(tokens: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randint(5, tokens, (length,), generator=generator).tolist())
        for length in LENGTHS
    ]


def plain(model: Any, ids: Iterable[int]) -> Any:
    """The model's own forward over one text."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]))


def relative(found: Any, wanted: Any) -> float:
    one, other = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    return float((one - other).norm() / other.norm())


def compare(engine: Engine, model: Any) -> tuple[list[str], float]:
    """The lanes that answer, and the largest error of a mixed batch against the plain forward."""
    texts = sequences(tiny_bases.VOCABULARY)
    items = tuple(TokenizedInput(ids) for ids in texts)
    task: Task = "feature-extraction"
    options = {"pooling": "mean", "normalize": False}
    vectors: Any = engine.run(EncodeRequest("v", task, None, None, items, None, options))
    lanes = ["encode"]
    errors = [
        relative(vector, plain(model.base_model, ids).last_hidden_state[0].mean(0))
        for vector, ids in zip(vectors.outputs, texts, strict=True)
    ]
    if engine.base.fills_masks:
        masked = [(*ids[:-1], 4) for ids in texts]
        every = {"targets": tuple(range(tiny_bases.VOCABULARY))}
        items = tuple(TokenizedInput(ids) for ids in masked)
        words: Any = engine.run(EncodeRequest("m", "fill-mask", None, None, items, None, every))
        lanes.append("fill-mask")
        for ids, found in zip(masked, words.outputs, strict=True):
            scores = [one["score"] for one in sorted(found, key=lambda one: one["token"])]
            errors.append(relative(scores, plain(model, ids).logits[0, -1].softmax(-1)))
    if engine.base.generates:
        lanes.append("generate")
        sampling = SamplingOptions(NEW_TOKENS, ignore_eos=True, logprobs=True, prompt_logprobs=True)
        for index, ids in enumerate(texts):
            engine.submit(GenerateRequest(str(index), None, None, ids, sampling))
        ended: dict[str, Any] = {}
        while len(ended) < len(texts):
            for event in engine.step():
                if not hasattr(event, "prompt_logprobs"):
                    raise EngineFailure(event)  # type: ignore[arg-type]
                ended[event.id] = event
        for index, ids in enumerate(texts):
            answer = ended[str(index)]
            whole = [*ids, *(token.id for token in answer.tokens)]
            told = [*answer.prompt_logprobs[1:], *(token.logprob for token in answer.tokens)]
            logits = plain(model, whole[:-1]).logits[0].log_softmax(-1)
            wanted = [float(logits[at, token]) for at, token in enumerate(whole[1:])]
            errors.append(relative(told, wanted))
    return lanes, max(errors)


def judge(family: str, architecture: str, folder: Path) -> Row:
    """Make the base, start an engine on it, and compare."""
    made = build_or_reason(family, architecture)
    if isinstance(made, str):
        return Row(family, architecture, "not makeable", made)
    place = folder / "base"
    made.save_pretrained(place)
    text = Text(tiny_bases.tokenizer("bert"), max_tokens=60, vocab_size=tiny_bases.VOCABULARY)
    options = tiny_bases.options(place, folder / "store", threads=1, modulation="expand")
    try:
        with mock.patch("server.engine.engine.inputs_of", return_value=text):
            engine = Engine.build(options)
    except BaseModelError as error:
        line = f"{error.message} {error.found or ''}"
        return Row(family, architecture, "refused", one_line(line))
    told = ""
    try:
        lanes, worst = compare(engine, made)
        told, head_error = classify(engine, family, place, folder)
        worst = max(worst, head_error)
    except EngineFailure as failed:
        return Row(family, architecture, "wrong", one_line(f"{failed.failure.found}"))
    finally:
        engine.close()
    outcome = "served" if worst < BOUND else "wrong"
    return Row(family, architecture, outcome, f"{', '.join(lanes)}{told}: {worst:.0e}")


def classify(engine: Engine, family: str, place: Path, folder: Path) -> tuple[str, float]:
    """What becomes of the family's own sequence classifier, saved by PEFT with all of its head, and
    the largest error of its logits in a mixed batch against PEFT on each text alone."""
    import transformers
    from peft import LoraConfig, get_peft_model

    name = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(family)
    if name is None:
        return "", 0.0
    factory: Any = getattr(transformers, name)
    try:
        whole = factory.from_pretrained(place, num_labels=3, dtype=torch.float32)
        backbone = whole.base_model_prefix
        heads = [
            name
            for name, child in whole.named_children()
            if name != backbone and any(True for _ in child.parameters())
        ]
        layers = engine.base.adapted.signature.layers.values()
        target = next(
            one.path.rpartition(".")[2]
            for one in layers
            if one.kind in ("linear", "conv1d_transposed") and one.path.startswith(backbone)
        )
        config = LoraConfig(
            target_modules=rf"{backbone}\..*\.{target}",
            modules_to_save=heads,
            task_type="SEQ_CLS",
            init_lora_weights=False,
        )
        adapter: Any = get_peft_model(whole, config).eval()
        adapter.save_pretrained(folder / "adapter", save_embedding_layers=False)
        whole.config.save_pretrained(folder / "adapter")
        texts = sequences(tiny_bases.VOCABULARY)
        wanted = [plain(adapter, ids).logits[0] for ids in texts]
    except Exception as error:  # noqa: BLE001  # PEFT's or transformers' own
        return one_line(
            f" (its classifier cannot be made: {type(error).__name__}: {error})", 90
        ), 0.0
    try:
        version = tiny_bases.stored(folder / "store", folder / "adapter")
        load_adapter(folder / "adapter", engine.base.adapted.signature)
        items = tuple(TokenizedInput(ids) for ids in texts)
        task: Task = "text-classification"
        options = {"function_to_apply": "none"}
        found: Any = engine.run(EncodeRequest("c", task, version, version, items, None, options))
    except AdapterError as error:
        return one_line(f" (its classifier is refused: {error.message} {error.found})", 160), 0.0
    except EngineFailure as failed:
        said = f"{failed.failure.message} {failed.failure.found}"
        return one_line(f" (its classifier is refused: {said})", 160), 0.0
    errors = []
    for outputs, logits in zip(found.outputs, wanted, strict=True):
        scores = {one["label"]: one["score"] for one in outputs}
        errors.append(relative([scores[f"LABEL_{at}"] for at in range(3)], logits))
    return ", classify", max(errors)


def build_or_reason(family: str, architecture: str) -> Any:
    """The model, or one line on why there is none."""
    try:
        model = build(family, architecture)
        if model.config.is_encoder_decoder:
            return model  # refused before it is asked
        out = plain(model, sequences(tiny_bases.VOCABULARY)[0])
        states = out[0] if not hasattr(out, "logits") else out.logits
        if not bool(torch.isfinite(states).all()):
            return "its answers are not finite"
        return model
    except Exception as error:  # noqa: BLE001  # whatever it is, it is the row
        return one_line(f"{type(error).__name__}: {error}")


def one_line(text: str, most: int = 220) -> str:
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _work(family: str, architecture: str, place: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = judge(family, architecture, Path(folder))
        except Exception as error:  # noqa: BLE001  # a start that does not end with its one line
            row = Row(family, architecture, "wrong", one_line(f"{type(error).__name__}: {error}"))
    with open(place, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read(place: Path) -> dict[tuple[str, str], Row]:
    if not place.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in place.read_text().splitlines()]
    return {(row.family, row.architecture): row for row in rows}


def run(wanted: list[tuple[str, str]], place: Path) -> None:
    """Make the rows that are not there yet."""
    context = multiprocessing.get_context("fork")
    done = read(place)
    waiting = [one for one in wanted if one not in done]
    running: list[tuple[Any, float, tuple[str, str]]] = []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            one = waiting.pop(0)
            child = context.Process(target=_work, args=(*one, str(place)))
            child.start()
            running.append((child, time.monotonic(), one))
        time.sleep(0.05)
        for entry in list(running):
            child, began, one = entry
            late = time.monotonic() - began > LIMIT_S
            if child.is_alive() and not late:
                continue
            child.kill()
            child.join()
            running.remove(entry)
            if one not in read(place):
                reason = f"not done in {LIMIT_S:.0f} s" if late else f"exit {child.exitcode}"
                row = Row(*one, "not makeable", reason)
                with place.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")


def table(rows: Iterable[Row]) -> str:
    """The whole document."""
    listed = list(rows)
    counts = {kind: sum(row.outcome == kind for row in listed)
              for kind in ("served", "refused", "not makeable", "wrong")}  # fmt: skip
    lines = [
        "# Families",
        "",
        "Made by `python -m tests.stand.families`: every family that `AutoModelForCausalLM`,",
        "`AutoModelForMaskedLM` and `AutoModelForSequenceClassification` of transformers 5.23",
        "know, as a tiny random base of each of its language models (else of its backbone), in",
        "float32, not quantized. *Served*: the lanes that answer, and the largest relative error",
        "of a batch of mixed lengths (vectors, words for a mask, log-probabilities of prompts and",
        "of new tokens) against the model's own forward over each text alone; *classify*: the",
        "family's own sequence classifier on that base, saved by PEFT with all of its head,",
        "against PEFT, or in brackets why it has none. *Refused*: what the start ends with.",
        "*Not makeable*: why no tiny random model of it can be asked.",
        "",
        "Counts: " + ", ".join(f"{kind} {count}" for kind, count in counts.items()) + ".",
        "",
        "| family | class | outcome | lanes and error, or reason |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.family} | {row.architecture} | {row.outcome} | {row.detail} |" for row in listed
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    parser.add_argument("--rows", type=Path, default=None)
    chosen = parser.parse_args()
    place = chosen.rows or Path(tempfile.gettempdir()) / "hira-families.jsonl"
    wanted = [(family, one) for family, classes in known().items() for one in classes]
    run([one for one in wanted if not chosen.families or one[0] in chosen.families], place)
    rows = read(place)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(rows[one] for one in wanted if one in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
