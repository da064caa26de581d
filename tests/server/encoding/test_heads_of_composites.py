"""Classifiers on bases of texts and images, whose configuration holds one for texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters.intake.model_config import read_task_config
from tests.stand import families


def test_a_classifier_on_a_base_of_texts_and_images_reads_the_last_token_of_each_text(
    tmp_path: Path,
) -> None:
    row = families.judge("gemma3", "Gemma3ForConditionalGeneration", tmp_path)
    assert row.outcome == "served"
    assert "classify" in row.detail


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"pad_token_id": 3}, 3),
        ({"text_config": {"pad_token_id": 5}}, 5),
        ({"pad_token_id": 3, "text_config": {"pad_token_id": 5}}, 5),
        ({"pad_token_id": 3, "text_config": {"pad_token_id": None}}, None),
        ({"pad_token_id": 3, "text_config": {}}, "the base's"),
        ({"pad_token_id": 3, "text_config": None}, 3),
    ],
)
def test_the_padding_token_is_that_of_the_part_for_texts(
    content: dict[str, object], found: object
) -> None:
    read = read_task_config(json.dumps(content).encode())
    assert read.head.get("pad_token_id", "the base's") == found
