"""What keys use: windows, quotas, several processes, and a plain count to compare with."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.edge.admit.key_file import ApiKey, Quotas
from server.edge.admit.key_usage import DAY_S, DayUsage, SharedUsage, duration
from server.edge.admit.key_usage_file import KeyUsageFile
from server.errors import Refusal

MIDNIGHT = 20_000 * DAY_S


class Clock:
    def __init__(self) -> None:
        self.monotonic = 6000.0
        self.wall = MIDNIGHT + 600.0

    def pass_s(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += seconds


def usage(clock: Clock, processes: int = 1) -> SharedUsage:
    return SharedUsage(processes, clock=lambda: clock.monotonic, wall=lambda: clock.wall)


def key(**quotas: int) -> ApiKey:
    return ApiKey("app", quotas=Quotas(**quotas))


def refused(call: object, *arguments: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value


def told(shared: SharedUsage, one: ApiKey) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in shared.headers(one)}


def test_a_minute_has_its_requests_and_the_next_one_too() -> None:
    clock = Clock()
    shared, app = usage(clock), key(requests_per_minute=3)
    clock.pass_s(15)
    for left in (2, 1, 0):
        shared.count_request(app)
        assert told(shared, app)["x-ratelimit-remaining-requests"] == str(left)
    refusal = refused(shared.count_request, app)
    assert (refusal.status, refusal.code) == (429, "rate_limit_exceeded")
    assert refusal.headers["Retry-After"] == "45"
    assert told(shared, app) == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "45s",
    }
    clock.pass_s(44)
    refused(shared.count_request, app)
    clock.pass_s(1)
    shared.count_request(app)
    assert shared.of("app").minute_requests == 1
    assert shared.of("app").day.requests == 4


def test_a_day_ends_at_midnight_utc_and_is_remembered() -> None:
    clock = Clock()
    shared, app = usage(clock), key(requests_per_day=2, requests_per_minute=100)
    shared.count_request(app)
    shared.count_request(app)
    refusal = refused(shared.count_request, app)
    assert refusal.headers["Retry-After"] == str(DAY_S - 600)
    assert told(shared, app)["x-ratelimit-limit-requests"] == "2"
    clock.pass_s(DAY_S - 600)
    assert shared.of("app").day == DayUsage()
    assert shared.of("app").last_day == DayUsage(requests=2)
    shared.count_request(app)
    assert shared.of("app").day == DayUsage(requests=1)
    assert shared.of("app").last_day == DayUsage(requests=2)


def test_tokens_count_when_they_are_asked_for_and_are_put_right_at_the_end() -> None:
    clock = Clock()
    shared, app = usage(clock), key(tokens_per_minute=100)
    shared.check_tokens(app, 80)
    shared.reserve(app, "1", 80)
    assert refused(shared.check_tokens, app, 30).code == "rate_limit_exceeded"
    shared.settle("1", prompt=10, generated=5)
    assert shared.of("app").minute_tokens == 15
    assert shared.of("app").day == DayUsage(0, 10, 5)
    shared.check_tokens(app, 85)
    assert refused(shared.check_tokens, app, 86).headers["Retry-After"] == "60"
    shared.reserve(app, "2", 50)
    shared.settle("2", prompt=0, generated=0, kept=True)
    assert shared.of("app").minute_tokens == 65
    shared.settle("2", prompt=9, generated=9)  # once is enough
    assert shared.of("app").minute_tokens == 65


def test_what_never_fits_is_told_so() -> None:
    shared = usage(Clock())
    assert refused(shared.check_tokens, key(tokens_per_day=100), 101).code == "request_too_large"


def test_a_request_that_ends_in_a_later_minute_changes_only_its_day() -> None:
    clock = Clock()
    shared, app = usage(clock), key(tokens_per_minute=100, tokens_per_day=1000)
    shared.reserve(app, "1", 80)
    clock.pass_s(61)
    shared.reserve(app, "2", 40)
    shared.settle("1", prompt=1, generated=1)
    assert shared.of("app").minute_tokens == 40
    assert shared.of("app").day_tokens == 42


def test_processes_see_each_others_counts_and_exceed_by_less_than_their_number() -> None:
    clock = Clock()
    processes, limit = 4, 500
    shared, app = usage(clock, processes), key(requests_per_minute=limit)
    context = multiprocessing.get_context("fork")
    start = context.Event()
    admitted = context.Array("q", processes)

    def take(number: int) -> None:
        shared.number = number
        start.wait()
        try:
            while True:
                shared.count_request(app)
                admitted[number] += 1
        except Refusal:
            return

    children = [context.Process(target=take, args=(number,)) for number in range(processes)]
    for one in children:
        one.start()
    start.set()
    for one in children:
        one.join(60)
        assert one.exitcode == 0
    assert limit <= sum(admitted[one] for one in range(processes)) <= limit + processes - 1
    assert shared.of("app").minute_requests == sum(admitted[one] for one in range(processes))


def test_a_process_that_starts_anew_goes_on_with_its_counts() -> None:
    clock = Clock()
    shared, app = usage(clock, 2), key(requests_per_minute=2)
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        child = context.Process(target=shared.count_request, args=(app,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
    refused(shared.count_request, app)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.integers(0, 2),
            st.floats(0, 40, allow_nan=False),
        ),
        max_size=60,
    )
)
def test_counts_are_those_of_a_plain_counter(steps: list[tuple[str, int, float]]) -> None:
    clock = Clock()
    shared = usage(clock, 3)
    plain: Counter[tuple[str, int]] = Counter()
    for name, process, seconds in steps:
        clock.pass_s(seconds)
        minute = int(clock.monotonic // 60)
        app = ApiKey(name, quotas=Quotas(requests_per_minute=4))
        shared.number = process
        if plain[name, minute] < 4:
            shared.count_request(app)
            plain[name, minute] += 1
        else:
            refused(shared.count_request, app)
        assert shared.of(name).minute_requests == plain[name, minute]


def test_many_writers_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    names, rounds = [f"key-{number}" for number in range(200)], 15
    shared = SharedUsage(1)
    for name in names:
        shared.count_request(ApiKey(name))
    file = KeyUsageFile(tmp_path / "key-usage.json", shared)
    context = multiprocessing.get_context("fork")
    start = context.Event()

    def write() -> None:
        start.wait()
        for _ in range(rounds):
            file.write(names)

    children = [context.Process(target=write) for _ in range(4)]
    for one in children:
        one.start()
    start.set()
    for one in children:
        one.join(60)
        assert one.exitcode == 0
    (day,) = file.read().days.values()
    assert day.keys() == set(names)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["key-usage.json", "key-usage.lock"]


def test_a_child_forked_during_a_writing_holds_nobody_up(tmp_path: Path) -> None:
    file = KeyUsageFile(tmp_path / "key-usage.json", SharedUsage(1))
    context = multiprocessing.get_context("fork")
    done = context.Event()
    child, again = context.Process(target=done.wait), context.Process(target=file.write, args=([],))

    def forking() -> Iterator[str]:
        child.start()
        yield "app"

    file.write(forking())
    again.start()
    again.join(20)
    waits = again.is_alive()
    again.kill()
    done.set()
    child.join(60)
    assert not waits


def test_a_restart_gives_nobody_his_day_anew(tmp_path: Path) -> None:
    app = key(requests_per_day=3, tokens_per_day=100)
    before = SharedUsage(2)
    for process in (0, 1):
        before.number = process
        before.count_request(app)
    before.reserve(app, "1", 60)
    before.settle("1", prompt=30, generated=20)
    KeyUsageFile(tmp_path / "usage.json", before).write(["app", "never-used"])
    after = SharedUsage(1)
    file = KeyUsageFile(tmp_path / "usage.json", after)
    file.restore()
    assert after.of("app").day == DayUsage(2, 30, 20)
    assert after.of("app").day_tokens == 50
    after.count_request(app)
    refused(after.count_request, app)
    refused(after.check_tokens, app, 51)
    file.write(["app"])
    (day,) = file.read().days.values()
    assert {name: row.usage for name, row in day.items()} == {"app": DayUsage(3, 30, 20)}


def test_a_damaged_file_is_put_aside_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "usage.json"
    path.write_text('{"days": {"2026-')
    file = KeyUsageFile(path, SharedUsage(1))
    file.restore()
    assert "put aside" in caplog.text
    assert (tmp_path / "usage.broken").read_text() == '{"days": {"2026-'
    file.write(["app"])
    assert file.read().days == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1s"), (59.9, "1m0s"), (360, "6m0s"), (7261, "2h1m1s")]
)
def test_durations_are_written_as_clients_read_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_window_that_ends_last_says_when_to_come_again() -> None:
    clock = Clock()
    shared, app = usage(clock), key(requests_per_minute=1, requests_per_day=1)
    shared.count_request(app)
    refusal = refused(shared.count_request, app)
    assert refusal.headers["Retry-After"] == str(DAY_S - 600)
    assert "at most 1 requests a day" in (refusal.faults[0].expected or "")
    # As many are left of both: what is told is when there are more.
    assert told(shared, app)["x-ratelimit-reset-requests"] == duration(DAY_S - 600)


def test_a_part_of_a_second_is_waited_for_as_a_whole_one() -> None:
    clock = Clock()
    shared, app = usage(clock), key(requests_per_minute=1)
    clock.pass_s(14.25)
    shared.count_request(app)
    assert refused(shared.count_request, app).headers["Retry-After"] == "46"
    clock.pass_s(45.5)
    assert refused(shared.count_request, app).headers["Retry-After"] == "1"


def test_the_window_with_the_least_left_is_told() -> None:
    shared, app = usage(Clock()), key(requests_per_minute=10, requests_per_day=3)
    shared.count_request(app)
    assert told(shared, app)["x-ratelimit-remaining-requests"] == "2"
    assert told(shared, app)["x-ratelimit-limit-requests"] == "3"


def test_all_of_a_quota_may_be_asked_for_at_once_and_less_than_nothing_is_never_left() -> None:
    clock = Clock()
    shared, app = usage(clock), key(tokens_per_minute=100)
    shared.check_tokens(app, 100)
    for request in "12":  # both were checked before either was admitted
        shared.reserve(app, request, 80)
    assert told(shared, app)["x-ratelimit-remaining-tokens"] == "0"
    found = refused(shared.check_tokens, app, 7).faults[0].found
    assert found == "160 tokens, and 7 more asked for"


def test_a_request_that_ends_on_a_later_day_changes_nothing_of_it() -> None:
    clock = Clock()
    shared, app = usage(clock), key(tokens_per_day=1000)
    shared.reserve(app, "1", 80)
    clock.pass_s(DAY_S)
    shared.reserve(app, "2", 40)
    shared.settle("1", prompt=1, generated=1)
    assert shared.of("app").day_tokens == 40


def test_the_last_use_is_that_of_the_process_that_used_it_last() -> None:
    clock = Clock()
    shared = usage(clock, 2)
    for number in (1, 0):
        shared.number = number
        clock.pass_s(10)
        shared.count_request(key())
    assert shared.of("app").last_used == int(clock.wall)
    shared.number = 1
    clock.pass_s(10)
    shared.count_request(key())
    assert shared.of("app").last_used == int(clock.wall)


def test_a_process_that_counts_nothing_today_still_has_yesterdays() -> None:
    clock = Clock()
    shared = usage(clock, 2)
    for number in (0, 1):
        shared.number = number
        shared.count_request(key())
    clock.pass_s(DAY_S)
    shared.count_request(key())
    found = shared.of("app")
    assert (found.day.requests, found.last_day.requests) == (1, 2)
    clock.pass_s(DAY_S)
    assert shared.of("app").last_day.requests == 1


def test_a_thousand_names_are_counted_apart() -> None:
    shared = usage(Clock())
    names = [f"key-{number}" for number in range(1000)]
    for times, name in enumerate(names):
        for _ in range(times % 3):
            shared.count_request(ApiKey(name))
    assert [shared.of(name).day.requests for name in names] == [one % 3 for one in range(1000)]
    assert shared.of("nobody").day == DayUsage()


def test_durations_are_written_as_openai_writes_them() -> None:
    assert [duration(one) for one in (0.2, 59, 60, 3605)] == ["1s", "59s", "1m0s", "1h0m5s"]
