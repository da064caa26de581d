"""Every series that the dashboard and the alerts name is in the /metrics of a real server, with its
labels; and every panel shows something of a run that Prometheus has recorded."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.demo import ADAPTERS_DIR
from server.edge.admit.key_file import digest_of, new_key
from server.metrics import Live as Figures
from server.metrics import LiveCollector
from tests.stand.live import Live, hira
from tests.stand.prometheus import PROGRAM, WHY_NOT, scraping
from tests.stand.promql import filled, series_of
from tests.stand.waits import until

pytestmark = pytest.mark.http

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [one for one in BOARD["panels"] if one["type"] != "row"]
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
KEYS = {"ops": new_key(), "reader": new_key()}
MORE = {"ops": "admin = true", "reader": 'adapters = ["hira-*"]'}
# What one machine without a GPU has not; of a cluster, its collector is asked.
ELSEWHERE = {"hira_cuda_bytes", "hira_routed_total"}
NOT_HERE = {"CUDA device"}


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("named-series")
    keys = folder / "keys.toml"
    keys.write_text(
        "\n".join(
            f'[{name}]\nsha256 = "{digest_of(key.encode())}"\n{MORE[name]}\n'
            for name, key in KEYS.items()
        )
    )
    with hira(folder / "data", anew=False, keys_file=keys, source_root=ADAPTERS_DIR) as server:
        staged = server.client.post(
            "/admin/adapters",
            json={"name": "hira-imdb", "source": str(ADAPTERS_DIR / "hira-sst2"), "stage": True},
            headers=bearer("ops"),
            timeout=120,
        )
        assert staged.is_success, staged.text
        share = server.client.put(
            "/admin/adapters/hira-imdb/canary",
            json={"version": staged.json()["version"], "share": 50},
            headers=bearer("ops"),
        )
        assert share.is_success, share.text
        yield server


def ask(live: Live, path: str, body: object, **more: str) -> int:
    try:
        answer = live.client.post(path, json=body, headers={**bearer("reader"), **more})
    except httpx.TransportError as error:
        raise AssertionError(live.log.read_text()[-2000:]) from error
    return answer.status_code


def traffic(live: Live) -> None:
    """Some of everything: answers, a stream, a late one, what a key may not ask, a canary."""
    for name in ("hira-sst2", *["hira-imdb"] * 8):
        assert ask(live, f"/predict?adapter={name}", {"inputs": "A fine film."}) == 200
    story = {"inputs": "To be", "parameters": {"max_new_tokens": 6}}
    assert ask(live, "/generate_stream?adapter=hira-shakespeare", story) == 200
    long = {"inputs": "To be", "parameters": {"max_new_tokens": 400, "ignore_eos": True}}
    late = {"X-Timeout-Seconds": "0.05"}
    assert ask(live, "/generate?adapter=hira-shakespeare", long, **late) == 504
    assert ask(live, "/predict?adapter=secret", {"inputs": "x"}) == 403


def named() -> dict[str, set[str]]:
    """Labels that are asked of each metric."""
    expressions = [one["expr"] for panel in PANELS for one in panel["targets"]]
    expressions += [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]
    found: dict[str, set[str]] = {}
    for expression in expressions:
        for series in series_of(expression):
            found.setdefault(series.name, set()).update(series.labels)
    found.pop("up")
    return found


def shown(text: str) -> dict[str, set[str]]:
    """Labels of each sample's name."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def shown_of_a_cluster() -> dict[str, set[str]]:
    registry = CollectorRegistry()
    figures = {
        "queue_depth": {"encode": 1},
        "adapters": {"device": 1},
        "totals": {"load": 1},
        "cuda_bytes": {"free": 1},
    }
    cluster = Figures(figures, replicas={"r": figures}, routed={"placed": 1})
    registry.register(LiveCollector(cluster))
    return shown(generate_latest(registry).decode())


def test_every_series_that_is_named_is_there_with_its_labels(live: Live) -> None:
    traffic(live)
    wanted = named()

    def missing() -> dict[str, set[str]]:
        text = live.client.get("/metrics", headers=bearer("ops")).text
        there, elsewhere = shown(text), shown_of_a_cluster()
        absent = {}
        for name, labels in wanted.items():
            is_elsewhere = name in ELSEWHERE or name.startswith("hira_replica_")
            known = (elsewhere if is_elsewhere else there).get(name)
            if known is None or not labels <= known:
                absent[name] = labels - (known or set())
        return absent

    assert len(wanted) > 30
    end = time.monotonic() + 30
    while missing() and time.monotonic() < end:  # some figures are a second old
        time.sleep(0.5)
    assert missing() == {}


@pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)
def test_every_panel_shows_something_of_a_recorded_run(live: Live, tmp_path: Path) -> None:
    variables = {"job": "hira", "instance": ".*"}
    cluster = max(one["gridPos"]["y"] for one in BOARD["panels"] if one["title"] == "Cluster")
    with scraping(live, tmp_path / "prometheus", KEYS["ops"]) as prometheus:
        until(lambda: prometheus.scrapes() >= 2)
        traffic(live)
        first = prometheus.scrapes()
        until(lambda: prometheus.scrapes() >= first + 3, every_s=0.5)
        traffic(live)
        until(lambda: prometheus.scrapes() >= first + 6, every_s=0.5)
        empty = set()
        for panel in PANELS:
            samples = [
                sample
                for one in panel["targets"]
                for sample in prometheus.ask(
                    filled(one["expr"], interval="10m", variables=variables)
                )
            ]
            values = [sample["value"][1] for sample in samples]
            is_elsewhere = panel["title"] in NOT_HERE or panel["gridPos"]["y"] > cluster
            if (not values or set(values) == {"NaN"}) != is_elsewhere:
                empty.add(panel["title"])
        assert empty == set(), "panels without a sample, or with one that is not of this machine"
