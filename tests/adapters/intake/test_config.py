from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from adapters.errors import AdapterFaults, CorruptFile, UnsupportedMethod, UnsupportedOption
from adapters.intake.config import (
    HONOURED,
    OPTIONS_WITHOUT_EFFECT,
    REFUSED,
    AdapterConfig,
    parse_config,
)
from adapters.signature import Method

HIRA: dict[str, Any] = {"peft_type": "HIRA", "r": 8, "target_modules": ["q_lin"]}
LORA: dict[str, Any] = {**HIRA, "peft_type": "LORA", "lora_alpha": 16}


def parse(**content: Any) -> AdapterConfig:
    return parse_config(json.dumps(content).encode())


@pytest.mark.parametrize("method", ["hira", "lora"])
def test_every_option_of_peft_is_classified_once(method: Method) -> None:
    from peft import LoraConfig
    from peft.tuners.hira import HiraConfig

    kind: Any = HiraConfig if method == "hira" else LoraConfig
    options = {field.name for field in dataclasses.fields(kind)}
    groups = [set(HONOURED[method]), set(OPTIONS_WITHOUT_EFFECT[method]), set(REFUSED[method])]
    assert options == set.union(*groups)
    assert sum(map(len, groups)) == len(options)


@pytest.mark.parametrize("option", sorted(REFUSED["lora"]))
def test_options_that_change_the_answer_are_refused_by_name(option: str) -> None:
    with pytest.raises(UnsupportedOption, match=option) as caught:
        parse(**LORA, **{option: True})
    assert caught.value.fix


def test_an_unknown_option_is_refused_unless_it_is_off() -> None:
    assert parse(**HIRA, new_trick=False).rank == 8
    with pytest.raises(UnsupportedOption, match="new_trick"):
        parse(**HIRA, new_trick=0.5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_initialisations_that_moved_the_base_are_refused(init: str) -> None:
    with pytest.raises(UnsupportedOption, match="base weight"):
        parse(**LORA, init_lora_weights=init)


@pytest.mark.parametrize("peft_type", ["IA3", "LOHA", None, 3])
def test_other_methods_are_refused(peft_type: object) -> None:
    with pytest.raises(UnsupportedMethod):
        parse(peft_type=peft_type)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{",
        b'{"r": NaN}',
        b'{"r": 1, "r": 2}',
        b"\xff",
        b"[" * 100_000,
        b'"x"',
        b'{"x": "\\ud800"}',
    ],
)
def test_what_is_not_a_plain_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(CorruptFile):
        parse_config(raw)


@pytest.mark.parametrize("r", [0, -1, 1.5, "8", True, 10**9])
def test_a_rank_that_is_none_is_refused(r: object) -> None:
    with pytest.raises(CorruptFile, match="r has a value"):
        parse(**{**HIRA, "r": r})


def test_several_faults_are_reported_together() -> None:
    with pytest.raises(AdapterFaults) as caught:
        parse(**LORA, use_dora=True, bias="all", task_type="SEQ_2_SEQ_LM")
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize(
    ("rslora", "path", "expected"),
    [(False, "a.q_lin", 2.0), (True, "a.q_lin", 16 / 8**0.5), (False, "a.v_lin", 0.5)],
)
def test_the_scale_of_lora_follows_alpha(rslora: bool, path: str, expected: float) -> None:
    config = parse(**LORA, use_rslora=rslora, alpha_pattern={"v_lin": 4})
    assert config.scale(path, 8) == pytest.approx(expected)


def test_hira_has_no_scale() -> None:
    assert parse(**HIRA, lora_alpha=None).scale("x", 8) == 1.0


@pytest.mark.parametrize(
    ("content", "path", "expected"),
    [
        ({"target_modules": ["q_lin"]}, "layer.0.attention.q_lin", True),
        ({"target_modules": ["q_lin"]}, "layer.0.attention.xq_lin", False),
        ({"target_modules": r".*\.(q|v)_lin"}, "layer.1.attention.v_lin", True),
        ({"target_modules": ["q_lin"], "exclude_modules": ["0.q_lin"]}, "layer.0.q_lin", False),
        ({"target_modules": ["q_lin"], "layers_to_transform": [1]}, "h.layer.0.q_lin", False),
        ({"target_modules": ["q_lin"], "layers_to_transform": [1]}, "h.layer.1.q_lin", True),
        ({"target_modules": "all-linear"}, "anything", True),
    ],
)
def test_targets_are_found_as_peft_finds_them(
    content: dict[str, Any], path: str, expected: bool
) -> None:
    assert parse(**{**HIRA, **content}).targets(path) is expected


def test_a_pattern_that_never_ends_is_refused_in_time() -> None:
    config = parse(**{**HIRA, "target_modules": "(a|aa)+$"})
    with pytest.raises(UnsupportedOption, match="too long"):
        config.targets("a" * 60 + "b")
