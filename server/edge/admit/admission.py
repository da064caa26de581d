"""How much may be under way at once, and when those who were sent away may come back.

Counts of one HTTP process, within bounds of all of them. Whether a worker is there, and what
becomes of what was admitted, is the dispatcher's affair.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, deque
from typing import Final

from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import SharedLoad
from server.errors import Refusal
from server.messages import Request

RATE_WINDOW_S: Final = 10.0
RATE_SAMPLES: Final = 8192
RETRY_MAX_S: Final = 60
UNNAMED: Final = ""  # no adapter has this name


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
        elif mine + 1 > share:
            found, expected = f"{mine} requests for this adapter", f"at most {share}"
        elif token_share is not None and my_tokens + tokens > token_share and my_tokens > 0:
            found = f"{my_tokens} tokens for this adapter, and {tokens} more asked for"
            expected = f"at most {token_share}"
        else:
            return
        raise self.overloaded(found, expected)

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

    def check_early(self, adapter: str | None) -> None:
        """`check` before a body has been read: refuses only what no body could change.

        Args:
            adapter: As the query names it; None where it does not.

        Raises:
            Refusal: overloaded, with Retry-After.
        """
        # An adapter that is not named, or not known, has nothing under way.
        self.check(UNNAMED if adapter is None else adapter, 1)

    def add(self, request: Request) -> None:
        """Count a request in."""
        self._requests += 1
        self._tokens += request.tokens
        self._pixel_bytes += request.pixel_bytes
        self._per_adapter[request.adapter] += 1
        self._adapter_tokens[request.adapter] += request.tokens
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
        now = time.monotonic()
        self._refused.append(now)
        for times in (self._finished, self._refused):
            while times and now - times[0] > RATE_WINDOW_S:
                times.popleft()
        if self._finished:
            per_s = len(self._finished) / max(1.0, now - self._finished[0])
        else:
            per_s = max(1.0, self._requests / RATE_WINDOW_S)
        wait_s = math.ceil((self._requests + len(self._refused)) / per_s)
        if wait_s > RETRY_MAX_S:
            return random.randint(RETRY_MAX_S // 2, RETRY_MAX_S)
        return max(1, wait_s)
