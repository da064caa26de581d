"""The scenarios of the Locust runs: who asks, how many at what time, and what must hold.

Pass marks are ratios within one run, or counts that must be zero: they mean the same on
any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Report = Mapping[str, Any]
ASKING: Final = ("/predict", "/generate", "/generate_stream")
# Names under which things are reported, beside the endpoints' own.
REFUSED, LEFT, TRICKLED = "refused with 429", "left in mid-stream", "trickled"
REMOVED = "/admin/adapters (delete)"
COMMON, RARE = "common", "rare"  # of answers that are reported by endpoint too
WRONG = "wrong"  # begins what is said of an answer that is not the adapter's own


@dataclass(frozen=True)
class Stage:
    """A stretch of a run: who is there, as clients by what they do (see `users.Member`)."""

    name: str
    part: float  # of the run's time
    users: Mapping[str, int]


@dataclass(frozen=True)
class Mark:
    """Something that must hold of a finished run."""

    what: str
    value: Callable[[Report], float]
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, report: Report) -> bool:
        value = self.value(report)
        low = -math.inf if self.at_least is None else self.at_least
        return low <= value <= (math.inf if self.at_most is None else self.at_most)  # not for NaN

    @property
    def limit(self) -> str:
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Scenario:
    """One load test."""

    what: str
    stages: tuple[Stage, ...]
    marks: tuple[Mark, ...]
    seconds: int = 24  # of the short run
    zipf: float = 1.0  # exponent of the popularity of adapters

    def users_at(self, part: float) -> tuple[str, Mapping[str, int]] | None:
        """The stage at a part of the run, and its users; None when it is over."""
        for stage in self.stages:
            part -= stage.part
            if part < 0:
                return stage.name, stage.users
        return None


def rate(stage: str, *names: str) -> Callable[[Report], float]:
    """Good answers per second in a stage."""

    def value(report: Report) -> float:
        found = report["stages"].get(stage, {})
        chosen = names or ASKING
        return float(sum(found[name]["good_per_s"] for name in chosen if name in found))

    return value


def latency(stage: str, name: str, quantile: str = "p95_ms") -> Callable[[Report], float]:
    """A quantile of the good answers of one kind in a stage."""

    def value(report: Report) -> float:
        return float(report["stages"].get(stage, {}).get(name, {}).get(quantile, float("nan")))

    return value


def ratio(
    above: Callable[[Report], float], below: Callable[[Report], float]
) -> Callable[[Report], float]:
    def value(report: Report) -> float:
        divisor = below(report)
        return above(report) / divisor if divisor else float("nan")

    return value


def count(name: str) -> Callable[[Report], float]:
    return lambda report: float(report[name])


CROWDS: Final = (4, 16, 64, 160)
ALWAYS: Final = (
    Mark("wrong answers", count("wrong"), at_most=0),
    Mark("errors", count("errors"), at_most=0),
    Mark("requests answered", count("good"), at_least=1),
    Mark("resident memory, end / start", count("memory_ratio"), at_most=1.25),
    # A descriptor of a connection that closes may still be there.
    Mark("descriptors, end / start", count("descriptor_ratio"), at_most=1.5),
)
_MIXED = {"classify": 8, "generate": 3, "stream": 2}


def _constant(users: Mapping[str, int]) -> tuple[Stage, ...]:
    return (Stage("warm", 0.2, users), Stage("early", 0.4, users), Stage("late", 0.4, users))


SCENARIOS: Final[Mapping[str, Scenario]] = {
    "steady": Scenario(
        "the same crowd all the time",
        _constant({"classify": 6, "generate": 2, "stream": 2}),
        (
            *ALWAYS,
            Mark("answers/s, late / early", ratio(rate("late"), rate("early")), at_least=0.5),
            Mark(
                "/predict p95, late / early",
                ratio(latency("late", "/predict"), latency("early", "/predict")),
                at_most=3.0,
            ),
        ),
    ),
    "ramp": Scenario(
        "more and more clients, past what the queue takes",
        tuple(
            Stage(f"{users} clients", 0.25, {"classify": users * 3 // 4, "generate": users // 4})
            for users in CROWDS
        ),
        (
            *ALWAYS,
            Mark(
                "answers/s, 160 / 64 clients",
                ratio(rate("160 clients"), rate("64 clients")),
                at_least=0.5,
            ),
            Mark(
                "answers/s, 64 / 4 clients",
                ratio(rate("64 clients"), rate("4 clients")),
                at_least=0.8,
            ),
            Mark("refused as overloaded", count("refused"), at_least=1),
        ),
        seconds=32,
    ),
    "spike": Scenario(
        "a crowd that comes at once and goes again",
        (
            Stage("before", 0.35, {"classify": 4, "generate": 1}),
            Stage("spike", 0.2, {"classify": 90, "generate": 20}),
            Stage("falling", 0.1, {"classify": 4, "generate": 1}),
            Stage("after", 0.35, {"classify": 4, "generate": 1}),
        ),
        (
            *ALWAYS,
            Mark(
                "/predict p50, after / before",
                ratio(
                    latency("after", "/predict", "p50_ms"), latency("before", "/predict", "p50_ms")
                ),
                at_most=2.0,
            ),
            Mark("answers/s, after / before", ratio(rate("after"), rate("before")), at_least=0.5),
        ),
        seconds=28,
    ),
    "soak": Scenario(
        "everything at once, for as long as is asked (see also loadtests.soak)",
        _constant({"classify": 5, "generate": 2, "stream": 2, "operate": 1, "leave": 1}),
        (
            *ALWAYS,
            Mark("answers/s, late / early", ratio(rate("late"), rate("early")), at_least=0.5),
        ),
    ),
    "skew": Scenario(
        "most requests for very few of the adapters: Zipf's law with exponent 1.6",
        _constant({"classify": 12}),
        (
            *ALWAYS,
            Mark("adapters that were asked", count("adapters"), at_least=5),
            Mark(
                "p95 of rare adapters / of the most asked one",
                ratio(latency("all", RARE), latency("all", COMMON)),
                at_most=3.0,
            ),
        ),
        zipf=1.6,
    ),
    "churn": Scenario(
        "adapters come, change and go while others are asked",
        (
            Stage("calm", 0.45, {"classify": 8, "generate": 2}),
            Stage("turning", 0.1, {"classify": 8, "generate": 2, "operate": 2}),
            Stage("churn", 0.45, {"classify": 8, "generate": 2, "operate": 2}),
        ),
        (
            *ALWAYS,
            Mark("adapters turned over", count("turned_over"), at_least=1),
            Mark(
                "/predict p95, churn / calm",
                ratio(latency("churn", "/predict"), latency("calm", "/predict")),
                at_most=5.0,
            ),
            Mark("answers/s, churn / calm", ratio(rate("churn"), rate("calm")), at_least=0.4),
        ),
    ),
    "slow": Scenario(
        "clients that read their stream at a trickle, or send their body so, beside quick ones",
        (
            Stage("quick", 0.45, {"classify": 6, "generate": 1}),
            Stage("coming", 0.1, {"classify": 6, "generate": 1, "trickle": 20}),
            Stage("beside", 0.45, {"classify": 6, "generate": 1, "trickle": 20}),
        ),
        (
            *ALWAYS,
            Mark("slow clients that were served", count("trickled"), at_least=1),
            Mark(
                "/predict p95, beside slow ones / alone",
                ratio(latency("beside", "/predict"), latency("quick", "/predict")),
                at_most=3.0,
            ),
            Mark("answers/s, beside / alone", ratio(rate("beside"), rate("quick")), at_least=0.4),
        ),
    ),
    "mixed": Scenario(
        "classification alone, then with generation beside it",
        (
            Stage("alone", 0.45, {"classify": 8}),
            Stage("coming", 0.1, _MIXED),
            Stage("mixed", 0.45, _MIXED),
        ),
        (
            *ALWAYS,
            Mark(
                "/predict p95, mixed / alone",
                ratio(latency("mixed", "/predict"), latency("alone", "/predict")),
                at_most=4.0,
            ),
            Mark("generations/s when mixed", rate("mixed", "/generate"), at_least=0.1),
        ),
    ),
}
