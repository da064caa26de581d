"""The link to many engines, over a handle that answers as Ray Serve's does."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra cluster is not installed: no ray")

from ray.exceptions import ActorUnavailableError

from server.cluster import cluster_link as module
from server.cluster.cluster_link import ClusterLink
from server.cluster.liveness import Placed
from server.cluster.replica import Addressed
from server.cluster.router_table import ROUTERS
from server.edge.admit.bounds import Bounds
from server.edge.admit.shared_load import SharedLoad
from server.errors import Refusal
from server.messages import (
    EncodeRequest,
    EncodeResult,
    Event,
    Failure,
    GenerateRequest,
    GenerateResult,
    Message,
    Preload,
    Request,
    TokenEvent,
    TokenizedInput,
)

BOUNDS = Bounds(requests=8, tokens=1000, adapter_requests=8, adapter_tokens=1000, pixel_bytes=None)
Answer = Callable[[Request], Awaitable[Event]]


def died() -> ActorUnavailableError:
    return ActorUnavailableError("gone", b"0" * 16)


def encode_request() -> EncodeRequest:
    inputs = (TokenizedInput((1, 2)),)
    return EncodeRequest(
        "", "text-classification", "imdb", "v1", inputs,
        submitted=time.monotonic(), deadline=time.monotonic() + 60,
    )  # fmt: skip


def generate_request(*, stream: bool) -> GenerateRequest:
    return GenerateRequest("", "story", "v2", (1,), stream=stream, submitted=time.monotonic())


def result(request: Request) -> Event:
    if isinstance(request, EncodeRequest):
        return EncodeResult(request.id, ("x",), request.version, 2, 0.0, 0.0)
    return GenerateResult(request.id, "", "", (), "length", request.version, 1, 0.0, 0.0)


class Response:
    """Of a call through the handle: awaited, or iterated."""

    def __init__(self, work: Any) -> None:
        self.work = work
        self.cancelled = False

    def __await__(self) -> Any:
        return self.work.__await__()

    def __aiter__(self) -> Any:
        return self.work.__aiter__()

    def cancel(self) -> None:
        self.cancelled = True


class Engines:
    """The handle: each answer is made by the next of ``answers``."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[Request, float, float | None]] = []
        self.responses: list[Response] = []
        self.answer = self.stream = SimpleNamespace(remote=self._remote)
        self.hear: Any = None
        self.state: Any = SimpleNamespace(remote=lambda to: Response(self._said()))

    async def _said(self) -> dict[str, Any]:
        return {"name": "r0", "pid": 1, "busy_s": 0.0, "snapshot": {"residency": {}}}

    def options(self, **_: Any) -> Engines:
        return self

    def _remote(self, request: Request, waited_s: float, left_s: float | None) -> Response:
        self.asked.append((request, waited_s, left_s))
        response = Response(self.answers.pop(0)(request))
        self.responses.append(response)
        return response


async def answered(request: Request) -> Event:
    return result(request)


async def fails(request: Request) -> Event:
    raise died()


async def never(request: Request) -> Event:
    await asyncio.Event().wait()
    raise AssertionError


@asynccontextmanager
async def linked(engines: Engines) -> AsyncIterator[ClusterLink]:
    ROUTERS.pop("engine", None)
    link = ClusterLink(SharedLoad(1), BOUNDS, engines, "engine", "http-a")
    await link.start()
    try:
        async with asyncio.timeout(10):
            while link.status != "ready":
                await asyncio.sleep(0.01)
            yield link
    finally:
        await link.stop()


def outcome(engines: Engines, request: Request) -> list[Event]:
    async def scenario() -> list[Event]:
        async with linked(engines) as link:
            with link.admit(request) as ticket:
                events: list[Event] = []
                while not ticket.ended:
                    events.append(await ticket.next())
                while (more := ticket.next_if_there()) is not None:
                    events.append(more)
                return events

    return asyncio.run(asyncio.wait_for(scenario(), 20))


def test_an_answer_comes_under_the_id_of_its_request_with_times_as_durations() -> None:
    engines = Engines(answered)
    (event,) = outcome(engines, encode_request())
    assert isinstance(event, EncodeResult)
    assert event.id == "http-a.0"
    ((_, waited_s, left_s),) = engines.asked
    assert 0 <= waited_s < 5
    assert left_s is not None
    assert 50 < left_s <= 60


def test_a_request_for_one_forward_is_asked_once_more_when_its_replica_dies() -> None:
    engines = Engines(fails, answered)
    (event,) = outcome(engines, encode_request())
    assert isinstance(event, EncodeResult)
    assert len({request.id for request, _, _ in engines.asked}) == 2


