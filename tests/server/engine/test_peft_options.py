"""Every option that is honoured, as PEFT saves it, against PEFT's own forward in float64."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import AdapterError
from adapters.intake.checkpoint import load_adapter
from adapters.signature import describe
from server.engine.engine import Engine
from tests.stand import tiny_bases
from tests.stand.float64 import TASK_TYPES
from tests.stand.folders import change_config, change_tensors, first_tensor

peft = pytest.importorskip("peft", reason="PEFT is an extra of the project (train)")

BOTH = ("hira", "lora")
OPTIONS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_lin", "v_lin"]},
    "regex": {"target_modules": r".*layer\.1\.(attention\.q_lin|ffn\.lin2)"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude_modules": {"target_modules": ["q_lin", "lin1"], "exclude_modules": ["lin1"]},
    "exclude-by-regex": {
        "target_modules": "all-linear", "exclude_modules": r".*(k_lin|out_lin|classifier)",
    },
    "layers_to_transform": {"target_modules": ["q_lin", "v_lin"], "layers_to_transform": [1]},
    "layers_pattern": {
        "target_modules": ["q_lin"], "layers_to_transform": 0, "layers_pattern": "layer",
    },
    "rank_pattern": {
        "target_modules": ["q_lin", "v_lin", "lin1"],
        "rank_pattern": {"lin1": 2, r"layer\.0\.attention\.q_lin": 7},
    },
    "embedding": {"target_modules": ["word_embeddings", "position_embeddings", "q_lin"]},
}  # fmt: skip
LORA_ONLY: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 3},
    "rslora": {"lora_alpha": 6, "use_rslora": True},
    "alpha_pattern": {"lora_alpha": 4, "alpha_pattern": {"v_lin": 16, r"layer\.1\..*q_lin": 1}},
    "rslora-with-patterns": {
        "use_rslora": True, "rank_pattern": {"q_lin": 9}, "alpha_pattern": {"q_lin": 5},
    },
    "bias-of-targets": {"bias": "lora_only", "target_modules": ["q_lin", "lin1", "lin2"]},
    "bias-of-every-linear": {"bias": "lora_only", "target_modules": "all-linear"},
    "gaussian": {"init_lora_weights": "gaussian"},
}  # fmt: skip
CASES = [
    *((method, "distilbert", name, OPTIONS[name]) for method in BOTH for name in OPTIONS),
    *(("lora", "distilbert", name, LORA_ONLY[name]) for name in LORA_ONLY),
    *(
        (method, "gpt2", f"fan_in_fan_out-{fan}", {
            "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": fan,
        })
        for method in BOTH
        for fan in (True, False)
    ),
    ("lora", "gpt2", "bias-of-Conv1D", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    ("lora", "llama", "bias-of-none", {"target_modules": ["q_proj"], "bias": "lora_only"}),
]  # fmt: skip


def saved_by_peft(base: Path, folder: Path, method: str, task: str, **options: Any) -> Any:
    """An adapter in a folder, and PEFT's own model of it in float64."""
    torch.manual_seed(5)
    _, factory = TASK_TYPES[task]
    model = factory.from_pretrained(base, dtype=torch.float32, num_labels=3)
    settings: dict[str, Any] = {
        "r": 4,
        "target_modules": ["q_lin", "v_lin"],
        "modules_to_save": tiny_bases.heads_of(model.config.model_type, task),
        "task_type": TASK_TYPES[task][0],
    }
    config_class = peft.HiraConfig if method == "hira" else peft.LoraConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it corrects fan_in_fan_out, and says so
        adapted = peft.get_peft_model(model, config_class(**(settings | options)))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "hira_" in name or "lora_" in name:
                    parameter.normal_(0.0, 0.45 if method == "hira" else 0.12)
                elif parameter.requires_grad:
                    parameter.normal_(0.0, 0.3)  # heads, and biases where they are trained
        adapted.save_pretrained(folder)
    model.config.save_pretrained(folder)
    return copy.deepcopy(adapted).double().eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("options")
    return {kind: tiny_bases.base_folder(root, kind) for kind in ("distilbert", "gpt2", "llama")}


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [(method, kind, options) for method, kind, _, options in CASES],
    ids=["-".join(case[:3]) for case in CASES],
)
def test_an_option_is_served_as_peft_computes_it(
    bases: dict[str, Path], tmp_path: Path, method: str, kind: str, options: dict[str, Any]
) -> None:
    base, store = bases[kind], tmp_path / "store"
    truth = saved_by_peft(base, tmp_path / "a", method, "text-classification", **options)
    version = tiny_bases.stored(store, tmp_path / "a")
    engine = Engine.build(tiny_bases.options(base, store, threads=1))
    samples = tiny_bases.texts(3, seed=8)
    task: Any = "text-classification"
    answer = engine.encode(samples, task=task, version=version, function_to_apply="none")
    weights = load_adapter(tmp_path / "a", engine.base.adapted.signature)
    assert len(weights.factors) == len(factor_layers(truth))
    for item, output in zip(engine.text.tokenize(samples, task), answer.outputs, strict=True):
        with torch.no_grad():
            wanted = truth(input_ids=torch.tensor([item.token_ids])).logits[0]
        found = {entry["label"]: entry["score"] for entry in output}
        values = torch.tensor([found[f"LABEL_{i}"] for i in range(3)], dtype=torch.float64)
        assert (values - wanted).norm() / wanted.norm() < 1e-5
    # The option does something: without the adapter the vectors are others.
    plain = torch.tensor(engine.encode(samples, task="feature-extraction").outputs[0])
    adapted = engine.encode(samples, task="feature-extraction", version=version).outputs[0]
    assert (torch.tensor(adapted) - plain).norm() > 1e-3
    engine.close()


