"""Clients of other servers, unchanged: every call that their programs make succeeds.

A client whose environment is missing is skipped; ``python -m tests.clients --install`` makes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stand.client_calls import Calls, Served
from tests.stand.client_environments import ENVIRONMENTS, PROGRAMS, REQUIREMENTS, Environment
from tests.stand.client_servers import client_servers


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with client_servers(tmp_path_factory.mktemp("clients")) as servers:
        yield servers


@pytest.mark.http
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda one: one.name)
def test_every_call_of_a_client_succeeds(
    environment: Environment, request: pytest.FixtureRequest
) -> None:
    lacking = environment.lacking()
    if lacking is not None:
        pytest.skip(lacking)
    outcomes = environment.run(request.getfixturevalue("served"))
    assert outcomes
    assert [one for one in outcomes if one.error is not None] == []


def test_every_program_has_an_environment_and_every_environment_its_pins() -> None:
    programs = {one.stem for one in PROGRAMS.iterdir() if one.stem.endswith("_calls")}
    assert programs == {one.program.removesuffix(".mjs") for one in ENVIRONMENTS}
    own = {one.name for one in ENVIRONMENTS if not one.needs and not one.is_javascript}
    assert own == {one.stem for one in REQUIREMENTS.iterdir()}


def test_a_call_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    calls = Calls("pytest")

    @calls.call("right")
    def right(served: Served) -> None:
        assert served.encoder

    @calls.call("wrong")
    def wrong(served: Served) -> None:
        raise ValueError("as asked")

    calls.run(Served("one", "two"))
    first, second = capsys.readouterr().out.splitlines()
    assert '"error": null' in first
    assert "ValueError at test_clients.py" in second
    assert "as asked" in second
