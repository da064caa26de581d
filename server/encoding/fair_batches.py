"""Who runs next in the encode lane: rows waiting per adapter, and batches made of them.

Pure book-keeping over lengths and names: no torch, no clock, no threads. A batch is filled by
serving, again and again, a request of the adapter that has been served the fewest tokens so far
(deficit round robin with a request for a quantum), among rows of similar length, within a budget of
padded tokens. A request is answered with its last row, so requests are ended one after the other
rather than begun together; and fewer adapters in a batch cost less. Loading adapters, running
batches and answering are left to the lane.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

AdapterVersion = str | None  # an adapter version; None is the bare base

WASTE_TOKENS = 512  # padding that any batch may hold: less than what a forward costs anyway
WASTE_SHARE = 0.2  # padding that a large batch may hold, as a share of its padded tokens
# Rows of one adapter that are compared for length, oldest first: so many times its part of a batch.
# With more of them batches have a little less padding, and rows of rare lengths wait much longer.
LOOKAHEAD_PARTS = 3
LOOKAHEAD_ROWS = 16  # at least
# Lengths that count as alike: among these, whole requests come one after the other.
ALIKE_TOKENS = 16
ALIKE_SHARE = 0.25  # of the length that the batch is for
PATIENCE_BATCHES = 8  # per waiting adapter: batches that may pass over its oldest row


@dataclass(frozen=True, slots=True)
class Row:
    """One input of one request, waiting."""

    request: str
    index: int
    key: AdapterVersion
    tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to run together; rows of one adapter are neighbours."""

    rows: tuple[Row, ...]

    @property
    def longest(self) -> int:
        return max(row.tokens for row in self.rows)

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)

    @property
    def keys(self) -> tuple[AdapterVersion, ...]:
        """The distinct adapters, in the order of their rows."""
        return tuple(dict.fromkeys(row.key for row in self.rows))


@dataclass(frozen=True, slots=True)
class Depth:
    """What waits in a lane."""

    requests: int
    rows: int
    tokens: int
    adapters: int


@dataclass(slots=True)
class _QueuedRequest:
    key: AdapterVersion
    deadline: float | None
    rows: dict[int, Row]  # those still waiting
    begun: bool = False  # others have been served


@dataclass(slots=True)
class _Queue:
    served_tokens: float  # on the scale of Scheduler._clock_tokens
    rows: OrderedDict[tuple[str, int], Row] = field(default_factory=OrderedDict)  # oldest first
    head: tuple[str, int] | None = None  # the row that `passed_batches` is about
    passed_batches: int = 0


