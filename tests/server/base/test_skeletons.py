"""What a head must look like, checked without any weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, LlamaConfig

from adapters.errors import AdapterFaults, MissingTensors, ShapeMismatch, UnmatchedTensors
from server.base.skeletons import Skeletons
from tests.stand.head_weights import DISTILBERT, weights


@pytest.fixture(scope="module")
def skeletons() -> Skeletons:
    return Skeletons(DISTILBERT, 50, has_pooler=False)


def test_a_whole_head_passes(skeletons: Skeletons) -> None:
    skeletons.check(weights())


def test_a_task_without_a_head_is_not_looked_at(skeletons: Skeletons) -> None:
    skeletons.check(replace(weights(), task="fill-mask", head={}, labels=None))


def test_missing_unknown_and_misshapen_tensors_are_named(skeletons: Skeletons) -> None:
    with pytest.raises(MissingTensors, match=r"pre_classifier\.bias"):
        skeletons.check(weights(pre_classifier__bias=None))
    with pytest.raises(UnmatchedTensors, match=r"dense\.weight"):
        skeletons.check(weights(dense__weight=torch.zeros(1)))
    with pytest.raises(ShapeMismatch, match=r"\(2, 99\)"):
        skeletons.check(weights(classifier__weight=torch.zeros(2, 99)))
    with pytest.raises(AdapterFaults):
        skeletons.check(weights(classifier__bias=None, pre_classifier__weight=torch.zeros(7, 9)))


def test_a_head_that_reads_a_pooler_needs_one() -> None:
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    adapter = replace(
        weights(),
        head={"classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(2)},
    )
    Skeletons(config, 50, has_pooler=True).check(adapter)
    with pytest.raises(MissingTensors, match="pooler"):
        Skeletons(config, 50, has_pooler=False).check(adapter)


def test_a_decoder_has_a_score() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
    )
    adapter = replace(weights(), head={"score.weight": torch.zeros(2, 32)})
    Skeletons(config, 50, has_pooler=False).check(adapter)
