"""Predicted waits: against slow references and the encode lane's own batches; refusals by them."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.edge.admit import admission as module
from server.edge.admit.admission import Admission
from server.edge.admit.bounds import Bounds
from server.edge.admit.predicted_wait import (
    QUEUE_REQUESTS,
    SAFETY,
    LaneWaits,
    OtherAdapter,
    PredictedWait,
    passing_s,
)
from server.edge.admit.shared_load import SharedLoad
from server.encoding.fair_batches import Scheduler
from server.errors import Refusal
from server.messages import (
    EncodeRequest,
    EncodeResult,
    GeneratedToken,
    GenerateRequest,
    GenerateResult,
    TokenizedInput,
)
from tests.stand.clock import FakeClock

ADAPTERS = ("a", "b", "c")
Waiting = dict[str, list[int]]  # tokens of each request under way, by adapter


def waiting_of(entries: list[tuple[str, int]]) -> Waiting:
    found: Waiting = {}
    for adapter, tokens in entries:
        found.setdefault(adapter, []).append(tokens)
    return found


def token_by_token(waiting: Waiting, own: int) -> int:
    """Tokens served until the request's last one, where all adapters get one token in turn."""
    left = Counter({name: sum(tokens) for name, tokens in waiting.items()})
    left["a"] += own
    served = 0
    while left["a"]:
        for name in [one for one in left if left[one]]:
            left[name] -= 1
            served += 1
    return served


def turn_by_turn(waiting: Waiting, own: int) -> int:
    """Tokens served until the request's last one, where all adapters get one request in turn."""
    queues = {name: deque(tokens) for name, tokens in waiting.items()}
    queues.setdefault("a", deque()).append(own)
    served = 0
    while queues["a"]:
        for queue in queues.values():
            served += queue.popleft() if queue else 0
    return served


under_way = st.lists(st.tuples(st.sampled_from(ADAPTERS), st.integers(1, 40)), max_size=30)


@given(under_way, st.integers(1, 40), st.integers(1, 9))
def test_what_passes_before_is_what_is_served_token_by_token(
    entries: list[tuple[str, int]], own: int, per_s: int
) -> None:
    waiting = waiting_of(entries)
    mine = sum(waiting.get("a", [])) + own
    others = [OtherAdapter(sum(tokens), 0.0) for name, tokens in waiting.items() if name != "a"]
    found = passing_s(others, mine, mine, per_s)
    assert found * per_s == pytest.approx(token_by_token(waiting, own))


@given(
    st.lists(st.sampled_from(ADAPTERS), max_size=30),
    st.dictionaries(st.sampled_from(ADAPTERS), st.integers(1, 40)),
    st.integers(1, 40),
)
def test_what_passes_before_is_what_is_served_turn_by_turn(
    names: list[str], sizes: dict[str, int], own: int
) -> None:
    # Requests of one adapter are of one size: in turns, their mean is taken for each.
    waiting = waiting_of([(name, sizes.get(name, 7)) for name in names])
    others = [
        OtherAdapter(len(tokens), 0.0, sum(tokens) / len(tokens))
        for name, tokens in waiting.items()
        if name != "a"
    ]
    mine = waiting.get("a", [])
    found = passing_s(others, len(mine) + 1, sum(mine) + own, 1.0)
    assert found == pytest.approx(turn_by_turn(waiting, own))


def test_what_others_ask_for_meanwhile_passes_before_as_far_as_their_part_goes() -> None:
    # 10 of 20 tokens a second are another's: 100 tokens take 10 s, in which it gets its 100.
    assert passing_s([OtherAdapter(0, 10)], 100, 100, 20) == pytest.approx(10, rel=0.05)
    # Whoever asks for more than his part has no more than that.
    assert passing_s([OtherAdapter(0, 1000)], 100, 100, 20) == pytest.approx(10)
    assert passing_s([OtherAdapter(0, 2)], 100, 100, 20) == pytest.approx(100 / 18, rel=0.01)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0.01, 100))
def test_who_finds_no_queue_is_never_too_late(queue_s: float, run_s: float, left_s: float) -> None:
    assert PredictedWait(0.0, run_s).excess_s(left_s) == 0.0
    late = PredictedWait(queue_s, run_s).excess_s(left_s)
    assert late == pytest.approx(max(0.0, SAFETY * queue_s + min(run_s, left_s / 2) - left_s))


def encode_request(number: int, adapter: str | None, lengths: list[int]) -> EncodeRequest:
    inputs = tuple(TokenizedInput((0,) * tokens) for tokens in lengths)
    return EncodeRequest(str(number), "text-classification", adapter, adapter, inputs)