def factor_layers(model: Any) -> set[str]:
    """Layers that PEFT put factors into."""
    ends = ("hira_A", "lora_A", "hira_embedding_A", "lora_embedding_A")
    return {
        name for name, module in model.named_modules()
        if any("default" in getattr(module, end, {}) for end in ends)
    }  # fmt: skip


def test_modules_to_save_of_another_name_are_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    saved_by_peft(
        bases["distilbert"], tmp_path / "a", "hira", "text-classification",
        modules_to_save=["classifier", "ffn"],
    )  # fmt: skip
    with pytest.raises(AdapterError, match="ffn"):
        load_adapter(tmp_path / "a", signature(bases["distilbert"]))


def signature(base: Path) -> Any:
    from server.base.load import signature_of

    return signature_of(tiny_bases.options(base, base))


@pytest.mark.parametrize(
    ("changes", "code", "found"),
    [
        ({"bias": "all"}, "unsupported_option", "bias"),
        ({"use_dora": True}, "unsupported_option", "use_dora"),
        ({"init_lora_weights": "pissa"}, "unsupported_option", "pissa"),
        ({"peft_type": "LOHA"}, "unsupported_method", "LOHA"),
        ({"peft_type": "ADALORA"}, "unsupported_method", "ADALORA"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "unsupported_option", "layer_replication"),
        ({"target_modules": ["q_lin", "v_lin", "nowhere"]}, None, ""),
        ({"target_modules": ["q_lin"]}, "unmatched_tensors", "v_lin"),
        ({"target_modules": ["q_lin", "v_lin", "k_lin"]}, "missing_tensors", "k_lin"),
        ({"target_modules": ["nowhere"]}, "unmatched_tensors", ""),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    bases: dict[str, Path], tmp_path: Path, changes: dict[str, Any], code: str | None, found: str
) -> None:
    base = bases["distilbert"]
    saved_by_peft(base, tmp_path / "a", "lora", "text-classification")
    change_config(tmp_path / "a", **changes)
    if code is None:  # a name that no layer of this base has: PEFT takes it, too
        assert load_adapter(tmp_path / "a", signature(base)).factors
        return
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path / "a", signature(base))
    assert caught.value.code == code
    assert found in str(caught.value)


def test_a_trained_bias_that_is_missing_or_does_not_fit_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base, folder = bases["distilbert"], tmp_path / "a"
    saved_by_peft(base, folder, "lora", "text-classification", bias="lora_only")
    name, _ = first_tensor(folder, "q_lin.base_layer.bias")
    assert load_adapter(folder, signature(base))
    for change, code in ((torch.ones(3), "shape_mismatch"), (None, "missing_tensors")):
        change_tensors(folder, {name: change})
        with pytest.raises(AdapterError) as caught:
            load_adapter(folder, signature(base))
        assert caught.value.code == code
    change_config(folder, bias="none")
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, signature(base))
    assert caught.value.code == "unmatched_tensors"


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    class Grouped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv1d(8, 8, 3, groups=4)

    layer = describe(Grouped(), "grouped").layers["conv"]
    for method in BOTH:
        kind: Any = method
        with pytest.raises(AdapterError, match="grouped convolution conv") as caught:
            layer.factor_shapes(2, kind)
        assert caught.value.code == "unsupported_option"
        assert caught.value.found == "groups = 4"
    with pytest.raises(NotImplementedError, match="groups"):  # as PEFT does
        peft.get_peft_model(Grouped(), peft.HiraConfig(r=2, target_modules=["conv"]))


def test_a_head_with_other_labels_than_the_config_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base, folder = bases["distilbert"], tmp_path / "a"
    saved_by_peft(base, folder, "lora", "text-classification")
    path = folder / "config.json"
    known = json.loads(path.read_text())
    names = {str(index): f"class {index}" for index in range(5)}
    path.write_text(json.dumps(known | {"id2label": names}))
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, signature(base))
    assert caught.value.code == "shape_mismatch"
    assert (caught.value.found, caught.value.expected) == ("3 outputs", "5 labels")


def test_token_heads_go_with_options_too(bases: dict[str, Path], tmp_path: Path) -> None:
    base, store = bases["distilbert"], tmp_path / "store"
    truth = saved_by_peft(
        base, tmp_path / "a", "lora", "token-classification", bias="lora_only", use_rslora=True
    )
    version = tiny_bases.stored(store, tmp_path / "a")
    engine = Engine.build(tiny_bases.options(base, store, threads=1))
    (sample,) = tiny_bases.texts(1, seed=9)
    task: Any = "token-classification"
    answer = engine.encode(
        [sample], task=task, version=version, aggregation_strategy="none", ignore_labels=()
    )
    (item,) = engine.text.tokenize([sample], task)
    with torch.no_grad():
        logits = truth(input_ids=torch.tensor([item.token_ids])).logits[0].softmax(-1)
    rows = [i for i, (start, stop) in enumerate(item.offsets or ()) if start != stop]
    scores = [entry["score"] for entry in answer.outputs[0]]
    assert scores == pytest.approx(logits[rows].amax(-1).tolist(), abs=1e-5)
    engine.close()
