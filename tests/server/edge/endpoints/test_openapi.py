"""The OpenAPI document is right: schemathesis, seeded and short, holds every endpoint to it.

`python -m loadtests.schema --examples 500` is the long run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from loadtests.schema import run
from server.demo import ADAPTERS_DIR
from tests.stand.live import Live, hira

pytestmark = pytest.mark.http


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("openapi") / "data"
    with hira(folder, f"--source-root={ADAPTERS_DIR}", dtype="fp32") as server:
        yield server


def test_document_says_what_endpoints_answer(live: Live) -> None:
    document: dict[str, Any] = live.client.get("/openapi.json").json()
    predict = document["paths"]["/predict"]["post"]
    assert set(predict["responses"]["429"]["content"]) == {"application/problem+json"}
    assert {} in predict["security"], "inference keys are optional"
    register = document["paths"]["/admin/adapters"]["post"]
    assert {} not in register["security"], "an admin key is needed, always"
    assert {"200", "201", "507"} <= set(register["responses"])
    stream = document["paths"]["/generate_stream"]["post"]["responses"]["200"]
    assert set(stream["content"]) == {"text/event-stream"}
    openai = document["paths"]["/v1/completions"]["post"]["responses"]
    assert set(openai["200"]["content"]) == {"application/json", "text/event-stream"}
    assert set(openai["400"]["content"]) == {"application/json"}
    assert "422" not in openai, "a bad value is a bad request there"


def test_a_wrong_method_is_told_all_right_ones(live: Live) -> None:
    for path, methods in (("/admin/adapters/x", "DELETE, GET, PATCH"), ("/predict", "POST")):
        answer = live.client.put(path, headers=live.admin)
        assert (answer.status_code, answer.headers["Allow"]) == (405, methods)


def test_every_endpoint_answers_as_the_document_says(live: Live) -> None:
    key = live.admin["Authorization"].removeprefix("Bearer ")
    sources = sorted(one for one in ADAPTERS_DIR.iterdir() if one.is_dir())
    done = run(live.url, key, 4, 1, phases=("examples", "fuzzing"), sources=sources)
    assert done.returncode == 0, done.stdout[-8000:]
    assert "Traceback" not in live.log.read_text()