@dataclass
class SimulatedLane:
    """The encode lane's scheduler on a simulated device, behind the waits that are predicted."""

    token_s: float
    step_s: float = 0.005
    now: float = 0.0
    waits: LaneWaits = field(default_factory=lambda: LaneWaits("encode"))
    scheduler: Scheduler = field(default_factory=lambda: Scheduler(8192, 64))
    requests: dict[str, EncodeRequest] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)
    ran_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    rows_left: dict[str, int] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)

    def submit(self, request: EncodeRequest) -> None:
        request = replace(request, submitted=self.now)
        self.requests[request.id] = request
        self.rows_left[request.id] = len(request.inputs)
        self.waits.add(request)
        lengths = [one.tokens for one in request.inputs]
        self.scheduler.submit(request.id, request.version, lengths, request.deadline)

    def step(self) -> bool:
        for name in self.scheduler.expire(self.now):
            self.ended[name] = math.inf
            self.waits.too_late(self.requests[name], self.now)
            self.waits.remove(self.requests[name])
        batch = self.scheduler.next_batch(lambda _: True)
        if batch is None:
            return False
        seconds = self.step_s + self.token_s * batch.tokens
        for name in {row.request for row in batch.rows}:
            self.began.setdefault(name, self.now)
            self.ran_s[name] += seconds
        self.now += seconds
        for row in batch.rows:
            if row.request in self.ended:
                continue
            self.rows_left[row.request] -= 1
            if not self.rows_left[row.request]:
                self._end(self.requests[row.request])
        return True

    def _end(self, request: EncodeRequest) -> None:
        waited_s = self.began[request.id] - request.submitted
        self.ended[request.id] = self.now
        run_s = self.ran_s[request.id]
        result = EncodeResult(request.id, (), None, 0, waited_s * 1e3, run_s * 1e3)
        self.waits.answered(request, result, self.now)
        self.waits.remove(request)


