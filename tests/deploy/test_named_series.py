"""Every series that the dashboard and the alerts name is one that the server's collectors make,
with its labels, and stands in the documentation with them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from adapters.registry.objects import StoreNote
from server.metrics import HttpMetrics, Live, WorkerMetrics
from tests.stand.promql import SUFFIXES, series_of

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))


def named() -> dict[str, set[str]]:
    """Labels that are asked of each metric."""
    expressions = [one["expr"] for panel in BOARD["panels"] for one in panel.get("targets", [])] + [
        rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]
    ]
    found: dict[str, set[str]] = {}
    for expression in expressions:
        for series in series_of(expression):
            found.setdefault(series.name, set()).update(series.labels)
    assert len(found) > 30
    del found["up"]  # Prometheus' own
    return found


@pytest.fixture(scope="module")
def shown() -> dict[str, set[str]]:
    """Labels of each sample that a scrape can have, of one machine and of a cluster."""
    registry = CollectorRegistry()
    http, worker = HttpMetrics(registry), WorkerMetrics(registry)
    http.request("/predict", "a", 200, 0.1)
    http.tokens("a", prompt=1, generated=1)
    http.first_token("a", 0.1)
    http.next_token("a", 0.1)
    http.failure("a", "cancelled")
    http.refusal("overloaded")
    http.predicted_wait("encode", 0.1)
    http.canary_request("a", "canary", 200)
    http.canary_failure("a", "canary", "cancelled")
    http.key_request("k", 200)
    http.key_tokens("k", prompt=1, generated=1)
    worker.step("encode", rows=1, adapters=1, seconds=0.1, waits_s=(0.1,))
    worker.loads([0.1])
    worker.store([StoreNote("get", "ok", 0.1, 1), StoreNote("cache", "hit")])
    figures: dict[str, Any] = {
        "queue_depth": {"encode": 1},
        "base_bytes": {"linear": 1},
        "adapter_bytes": {"device": 1},
        "adapters": {"device": 1},
        "slots": {"used": 1},
        "kv_blocks": {"used": 1},
        "cuda_bytes": {"free": 1},
        "totals": {"load": 1},
        "weights_digest": "d",
    }
    live = Live(
        figures,
        processes={"main": os.getpid()},
        running={"requests": 1.0},
        replicas={"r": figures},
        routed={"placed": 1},
        keys_file_good=True,
        registered=1,
        build=dict.fromkeys(("version", "base", "python", "torch"), "x"),
    )
    registry.register(live)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def documented() -> dict[str, set[str]]:
    text = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(hira_\w+)` \| ([\w, ]*) \|", text, flags=re.MULTILINE)
    return {name: {one.strip() for one in labels.split(",")} - {""} for name, labels in rows}


@pytest.mark.parametrize("name", sorted(named()))
def test_a_series_that_is_named_is_made_and_documented_with_its_labels(
    name: str, shown: dict[str, set[str]]
) -> None:
    labels = named()[name]
    assert labels <= shown[name]
    metric = name if name in documented() else re.sub(f"({'|'.join(SUFFIXES)})$", "", name)
    assert labels - {"le"} <= documented()[metric]
