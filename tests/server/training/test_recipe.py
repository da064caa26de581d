"""The recipe: what it reads, how it trains, what it keeps, and the card that it writes."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from adapters.inspection.audit import audit
from adapters.intake.checkpoint import load_adapter
from server.base.load import signature_of
from server.training import scores
from server.training.__main__ import main, train
from server.training.adapted import build, factors, never_repack, task_config
from server.training.curve import CURVE_FILE, write_curve
from server.training.pruning import Pruning, kept
from server.training.rows import LabelledTexts, RowsError, read_labelled, read_text, split_off
from server.training.settings import METHODS, Recipe
from server.training.train import Classified, Windows, _rate, fit
from tests.stand import tiny_bases

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bases.base_folder(tmp_path_factory.mktemp("recipe"), "bert")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bases.base_folder(tmp_path_factory.mktemp("recipe"), "llama")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Rows whose label is told by one word, all different."""
    path = tmp_path / "rows.tsv"
    lines = ["text\tlabel"]
    for row in range(96):
        label = row % 2
        lines.append(f"word{10 + label} word{30 + row % 40} word{20 + row % 7}\t{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe(base: Path, **changes: Any) -> Recipe:
    shown: dict[str, Any] = {
        "base_name": "tiny",
        "method": "hira",
        "task_type": "SEQ_CLS",
        "rank": 4,
        "max_tokens": 16,
        "warmup_steps": 4,
        "learning_rate": 2e-2,
        "dropout": 0.0,
    }
    return Recipe(base=str(base), **(shown | changes))


def silent() -> Console:
    return Console(file=io.StringIO())


# What is read


def test_tsv_and_jsonl_hold_the_same_rows(tmp_path: Path) -> None:
    tsv, jsonl = tmp_path / "rows.tsv.gz", tmp_path / "rows.jsonl"
    tsv.write_bytes(gzip.compress(b'sentence\tlabel\nso "good\t1\nbad\t0\n'))
    rows = [{"text": 'so "good', "label": "yes", "id": 3}, {"text": "bad", "label": "no"}]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = LabelledTexts(('so "good', "bad"), (1, 0), ("no", "yes"))
    assert read_labelled(tsv, ("no", "yes")) == expected
    assert read_labelled(jsonl) == expected
    assert read_labelled(tsv).names == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.tsv", "text\tlabel\na\t2\n", "found label '2', expected one of no, yes"),
        ("rows.tsv", "text\tlabel\na\tb\tc\n", "line 2: found 3 columns, expected 2"),
        ("rows.tsv", "text\tlabel\n", "has no rows"),
        (
            "rows.tsv",
            "a\tno\nb\tyes\n",
            "found a row with the label 'no', expected a header",
        ),
        ("rows.jsonl", '{"text": "a"}\n', "line 1: expected an int or str label"),
        ("rows.jsonl", '["a", 1]\n', "line 1: expected a text and a label"),
        ("rows.jsonl", "text\n", "line 1: expected a text and a label"),
        ("rows.parquet", "x", "found .parquet, expected .tsv or .jsonl"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RowsError, match=said):
        read_labelled(tmp_path / name, ("no", "yes"))


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(RowsError, match="empty"):
        read_text(tmp_path / "a.txt")


def test_rows_set_aside_share_no_stretch_with_those_learned_from() -> None:
    long = "a film that is very good"
    texts = (long, f"yes , {long} indeed", "is", "that is very good", "a film that is very", "x y")
    rows = LabelledTexts(texts * 2, (0, 1, 0, 1, 0, 1) * 2, ("n", "p"))
    for seed in range(20):
        learned, aside = split_off(rows, 2, seed)
        assert len(aside) == 2
        for text in learned.texts:
            for held in aside.texts:
                assert text != held
                shorter, longer = sorted((text, held), key=len)
                assert len(shorter.split()) < 5 or shorter not in longer
    assert split_off(rows, 2, 3) == split_off(rows, 2, 3)


def test_no_more_rows_are_set_aside_than_were_asked_for() -> None:
    rows = LabelledTexts(tuple(f"text {row}" for row in range(300)), (0, 1) * 150, ("n", "p"))
    assert [len(part) for part in split_off(rows, None, 7)] == [270, 30]
    assert [len(part) for part in split_off(rows, 200, 7)] == [100, 200]
    for count in (0, 300):
        with pytest.raises(RowsError, match=f"{count} of 300 rows were to be set aside"):
            split_off(rows, count, 7)


def test_a_learning_curve_is_a_picture_of_every_evaluation(tmp_path: Path) -> None:
    history = [{"step": 4.0 * n, "train_loss": 1 / n, "loss": 1.5 / n} for n in (1, 2, 3)]
    picture = write_curve(tmp_path, history, 8)
    assert (tmp_path / CURVE_FILE).read_text() == picture
    root = ElementTree.fromstring(picture)
    dots = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(dots) == 6
    heights = [float(dot.get("cy", "")) for dot in dots]
    assert heights == [*sorted(heights[:3]), *sorted(heights[3:])]  # losses that fall
    assert "kept: step 8" in picture
    write_curve(tmp_path, history[:1], 4)  # one evaluation is a picture as well


# How it trains


def test_the_rate_rises_over_the_warm_up_and_falls_to_zero() -> None:
    rates = [_rate(step, 10, 4) for step in range(11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 0.5, 2 / 6, 1 / 6, 0])


def test_every_method_sees_the_same_batches(bert: Path, reviews: Path) -> None:
    rows = read_labelled(reviews)
    examples = Classified(tiny_bases.tokenizer("bert"), rows, 16)
    first, second = (list(examples.batches(16, np.random.default_rng(7))) for _ in range(2))
    assert first == second
    assert sorted(row for batch in first for row in batch) == list(range(96))
    assert first != list(examples.batches(16, np.random.default_rng(8)))


def test_windows_hold_the_text_once_and_in_order() -> None:
    tokenizer = tiny_bases.tokenizer("llama")
    windows = Windows(tokenizer, "word1 word2\nword3 word4 word5\nword6", 3)
    ids = tokenizer("word1 word2 word3 word4 word5 word6", add_special_tokens=False)["input_ids"]
    assert windows._windows[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    assert windows._windows[:, 1:].flatten().tolist() == ids


class Scripted:
    """Examples whose evaluations are foretold; a step moves every trained number."""

    def __init__(self, losses: Sequence[float]) -> None:
        self.losses = list(losses)
        self.seen: list[torch.Tensor] = []

    def __len__(self) -> int:
        return 4

    def batches(self, rows: int, random: Any) -> Iterator[list[int]]:
        yield from ([place] for place in range(4))

    def loss(self, model: Any, places: Sequence[int]) -> torch.Tensor:
        return torch.stack([one.sum() for one in factors(model).values()]).sum()

    def measure(self, model: Any) -> dict[str, float]:
        self.seen.append(torch.cat([one.detach().flatten() for one in factors(model).values()]))
        return {"loss": self.losses[len(self.seen) - 1]}


def fitted(bert: Path, losses: Sequence[float], **changes: Any) -> tuple[Scripted, Any, Any]:
    run = recipe(bert, batch_rows=1, evaluations=4, epochs=2, warmup_steps=0, **changes)
    model = build(run, task_config(run, ("a", "b")))
    examples = Scripted(losses)
    report = fit(run, model, examples, examples, out=bert, console=silent())
    return examples, torch.cat([one.flatten() for one in factors(model).values()]), report


def test_the_best_state_is_kept_and_not_the_last(bert: Path) -> None:
    examples, ended, report = fitted(bert, [5, 4, 2, 3, 6, 7, 8, 9])
    assert (report.best_step, report.steps) == (3, 8)
    assert torch.equal(ended, examples.seen[2])
    assert not torch.equal(ended, examples.seen[-1])


def test_training_ends_when_nothing_gets_better(bert: Path) -> None:
    _, _, report = fitted(bert, [5, 4, 4, 4, 4, 4, 4, 4], patience=3)
    assert (report.best_step, report.steps) == (2, 5)


def test_a_pruned_adapter_is_judged_once_it_is_pruned(bert: Path) -> None:
    examples, ended, report = fitted(
        bert, [1, 1, 1, 1, 9, 8, 7, 8], method="sparse-lora", dense_share=0.5
    )
    assert report.best_step == 7
    assert torch.equal(ended, examples.seen[6])
    assert float((ended == 0).double().mean()) == 0.5
    assert float((examples.seen[2] == 0).double().mean()) < 0.5


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_pruning_masks_exactly_the_smallest(share: float) -> None:
    tensor = torch.randn(7, 9, generator=torch.Generator().manual_seed(3))
    mask = kept(tensor, share)
    gone = int(share * 63)
    assert int((mask == 0).sum()) == gone
    if 0 < gone < 63:
        assert tensor[mask == 0].abs().max() <= tensor[mask == 1].abs().min()


def test_pruning_masks_as_many_where_all_are_equal() -> None:
    assert int((kept(torch.zeros(6, 4), 0.5) == 0).sum()) == 12
    with pytest.raises(ValueError, match="expected 0 to 1"):
        kept(torch.zeros(2), 1.5)


def test_pruned_numbers_stay_zero() -> None:
    factor = torch.nn.Parameter(torch.arange(1.0, 9.0).view(2, 4))
    pruning = Pruning({"A": factor}, 0.5)
    assert factor.tolist() == [[0, 0, 0, 0], [5, 6, 7, 8]]
    with torch.no_grad():
        factor.add_(1)
    pruning.apply()
    assert factor.tolist() == [[0, 0, 0, 0], [6, 7, 8, 9]]


def test_an_evaluation_leaves_a_quantized_base_as_it_was(bert: Path) -> None:
    import bitsandbytes

    run = recipe(bert, method="qlora")
    model = build(run, task_config(run, ("a", "b")))
    layers = [one for one in model.modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    assert layers
    assert not any(one.support_avx512bf16_for_cpu for one in layers)
    before = [one.weight.data.clone() for one in layers]
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[2, 7, 8, 3]]))
    assert all(torch.equal(a, b.weight.data) for a, b in zip(before, layers, strict=True))
    never_repack(torch.nn.Linear(2, 2))  # what is not quantized is left alone


