"""How much may be under way at once, who would wait too long, and when those who were sent away may
come back.

Counts of one HTTP process, within bounds of all of them. Whether a worker is there, and what
becomes of what was admitted, is the dispatcher's affair.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, deque
from typing import Final

from adapters.tasks import Lane
from server.edge.admit.bounds import Bounds
from server.edge.admit.predicted_wait import LANES, LaneWaits, PredictedWait, lane_of
from server.edge.admit.shared_load import SharedLoad
from server.errors import Refusal
from server.messages import EncodeResult, GenerateResult, Request

RATE_WINDOW_S: Final = 10.0
RATE_SAMPLES: Final = 8192
RETRY_MAX_S: Final = 60
UNNAMED: Final = ""  # no adapter has this name
# One adapter may have so many times as many requests under way as there is room left for: where all
# ask for more than there is, all have as many, and who asks for little always finds room.
ROOM_TIMES: Final = 8
# Once half of what may be under way is, one adapter may have so many times its equal part of it.
# Lanes serve adapters alike, so its last request waits as many times as long as the queue takes.
PART_TIMES: Final = 1.5


class Admission:
    """See the module.

    Args:
        load: Shared between the HTTP processes.
        bounds: Of all HTTP processes together.
        processes: How many HTTP processes there are.
    """

    def __init__(self, load: SharedLoad, bounds: Bounds, processes: int) -> None:
        self.load = load
        self.bounds = bounds
        self.processes = processes
        self.number = 0  # of this HTTP process
        self._requests = 0
        self._tokens = 0
        self._pixel_bytes = 0
        self._per_adapter: Counter[str | None] = Counter()
        self._adapter_tokens: Counter[str | None] = Counter()
        # Monotonic times of requests that ended, and of those that were refused as too many.
        self._finished: deque[float] = deque(maxlen=RATE_SAMPLES)
        self._refused: deque[float] = deque(maxlen=RATE_SAMPLES)
        self._waits: dict[Lane, LaneWaits] = {lane: LaneWaits(lane) for lane in LANES}

    def check(self, adapter: str | None, tokens: int, pixel_bytes: int = 0) -> None:
        """Refuse what does not fit beside what is under way.

        Args:
            adapter: Whom it is for.
            tokens: What it costs to compute.
            pixel_bytes: What its images take in memory: here, and once more in the worker.

        Raises:
            Refusal: overloaded, with Retry-After.
        """
        bounds, load = self.bounds, self.load
        waiting, all_tokens = load.requests(), load.tokens()
        mine, share = self._per_adapter[adapter], bounds.share(self.processes)
        my_tokens, token_share = self._adapter_tokens[adapter], bounds.token_share(self.processes)
        all_pixels, most_pixels = load.pixel_bytes(), bounds.pixel_bytes
        # A request that is larger than a bound on tokens or pixels may run, but only alone.
        if waiting + 1 > bounds.requests:
            found, expected = f"{waiting} requests", f"at most {bounds.requests}"
        elif all_tokens + tokens > bounds.tokens and all_tokens > 0:
            found = f"{all_tokens} tokens, and {tokens} more asked for"
            expected = f"at most {bounds.tokens}"
        elif (
            most_pixels is not None
            and pixel_bytes > 0
            and all_pixels > 0
            and all_pixels + pixel_bytes > most_pixels
        ):
            found = f"{all_pixels} bytes of pixels, and {pixel_bytes} more asked for"
            expected = f"at most {most_pixels}"
        elif mine + 1 > (share := min(share, self._part_of_room(waiting, adapter))):
            found, expected = f"{mine} requests for this adapter", f"at most {share}"
        elif token_share is not None and my_tokens + tokens > token_share and my_tokens > 0:
            found = f"{my_tokens} tokens for this adapter, and {tokens} more asked for"
            expected = f"at most {token_share}"
        else:
            return
        raise self.overloaded(found, expected)

    def _part_of_room(self, waiting: int, adapter: str | None) -> int:
        """How many requests one adapter may have under way in this process: so many times the room
        that there is now, and in a queue so many times its part beside the other adapters that
        have some; one always, since that is no crowd."""
        bounds = self.bounds
        most = ROOM_TIMES * (bounds.requests - waiting) // self.processes
        if 2 * waiting >= bounds.requests:
            adapters = len(self._per_adapter) + (adapter not in self._per_adapter)
            part = PART_TIMES * bounds.requests / (adapters * self.processes)
            most = min(most, math.ceil(part))
        return max(1, most)

    def predict(
        self, lane: Lane, adapter: str | None, tokens: int, left_s: float = 0.0
    ) -> PredictedWait | None:
        """What a request would meet now; None where nothing waits, or nothing is known.

        Args:
            lane, adapter, tokens: Of the request.
            left_s: Until its deadline; a wait that is much shorter is told roughly.
        """
        now = time.monotonic()
        return self._waits[lane].predict(adapter, tokens, now, no_matter_s=left_s / 4)

    def check_wait(
        self, lane: Lane, adapter: str | None, tokens: int, deadline: float | None
    ) -> PredictedWait | None:
        """Refuse what would not be answered before its deadline.

        Args:
            lane, adapter, tokens: Of the request.
            deadline: As ``time.monotonic()`` counts.

        Returns:
            The wait that was predicted, if any was.

        Raises:
            Refusal: wait_too_long, with Retry-After.
        """
        left_s = math.inf if deadline is None else deadline - time.monotonic()
        wait = self.predict(lane, adapter, tokens, left_s)
        excess_s = 0.0 if wait is None or deadline is None else wait.excess_s(left_s)
        if wait is None or excess_s <= 0.0:
            return wait
        retry_s = self._retry_later_s(excess_s)
        raise Refusal.because(
            "wait_too_long",
            "What is waiting already would take longer than this request has time.",
            found=_seconds_told(wait.queue_s + wait.run_s),
            expected=f"at most {max(0.0, left_s):.1f} s, its deadline",
            fix=f"Try again in {retry_s} s, or allow more time with X-Timeout-Seconds.",
            headers={"Retry-After": str(retry_s)},
        )

    def answered(self, request: Request, result: EncodeResult | GenerateResult) -> None:
        """Learn from an answer how fast what waits passes; before `remove`."""
        self._waits[lane_of(request)].answered(request, result, time.monotonic())

    def too_late(self, request: Request) -> None:
        """Learn from a request whose deadline passed; before `remove`."""
        self._waits[lane_of(request)].too_late(request, time.monotonic())

    def overloaded(self, found: str, expected: str) -> Refusal:
        """The refusal of one who comes too many, counted among those who will come back."""
        retry_s = self.retry_after_s()
        return Refusal.because(
            "overloaded",
            "Too much is waiting already.",
            found=found,
            expected=expected,
            fix=f"Try again in {retry_s} s.",
            headers={"Retry-After": str(retry_s)},
        )

    def check_early(
        self, adapter: str | None, lane: Lane | None = None, deadline: float | None = None
    ) -> None:
        """`check` before a body has been read: refuses only what no body could change.

        Args:
            adapter: As the query names it; None where it does not.
            lane: That the path is for; None where that is not known.
            deadline: As ``time.monotonic()`` counts.

        Raises:
            Refusal: overloaded or wait_too_long, with Retry-After.
        """
        # An adapter that is not named, or not known, has nothing under way.
        named = UNNAMED if adapter is None else adapter
        self.check(named, 1)
        if lane is not None:
            self.check_wait(lane, named, 1, deadline)

    def add(self, request: Request) -> None:
        """Count a request in."""
        self._requests += 1
        self._tokens += request.tokens
        self._pixel_bytes += request.pixel_bytes
        self._per_adapter[request.adapter] += 1
        self._adapter_tokens[request.adapter] += request.tokens
        self._waits[lane_of(request)].add(request)
        self.publish()

    def remove(self, request: Request) -> None:
        """Count a request out, however it ended."""
        self._requests -= 1
        self._tokens -= request.tokens
        self._pixel_bytes -= request.pixel_bytes
        self._per_adapter[request.adapter] -= 1
        self._adapter_tokens[request.adapter] -= request.tokens
        if not self._per_adapter[request.adapter]:
            del self._per_adapter[request.adapter], self._adapter_tokens[request.adapter]
        self._waits[lane_of(request)].remove(request)
        self._finished.append(time.monotonic())
        self.publish()

    def publish(self) -> None:
        """Tell the other HTTP processes."""
        self.load.set(
            self.number,
            requests=self._requests,
            tokens=self._tokens,
            pixel_bytes=self._pixel_bytes,
        )

    def retry_after_s(self) -> int:
        """When a refused client may try again.

        What is under way, and all who were refused just before, over the rate at which requests
        end: so thousands who come at once are sent back over as many seconds as it takes to serve
        them. Those for whom that is too long to say are spread over the later half of the longest
        time. Where nothing has ended yet, what is under way is taken to end within the window.
        """
        return _whole_seconds((self._requests + self._count_refusal()) / self._ended_per_s())

    def _retry_later_s(self, excess_s: float) -> int:
        """When one who would have waited ``excess_s`` too long may try again: once that much has
        passed, and those who were refused just before have had their turn."""
        return _whole_seconds(excess_s + self._count_refusal() / self._ended_per_s())

    def _count_refusal(self) -> int:
        """Count one more who will come back; how many were refused lately, with this one."""
        now = time.monotonic()
        self._refused.append(now)
        for times in (self._finished, self._refused):
            while times and now - times[0] > RATE_WINDOW_S:
                times.popleft()
        return len(self._refused)

    def _ended_per_s(self) -> float:
        """Requests that ended lately; where none has, what is under way is taken to end within the
        window."""
        if self._finished:
            return len(self._finished) / max(1.0, time.monotonic() - self._finished[0])
        return max(1.0, self._requests / RATE_WINDOW_S)


def _seconds_told(wait_s: float) -> str:
    return "all before it were late" if wait_s == math.inf else f"about {wait_s:.1f} s"


def _whole_seconds(wait_s: float) -> int:
    """Seconds for Retry-After: whole, and spread where they would be too many."""
    if wait_s > RETRY_MAX_S:
        return random.randint(RETRY_MAX_S // 2, RETRY_MAX_S)
    return max(1, math.ceil(wait_s))