class Scheduler:
    """Waiting rows, fair between adapters by tokens.

    Guarantees, each tested: a batch never exceeds its budget (a single row longer than the budget
    runs alone); while two adapters both have rows that fit, the tokens served to them differ by at
    most one batch; every row whose adapter stays ready is served after a bounded number of batches;
    an adapter that waited idle gains no credit, one that is being loaded delays nobody.

    Args:
        max_batch_tokens: Rows times the longest of them.
        max_batch_rows: Rows of a batch.
    """

    def __init__(self, max_batch_tokens: int, max_batch_rows: int) -> None:
        if max_batch_tokens < 1 or max_batch_rows < 1:
            raise ValueError("A batch needs room for at least one token and one row.")
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_rows = max_batch_rows
        self._requests: dict[str, _QueuedRequest] = {}
        self._queues: dict[AdapterVersion, _Queue] = {}
        self._debts: dict[
            AdapterVersion, float
        ] = {}  # of adapters that left while ahead of the clock
        self._clock_tokens = 0.0  # what the least served adapter had got when last one was chosen
        self._deadlines: list[tuple[float, str]] = []
        self._rows = 0
        self._tokens = 0

    def submit(
        self,
        request: str,
        key: AdapterVersion,
        lengths: Sequence[int],
        deadline: float | None = None,
    ) -> None:
        """Queue one row per length, behind the adapter's other rows.

        Raises:
            ValueError: No rows, an empty row, or an id that is already waiting.
        """
        if request in self._requests:
            raise ValueError(f"Request {request} is already waiting.")
        if not lengths or min(lengths) < 1:
            raise ValueError("A request needs at least one row and a row at least one token.")
        rows = {i: Row(request, i, key, tokens) for i, tokens in enumerate(lengths)}
        self._requests[request] = _QueuedRequest(key, deadline, rows)
        queue = self._queues.get(key)
        if queue is None:
            served = max(self._debts.pop(key, 0.0), self._clock_tokens)
            queue = self._queues[key] = _Queue(served)
        for row in rows.values():
            queue.rows[row.request, row.index] = row
        self._rows += len(rows)
        self._tokens += sum(lengths)
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, request))

    def cancel(self, request: str) -> bool:
        """Forget the rows of a request that still wait; False if none did."""
        found = self._requests.pop(request, None)
        if found is None:
            return False
        for row in found.rows.values():
            self._unqueue(row)
        return True

    def expire(self, now: float) -> list[str]:
        """Forget requests whose deadline is ``now`` or earlier and return their ids."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request = heapq.heappop(self._deadlines)
            found = self._requests.get(request)
            if found is not None and found.deadline == deadline:
                self.cancel(request)
                late.append(request)
        return late

    def drop(self, key: AdapterVersion) -> list[str]:
        """Forget every request of one adapter and return their ids, oldest first."""
        lost = [request for request, found in self._requests.items() if found.key == key]
        for request in lost:
            self.cancel(request)
        return lost

    def next_batch(
        self, ready: Callable[[AdapterVersion], bool], *, max_tokens: int | None = None
    ) -> Batch | None:
        """Take the next batch out of the queues, or None if no adapter with rows is ready.

        The adapter served least leads with its oldest row, which sets the length of the batch; the
        rest is filled with rows of similar length, a request after the other, each of the adapter
        served least so far: of requests that have begun, then those of the oldest others. Among
        adapters served alike the one with the fewest rows is first.

        Args:
            ready: Whether an adapter's factors are on the device. Called once per waiting adapter.
            max_tokens: A smaller budget than ``max_batch_tokens``, for this batch.
        """
        open_keys = [key for key in self._queues if ready(key)]
        if not open_keys:
            self._level(self._queues)
            return None
        lead = self._lead(open_keys)
        self._clock_tokens = max(
            self._clock_tokens, min(self._queues[key].served_tokens for key in open_keys)
        )
        is_open = set(open_keys)
        self._level(key for key in self._queues if key not in is_open)
        budget = min(self.max_batch_tokens, max_tokens or self.max_batch_tokens)
        filling = _Filling(budget, self.max_batch_rows)
        self._fill(filling, lead, open_keys)
        self._note_passed(open_keys)
        self._debts = {k: v for k, v in self._debts.items() if v > self._clock_tokens}
        order = {key: i for i, key in enumerate(dict.fromkeys(row.key for row in filling.rows))}
        return Batch(tuple(sorted(filling.rows, key=lambda row: order[row.key])))

    def waiting(self) -> tuple[AdapterVersion, ...]:
        """Adapters with rows, least served first: the order in which to load them."""
        return tuple(sorted(self._queues, key=lambda key: self._queues[key].served_tokens))

    def next_deadline(self) -> float | None:
        """The earliest deadline of a waiting request (it may have been met already)."""
        return self._deadlines[0][0] if self._deadlines else None

    def depth(self) -> Depth:
        return Depth(len(self._requests), self._rows, self._tokens, len(self._queues))

    def __contains__(self, request: Hashable) -> bool:
        return request in self._requests

    def _lead(self, open_keys: Sequence[AdapterVersion]) -> AdapterVersion:
        """The adapter whose oldest row was passed over too often, else the one served least."""
        queues = self._queues
        impatient = max(open_keys, key=lambda key: queues[key].passed_batches)
        if queues[impatient].passed_batches >= PATIENCE_BATCHES * len(open_keys):
            return impatient
        return min(open_keys, key=lambda key: queues[key].served_tokens)

    def _fill(
        self, filling: _Filling, lead: AdapterVersion, open_keys: Sequence[AdapterVersion]
    ) -> None:
        first = next(iter(self._queues[lead].rows.values()))
        part = self.max_batch_rows // len(open_keys)
        ahead = max(LOOKAHEAD_ROWS, LOOKAHEAD_PARTS * part)
        filling.add(first)
        self._serve(first)
        candidates: dict[AdapterVersion, deque[Row]] = {lead: deque()}
        if lead in self._queues:
            candidates[lead].extend(self._in_order(self._queues[lead], first.tokens, ahead))
            self._serve_on(filling, candidates[lead], first.request)
        heap = [
            (self._queues[key].served_tokens, len(self._queues[key].rows), order, key)
            for order, key in enumerate(open_keys)
            if key in self._queues
        ]
        heapq.heapify(heap)
        while heap and not filling.full:
            _, _, order, key = heapq.heappop(heap)
            queue = self._queues[key]
            if key not in candidates:
                candidates[key] = deque(self._in_order(queue, first.tokens, ahead))
            rows = candidates[key]
            while rows and not filling.fits(rows[0]):
                rows.popleft()
            if not rows:
                continue
            self._serve_on(filling, rows, rows[0].request)
            if key in self._queues:
                heapq.heappush(heap, (queue.served_tokens, len(queue.rows), order, key))

    def _serve_on(self, filling: _Filling, rows: deque[Row], request: str) -> None:
        """Serve the rows of one request that come next, as far as they fit; takes them out."""
        while rows and rows[0].request == request and not filling.full:
            row = rows.popleft()
            if filling.fits(row):
                filling.add(row)
                self._serve(row)

    def _in_order(self, queue: _Queue, tokens: int, ahead: int) -> list[Row]:
        """The adapter's oldest rows, ``ahead`` of them and at least its oldest request, as they are
        tried for a batch of about ``tokens`` a row.

        Rows of a similar length first, and of these the requests that have begun, then the oldest
        one whole, then the next; the others by how near their length is. Requests that were begun
        together would all be answered late: what they had by then was no answer to anybody.
        """
        oldest = next(iter(queue.rows.values())).request
        ahead = max(ahead, len(self._requests[oldest].rows))
        alike = max(ALIKE_TOKENS, ALIKE_SHARE * tokens)
        places: dict[str, int] = {}

        def place(row: Row) -> tuple[float, int, int]:
            off = abs(row.tokens - tokens)
            if off > alike:
                return float(off), 0, 0
            age = places.setdefault(row.request, len(places))
            return 0.0, age - ahead * self._requests[row.request].begun, off

        return sorted(islice(queue.rows.values(), ahead), key=place)

    def _serve(self, row: Row) -> None:
        """Charge a row to its adapter and take it out."""
        queue = self._queues[row.key]
        queue.served_tokens += row.tokens
        request = self._requests[row.request]
        request.begun = True
        del request.rows[row.index]
        if not request.rows:
            del self._requests[row.request]
        self._unqueue(row)

    def _unqueue(self, row: Row) -> None:
        queue = self._queues[row.key]
        del queue.rows[row.request, row.index]
        self._rows -= 1
        self._tokens -= row.tokens
        if not queue.rows:
            del self._queues[row.key]
            if queue.served_tokens > self._clock_tokens:
                self._debts[row.key] = queue.served_tokens
        if not self._requests:
            self._deadlines.clear()

    def _level(self, keys: Iterable[AdapterVersion]) -> None:
        """Adapters that cannot run yet do not save up a claim to run alone later."""
        for key in keys:
            queue = self._queues[key]
            queue.served_tokens = max(queue.served_tokens, self._clock_tokens)

    def _note_passed(self, open_keys: Sequence[AdapterVersion]) -> None:
        for key in open_keys:
            queue = self._queues.get(key)
            if queue is None:
                continue
            head = next(iter(queue.rows))
            queue.passed_batches = queue.passed_batches + 1 if head == queue.head else 1
            queue.head = head


class _Filling:
    """A batch being filled: its limits, and whether one more row keeps them."""

    def __init__(self, budget_tokens: int, max_rows: int) -> None:
        self.budget_tokens = budget_tokens
        self.max_rows = max_rows
        self.rows: list[Row] = []
        self._longest = 0
        self._tokens = 0

    @property
    def full(self) -> bool:
        return (
            len(self.rows) >= self.max_rows
            or (len(self.rows) + 1) * self._longest > self.budget_tokens
        )

    def fits(self, row: Row) -> bool:
        padded = (len(self.rows) + 1) * max(self._longest, row.tokens)
        waste = padded - self._tokens - row.tokens
        return padded <= self.budget_tokens and waste <= max(WASTE_TOKENS, WASTE_SHARE * padded)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._longest = max(self._longest, row.tokens)
        self._tokens += row.tokens
