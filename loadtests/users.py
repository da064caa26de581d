"""Locust's user: classifies, generates, streams, leaves, trickles or administers.

Every answer is compared with the one that its adapter gave alone. Each request is reported under
one of few names; a refusal with 429 is reported as such and is no failure.
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import gevent
from locust import FastHttpUser, task

from loadtests.scenarios import COMMON, LEFT, RARE, REFUSED, REMOVED, TRICKLED, WRONG
from loadtests.stage import PROMPTS, TEXTS, Adapter, Stage, archive

DEMO_DIR = Path(__file__).parents[1] / "server" / "demo" / "adapters"
TRICKLE_S, IDLE_S = 0.2, 0.05
RETRY_MAX_S = 60
PAUSES_S = {"operate": (0.2, 0.8), "leave": (0.3, 0.6)}


class Cast:
    """Who does what: as many members in each role as the present stage asks for."""

    def __init__(self) -> None:
        self.wanted: Mapping[str, int] = {}
        self.taken: Counter[str] = Counter()

    def role(self, present: str | None) -> str | None:
        """The role of a member who is between two requests; None: there is none for it."""
        if present is not None:
            if self.taken[present] <= self.wanted.get(present, 0):
                return present
            self.leave(present)
        for role, number in self.wanted.items():
            if self.taken[role] < number:
                self.taken[role] += 1
                return role
        return None

    def leave(self, present: str | None) -> None:
        if present is not None:
            self.taken[present] -= 1


class Prepared:
    """What all users of a run share; the stage is set before the first of them is made."""

    stage: ClassVar[Stage]
    zipf: ClassVar[float] = 1.0
    cast: ClassVar[Cast] = Cast()


class Member(FastHttpUser):
    """One client, in the role that the present stage of the run has for it."""

    network_timeout = 90.0
    connection_timeout = 30.0

    def on_start(self) -> None:
        self.role: str | None = None
        self.content = b""  # of the last upload
        self.stage = Prepared.stage
        self.rng = random.Random()

    def on_stop(self) -> None:
        Prepared.cast.leave(self.role)
        self.role = None

    def wait_time(self) -> float:
        return self.rng.uniform(*PAUSES_S.get(self.role or "", (0.0, 0.05)))

    @task
    def act(self) -> None:
        self.role = Prepared.cast.role(self.role)
        if self.role is None:
            gevent.sleep(IDLE_S)
        else:
            getattr(self, self.role)()

    # Roles

    def classify(self) -> None:
        """One text or three, to any adapter."""
        adapter = self._pick(self.stage.classifiers)
        texts = self.rng.sample(TEXTS, self.rng.choice((1, 1, 1, 3)))
        body = {"inputs": texts if len(texts) > 1 else texts[0]}
        began = time.monotonic()
        with self._asked("/predict", adapter, body) as reply:
            if self._is_refused(reply):
                return
            fault = fault_in_headers(reply, adapter)
            if fault is None:
                answers = reply.json() if len(texts) > 1 else [reply.json()]
                faults = map(self.stage.fault_in_scores, [adapter] * len(texts), texts, answers)
                fault = wrong(next((one for one in faults if one), None))
            if fault:
                reply.failure(fault)
                return
        if Prepared.zipf > 1.0:
            kind = COMMON if adapter is self.stage.classifiers[0] else RARE
            report(self, kind, began, None, adapter=adapter.name)

    def generate(self) -> None:
        """A few tokens, all at once."""
        adapter, prompt = self._pick(self.stage.generators), self.rng.choice(PROMPTS)
        parameters = {"max_new_tokens": self.stage.new_tokens, "details": True}
        body = {"inputs": prompt, "parameters": parameters}
        with self._asked("/generate", adapter, body) as reply:
            if self._is_refused(reply):
                return
            fault = fault_in_headers(reply, adapter)
            if fault is None:
                answer = reply.json()
                tokens, text = answer["details"]["generated_tokens"], answer["generated_text"]
                fault = wrong(self.stage.fault_in_text(adapter, prompt, text, tokens))
            if fault:
                reply.failure(fault)

    def stream(self) -> None:
        """A few tokens, one by one."""
        adapter, prompt = self._pick(self.stage.generators), self.rng.choice(PROMPTS)
        body = {"inputs": prompt, "parameters": {"max_new_tokens": self.stage.new_tokens}}
        with self._asked("/generate_stream", adapter, body) as reply:
            if self._is_refused(reply):
                return
            fault = fault_in_headers(reply, adapter)
            if fault is None:
                fault = wrong(fault_in_stream(self.stage, adapter, prompt, reply.text))
            if fault:
                reply.failure(fault)

    def leave(self) -> None:
        """Go away in the middle of a stream."""
        adapter, prompt = self._pick(self.stage.generators), self.rng.choice(PROMPTS)
        body = {"inputs": prompt, "parameters": {"max_new_tokens": 64}}
        began = time.monotonic()
        with Socket(self.host, f"/generate_stream?adapter={adapter.name}", body) as stream:
            stream.send(stream.raw)
            head = stream.read(4096)
        fault = None if head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 429")) else repr(head[:100])
        report(self, LEFT, began, fault)

    def trickle(self) -> None:
        """Send the request a few bytes at a time and read the stream so."""
        adapter, prompt = self._pick(self.stage.generators), self.rng.choice(PROMPTS)
        body = {"inputs": prompt, "parameters": {"max_new_tokens": self.stage.new_tokens}}
        began, taken = time.monotonic(), b""
        with Socket(self.host, f"/generate_stream?adapter={adapter.name}", body) as stream:
            for piece in stream.pieces(8):
                stream.send(piece)
                gevent.sleep(TRICKLE_S)
            while piece := stream.read(256):
                taken += piece
                gevent.sleep(TRICKLE_S)
        if taken.startswith(b"HTTP/1.1 429"):
            report(self, REFUSED, began, None)
        elif not taken.startswith(b"HTTP/1.1 200"):
            report(self, TRICKLED, began, f"answer {taken[:100]!r}")
        else:
            text = taken.split(b"\r\n\r\n", 1)[1].decode("utf-8", "replace")
            report(self, TRICKLED, began, wrong(fault_in_stream(self.stage, adapter, prompt, text)))

    def operate(self) -> None:
        """Register, replace, ask and remove an adapter of its own."""
        name = f"churn-{self.rng.randrange(10**9)}"
        self._register(name, replace=False, expected_status=201)
        self._register(name, replace=False, expected_status=409)
        version = self._register(name, replace=True, expected_status=201)
        if version is None:
            return  # reported already
        path, body = f"/predict?adapter={name}", {"inputs": TEXTS[0]}
        label = "/predict (new adapter)"
        with self.client.post(path, json=body, name=label, catch_response=True) as reply:
            found = reply.headers.get("X-Adapter-Version") if reply.headers else None
            if reply.status_code == 200 and found != version:
                reply.failure(wrong(f"version {found}, expected {version}"))
            elif reply.status_code not in {200, 429}:
                reply.failure(f"status {reply.status_code}")
            else:
                reply.success()
        self.client.delete(f"/admin/adapters/{name}", headers=admin(), name=REMOVED)
        label = "/predict (removed adapter)"
        with self.client.post(path, json=body, name=label, catch_response=True) as reply:
            if reply.status_code in {404, 429}:  # it may be refused before the name is read
                reply.success()
            else:
                reply.failure(wrong(f"status {reply.status_code} for a removed adapter, not 404"))

    # What they share

    def _pick(self, adapters: list[Adapter]) -> Adapter:
        return self.stage.pick(adapters, self.rng, Prepared.zipf)

    def _asked(self, path: str, adapter: Adapter, body: Any) -> Any:
        url = f"{path}?adapter={adapter.name}"
        return self.client.post(url, json=body, name=path, catch_response=True)

    def _is_refused(self, reply: Any) -> bool:
        """Whether it was refused, and properly so; reported under a name of its own."""
        if reply.status_code != 429:
            return False
        told = reply.headers.get("Retry-After", "")
        if told.isascii() and told.isdigit() and 1 <= int(told) <= RETRY_MAX_S:
            reply.request_meta["name"] = REFUSED
            reply.success()
        else:
            reply.failure(f"429 with Retry-After {told!r}")
        gevent.sleep(0.2)  # sooner than it was told to: the load must stay
        return True

    def _register(self, name: str, *, replace: bool, expected_status: int) -> str | None:
        content = self.rng.choice([one for one in uploads() if one != self.content])
        self.content = content
        boundary = "hira-loadtest-boundary"
        part = f"--{boundary}\r\nContent-Disposition: form-data; name="
        body = (
            f'{part}"name"\r\n\r\n{name}\r\n'
            f'{part}"replace"\r\n\r\n{str(replace).lower()}\r\n'
            f'{part}"file"; filename="{name}.tar"\r\nContent-Type: application/x-tar\r\n\r\n'
        ).encode()
        body += content
        body += f"\r\n--{boundary}--\r\n".encode()
        with self.client.post(
            "/admin/adapters",
            data=body,
            headers={**admin(), "Content-Type": f"multipart/form-data; boundary={boundary}"},
            name=f"/admin/adapters (expects {expected_status})",
            catch_response=True,
        ) as reply:
            if reply.status_code != expected_status:
                said = (reply.text or "")[:300]
                reply.failure(f"status {reply.status_code}, expected {expected_status}: {said}")
                return None
            reply.success()
            return reply.json().get("version") if expected_status == 201 else None


class Socket:
    """A request over a bare connection, sent and read as slowly as one likes."""

    def __init__(self, host: str, path: str, body: Any) -> None:
        place = urlsplit(host)
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self.raw = head.encode() + content
        self.socket = socket.create_connection((place.hostname, place.port), timeout=60)

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def pieces(self, count: int) -> list[bytes]:
        size = -(-len(self.raw) // count)
        return [self.raw[at : at + size] for at in range(0, len(self.raw), size)]

    def send(self, piece: bytes) -> None:
        self.socket.sendall(piece)

    def read(self, most: int) -> bytes:
        try:
            return self.socket.recv(most)
        except OSError:
            return b""


@cache
def uploads() -> list[bytes]:
    """Adapters to register; made once, because it is the server that shall be busy."""
    sources = [DEMO_DIR / "hira-imdb", DEMO_DIR / "hira-sst2"]
    return [archive(sources[one % 2], seed=1000 + one) for one in range(8)]


def admin() -> dict[str, str]:
    return {"Authorization": f"Bearer {os.environ['HIRA_LOADTEST_ADMIN_KEY']}"}


def wrong(fault: str | None) -> str | None:
    """Marks a fault as a wrong answer, which is worse than none."""
    return None if fault is None else f"{WRONG}: {fault}"


def fault_in_headers(reply: Any, adapter: Adapter) -> str | None:
    """None, or one line on why this is no answer of ``adapter``."""
    if reply.status_code != 200:
        return f"status {reply.status_code}: {(reply.text or '')[:200]}"
    found = (reply.headers.get("X-Adapter"), reply.headers.get("X-Adapter-Version"))
    if found != (adapter.name, adapter.version):
        return wrong(f"answered by {found}, asked {adapter.name} {adapter.version}")
    return None


def report(user: Any, name: str, began: float, fault: str | None, **context: str) -> None:
    """Tell Locust of a request that it did not make itself."""
    user.environment.events.request.fire(
        request_type="POST",
        name=name,
        response_time=(time.monotonic() - began) * 1e3,
        response_length=0,
        exception=None if fault is None else AssertionError(fault),
        context=context,
    )


def fault_in_stream(stage: Stage, adapter: Adapter, prompt: str, text: str) -> str | None:
    """None, or one line on what is wrong with a stream of events."""
    lines = [line[line.index("data:") :] for line in text.splitlines() if "data:" in line]
    try:
        last = json.loads(lines[-1].removeprefix("data:")) if lines else {}
    except ValueError:
        last = {}
    if last.get("generated_text") is None:
        return f"the stream did not end in a final event: {text[-200:]!r}"
    return stage.fault_in_text(adapter, prompt, last["generated_text"], len(lines))
