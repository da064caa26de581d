"""A real Prometheus that scrapes one server, for as long as a test needs it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.stand.live import Live, free_port
from tests.stand.waits import until

PROGRAM = shutil.which("prometheus")
WHY_NOT = "prometheus is not installed"


class Prometheus:
    """Answers instant queries over what it has scraped."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an expression now; raises AssertionError where it cannot be evaluated."""
        said = self.client.get("/api/v1/query", params={"query": expression}).json()
        assert said["status"] == "success", (expression, said)
        found: list[dict[str, Any]] = said["data"]["result"]
        return found

    def is_ready(self) -> bool:
        try:
            return self.client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def scrapes(self) -> float:
        """How many scrapes have brought something."""
        found = self.ask('count_over_time(up{job="hira"}[1h]) and up{job="hira"} == 1')
        return float(found[0]["value"][1]) if found else 0.0


@contextmanager
def scraping(live: Live, folder: Path, key: str) -> Iterator[Prometheus]:
    """Prometheus with the job of `deploy/`, every second, until the end of the block."""
    assert PROGRAM is not None
    folder.mkdir(parents=True)
    (folder / "key").write_text(key)
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        "scrape_configs:\n"
        "  - job_name: hira\n"
        f"    authorization: {{credentials_file: {folder / 'key'}}}\n"
        f"    static_configs: [{{targets: ['{live.url.removeprefix('http://')}']}}]\n"
    )
    port = free_port()
    command = [
        PROGRAM,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            made = Prometheus(client)
            until(made.is_ready, f"Prometheus is not ready: {folder / 'log'}")
            yield made
    finally:
        child.terminate()
        child.wait(60)