def crowd(rng: random.Random, count: int, rows: int, first: int = 0) -> list[EncodeRequest]:
    """Requests for a few adapters of random popularity."""
    popular = [rng.random() ** 3 for _ in range(rng.randint(1, 12))]
    return [
        encode_request(number, f"a{adapter}", [rng.randint(8, 60) for _ in range(rows)])
        for number, adapter in enumerate(rng.choices(range(len(popular)), popular, k=count), first)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_a_crowd_is_answered_when_its_last_were_predicted_to_be(seed: int) -> None:
    """Against the lane's own scheduler: of a random crowd after which nobody comes, the last of
    each adapter has its answer when that was predicted, to a tenth and two steps."""
    rng = random.Random(seed)
    lane = SimulatedLane(token_s=rng.uniform(1e-5, 1e-4))
    rows = rng.choice((1, 1, 4, 16))
    for request in crowd(rng, 8192 // rows, rows):
        lane.submit(request)
    while lane.step():
        pass
    lane.now += 30.0  # what was asked for then is hardly expected again
    asked = crowd(rng, 1024 // rows, rows, first=100_000)
    for request in asked:
        lane.submit(request)
    last = {request.adapter: request.id for request in asked}
    predicted = {name: lane.waits.predict(name, 1, lane.now) for name in last}
    began = lane.now
    while lane.step():
        pass
    full_s = lane.step_s + lane.token_s * 64 * 60
    for name, wait in predicted.items():
        assert wait is not None
        took_s = lane.ended[last[name]] - began
        assert wait.queue_s + wait.run_s == pytest.approx(took_s, rel=0.1, abs=2 * full_s)


@pytest.mark.parametrize("times", [2, 5, 20])
@pytest.mark.parametrize("rows", [1, 16])
def test_what_is_accepted_is_answered_in_time_and_the_lane_stays_busy(
    rows: int, times: int
) -> None:
    """An open loop of many times what the lane can do, with a deadline of 3 s."""
    rng = random.Random(times)
    lane = SimulatedLane(token_s=1e-4)
    capacity_per_s = 1 / (34 * rows * (lane.token_s + lane.step_s / (64 * 34)))
    due, refused = 0.0, 0
    arrivals = iter(crowd(rng, round(21 * times * capacity_per_s), rows))
    while lane.now < 20.0:
        while due <= lane.now:
            request = next(arrivals, None)
            if request is None:
                break
            due += rng.expovariate(times * capacity_per_s)
            wait = lane.waits.predict(request.adapter, request.tokens, lane.now)
            under_way = len(lane.requests) - len(lane.ended)
            late = wait is not None and wait.excess_s(3.0) > 0
            if late or under_way >= 2000 // rows:
                refused += 1
            else:
                lane.submit(replace(request, deadline=lane.now + 3.0))
        if not lane.step():
            lane.now = max(lane.now, due)
            break
    took = {name: lane.ended[name] - lane.requests[name].submitted for name in lane.ended}
    settled = [  # by then it is known how fast the queue passes, and how much each asks for
        seconds
        for name, seconds in took.items()
        if min(lane.ended[name], lane.requests[name].submitted + 3.0) > 8.0
    ]
    in_time = [seconds for seconds in settled if seconds <= 3.0]
    assert refused
    assert len(in_time) > 0.85 * len(settled)
    assert len(in_time) > 0.85 * capacity_per_s * (lane.now - 8.0)


def test_a_crowd_at_one_adapter_is_not_predicted_to_delay_another() -> None:
    lane = SimulatedLane(token_s=1e-3)
    for number in range(500):
        lane.submit(encode_request(number, "hot", [20]))
    while len(lane.ended) < 200 and lane.step():
        pass
    hot, cold = (lane.waits.predict(name, 20, lane.now) for name in ("hot", "cold"))
    assert hot is not None
    assert cold is not None
    left_s = (500 - len(lane.ended) + 1) * 20 * lane.token_s
    assert hot.queue_s + hot.run_s == pytest.approx(left_s, rel=0.3)
    assert cold.queue_s == 0.0


def test_nothing_is_predicted_before_anybody_has_waited_nor_without_a_queue() -> None:
    lane = SimulatedLane(token_s=1e-3)
    for number in range(500):
        lane.submit(encode_request(number, "hot", [20]))
    assert lane.waits.predict("hot", 20, lane.now) is None, "no answer has come yet"
    while len(lane.ended) < 300 and lane.step():
        pass
    assert lane.waits.predict("hot", 20, lane.now) is not None
    while lane.step():
        pass
    assert lane.waits.predict("hot", 1 << 20, lane.now) is None, "nothing waits"


def test_what_was_learnt_is_forgotten_in_a_calm() -> None:
    lane = SimulatedLane(token_s=1e-3)
    for number in range(1000):
        lane.submit(encode_request(number, "hot", [20]))
        if number == 499:
            while lane.step():
                pass
    assert lane.waits.predict("hot", 20, lane.now) is not None
    lane.now += 120.0
    assert lane.waits.predict("hot", 20, lane.now) is None


def test_a_queue_of_which_all_are_late_is_refused_until_it_is_over() -> None:
    waits = LaneWaits("encode")
    requests = deque(encode_request(number, "a", [20]) for number in range(60))
    for request in requests:
        waits.add(request)
    for now in range(3, 9):
        if now < 6:
            assert waits.predict("a", 20, now) is None, "few are not enough to say so"
        for _ in range(4):  # together, and told once
            late = requests.pop()
            waits.too_late(late, now)
            waits.remove(late)
    wait = waits.predict("a", 20, 9)
    assert wait is not None
    assert wait.excess_s(8.0) > 0.0
    assert wait.excess_s(300.0) == 0.0, "nobody has waited so long in vain"
    assert waits.predict("a", 20, 60) is None


def test_who_may_have_run_all_the_time_says_nothing_of_a_queue() -> None:
    waits = LaneWaits("encode")
    for number in range(40):
        waits.add(encode_request(number, "a", [20]))
    answer = EncodeResult("0", (), None, 20, 0.0, 10_000.0)  # it ran for 10 s, without a wait
    waits.answered(encode_request(0, "a", [20]), answer, 10.0)
    for now in range(11, 31):
        late = replace(encode_request(100 + now, "b", [20]), submitted=now - 1.0)
        waits.add(late)
        waits.too_late(late, float(now))
        waits.remove(late)
    assert waits.predict("a", 20, 31.0) is None


def test_a_slow_trickle_says_nothing_of_a_crowd() -> None:
    lane = SimulatedLane(token_s=1e-5, step_s=0.5)
    for number in range(50):  # each waits for the step before it, as where an adapter is cold
        lane.submit(encode_request(number, "a", [20]))
        lane.now += 1.5
        lane.step()
    for number in range(50, 150):
        lane.submit(encode_request(number, "a", [20]))
    assert lane.waits.predict("a", 20, lane.now) is None


def test_generations_wait_by_turns_and_run_as_long_as_others() -> None:
    waits = LaneWaits("generate")
    now = 0.0
    for number in range(40):
        request = GenerateRequest(str(number), "hot", "hot", (1,) * 10, submitted=now)
        waits.add(request)
    tokens = (GeneratedToken(0, "", None, special=False),) * 20
    for number in range(30):  # one after the other, each for a second
        now += 1.0
        request = GenerateRequest(str(number), "hot", "hot", (1,) * 10)
        result = GenerateResult(
            str(number), "", "", tokens, "length", None, 10, (now - 1.0) * 1e3, 1e3
        )
        waits.answered(request, result, now)
        waits.remove(request)
    wait = waits.predict("hot", 30, now)
    assert wait is not None
    assert wait.run_s == pytest.approx(1.0)
    assert wait.queue_s == pytest.approx(11.0, rel=0.2)
    other = waits.predict("cold", 30, now)
    assert other is not None
    assert other.queue_s < 3.0, "one turn of the other, and its own"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    made = FakeClock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=made))
    return made


def answer(admission: Admission, request: EncodeRequest, clock: FakeClock, run_s: float) -> None:
    waited_s = clock() - request.submitted - run_s
    result = EncodeResult(request.id, (), None, 0, waited_s * 1e3, run_s * 1e3)
    admission.answered(request, result)
    admission.remove(request)


def crowded(clock: FakeClock) -> Admission:
    """An admission with 60 requests of 20 tokens under way, of which 20 end each second."""
    admission = Admission(SharedLoad(1), Bounds(2000, 1 << 20, 2000), 1)
    requests = deque(
        replace(encode_request(number, "hot", [20]), submitted=clock()) for number in range(100)
    )
    for request in requests:
        admission.add(request)
    for _ in range(40):
        clock.advance(0.05)
        answer(admission, requests.popleft(), clock, 0.01)
    return admission


def test_what_cannot_be_answered_in_time_is_refused_with_a_time_to_return(clock: FakeClock) -> None:
    admission = crowded(clock)
    now = clock()
    wait = admission.check_wait("encode", "hot", 20, now + 10.0)
    assert wait is not None
    assert wait.queue_s == pytest.approx(3.0, rel=0.1)
    with pytest.raises(Refusal, match="wait_too_long") as caught:
        admission.check_wait("encode", "hot", 20, now + 1.0)
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "3")
    assert caught.value.faults[0].expected == "at most 1.0 s, its deadline"
    with pytest.raises(Refusal, match="wait_too_long"):
        admission.check_early("hot", "encode", now + 1.0)
    admission.check_early("hot", "generate", now + 1.0)
    admission.check_early("hot", None, now + 1.0)
    admission.check_early(None, "encode", now + 1.0)
    admission.check_early("cold", "encode", now + 1.0)
    admission.check_wait("encode", "cold", 20, now + 1.0)
    admission.check_wait("encode", "hot", 20, None)


