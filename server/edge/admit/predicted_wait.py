"""How long a request would wait, and whether its answer could come in time.

What stands before a request follows from how lanes share: all adapters alike, the encode lane by
tokens, the generation lane by turns. How fast that passes is learnt from answers: what else was
answered while a request waited. So nothing has to be known of batches, replicas or devices. What is
under way in one HTTP process stands for all: each has its part of the queue and the same part of
the answers. Counting bounds and refusing are the admission's affair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from adapters.tasks import Lane
from server.messages import EncodeRequest, EncodeResult, GenerateResult, Request

LANES: Final[tuple[Lane, ...]] = ("encode", "generate")

# Fewer requests in a lane are no queue: their batches are as small as they are few, and tell
# nothing of how fast a queue passes; nor is anybody refused for so few.
QUEUE_REQUESTS: Final = 8
WAITED_STEPS: Final = 2  # of its own steps; whoever waited less may have been in the next batch
HALF_LIFE_S: Final = 10.0  # after which an answer counts half
LATE_EVERY_S: Final = 1.0
MIN_ANSWERS: Final = 4.0  # by weight; with fewer, nothing is known
SAFETY: Final = 1.2  # times a predicted queue: those behind the bound would all be just too late
RUN_SHARE: Final = 0.5  # of the time left, at most, is set aside for running
ROUNDS: Final = 20  # of working out what comes meanwhile; three or four are the rule
MOST_QUIET: Final = 1024  # adapters with nothing under way of which it is known how much they ask
LN_2: Final = 0.6931471805599453


def lane_of(request: Request) -> Lane:
    return "encode" if isinstance(request, EncodeRequest) else "generate"


@dataclass(frozen=True, slots=True)
class PredictedWait:
    """What a request would meet.

    Args:
        queue_s: Until it runs.
        run_s: From there until its answer, as others of its lane had it lately.
    """

    queue_s: float
    run_s: float

    def excess_s(self, left_s: float) -> float:
        """By how much the answer would come too late; 0 where it comes in time.

        Args:
            left_s: Until the deadline. At most half of it is set aside for running, since a request
                may run shorter than others: whoever finds no queue is never too late.
        """
        room_s = left_s - min(self.run_s, RUN_SHARE * left_s)
        return max(0.0, SAFETY * self.queue_s - room_s)


@dataclass(frozen=True, slots=True)
class OtherAdapter:
    """One that shares a lane with the adapter of a request.

    Args:
        units: What it has under way: tokens where lanes share by tokens, requests where by turns.
        units_per_s: That it will ask for besides.
        unit_tokens: Tokens of one.
    """

    units: float
    units_per_s: float
    unit_tokens: float = 1.0


def passing_s(
    others: Iterable[OtherAdapter], units: float, tokens: float, tokens_per_s: float
) -> float:
    """Seconds until all that an adapter has under way is served, where all are served alike.

    The least t with ``tokens_per_s t = tokens + sum over others of
    unit_tokens min(units_other + units_per_s t, units)``: no other has more units served meanwhile
    than this adapter.

    Args:
        others: All other adapters.
        units, tokens: What the adapter has under way, with the request that is asked about.
        tokens_per_s: That the lane serves.
    """
    others = list(others)
    seconds = 0.0
    for _ in range(ROUNDS):
        # Whoever is below his part at this time asks on at his pace, the rest have their part.
        fixed, paced = tokens, 0.0
        for one in others:
            if one.units + one.units_per_s * seconds >= units:
                fixed += one.unit_tokens * units
            else:
                fixed += one.unit_tokens * one.units
                paced += one.unit_tokens * one.units_per_s
        before, left = seconds, tokens_per_s - paced
        seconds = fixed / left if left > 0.0 else math.inf
        if seconds == before:
            break
    return seconds


class PassingRate:
    """Tokens a second that a lane serves while requests wait, and how long requests run."""

    def __init__(self) -> None:
        self._at = 0.0
        self._tokens = self._seconds = self._waited = 0.0
        self._run_s = self._ran = 0.0

    def note(self, now: float, *, tokens: float, seconds: float) -> None:
        """Somebody waited, and in so many seconds so many tokens were served."""
        self._forget(now)
        self._tokens += tokens
        self._seconds += seconds
        self._waited += 1.0

    def note_run(self, now: float, run_s: float) -> None:
        """Somebody ran so long, having waited or not."""
        self._forget(now)
        self._run_s += run_s
        self._ran += 1.0

    def per_s(self, now: float) -> float | None:
        """None where too few have waited lately."""
        self._forget(now)
        if self._waited < MIN_ANSWERS or self._seconds <= 0.0:
            return None
        return self._tokens / self._seconds

    def run_s(self, now: float) -> float:
        """The mean of lately."""
        self._forget(now)
        return self._run_s / self._ran if self._ran else 0.0

    def _forget(self, now: float) -> None:
        if now <= self._at:
            return
        kept = _weight_after(now - self._at)
        self._at = now
        self._tokens *= kept
        self._seconds *= kept
        self._waited *= kept
        self._run_s *= kept
        self._ran *= kept


@dataclass(slots=True)
class _Adapter:
    """What one adapter has under way, and what of it was answered lately: so much will go on being
    asked for. What it asked for is no measure of that: a crowd comes at once, and is gone."""

    tokens: int = 0
    requests: int = 0
    lately_tokens: float = 0.0
    lately_requests: float = 0.0
    at: float = 0.0

    def answered(self, tokens: int, now: float) -> None:
        kept = _weight_after(now - self.at)
        self.lately_tokens = kept * self.lately_tokens + tokens
        self.lately_requests = kept * self.lately_requests + 1
        self.at = now

    def by_tokens(self, now: float) -> OtherAdapter:
        per_s = _weight_after(now - self.at) * LN_2 / HALF_LIFE_S
        return OtherAdapter(self.tokens, self.lately_tokens * per_s)

    def by_turns(self, now: float) -> OtherAdapter:
        per_s = _weight_after(now - self.at) * LN_2 / HALF_LIFE_S
        requests = self.requests + self.lately_requests
        mean = (self.tokens + self.lately_tokens) / requests if requests else 0.0
        return OtherAdapter(self.requests, self.lately_requests * per_s, mean)


class LaneWaits:
    """What is under way in one lane, and how fast it passes.

    Args:
        lane: Whose way of sharing holds.
    """

    def __init__(self, lane: Lane) -> None:
        self.rate = PassingRate()
        self._by_turns = lane == "generate"
        self._adapters: dict[str | None, _Adapter] = {}
        self._tokens = 0  # under way
        self._requests = 0
        self._served_tokens = 0
        self._late_at = -math.inf
        self._late_s = 0.0  # the longest that somebody waited in vain since the last answer
        # By request under way: how many others were when it came, and what had been served.
        self._came: dict[str, tuple[int, int]] = {}

    def add(self, request: Request) -> None:
        """A request was admitted."""
        self._came[request.id] = (self._requests, self._served_tokens)
        adapter = self._adapters.pop(request.adapter, None) or _Adapter()
        self._adapters[request.adapter] = adapter  # the last: quiet ones come to the front
        adapter.tokens += request.tokens
        adapter.requests += 1
        self._tokens += request.tokens
        self._requests += 1

    def remove(self, request: Request) -> None:
        """It ended, however it did."""
        self._came.pop(request.id, None)
        adapter = self._adapters[request.adapter]
        adapter.tokens -= request.tokens
        adapter.requests -= 1
        self._tokens -= request.tokens
        self._requests -= 1
        if len(self._adapters) > MOST_QUIET:
            self._forget_quiet()

    def answered(self, request: Request, result: EncodeResult | GenerateResult, now: float) -> None:
        """Learn from an answer; before its request is removed.

        Args:
            request: With the time of its submission.
            result: Says how long it ran, and in how many steps.
            now: On the same clock.
        """
        self._served_tokens += request.tokens
        self._late_s = 0.0
        run_s = result.compute_ms / 1000
        self.rate.note_run(now, run_s)
        if request.id not in self._came:
            return
        self._adapters[request.adapter].answered(request.tokens, now)
        requests, served = self._came[request.id]
        steps = len(result.tokens) if isinstance(result, GenerateResult) else 1
        least_s = WAITED_STEPS * run_s / max(1, steps)
        if requests >= QUEUE_REQUESTS and result.queue_ms / 1000 >= least_s:
            self.rate.note(
                now, tokens=self._served_tokens - served, seconds=now - request.submitted
            )

    def too_late(self, request: Request, now: float) -> None:
        """Learn from a request whose deadline passed; before it is removed.

        So a queue is refused, too, that is so long that none of it is answered. One a second says
        enough: those of a crowd pass their deadlines together. Whoever was not there for longer
        than others run may have run all the time, and says nothing of the queue.
        """
        requests, served = self._came.get(request.id, (0, 0))
        there_s = now - request.submitted
        if there_s <= self.rate.run_s(now):
            return
        if requests >= QUEUE_REQUESTS and now - self._late_at >= LATE_EVERY_S:
            self._late_at = now
            self._late_s = max(self._late_s, there_s)
            self.rate.note(now, tokens=self._served_tokens - served, seconds=there_s)

    def predict(
        self, adapter: str | None, tokens: int, now: float, *, no_matter_s: float = 0.0
    ) -> PredictedWait | None:
        """What a request would meet now; None where nothing waits, or nothing is known.

        Args:
            adapter, tokens: Of the request.
            now: Monotonic seconds.
            no_matter_s: A wait that is not so long need not be told exactly, which spares going
                through all adapters.
        """
        if self._requests < QUEUE_REQUESTS:
            return None
        per_s = self.rate.per_s(now)
        if per_s is None:
            return None
        run_s = self.rate.run_s(now)
        if per_s <= 0.0:  # all were late; who has longer than they had may still be in time
            return PredictedWait(self._late_s, run_s)
        seconds = (self._tokens + tokens) / per_s
        if seconds > no_matter_s:
            seconds = self._passing_s(adapter, tokens, per_s, now)
        return PredictedWait(max(0.0, seconds - run_s), run_s)

    def _passing_s(self, adapter: str | None, tokens: int, per_s: float, now: float) -> float:
        mine = self._adapters.get(adapter) or _Adapter()
        others = [one for name, one in self._adapters.items() if name != adapter]
        all_tokens = mine.tokens + tokens
        if self._by_turns:
            turns = (one.by_turns(now) for one in others)
            return passing_s(turns, mine.requests + 1, all_tokens, per_s)
        return passing_s((one.by_tokens(now) for one in others), all_tokens, all_tokens, per_s)

    def _forget_quiet(self) -> None:
        """Of adapters with nothing under way, those that were asked for longest ago are dropped."""
        quiet = [name for name, one in self._adapters.items() if not one.requests]
        for name in quiet[: max(0, len(self._adapters) - MOST_QUIET)]:
            del self._adapters[name]


def _weight_after(seconds: float) -> float:
    """What is left of something's weight after so long."""
    return float(0.5 ** (max(0.0, seconds) / HALF_LIFE_S))
