"""How much each key has used, over all HTTP processes of a machine, and whether it may use more.

The counts are in memory that the main process shares with the HTTP processes, so none of them is
lost when one of those dies. As in `shared_load`, every cell has one writer and there are no locks:
a process writes what it admitted itself and reads the sum. So two processes that look at the same
moment may both admit: a key exceeds a quota by at most one request for each other HTTP process, and
with one process by nothing. Minutes go by the monotonic clock, days by UTC.

Tokens are counted when a request is admitted, with all that it may generate, and put right when it
ends. What was cancelled keeps its whole count: nobody knows how far it was.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Final

from server.edge.admit.key_file import MAX_KEYS, ApiKey
from server.errors import Refusal

MINUTE_S: Final = 60
DAY_S: Final = 86400
MAX_NAMES: Final = 4 * MAX_KEYS  # that are counted between two starts, with those since removed
_FORKED = multiprocessing.get_context("fork")


class Cell(IntEnum):
    """Numbers of one key in one process."""

    NAME = 0  # a hash of it; 0: free
    MINUTE = 1  # which one the next two are of
    MINUTE_REQUESTS = 2
    MINUTE_TOKENS = 3
    DAY = 4  # which one the next four are of
    DAY_REQUESTS = 5
    DAY_TOKENS = 6  # as the quota counts them
    DAY_PROMPT = 7
    DAY_GENERATED = 8
    LAST_DAY = 9  # the one before, for the report
    LAST_REQUESTS = 10
    LAST_PROMPT = 11
    LAST_GENERATED = 12
    LAST_USED = 13  # unix seconds


@dataclass(frozen=True, slots=True)
class DayUsage:
    """What a key used on one day."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KeyUsage:
    """What a key has used by now, over all processes."""

    minute_requests: int = 0
    minute_tokens: int = 0
    day_tokens: int = 0
    day: DayUsage = DayUsage()
    last_day: DayUsage = DayUsage()
    last_used: int | None = None


@dataclass(frozen=True, slots=True)
class _Window:
    """One quota: how much of what is allowed until when."""

    limit: int
    used: int
    ends_in_s: float
    span: str

    @property
    def left(self) -> int:
        return max(0, self.limit - self.used)


