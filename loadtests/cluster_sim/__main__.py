"""Simulates a cluster with the product's routing and others: `python -m loadtests.cluster_sim`.

Without arguments it is 8 replicas and 10,000 adapters. `--sweep` adds clusters of 1 to 64 replicas,
10 to 100,000 adapters and other exponents, with the product's routing and the least loaded or with
each `--policy`; `--burst-every 30` crowds that all want one adapter, and `--lose-at 60` the death
of a replica. Figures of loads are for each 1,000 requests. With `--judge` the exit status is not 0
where the goals are missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from loadtests.cluster_sim.arrivals import Demand
from loadtests.cluster_sim.costs import PRESETS
from loadtests.cluster_sim.policies import POLICIES, Choose, affinity
from loadtests.cluster_sim.replicas import Room
from loadtests.cluster_sim.simulation import Plan
from loadtests.cluster_sim.tables import LOAD, TableRow, compare, faults_of, markdown
from loadtests.verdict import verdict
from server.cluster.routing import SPILL_FACTOR, SPILL_REQUESTS, SpillPolicy

SWEEP = (  # replicas, adapters, exponent
    *((replicas, 10_000, 1.0) for replicas in (1, 2, 4, 16, 64)),
    *((8, adapters, 1.0) for adapters in (10, 100, 1_000, 100_000)),
    *((8, 10_000, zipf) for zipf in (0.8, 1.2)),
)
SWEPT = ("affinity", "least loaded")


def main() -> int:
    options = _parser().parse_args()
    policies: dict[str, Callable[[int], Choose]] = dict(POLICIES)
    spill = SpillPolicy(options.spill_requests, options.spill_factor)
    policies["affinity"] = partial(affinity, policy=spill)
    plan = Plan(
        replicas=options.replicas,
        costs=PRESETS[options.costs],
        room=Room(slots=options.slots, host=options.host),
        demand=Demand(
            requests=options.requests,
            adapters=options.adapters,
            zipf=options.zipf,
            tokens=options.tokens,
            burst_every_s=options.burst_every,
            burst_factor=options.burst_factor,
            seed=options.seed,
        ),
        routers=options.routers,
        lost_at_s=options.lose_at,
    )
    chosen = {name: policies[name] for name in options.policy or POLICIES}
    rows = compare(plan, chosen, options.load)
    tables = {_title(plan): rows}
    _print(plan, rows)
    if options.sweep:
        for replicas, adapters, zipf in SWEEP:
            demand = replace(plan.demand, adapters=adapters, zipf=zipf)
            one = replace(plan, replicas=replicas, demand=demand)
            swept = compare(
                one, {name: policies[name] for name in options.policy or SWEPT}, options.load
            )
            tables[_title(one)] = swept
            _print(one, swept)
    if options.json is not None:
        text = json.dumps(
            {title: [asdict(row) for row in found] for title, found in tables.items()}
        )
        options.json.write_text(text + "\n", encoding="utf-8")
    faults = faults_of(rows) if options.judge else []
    return verdict(faults)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.cluster_sim", description=__doc__)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the popularity")
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=16, help="mean of a request")
    parser.add_argument("--slots", type=int, default=256, help="of a replica")
    parser.add_argument("--host", type=int, default=2048, help="adapters in host memory besides")
    parser.add_argument("--costs", choices=tuple(PRESETS), default="1.2B")
    parser.add_argument("--load", type=float, default=LOAD, help="share of linear throughput")
    parser.add_argument("--routers", type=int, default=2, help="HTTP replicas")
    parser.add_argument("--spill-requests", type=int, default=SPILL_REQUESTS)
    parser.add_argument("--spill-factor", type=float, default=SPILL_FACTOR)
    parser.add_argument("--burst-every", type=float, default=0.0, metavar="S")
    parser.add_argument("--burst-factor", type=float, default=3.0)
    parser.add_argument("--lose-at", type=float, metavar="S")
    parser.add_argument("--policy", action="append", choices=tuple(POLICIES))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--judge", action="store_true", help="needs affinity and least loaded")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser


def _title(plan: Plan) -> str:
    demand = plan.demand
    return f"{plan.replicas} replicas, {demand.adapters} adapters, Zipf({demand.zipf:g})"


def _print(plan: Plan, rows: list[TableRow]) -> None:
    print(f"\n{_title(plan)}, {plan.demand.requests} requests\n\n{markdown(rows)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
