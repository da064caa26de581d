"""The dashboard on a recorded run: a real Prometheus scrapes a real server under load, with the
configuration that `deploy/` has, and every query of every panel is asked of what it has kept."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from server.demo import ADAPTERS_DIR
from server.edge.admit.key_file import digest_of
from tests.stand.folders import change_config
from tests.stand.live import ON_CLUSTER, Live, free_port, hira
from tests.stand.promql import filled

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
QUERIES = [
    (panel["title"], target["refId"], target["expr"])
    for panel in BOARD["panels"]
    for target in panel.get("targets", [])
]
OF_CLUSTERS = {
    "Queue by replica",
    "Adapters by replica",
    "Loads by replica",
    "Where requests went",
}
# What the server has not that is asked: there is no GPU.
ELSEWHERE = {"CUDA device", *(() if ON_CLUSTER else OF_CLUSTERS)}
PROMETHEUS = shutil.which("prometheus")
KEYS = {"ops": "admin = true", "app": 'adapters = ["hira-*", "base"]\nrequests_per_minute = 400'}
RUN_S = 15.0
WINDOW = "10s"  # of the rates; scraped every second

pytestmark = [
    pytest.mark.http,
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed"),
]


@dataclass(frozen=True)
class Recording:
    """What a Prometheus has kept of a run."""

    client: httpx2.Client
    began: float  # unix seconds
    ended: float

    def values(self, expression: str) -> list[float]:
        """Every number that an expression had during the run, of all its series."""
        asked: dict[str, str | float] = {
            "query": expression,
            "start": self.began,
            "end": self.ended,
            "step": 1,
        }
        answer = self.client.get("/api/v1/query_range", params=asked).json()
        assert answer["status"] == "success", answer
        found = [float(value) for one in answer["data"]["result"] for _, value in one["values"]]
        return [one for one in found if math.isfinite(one)]


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{name}"}


def ask_all(live: Live, ended: threading.Event) -> None:
    """Calls of all kinds, some of which are refused or fail, until the end."""
    place = 0
    classify = [f"/predict?adapter={name}" for name in ("hira-imdb", "hira-sst2", "lora-agnews")]
    while not ended.is_set():
        place += 1
        text = {"inputs": "a warm film " * (1 + place % 5)}
        key = bearer("ops" if place % 3 == 0 else "app")
        live.client.post(classify[place % 3], json=text, headers=key)  # agnews: not for app
        live.client.post("/predict?adapter=nobody", json=text, headers=bearer("ops"))
        body = {"inputs": "The king", "parameters": {"max_new_tokens": 8}}
        for path in ("/generate", "/generate_stream"):
            live.client.post(f"{path}?adapter=hira-wiki", json=body, headers=key)
        if place % 4 == 0:  # a deadline that cannot be kept
            long = {"inputs": "The king", "parameters": {"max_new_tokens": 400}}
            hurry = {**key, "X-Timeout-Seconds": "0.05"}
            live.client.post("/generate?adapter=hira-wiki", json=long, headers=hurry)


def prepare(live: Live, folder: Path) -> None:
    """Start a canary, so that there are two arms."""
    other = change_config(
        shutil.copytree(ADAPTERS_DIR / "hira-imdb", folder), base_model_name_or_path="x"
    )
    files = [("files", (one.name, one.read_bytes())) for one in other.iterdir() if one.is_file()]
    data = {"name": "hira-imdb", "stage": "true"}
    staged = live.client.post("/admin/adapters", data=data, files=files, headers=bearer("ops"))
    body = {"version": staged.json()["version"], "share": 50}
    path = "/admin/adapters/hira-imdb/canary"
    answer = live.client.put(path, json=body, headers=bearer("ops"))
    assert answer.is_success, answer.text


def configured(folder: Path, live: Live) -> Path:
    """The configuration of `deploy/`, for this server and in the haste of a test."""
    shutil.copytree(DEPLOY / "prometheus", folder)
    path = folder / "prometheus.yml"
    said = yaml.safe_load(path.read_text())
    said["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    said["scrape_configs"][0]["authorization"] = {"credentials": "key-of-ops"}
    path.write_text(yaml.safe_dump(said))
    target = live.url.removeprefix("http://")
    (folder / "targets" / "hira.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    assert PROMETHEUS is not None
    root = tmp_path_factory.mktemp("recorded")
    keys = root / "keys.toml"
    keys.write_text(
        "".join(
            f'[{name}]\nsha256 = "{digest_of(f"key-of-{name}".encode())}"\n{more}\n'
            for name, more in KEYS.items()
        )
    )
    port = free_port()
    with hira(root / "data", keys_file=keys) as live:
        prepare(live, root / "other")
        watching = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={configured(root / 'prometheus', live)}",
                f"--storage.tsdb.path={root / 'kept'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                while not scraped(client):
                    assert watching.poll() is None, "prometheus ended"
                    time.sleep(0.2)
                yield record(live, client)
        finally:
            watching.terminate()
            watching.wait(30)


def record(live: Live, client: httpx2.Client) -> Recording:
    """Have the server asked for a while."""
    began, ended = time.time(), threading.Event()
    asking = [threading.Thread(target=ask_all, args=(live, ended)) for _ in range(3)]
    for one in asking:
        one.start()
    time.sleep(RUN_S)
    ended.set()
    for one in asking:
        one.join()
    time.sleep(2)  # one more scrape
    return Recording(client, began, time.time())


def scraped(client: httpx2.Client) -> bool:
    try:
        found = client.get("/api/v1/query", params={"query": "hira_worker_ready"})
    except httpx2.TransportError:
        return False
    return found.is_success and bool(found.json()["data"]["result"])


@pytest.mark.parametrize(
    ("title", "expression"),
    [(title, expression) for title, _, expression in QUERIES],
    ids=[f"{title} {name}" for title, name, _ in QUERIES],
)
def test_a_panel_shows_something_of_a_run(
    recording: Recording, title: str, expression: str
) -> None:
    variables = {"job": ".+", "instance": ".+"}
    found = recording.values(filled(expression, interval=WINDOW, variables=variables))
    assert bool(found) != (title in ELSEWHERE)


def test_the_series_of_a_run_are_evaluated_by_every_alert(recording: Recording) -> None:
    groups = recording.client.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 5
    assert {rule["health"] for rule in rules} == {"ok"}
    critical = [one["name"] for one in rules if one["labels"]["severity"] == "critical"]
    firing = [one["name"] for one in rules if one["state"] == "firing"]
    assert not set(critical) & set(firing)