def test_a_request_that_loses_two_replicas_is_told_and_not_asked_again() -> None:
    engines = Engines(fails, fails)
    (event,) = outcome(engines, encode_request())
    assert isinstance(event, Failure)
    assert event.code == "worker_lost"
    assert len(engines.asked) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_is_never_asked_again(stream: bool) -> None:
    async def tokens(request: Request) -> AsyncIterator[list[Event]]:
        yield [TokenEvent(request.id, 7, "x", None, special=False)]
        raise died()

    engines = Engines(tokens if stream else fails)
    events = outcome(engines, generate_request(stream=stream))
    assert [type(one) for one in events[:-1]] == [TokenEvent] * stream
    assert isinstance(events[-1], Failure)
    assert events[-1].code == "worker_lost"
    assert len(engines.asked) == 1


def test_who_leaves_early_has_the_call_cancelled() -> None:
    engines = Engines(never)

    async def scenario() -> None:
        async with linked(engines) as link:
            with link.admit(encode_request()):
                while not engines.responses:
                    await asyncio.sleep(0.01)
            for _ in range(100):
                if engines.responses[0].cancelled:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("the call goes on")

    asyncio.run(scenario())


class Router:
    """What the link knows of the router: who is there, and who has which request."""

    def __init__(self) -> None:
        self.curr_replicas: dict[Any, Any] = {}
        self.there = True
        self.silent: set[str] = set()
        self.placed = Placed()
        self.looked_for: list[str] = []
        self.looks_failing = 0
        self.looks = 0

    def reachable(self) -> bool:
        self.looks += 1
        if self.looks_failing:
            self.looks_failing -= 1
            raise LookupError("a look that fails")
        return self.there

    def look_for(self, replica: Any) -> None:
        self.looked_for.append(replica.name)

    def put(self, engines: Engines, name: str) -> None:
        """Every request that was sent is there."""
        there: Any = Replica(name)
        for request, _, _ in engines.asked:
            self.placed.put(request.id, there)


@pytest.fixture
def router() -> Iterator[Router]:
    made = Router()
    yield made
    ROUTERS.pop("engine", None)


