"""Who asks for what, and when: Zipf's law, Poisson arrivals, and crowds for one adapter."""

from __future__ import annotations

import itertools
import random
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

LONGEST: Final = 8  # times the mean: no request asks for more tokens


@dataclass(slots=True)
class Call:
    """One request.

    Args:
        number: Of the request, in the order of arrival.
        version: Of its adapter.
        tokens: That are to come; with one, a replica's death lets it be asked again elsewhere.
        arrived_s: When.
        began_s: When its first step began, in the replica that had it last.
        asked: Replicas that it was sent to.
    """

    number: int
    version: str
    tokens: int
    arrived_s: float = 0.0
    began_s: float = 0.0
    asked: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """What clients ask for.

    Args:
        requests: All together.
        adapters: That there are.
        zipf: Exponent of their popularity.
        tokens: Mean of a request; 1 for requests of one forward.
        burst_every_s: From the beginning of one crowd to the next; 0 without crowds.
        burst_s: That a crowd lasts.
        burst_factor: Rate in a crowd over the rate outside; the requests that are more all ask for
            one adapter, another in every crowd. The mean rate is the same with crowds and without.
        seed: Of all that is drawn.
    """

    requests: int
    adapters: int
    zipf: float = 1.0
    tokens: int = 64
    burst_every_s: float = 0.0
    burst_s: float = 5.0
    burst_factor: float = 3.0
    seed: int = 1


@dataclass
class Draws:
    """Draws the calls of a demand one after another."""

    demand: Demand
    _weights: list[float] = field(init=False)

    def __post_init__(self) -> None:
        ranks = range(1, self.demand.adapters + 1)
        self._weights = list(itertools.accumulate(rank**-self.demand.zipf for rank in ranks))
        self._adapters = random.Random(f"adapters {self.demand.seed}")
        self._tokens = random.Random(f"tokens {self.demand.seed}")
        self._times = random.Random(f"times {self.demand.seed}")
        self._count = itertools.count()

    def call(self, version: str | None = None) -> Call:
        """The next call, for an adapter by Zipf's law, or for ``version``."""
        if version is None:
            drawn = self._adapters.random() * self._weights[-1]
            version = version_name(bisect(self._weights, drawn))
        mean = self.demand.tokens
        more = int(self._tokens.expovariate(1 / (mean - 1))) if mean > 1 else 0
        return Call(next(self._count), version, min(1 + more, LONGEST * mean))

    def arrivals(self, rate: float) -> Iterator[tuple[float, Call]]:
        """All calls with their times, in seconds, at a mean of ``rate`` a second."""
        demand, now = self.demand, 0.0
        share = demand.burst_s / demand.burst_every_s if demand.burst_every_s else 0.0
        calm = rate / (1 + share * (demand.burst_factor - 1))
        crowd, favourite = -1, ""
        for _ in range(demand.requests):
            # Crowds begin at known times; drawn from the higher rate, and thinned outside them.
            while True:
                now += self._times.expovariate(calm * (demand.burst_factor if share else 1.0))
                number, since = divmod(now, demand.burst_every_s) if share else (0.0, 0.0)
                crowded = bool(share) and since < demand.burst_s
                if not share or crowded or self._times.random() < 1 / demand.burst_factor:
                    break
            if crowded and number != crowd:
                crowd = int(number)
                favourite = version_name(self._times.randrange(demand.adapters))
            more = crowded and self._times.random() >= 1 / demand.burst_factor
            yield now, self.call(favourite if more else None)


def version_name(number: int) -> str:
    """Of the adapter with this rank of popularity, the first being 0."""
    return f"version-{number}"
