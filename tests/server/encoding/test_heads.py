"""Heads on a shared backbone against the whole task class; and heads that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForQuestionAnswering

from adapters.errors import AdapterError, MissingTensors, ShapeMismatch, UnmatchedTensors
from adapters.intake.checkpoint import AdapterWeights, load_adapter
from adapters.modulation.slot_factors import SlotFactors
from adapters.segments import from_rows
from server.base.load import LoadedBase, load_base
from server.encoding.heads import Heads
from tests.stand import tiny_bases

BUDGET_BYTES = 1 << 20
COMBINATIONS = [
    ("distilbert", "text-classification"),
    ("distilbert", "token-classification"),
    ("distilbert", "question-answering"),
    ("bert", "text-classification"),
    ("bert", "token-classification"),
    ("llama", "text-classification"),
    ("llama", "token-classification"),
]


def made(root: Path, kind: str, task: str) -> tuple[LoadedBase, AdapterWeights]:
    base = tiny_bases.base_folder(root, kind)
    folder = tiny_bases.adapter(root / "adapter", base, task, labels=("x", "y", "z"))
    loaded = load_base(tiny_bases.options(base, root))
    return loaded, load_adapter(folder, loaded.adapted.signature)


def padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    ids = torch.randint(5, tiny_bases.VOCABULARY, mask.shape) * mask
    return ids, mask


@pytest.mark.parametrize(("kind", "task"), COMBINATIONS)
def test_a_head_equals_the_task_class_on_each_row_alone(
    tmp_path: Path, kind: str, task: str
) -> None:
    base, weights = made(tmp_path, kind, task)
    head = Heads(base, 4, BUDGET_BYTES).task_head("v", weights)
    lengths = [7, 1, 12, 4]
    ids, mask = padded(lengths)
    with torch.no_grad():
        out = base.backbone(input_ids=ids, attention_mask=mask)
        logits = head(out.last_hidden_state, getattr(out, "pooler_output", None), ids, mask)
    # The adapter's head on the bare backbone: the factors are not installed here.
    _, factory = tiny_bases.TASK_TYPES[task]
    more = {} if task == "question-answering" else {"num_labels": 3}
    whole: Any = factory.from_pretrained(tmp_path / kind, dtype=torch.float32, **more).eval()
    missing, unexpected = whole.load_state_dict(dict(weights.head), strict=False)
    assert not unexpected
    assert len(missing) < len(whole.state_dict())
    for index, length in enumerate(lengths):
        with torch.no_grad():
            alone = whole(input_ids=ids[index : index + 1, :length])
        if task == "question-answering":
            wanted = torch.stack((alone.start_logits, alone.end_logits), -1)[0]
        else:
            wanted = alone.logits[0]
        got = logits[index] if task == "text-classification" else logits[index, :length]
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    assert head.labels == (() if task == "question-answering" else ("x", "y", "z"))
    assert head.nbytes == sum(tensor.nbytes for tensor in weights.head.values())


def test_a_decoder_without_a_padding_id_reads_the_last_token(tmp_path: Path) -> None:
    base, weights = made(tmp_path, "llama", "text-classification")
    base.config.pad_token_id = None
    head = Heads(base, 4, BUDGET_BYTES).task_head("v", replace(weights, head_config={}))
    hidden = torch.randn(2, 5, 64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    logits = head(hidden, None, torch.zeros(2, 5, dtype=torch.long), mask)
    wanted = torch.stack((hidden[0, 2], hidden[1, 4])) @ weights.head["score.weight"].T
    torch.testing.assert_close(logits, wanted)


def test_each_adapter_keeps_its_own_head_and_those_used_last_stay(tmp_path: Path) -> None:
    base, weights = made(tmp_path, "distilbert", "text-classification")
    heads = Heads(base, 2, BUDGET_BYTES)
    first = heads.task_head("1", weights)
    doubled = {name: 2 * tensor for name, tensor in weights.head.items()}
    second = heads.task_head("2", replace(weights, head=doubled))
    hidden, ids = torch.randn(1, 3, 64), torch.ones(1, 3, dtype=torch.long)
    assert not torch.allclose(first(hidden, None, ids, ids), second(hidden, None, ids, ids))
    assert heads.task_head("1", weights) is first
    heads.task_head("3", weights)
    assert heads.task_head("1", weights) is first
    assert heads.task_head("2", weights) is not second
    assert heads.nbytes == 2 * first.nbytes
    heads.forget("1")
    assert heads.task_head("1", weights) is not first


def test_heads_never_take_more_than_their_bytes_and_those_used_last_stay(tmp_path: Path) -> None:
    base, weights = made(tmp_path, "distilbert", "text-classification")
    size = sum(tensor.nbytes for tensor in weights.head.values())
    heads = Heads(base, 256, 2 * size + size // 2)
    first = heads.task_head("1", weights)
    heads.task_head("2", weights)
    assert heads.task_head("1", weights) is first
    heads.task_head("3", weights)
    assert heads.versions() == {"1", "3"}
    assert heads.nbytes == 2 * size
    heads.forget("1")
    assert heads.nbytes == size


def test_a_head_over_the_whole_budget_answers_and_is_not_kept(tmp_path: Path) -> None:
    base, weights = made(tmp_path, "distilbert", "text-classification")
    heads = Heads(base, 256, 100)
    hidden, ids = torch.randn(1, 3, 64), torch.ones(1, 3, dtype=torch.long)
    wanted = Heads(base, 256, BUDGET_BYTES).task_head("1", weights)(hidden, None, ids, ids)
    torch.testing.assert_close(heads.task_head("1", weights)(hidden, None, ids, ids), wanted)
    assert heads.nbytes == 0
    assert not heads.versions()


def test_a_head_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    base, weights = made(tmp_path, "distilbert", "text-classification")

    def refused(kind: type[AdapterError], head: dict[str, torch.Tensor]) -> str:
        with pytest.raises(kind) as caught:
            Heads(base, 4, BUDGET_BYTES).task_head("v", replace(weights, head=head))
        return str(caught.value)

    whole = dict(weights.head)
    part = {name: tensor for name, tensor in whole.items() if name != "pre_classifier.weight"}
    assert "pre_classifier.weight" in refused(MissingTensors, part)
    assert "extra.weight" in refused(UnmatchedTensors, {**whole, "extra.weight": torch.ones(1)})
    bent = {**whole, "pre_classifier.bias": torch.ones(3)}
    assert "(3,)" in refused(ShapeMismatch, bent)


def test_a_head_that_needs_a_pooler_is_refused_on_a_base_without_one(tmp_path: Path) -> None:
    base, weights = made(tmp_path, "bert-without-pooler", "text-classification")
    with pytest.raises(MissingTensors, match="pooler"):
        Heads(base, 4, BUDGET_BYTES).task_head("v", weights)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_question_answering_on_a_decoder_answers_as_the_task_class(
    tmp_path: Path, kind: str
) -> None:
    base = tiny_bases.base_folder(tmp_path, kind)
    folder = tiny_bases.adapter(tmp_path / "a", base, "question-answering")
    loaded = load_base(tiny_bases.options(base, tmp_path / "store"))
    weights = load_adapter(folder, loaded.adapted.signature)
    ids = [2, 7, 9, 11, 3]
    backbone = AutoModel.from_pretrained(base, dtype=torch.float32)
    # from_pretrained leaves the backbone of this class as it was drawn: see findings/.
    whole = AutoModelForQuestionAnswering.from_config(backbone.config)
    whole.transformer.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(whole, folder).eval()(torch.tensor([ids]))
    factors = {
        path: SlotFactors(weights.config.method, one.a.float(), one.b.float(), one.scale)
        for path, one in weights.factors.items()
    }
    loaded.adapted.install(1, factors)
    head = Heads(loaded, 2, BUDGET_BYTES).task_head("v", weights)
    tokens, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
    with torch.no_grad(), loaded.adapted.batch(from_rows([1] * len(ids))):
        hidden = loaded.backbone(input_ids=tokens).last_hidden_state
        logits = head(hidden, None, tokens, mask)
    torch.testing.assert_close(
        logits[0],
        torch.stack((wanted.start_logits[0], wanted.end_logits[0]), -1),
        rtol=0,
        atol=2e-4,
    )