class Replica:
    """One that was never heard."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def heard(self) -> float:
        return 0.0

    @heard.setter
    def heard(self, at: float) -> None:
        pass


async def first_sent(engines: Engines) -> None:
    while not engines.asked:
        await asyncio.sleep(0.01)


def test_requests_wait_for_nobody_where_no_replica_is_left(router: Router) -> None:
    engines = Engines(never)
    router.there = False

    async def scenario() -> None:
        async with linked(engines) as link:
            with link.admit(encode_request()) as ticket:
                ROUTERS["engine"] = router
                event = await asyncio.wait_for(ticket.next(), 60)
                assert isinstance(event, Failure)
                assert event.code == "worker_lost"
                with pytest.raises(Refusal, match="restarted"):
                    link.admit(encode_request()).__enter__()

    asyncio.run(scenario())


def test_a_request_that_has_a_replica_ends_with_it_and_not_with_the_list(router: Router) -> None:
    """As where a replica is to go, and the next one is not there yet."""
    goes_on = asyncio.Event()

    async def later(request: Request) -> Event:
        await goes_on.wait()
        return result(request)

    engines = Engines(later, never)

    async def scenario() -> None:
        async with linked(engines) as link:
            with link.admit(generate_request(stream=False)) as held:
                await first_sent(engines)
                router.put(engines, "drains")
                with link.admit(encode_request()) as waits:
                    router.there = False
                    ROUTERS["engine"] = router
                    event = await asyncio.wait_for(waits.next(), 60)
                    assert isinstance(event, Failure)
                goes_on.set()
                assert isinstance(await asyncio.wait_for(held.next(), 60), GenerateResult)

    asyncio.run(scenario())


def test_one_look_that_fails_ends_no_request_and_no_later_look(router: Router) -> None:
    engines = Engines(never)
    router.there = False
    router.looks_failing = 3

    async def scenario() -> None:
        async with linked(engines) as link:
            ended: list[bool] = []
            link.end = lambda: ended.append(True)
            with link.admit(encode_request()) as ticket:
                ROUTERS["engine"] = router
                event = await asyncio.wait_for(ticket.next(), 60)
                assert isinstance(event, Failure)
                assert event.code == "worker_lost"
                assert router.looks_failing == 0
                assert ended == []

    asyncio.run(scenario())


def test_a_moment_without_a_replica_ends_no_request(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NOBODY_S", 600.0)
    monkeypatch.setattr(module, "WATCH_EVERY_S", 0.01)
    goes_on = asyncio.Event()

    async def later(request: Request) -> Event:
        await goes_on.wait()
        return result(request)

    engines = Engines(later)

    async def scenario() -> None:
        async with linked(engines) as link:
            with link.admit(encode_request()) as ticket:
                ROUTERS["engine"] = router
                for there in (False, True):
                    router.there = there
                    seen = router.looks
                    while router.looks < seen + 3:
                        await asyncio.sleep(0.01)
                goes_on.set()
                assert isinstance(await asyncio.wait_for(ticket.next(), 60), EncodeResult)

    asyncio.run(scenario())


def test_a_replica_with_requests_that_says_nothing_is_looked_for(router: Router) -> None:
    engines = Engines(never)

    async def scenario() -> None:
        async with linked(engines) as link:
            ROUTERS["engine"] = router
            with link.admit(encode_request()):
                await first_sent(engines)
                router.put(engines, "quiet")
                while not router.looked_for:
                    await asyncio.sleep(0.01)
                assert router.looked_for[0] == "quiet"

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_requests_of_a_silent_replica_are_told_or_asked_of_another(router: Router) -> None:
    engines = Engines(never, never, answered)

    async def scenario() -> None:
        async with linked(engines) as link:
            ROUTERS["engine"] = router
            with (
                link.admit(generate_request(stream=False)) as told,
                link.admit(encode_request()) as asked_again,
            ):
                while len(engines.asked) < 2:
                    await asyncio.sleep(0.01)
                router.put(engines, "gone")
                router.silent.add("gone")
                event = await asyncio.wait_for(told.next(), 60)
                assert isinstance(event, Failure)
                assert event.code == "worker_lost"
                assert isinstance(await asyncio.wait_for(asked_again.next(), 60), EncodeResult)
                assert len(engines.asked) == 3
                assert [one.cancelled for one in engines.responses] == [True, True, False]
                assert not router.placed.by_replica()

    asyncio.run(scenario())


def test_a_call_that_is_taken_back_leaves_nobody_waiting() -> None:
    async def cancelled(request: Request) -> Event:
        raise asyncio.CancelledError

    engines = Engines(cancelled, answered)
    (event,) = outcome(engines, encode_request())
    assert isinstance(event, EncodeResult)
    (event,) = outcome(Engines(cancelled), generate_request(stream=False))
    assert isinstance(event, Failure)
    assert event.code == "worker_lost"


def test_calls_of_one_http_request_do_not_share_its_id() -> None:
    """As Ray Serve has it: a variable of the request's context, which calls made in it take."""
    of_request: ContextVar[str] = ContextVar("of_request", default="")
    seen: list[str] = []

    def answer(request: Request) -> Awaitable[Event]:
        seen.append(of_request.get())
        return answered(request)

    def hear(to: Addressed, message: Message) -> Response:
        async def heard() -> bool:
            return True

        seen.append(of_request.get())
        return Response(heard())

    async def scenario() -> None:
        engines = Engines(*[answer] * 2)
        engines.hear = SimpleNamespace(remote=hear)
        async with linked(engines) as link:
            of_request.set("one")
            with link.admit(encode_request()) as first, link.admit(encode_request()) as second:
                link.tell(Preload("v1"))
                await first.next()
                await second.next()

    asyncio.run(scenario())
    assert seen == [""] * 3


def test_a_message_that_cannot_be_sent_harms_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "ASK_EVERY_S", 0.01)
    tried: list[Any] = []

    def broken(to: Any, *message: Any) -> Response:
        tried.append(message)
        raise RuntimeError("the handle is broken")

    engines = Engines(answered)

    async def scenario() -> None:
        async with linked(engines) as link:
            ended: list[bool] = []
            link.end = lambda: ended.append(True)
            working = engines.state.remote
            engines.hear = SimpleNamespace(remote=broken)
            engines.state = SimpleNamespace(remote=broken)
            link.tell(Preload("v1"))
            while (Preload("v1"),) not in tried or () not in tried:
                await asyncio.sleep(0.01)
            assert ended == []
            asked = asyncio.Event()

            def asked_again(to: Any) -> Any:
                asked.set()
                return working(to)

            engines.state = SimpleNamespace(remote=asked_again)
            await asyncio.wait_for(asked.wait(), 30)
            with link.admit(encode_request()) as ticket:
                assert isinstance(await asyncio.wait_for(ticket.next(), 60), EncodeResult)

    with caplog.at_level(logging.INFO):
        asyncio.run(asyncio.wait_for(scenario(), 60))
    assert [one.levelname for one in caplog.records if "hear" in one.getMessage()] == ["WARNING"]
    assert not [one for one in caplog.records if "state" in one.getMessage()]
