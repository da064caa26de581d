"""The table of errors: every code that is used anywhere has exactly one row."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters import errors as adapter_errors
from adapters.errors import AdapterError, AdapterFaults, MissingTensors, ShapeMismatch
from server.errors import TABLE, Fault, Refusal
from server.messages import Failure

ROOT = Path(__file__).parents[2]


def kinds(kind: type[AdapterError]) -> Iterator[type[AdapterError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from kinds(below)


@pytest.mark.parametrize(
    "kind",
    [one for one in kinds(AdapterError) if one is not AdapterFaults],
    ids=lambda kind: str(kind.__name__),
)
def test_every_adapter_error_has_a_row(kind: type[AdapterError]) -> None:
    assert kind.__module__ != adapter_errors.__name__ or kind.code in TABLE


def codes_in(path: Path) -> Iterator[str]:
    """Codes as written: of Failure(...), Refusal.because(...), Fault(...), and class attributes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            place = {"Failure": 1, "Fault": 0, "Refusal.because": 0, "self.fail_all": 0}.get(called)
            if place is not None:
                written = [
                    *(node.args[place : place + 1]),
                    *(one.value for one in node.keywords if one.arg == "code"),
                ]
                for one in written:
                    parts = ast.walk(one) if isinstance(one, ast.IfExp) else [one]
                    for part in parts:
                        if isinstance(part, ast.Constant) and isinstance(part.value, str):
                            yield part.value
        elif isinstance(node, ast.ClassDef):
            for line in node.body:
                if not isinstance(line, ast.Assign | ast.AnnAssign):
                    continue
                target = line.targets[0] if isinstance(line, ast.Assign) else line.target
                named = isinstance(target, ast.Name) and target.id == "code"
                if named and isinstance(line.value, ast.Constant):
                    yield str(line.value.value)


def test_every_code_in_the_source_has_a_row() -> None:
    found: set[str] = set()
    for package in ("adapters", "server"):
        for path in (ROOT / package).rglob("*.py"):
            found |= {code for code in codes_in(path) if re.fullmatch(r"[a-z_]+", code)}
    assert {"worker_lost", "overloaded", "shape_mismatch", "invalid_request"} <= found
    # Errors that end the start, and so never reach a client.
    of_starts = {"base_unusable", "base_unsupported", "not_enough_memory", "start_failed"}
    assert found - set(TABLE) <= of_starts


def test_every_row_is_an_error_status_with_a_title() -> None:
    for code, row in TABLE.items():
        assert re.fullmatch(r"[a-z_]+", code)
        assert 400 <= row.status < 600
        assert row.title


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("adapter_not_found", 404),
        ("adapter_required", 400),
        ("task_mismatch", 400),
        ("input_too_long", 413),
        ("upload_too_large", 413),
        ("unsafe_format", 422),
        ("corrupt_file", 422),
        ("unsupported_method", 422),
        ("unsupported_option", 422),
        ("shape_mismatch", 422),
        ("base_mismatch", 422),
        ("unmatched_tensors", 422),
        ("missing_tensors", 422),
        ("non_finite", 422),
        ("invalid_name", 422),
        ("key_missing", 401),
        ("key_wrong", 403),
        ("source_forbidden", 403),
        ("adapter_exists", 409),
        ("overloaded", 429),
        ("starting", 503),
        ("draining", 503),
        ("worker_lost", 503),
        ("deadline_exceeded", 504),
        ("store_full", 507),
    ],
)
def test_contract(code: str, status: int) -> None:
    assert TABLE[code].status == status


def test_problem_carries_what_is_known_and_nothing_else() -> None:
    refusal = Refusal.because(
        "input_too_long", "Too long.", found="9", expected="8", field="inputs"
    )
    assert refusal.problem() == {
        "type": "urn:hira:error:input_too_long",
        "title": TABLE["input_too_long"].title,
        "status": 413,
        "detail": "Too long.",
        "code": "input_too_long",
        "field": "inputs",
        "found": "9",
        "expected": "8",
        "error": "Too long.",
        "error_type": "validation",
    }


@pytest.mark.parametrize(
    ("code", "error_type"),
    [
        ("invalid_request", "validation"),
        ("task_mismatch", "validation"),
        ("input_too_long", "validation"),
        ("overloaded", "overloaded"),
        ("adapter_failed", "generation"),
        ("adapter_not_found", "adapter_not_found"),
        ("deadline_exceeded", "deadline_exceeded"),
        ("key_wrong", "key_wrong"),
        ("starting", "starting"),
    ],
)
def test_errors_have_the_type_by_which_clients_of_tgi_choose(code: str, error_type: str) -> None:
    assert Refusal.because(code, "x").problem()["error_type"] == error_type


def test_several_faults_of_an_adapter_are_all_reported() -> None:
    faults = AdapterFaults(
        [ShapeMismatch("one", found="[1]"), MissingTensors("two", fix="send it")]
    )
    refusal = Refusal.of(faults)
    assert refusal.status == 422
    assert [one["code"] for one in refusal.problem()["problems"]] == [
        "shape_mismatch",
        "missing_tensors",
    ]


def test_openai_shape_says_the_same() -> None:
    refusal = Refusal((Fault("adapter_not_found", "No x.", "x", field="model"),))
    error = refusal.openai()["error"]
    assert error == {
        "message": "No x.; found: x",
        "type": "invalid_request_error",
        "param": "model",
        "code": "adapter_not_found",
    }


def test_failure_of_an_unknown_code_is_our_defect_not_a_crash() -> None:
    assert Refusal.of(Failure("1", "never_heard_of", "x")).status == 500


def test_headers_that_a_status_calls_for() -> None:
    assert Refusal.because("key_missing", "x").all_headers()["WWW-Authenticate"] == "Bearer"
    assert "Retry-After" in Refusal.because("starting", "x").all_headers()