# End to end


@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_learns_and_its_folder_can_be_served(
    method: Any, bert: Path, reviews: Path, tmp_path: Path
) -> None:
    out, report_file = tmp_path / "made", tmp_path / "report.json"
    run = recipe(bert, method=method, epochs=4, rank=2)
    report = train(
        run, reviews, out, eval_rows=24, labels=("BAD", "GOOD"), report=report_file,
        console=silent(),
    )  # fmt: skip
    assert report.train_rows + report.eval_rows <= 96
    assert report.eval_rows == 24
    assert report.best["accuracy"] == 1.0
    assert report.history[0]["loss"] > report.best["loss"]
    assert json.loads(report_file.read_text())["best"] == report.best
    options = tiny_bases.options(bert, tmp_path / "store")
    weights = load_adapter(out, signature_of(options))
    assert weights.labels is not None
    assert weights.labels.names == ("BAD", "GOOD")
    found = audit(out, signature_of(options), (out / "README.md").read_text())
    assert found.contradictions == ()
    assert found.tensors is not None
    assert found.tensors.method == ("hira" if method == "hira" else "lora")
    assert found.tensors.all_ranks == (2,)
    assert (found.tensors.sparsity == 0.5) == (method == "sparse-lora")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_the_card_is_what_the_tensors_show(bert: Path, reviews: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    train(recipe(bert, epochs=1), reviews, out, console=silent())
    card = (out / "README.md").read_text()
    tensors = load_file(out / TENSORS)
    assert f"**Trainable Parameters:** {sum(one.numel() for one in tensors.values()):,}" in card
    assert f"{(out / TENSORS).stat().st_size:,} bytes" in card
    assert "**Rank (r):** 4" in card
    # The same card beside other tensors is found out.
    save_file({key: one[:2] if "hira_A" in key else one for key, one in tensors.items()
               if "hira_B" not in key} | {key: one[:, :2].contiguous()
               for key, one in tensors.items() if "hira_B" in key}, out / TENSORS)  # fmt: skip
    subjects = {one.subject for one in audit(out, None, card).contradictions}
    assert {"rank", "trainable"} <= subjects


@pytest.mark.parametrize("method", ["hira", "qlora"])
def test_a_writer_learns_the_next_token(method: Any, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word1 word2 word3 word4 word5\n" * 120)
    run = recipe(llama, method=method, task_type="CAUSAL_LM", max_tokens=11, epochs=2)
    report = train(run, text, tmp_path / "made", console=silent())
    assert report.best["perplexity"] < report.history[0]["perplexity"]
    assert report.best["perplexity"] == pytest.approx(np.exp(report.best["loss"]))
    weights = load_adapter(
        tmp_path / "made", signature_of(tiny_bases.options(llama, tmp_path / "store"))
    )
    assert weights.task == "text-generation"


def test_the_command_has_the_usual_values(
    bert: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = Recipe(base="b", base_name="b", method="lora", task_type="SEQ_CLS")
    assert (usual.epochs, usual.batch_rows, usual.warmup_steps) == (3, 16, 100)
    assert (usual.top_learning_rate, usual.weight_decay, usual.dropout) == (2e-3, 0.01, 0.1)
    assert (usual.rank, usual.lora_alpha) == (8, 16)
    command = [f"--base={bert}", f"--train={reviews}", f"--out={tmp_path / 'made'}"]
    report = main([*command, "--method=lora", "--max-tokens=16", "--epochs=1", "--targets=query"])
    assert report.steps == -(-report.train_rows // 16)
    config = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert (tmp_path / "made" / CURVE_FILE).is_file()
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 16, ["query"])
    assert "wrote" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected one of"):
        main([*command, "--labels=one"])


# Scores


def test_scores_are_those_of_a_case_worked_by_hand() -> None:
    predicted, actual = [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]
    assert scores.accuracy(predicted, actual) == 0.6
    # label 0: 1 hit, named 2 and 2 times: 0.5; label 1: 2 hits, 3 and 3 times: 2/3
    assert scores.macro_f1(predicted, actual, 2) == pytest.approx((0.5 + 2 / 3) / 2)
    assert scores.macro_f1(predicted, actual, 3) == pytest.approx((0.5 + 2 / 3) / 3)
    assert scores.perplexity(4 * np.log(8), 4) == pytest.approx(8)
