"""The table of tasks: every row has its postprocessor, its call, its page, and means one thing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import transformers

from adapters.tasks import (
    BY_NAME,
    ROWS,
    TASK_TYPES,
    Task,
    TaskRow,
    asked_at,
    narrowed,
    of_class,
    of_task_type,
    tasks_at,
)
from server.edge.endpoints.inference import inference_routes
from server.edge.endpoints.openai import OpenAI
from server.edge.endpoints.ranking import Ranking
from server.edge.endpoints.schemas import PredictParameters
from server.edge.endpoints.tei_tgi import TeiTgi
from server.encoding.postprocess import POSTPROCESSORS

API_PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def documented() -> dict[str, list[str]]:
    """The rows of the page's table of tasks, by name."""
    section = API_PAGE.read_text(encoding="utf-8").split("## Tasks", 1)[1].split("\n## ", 1)[0]
    lines = re.findall(r"^\| `(.*) \|$", section, flags=re.MULTILINE)
    return {cells[0].strip("`"): cells for line in lines if (cells := line.split(" | "))}


def test_the_table_has_every_name_and_none_twice() -> None:
    assert sorted(row.name for row in ROWS) == sorted(get_args(Task))
    assert len(BY_NAME) == len(ROWS)


def test_every_task_of_the_encode_lane_has_a_postprocessor_and_no_other_has() -> None:
    assert set(POSTPROCESSORS) == {row.name for row in ROWS if row.lane == "encode"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_task_has_its_call(row: TaskRow) -> None:
    nothing: Any = None
    routes = inference_routes(TeiTgi(nothing), Ranking(nothing), OpenAI(nothing))
    assert row.path in {one.path for one in routes if "POST" in one.methods}
    assert asked_at(row.name, row.path) == row.name
    assert row.name in tasks_at(row.path)
    for other in row.also:
        assert row.name in tasks_at(BY_NAME[other].path)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_task_has_its_row_on_the_page(row: TaskRow) -> None:
    _, call, task_type, made_on, _ = documented()[row.name]
    assert call == f"`POST {row.path}`"
    assert (row.task_type or "none") in task_type
    assert made_on == row.class_ends[0]


def test_the_page_has_no_other_task() -> None:
    assert set(documented()) == set(BY_NAME)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parameters_and_classes_exist(row: TaskRow) -> None:
    assert set(row.parameters) <= set(PredictParameters.model_fields)
    assert row.auto_class is None or hasattr(transformers, row.auto_class)


def test_what_peft_and_transformers_call_a_task_leads_to_it() -> None:
    for row in ROWS:
        before: Task = row.narrows or row.name
        kinds = sorted(row.takes)
        if row.task_type is not None:
            found = of_task_type(row.task_type)
            assert found == before
            assert narrowed(before, kinds[-1], row.outputs) == row.name
        if row.auto_class is not None:
            found = of_class(f"Some{row.class_ends[0]}")
            assert found in {before, row.name}
    assert "SEQ_CLS" in TASK_TYPES
    assert of_task_type(None) is None
    assert of_class("LlamaForSomethingElse") is None
    assert of_class("GPT2LMHeadModel") == "text-generation"
    assert of_class("BertModel") == "feature-extraction"


def test_a_classifier_on_a_base_of_images_classifies_images() -> None:
    assert narrowed("text-classification", "images", 3) == "image-classification"
    assert narrowed("text-classification", "texts", 3) == "text-classification"
    assert narrowed("token-classification", "texts", 3) == "token-classification"
    assert narrowed("feature-extraction", "images", None) == "feature-extraction"


def test_vectors_are_asked_of_every_adapter_and_nothing_else_is() -> None:
    assert set(tasks_at("/embed")) == set(BY_NAME)
    assert asked_at("text-generation", "/predict") is None
    assert asked_at("feature-extraction", "/predict") is None
    assert tasks_at("/generate") == ("text-generation",)