def test_few_are_no_queue_whatever_was_learnt(clock: FakeClock) -> None:
    admission = crowded(clock)
    for number in range(40, 100 - QUEUE_REQUESTS + 1):
        admission.remove(encode_request(number, "hot", [20]))
    admission.check_wait("encode", "hot", 1 << 16, clock() + 0.001)


def test_one_adapter_leaves_room_for_others_where_room_is_short() -> None:
    admission = Admission(SharedLoad(1), Bounds(90, 1 << 20, 90), 1)
    for number in range(80):
        admission.check("hot", 1)
        admission.add(encode_request(number, "hot", [1]))
    with pytest.raises(Refusal, match="overloaded") as caught:
        admission.check("hot", 1)
    assert caught.value.faults[0].expected == "at most 80"
    for number in range(80, 89):
        admission.check("cold", 1)
        admission.add(encode_request(number, "cold", [1]))


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(2, 8), st.randoms(use_true_random=False))
def test_no_adapter_has_more_than_its_part_of_the_room(
    most: int, adapters: int, rng: random.Random
) -> None:
    admission = Admission(SharedLoad(1), Bounds(most, 1 << 30, most), 1)
    counts: Counter[str] = Counter()
    running: list[EncodeRequest] = []
    for number in range(6 * most):
        if running and rng.random() < 0.2:
            gone = running.pop(rng.randrange(len(running)))
            admission.remove(gone)
            counts[str(gone.adapter)] -= 1
        name = str(min(rng.randrange(adapters), rng.randrange(adapters)))
        request = encode_request(number, name, [1])
        try:
            admission.check(name, 1)
        except Refusal:
            continue
        admission.add(request)
        running.append(request)
        counts[name] += 1
        room = most - len(running)
        assert room >= 0
        assert counts[name] <= max(1, 8 * (room + 1))