class SharedUsage:
    """See the module. Made before the fork.

    Args:
        processes: How many HTTP processes there are.
        clock: Seconds that only grow and are the same in all processes.
        wall: Unix seconds.
    """

    def __init__(
        self,
        processes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.number = 0  # of this HTTP process
        self._processes = processes
        self._clock = clock
        self._wall = wall
        self._cells = _FORKED.RawArray("q", processes * MAX_NAMES * len(Cell))
        self._places: dict[tuple[int, str], int] = {}
        # Of requests under way here, by their id: key, tokens, and the windows they count in.
        self._reserved: dict[str, tuple[str, int, int, int]] = {}

    # What callers ask

    def count_request(self, key: ApiKey) -> None:
        """Count a call of this key.

        Raises:
            Refusal: rate_limit_exceeded; then it does not count.
        """
        self._check(self._request_windows(key), 1, "requests")
        with self._writing(key.name) as cells:
            cells[Cell.MINUTE_REQUESTS] += 1
            cells[Cell.DAY_REQUESTS] += 1
            cells[Cell.LAST_USED] = int(self._wall())

    def check_tokens(self, key: ApiKey, tokens: int) -> None:
        """Refuse a request whose tokens do not fit into what is left.

        Raises:
            Refusal: rate_limit_exceeded; request_too_large for what would never fit.
        """
        windows = self._token_windows(key)
        for one in windows:
            if tokens > one.limit:
                raise Refusal.because(
                    "request_too_large",
                    f"The request asks for more tokens than this key has {one.span}.",
                    found=f"{tokens} tokens",
                    expected=f"at most {one.limit} tokens",
                    fix="Send shorter texts, or ask for fewer new tokens.",
                )
        self._check(windows, tokens, "tokens")

    def reserve(self, key: ApiKey, request_id: str, tokens: int) -> None:
        """Count the tokens of a request that is being admitted."""
        with self._writing(key.name) as cells:
            cells[Cell.MINUTE_TOKENS] += tokens
            cells[Cell.DAY_TOKENS] += tokens
        self._reserved[request_id] = (key.name, tokens, self._minute(), self._day())

    def settle(self, request_id: str, *, prompt: int, generated: int, kept: bool = False) -> None:
        """Put the count of a request right, which has ended.

        Args:
            prompt, generated: What it came to.
            kept: Leave the reserved count as it is.
        """
        found = self._reserved.pop(request_id, None)
        if found is None:
            return
        name, tokens, minute, day = found
        back = 0 if kept else tokens - prompt - generated
        with self._writing(name) as cells:
            if minute == cells[Cell.MINUTE]:
                cells[Cell.MINUTE_TOKENS] -= back
            if day == cells[Cell.DAY]:
                cells[Cell.DAY_TOKENS] -= back
            cells[Cell.DAY_PROMPT] += prompt
            cells[Cell.DAY_GENERATED] += generated

    def restore(self, name: str, day: DayUsage, day_tokens: int) -> None:
        """Go on with counts of today that were kept over a restart; before the fork."""
        with self._writing(name) as cells:
            cells[Cell.DAY_REQUESTS] = day.requests
            cells[Cell.DAY_PROMPT] = day.prompt_tokens
            cells[Cell.DAY_GENERATED] = day.generated_tokens
            cells[Cell.DAY_TOKENS] = day_tokens

    def headers(self, key: ApiKey) -> list[tuple[bytes, bytes]]:
        """What is left, as OpenAI's clients read it; of the quota of which the least is left."""
        found: list[tuple[bytes, bytes]] = []
        for kind, windows in (
            ("requests", self._request_windows(key)),
            ("tokens", self._token_windows(key)),
        ):
            if not windows:
                continue
            one = min(windows, key=lambda it: (it.left, -it.ends_in_s))
            for word, text in (
                ("limit", str(one.limit)),
                ("remaining", str(one.left)),
                ("reset", duration(one.ends_in_s)),
            ):
                found.append((f"x-ratelimit-{word}-{kind}".encode(), text.encode()))
        return found

    def of(self, name: str) -> KeyUsage:
        """What a key has used."""
        minute, day = self._minute(), self._day()
        sums = dict.fromkeys(Cell, 0)
        for process in range(self._processes):
            place = self._place(process, name)
            if place is None:
                continue
            row = self._cells[place : place + len(Cell)]
            if row[Cell.MINUTE] == minute:
                sums[Cell.MINUTE_REQUESTS] += row[Cell.MINUTE_REQUESTS]
                sums[Cell.MINUTE_TOKENS] += row[Cell.MINUTE_TOKENS]
            if row[Cell.DAY] == day:
                sums[Cell.DAY_TOKENS] += row[Cell.DAY_TOKENS]
                for one in (Cell.DAY_REQUESTS, Cell.DAY_PROMPT, Cell.DAY_GENERATED):
                    sums[one] += row[one]
            # A process that has had nothing to count today still has yesterday in today's place.
            shift = 0 if row[Cell.LAST_DAY] == day - 1 else 4 if row[Cell.DAY] == day - 1 else None
            if shift is not None:
                last = (
                    (Cell.LAST_REQUESTS, Cell.LAST_PROMPT, Cell.LAST_GENERATED)
                    if shift == 0
                    else (Cell.DAY_REQUESTS, Cell.DAY_PROMPT, Cell.DAY_GENERATED)
                )
                sums[Cell.LAST_REQUESTS] += row[last[0]]
                sums[Cell.LAST_PROMPT] += row[last[1]]
                sums[Cell.LAST_GENERATED] += row[last[2]]
            sums[Cell.LAST_USED] = max(sums[Cell.LAST_USED], row[Cell.LAST_USED])
        return KeyUsage(
            minute_requests=sums[Cell.MINUTE_REQUESTS],
            minute_tokens=sums[Cell.MINUTE_TOKENS],
            day_tokens=sums[Cell.DAY_TOKENS],
            day=DayUsage(sums[Cell.DAY_REQUESTS], sums[Cell.DAY_PROMPT], sums[Cell.DAY_GENERATED]),
            last_day=DayUsage(
                sums[Cell.LAST_REQUESTS], sums[Cell.LAST_PROMPT], sums[Cell.LAST_GENERATED]
            ),
            last_used=sums[Cell.LAST_USED] or None,
        )

    # Inside

    def _minute(self) -> int:
        return int(self._clock() // MINUTE_S)

    def _day(self) -> int:
        return int(self._wall() // DAY_S)

    def _request_windows(self, key: ApiKey) -> list[_Window]:
        quotas = key.quotas
        if quotas.requests_per_minute is None and quotas.requests_per_day is None:
            return []
        used = self.of(key.name)
        return self._windows(
            (quotas.requests_per_minute, used.minute_requests),
            (quotas.requests_per_day, used.day.requests),
        )

    def _token_windows(self, key: ApiKey) -> list[_Window]:
        quotas = key.quotas
        if quotas.tokens_per_minute is None and quotas.tokens_per_day is None:
            return []
        used = self.of(key.name)
        return self._windows(
            (quotas.tokens_per_minute, used.minute_tokens),
            (quotas.tokens_per_day, used.day_tokens),
        )

    def _windows(
        self, minute: tuple[int | None, int], day: tuple[int | None, int]
    ) -> list[_Window]:
        found = []
        if minute[0] is not None:
            left_s = MINUTE_S - self._clock() % MINUTE_S
            found.append(_Window(minute[0], minute[1], left_s, "a minute"))
        if day[0] is not None:
            left_s = DAY_S - self._wall() % DAY_S
            found.append(_Window(day[0], day[1], left_s, "a day"))
        return found

    def _check(self, windows: list[_Window], more: int, kind: str) -> None:
        full = [one for one in windows if one.used + more > one.limit]
        if not full:
            return
        last = max(full, key=lambda one: one.ends_in_s)
        retry_s = max(1, math.ceil(last.ends_in_s))
        raise Refusal.because(
            "rate_limit_exceeded",
            f"This key has used up its {kind} of this {last.span.removeprefix('a ')}.",
            found=f"{last.used} {kind}" + (f", and {more} more asked for" if more > 1 else ""),
            expected=f"at most {last.limit} {kind} {last.span}",
            fix=f"Try again in {retry_s} s.",
            headers={"Retry-After": str(retry_s)},
        )

    def _place(self, process: int, name: str, *, make: bool = False) -> int | None:
        """Where the cells of a name begin; None where a process has never counted it."""
        found = self._places.get((process, name))
        if found is not None:
            return found
        wanted = _hash_of(name)
        # Open addressing: at most a quarter of the places is taken, so this ends after a few.
        for step in range(MAX_NAMES):
            slot = (wanted + step) % MAX_NAMES
            place = (process * MAX_NAMES + slot) * len(Cell)
            there = self._cells[place + Cell.NAME]
            if there == 0:
                if not make:
                    return None
                there = self._cells[place + Cell.NAME] = wanted
            if there == wanted:
                self._places[process, name] = place
                return place
        return None

    @contextmanager
    def _writing(self, name: str) -> Iterator[_OwnCells]:
        """The own cells of a key, those of a minute or a day that is over set to nothing."""
        place = self._place(self.number, name, make=True)
        if place is None:
            raise Refusal.because(
                "internal",
                "More keys have been used than can be counted until the next start.",
                expected=f"at most {MAX_NAMES}",
                fix="Tell the operator to start the server anew.",
            )
        row = _OwnCells(self._cells, place)
        minute, day = self._minute(), self._day()
        if row[Cell.MINUTE] != minute:
            # The counts first: who reads in between finds less than there was, never more.
            row[Cell.MINUTE_REQUESTS] = row[Cell.MINUTE_TOKENS] = 0
            row[Cell.MINUTE] = minute
        if row[Cell.DAY] != day:
            row[Cell.LAST_DAY] = row[Cell.DAY]
            row[Cell.LAST_REQUESTS] = row[Cell.DAY_REQUESTS]
            row[Cell.LAST_PROMPT] = row[Cell.DAY_PROMPT]
            row[Cell.LAST_GENERATED] = row[Cell.DAY_GENERATED]
            for one in (Cell.DAY_REQUESTS, Cell.DAY_TOKENS, Cell.DAY_PROMPT, Cell.DAY_GENERATED):
                row[one] = 0
            row[Cell.DAY] = day
        yield row


class _OwnCells:
    """The cells of one key in one process."""

    __slots__ = ("_cells", "_place")

    def __init__(self, cells: Mapping[int, int], place: int) -> None:
        self._cells = cells
        self._place = place

    def __getitem__(self, cell: Cell) -> int:
        return self._cells[self._place + cell]

    def __setitem__(self, cell: Cell, value: int) -> None:
        self._cells[self._place + cell] = value  # type: ignore[index]


def duration(seconds: float) -> str:
    """``6m0s``, as OpenAI writes when a quota is whole again."""
    left = math.ceil(seconds)
    hours, minutes, rest = left // 3600, left % 3600 // 60, left % 60
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"


def day_of(day: int) -> str:
    """The date of a day of the unix calendar."""
    return datetime.fromtimestamp(day * DAY_S, UTC).date().isoformat()


def _hash_of(name: str) -> int:
    """63 bits of a name, never 0: no two of some thousands have the same."""
    return (int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1) or 1
