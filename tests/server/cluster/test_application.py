"""What an HTTP replica needs of Ray Serve before it starts."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra cluster is not installed: no ray")

from ray.serve._private import constants

from server.cluster.application import ROUTER_LOOP, HttpDeployment
from server.edge.processes.failed_start import StartFailed


def test_an_http_replica_does_not_start_where_routing_has_a_loop_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, ROUTER_LOOP, True)
    monkeypatch.setenv(ROUTER_LOOP, "1")
    plan: Any = None
    with pytest.raises(StartFailed) as caught:
        HttpDeployment(plan, engines=None)
    assert caught.value.found == f"{ROUTER_LOOP} is 1"
    assert caught.value.expected
    assert f"{ROUTER_LOOP}=0" in (caught.value.fix or "")
