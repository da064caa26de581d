"""What Locust runs: the users of one scenario, in the numbers that its stages ask for.

Run through `python -m loadtests SCENARIO`, or against a server of your own, with
HIRA_LOADTEST_SCENARIO and HIRA_LOADTEST_ADMIN_KEY set (and `--dtype fp32` for that server):
`locust -f loadtests/locustfile.py --host http://127.0.0.1:8000`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from locust import LoadTestShape, events

from loadtests.scenarios import SCENARIOS
from loadtests.stage import Stage, set_stage
from loadtests.users import DEMO_DIR, Member, Prepared, uploads

SCENARIO = SCENARIOS[os.environ.get("HIRA_LOADTEST_SCENARIO", "steady")]
SECONDS = float(os.environ.get("HIRA_LOADTEST_SECONDS", str(SCENARIO.seconds)))
# Where the runner left what the users act on; a run by hand finds it out.
STAGE = os.environ.get("HIRA_LOADTEST_STAGE")
DATA = os.environ.get("HIRA_LOADTEST_JSON")
SPAWN_PER_S = 200.0


class Stages(LoadTestShape):
    """The crowd of each stage of the scenario."""

    def tick(self) -> tuple[int, float] | None:
        found = SCENARIO.users_at(self.get_run_time() / SECONDS)
        if found is None:
            return None
        Prepared.cast.wanted = found[1]
        return sum(found[1].values()), SPAWN_PER_S


class Stretches:
    """Latencies and failures of every stage, kept one by one: Locust itself rounds them."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.good: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.failed: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.adapters: set[str] = set()

    def note(self, name: str, response_time: float, exception: Any, context: Any, **_: Any) -> None:
        found = SCENARIO.users_at((time.monotonic() - self.began) / SECONDS)
        # Who is still asking when the time is over belongs to no stage.
        stage = found[0] if found is not None else "ending"
        if exception is not None:
            self.failed[stage, name][str(exception)[:300]] += 1
            return
        self.good[stage, name].append(response_time)
        if context and "adapter" in context:
            self.adapters.add(context["adapter"])

    def write(self, path: Path) -> None:
        told = {
            "good": [[*key, values] for key, values in self.good.items()],
            "failed": [[*key, dict(values)] for key, values in self.failed.items()],
            "adapters": len(self.adapters),
        }
        path.write_text(json.dumps(told))


stretches = Stretches()
__all__ = ["Member", "Stages"]  # which Locust looks for here


@events.init.add_listener  # not test_start: the time of the run counts from before that
def prepare(environment: Any, **_: Any) -> None:
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    Prepared.zipf = SCENARIO.zipf
    uploads()
    if STAGE:
        Prepared.stage = Stage.load(Path(STAGE))
    else:
        host, key = environment.parsed_options.host, os.environ["HIRA_LOADTEST_ADMIN_KEY"]
        Prepared.stage = set_stage(host, key, DEMO_DIR, variants=12, dtype="fp32")


@events.test_start.add_listener
def begin(environment: Any, **_: Any) -> None:
    stretches.began = time.monotonic()
    environment.events.request.add_listener(stretches.note)


@events.quitting.add_listener
def end(**_: Any) -> None:
    if DATA:
        stretches.write(Path(DATA))
