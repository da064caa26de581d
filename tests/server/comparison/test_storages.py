"""`hira compare` against transformers and PEFT alone, in float32, on a 4-bit base of their own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import kl_div
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from typer.testing import CliRunner

from server.cli.main import app
from server.comparison.storages import NotComparable, compare_storages
from server.demo import ADAPTERS_DIR, BASE_DIR
from server.training.adapted import never_repack
from tests.stand import tiny_bases
from tests.stand.made import make_adapter

runner = CliRunner()
TEXTS = (
    "One of the finest films of the year: warm, funny and beautifully played.",
    "A dull, lifeless mess without a single joke that works.",
    "The king rode out of the city at dawn with his men, and nobody saw him again.",
)
LABELS = tuple("ABCDEFGH")


def alone(folder: Path, *, quantized: bool, causal: bool) -> tuple[Any, Any]:
    """Tokenizer and model of the demo base with the adapter, as PEFT computes it in float32."""
    arguments: dict[str, Any] = {"dtype": torch.float32}
    if quantized:
        arguments["device_map"] = {"": "cpu"}
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head", "score", "classifier"],
        )
    auto: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    if not causal:
        arguments["num_labels"] = json.loads((folder / "config.json").read_text())["id2label"]
        arguments["num_labels"] = len(arguments["num_labels"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a head that the adapter brings
        model = auto.from_pretrained(BASE_DIR, **arguments)
        never_repack(model)
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    return AutoTokenizer.from_pretrained(BASE_DIR), adapted


def logits(folder: Path, texts: tuple[str, ...], *, quantized: bool, causal: bool) -> list[Any]:
    """Of each text alone, in float64: ``[labels]``, or ``[T, vocabulary]``; with its ids."""
    tokenizer, model = alone(folder, quantized=quantized, causal=causal)
    found = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            found.append((ids[0], model(input_ids=ids).logits[0].double()))
    return found


def both(folder: Path, texts: tuple[str, ...], *, causal: bool) -> tuple[list[Any], list[Any]]:
    first = logits(folder, texts, quantized=False, causal=causal)
    return first, logits(folder, texts, quantized=True, causal=causal)


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(P || Q) of each row of logits."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return kl_div(q, p, log_target=True, reduction="none").sum(-1)


def test_label_flips_and_divergence_equal_those_of_peft(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "many", seed=3, labels=LABELS, scale=2.0)
    texts = tuple(tiny_bases.texts(24, seed=5))
    found = compare_storages(
        tiny_bases.options(BASE_DIR, tmp_path, quantization="nf4"), folder, texts
    )
    first, second = both(folder, texts, causal=False)
    pairs = [(one, other) for (_, one), (_, other) in zip(first, second, strict=True)]
    flips = sum(int(one.argmax() != other.argmax()) for one, other in pairs)
    truth = torch.stack([divergence(one, other) for one, other in pairs])
    assert 0 < flips < len(texts), "otherwise this compares nothing"
    assert (found.flips, found.answers, found.cut) == (flips, len(texts), 0)
    assert found.kl_mean_nats == pytest.approx(float(truth.mean()), rel=2e-3)
    assert found.kl_max_nats == pytest.approx(float(truth.max()), rel=2e-3)
    assert found.worst[0].flipped
    assert found.worst[0].before[0] != found.worst[0].after[0]
    plain, stored = found.base_bytes
    assert stored < plain / 2
    assert found.perplexity is None


def test_perplexity_and_divergence_of_a_generator_equal_those_of_peft(tmp_path: Path) -> None:
    folder = ADAPTERS_DIR / "hira-shakespeare"
    file = tmp_path / "texts"
    file.write_text("\n\n".join(TEXTS), encoding="utf-8")
    arguments = ["compare", str(folder), "--texts", str(file), "--dtype", "fp32", "--json"]
    done = runner.invoke(app, [*arguments, "--device", "cpu", "--threads", "2"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    first, second = both(folder, TEXTS, causal=True)
    nats, other_nats, truth, moved = 0.0, 0.0, [], 0
    for (ids, one), (_, other) in zip(first, second, strict=True):
        places = torch.arange(len(ids) - 1)
        nats -= float(one.log_softmax(-1)[places, ids[1:]].sum())
        other_nats -= float(other.log_softmax(-1)[places, ids[1:]].sum())
        truth.append(divergence(one[:-1], other[:-1]))
        moved += int((one[:-1].argmax(-1) != other[:-1].argmax(-1)).sum())
    every = torch.cat(truth)
    wanted = [float(torch.tensor(one / len(every)).exp()) for one in (nats, other_nats)]
    assert found["perplexity"] == pytest.approx(wanted, rel=1e-4)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-3), "otherwise this compares nothing"
    assert (found["answers"], found["flips"], found["texts"]) == (len(every), moved, len(TEXTS))
    assert 0.7 * float(every.mean()) < found["kl_mean_nats"] <= float(every.mean()) * 1.001


def test_other_tasks_and_bases_are_refused_before_a_base_is_loaded(tmp_path: Path) -> None:
    base = tiny_bases.base_folder(tmp_path, "distilbert")
    options = tiny_bases.options(base, tmp_path, quantization="nf4")
    names = tiny_bases.adapter(tmp_path / "names", base, "token-classification")
    with pytest.raises(NotComparable, match="classify texts or generate") as told:
        compare_storages(options, names, ["a text"])
    assert told.value.found == "token-classification"
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotComparable, match="quantized already"):
        compare_storages(options, names, ["a text"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "none.txt cannot be read"),
        ("empty.txt", b"\n \n", "empty.txt holds no text"),
        ("latin.txt", b"caf\xe9\n", "byte 0xe9 at 3"),
    ],
)
def test_a_file_without_texts_is_told_before_anything_is_loaded(
    name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    done = runner.invoke(app, ["compare", str(tmp_path), "--texts", str(file)])
    assert done.exit_code == 2
    assert said in done.stderr


def test_a_broken_adapter_is_told_with_its_fault(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("a text\n")
    folder = tmp_path / "broken"
    folder.mkdir()
    done = runner.invoke(app, ["compare", str(folder), "--texts", str(file)])
    assert done.exit_code == 1
    assert "adapter_config.json" in done.stderr
