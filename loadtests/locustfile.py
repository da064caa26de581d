"""Locust users: classification, generation, streaming and an operator, all at once.

Run through `make loadtest`, or against a server of your own:
`locust -f loadtests/locustfile.py --host http://127.0.0.1:8000` with HIRA_LOADTEST_ADMIN_KEY set.
Any wrong answer, wrong version or unexpected status is a failure.
"""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path
from typing import Any

from locust import FastHttpUser, between, events, task

from loadtests.stage import (
    NEW_TOKENS,
    PROMPTS,
    TEXTS,
    Adapter,
    Stage,
    archive,
    set_stage,
)

DEMO_DIR = Path(__file__).parents[1] / "server" / "demo" / "adapters"
stage: Stage | None = None


@events.init.add_listener  # not test_start: the time of the run counts from before that
def prepare(environment: Any, **_: Any) -> None:
    global stage  # noqa: PLW0603  # Locust gives its users no other way to share what was prepared
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stage = set_stage(
        environment.parsed_options.host,
        os.environ["HIRA_LOADTEST_ADMIN_KEY"],
        DEMO_DIR,
        variants=int(os.environ.get("HIRA_LOADTEST_VARIANTS", "24")),
        dtype=os.environ.get("HIRA_LOADTEST_DTYPE", "fp32"),
    )


class Asking(FastHttpUser):
    """Common ground of the users that ask for answers."""

    abstract = True
    wait_time = between(0.0, 0.05)

    def on_start(self) -> None:
        assert stage is not None
        self.stage = stage
        self.rng = random.Random()

    def fault_in_headers(self, reply: Any, adapter: Adapter) -> str | None:
        if reply.status_code != 200:
            return f"status {reply.status_code}: {reply.text[:200]}"
        if reply.headers.get("X-Adapter") != adapter.name:
            return f"answered by {reply.headers.get('X-Adapter')}, asked {adapter.name}"
        if reply.headers.get("X-Adapter-Version") != adapter.version:
            return f"version {reply.headers.get('X-Adapter-Version')} of {adapter.name}"
        return None


class Classifying(Asking):
    weight = 6

    @task
    def predict(self) -> None:
        adapter = self.stage.pick(self.stage.classifiers, self.rng)
        texts = self.rng.sample(TEXTS, self.rng.choice((1, 1, 1, 3)))
        body = {"inputs": texts if len(texts) > 1 else texts[0]}
        url = f"/predict?adapter={adapter.name}"
        with self.client.post(url, json=body, name="/predict", catch_response=True) as reply:
            fault = self.fault_in_headers(reply, adapter)
            if fault is None:
                answers = reply.json() if len(texts) > 1 else [reply.json()]
                faults = map(self.stage.fault_in_scores, [adapter] * len(texts), texts, answers)
                fault = next((found for found in faults if found), None)
            if fault:
                reply.failure(fault)


class Generating(Asking):
    weight = 2

    @task
    def generate(self) -> None:
        adapter = self.stage.pick(self.stage.generators, self.rng)
        prompt = self.rng.choice(PROMPTS)
        body = {
            "inputs": prompt,
            "parameters": {"max_new_tokens": NEW_TOKENS, "details": True},
        }
        url = f"/generate?adapter={adapter.name}"
        with self.client.post(url, json=body, name="/generate", catch_response=True) as reply:
            fault = self.fault_in_headers(reply, adapter)
            if fault is None:
                answer = reply.json()
                fault = self.stage.fault_in_text(
                    adapter,
                    prompt,
                    answer["generated_text"],
                    answer["details"]["generated_tokens"],
                )
            if fault:
                reply.failure(fault)


class Streaming(Asking):
    weight = 1

    @task
    def stream_tokens(self) -> None:
        adapter = self.stage.pick(self.stage.generators, self.rng)
        prompt = self.rng.choice(PROMPTS)
        body = {"inputs": prompt, "parameters": {"max_new_tokens": NEW_TOKENS}}
        url = f"/generate_stream?adapter={adapter.name}"
        with self.client.post(
            url, json=body, name="/generate_stream", catch_response=True
        ) as reply:
            fault = self.fault_in_headers(reply, adapter)
            if fault is None:
                lines = [line for line in reply.text.splitlines() if line.startswith("data:")]
                last = json.loads(lines[-1].removeprefix("data:")) if lines else {}
                if last.get("generated_text") is None:
                    fault = f"the stream did not end in a final event: {reply.text[-200:]!r}"
                else:
                    fault = self.stage.fault_in_text(
                        adapter, prompt, last["generated_text"], len(lines)
                    )
            if fault:
                reply.failure(fault)


class Operating(FastHttpUser):
    """Registers, replaces, asks and removes an adapter of its own, over and over."""

    fixed_count = 1
    wait_time = between(0.2, 0.8)

    def on_start(self) -> None:
        self.headers = {"Authorization": f"Bearer {os.environ['HIRA_LOADTEST_ADMIN_KEY']}"}
        self.rng = random.Random()
        self.sources = sorted(
            path for path in DEMO_DIR.iterdir() if "imdb" in path.name or "sst2" in path.name
        )

    @task
    def turn_over(self) -> None:
        name = f"churn-{self.rng.randrange(10**6)}"
        version = self.register(name, replace=False, expected_status=201)
        self.register(name, replace=False, expected_status=409)
        version = self.register(name, replace=True, expected_status=201)
        with self.client.post(
            f"/predict?adapter={name}",
            json={"inputs": TEXTS[0]},
            name="/predict (new adapter)",
            catch_response=True,
        ) as reply:
            if reply.status_code != 200 or reply.headers.get("X-Adapter-Version") != version:
                reply.failure(f"status {reply.status_code}, expected version {version}")
        self.client.delete(
            f"/admin/adapters/{name}", headers=self.headers, name="/admin/adapters (delete)"
        )
        with self.client.post(
            f"/predict?adapter={name}",
            json={"inputs": TEXTS[0]},
            name="/predict (removed adapter)",
            catch_response=True,
        ) as reply:
            if reply.status_code == 404:
                reply.success()
            else:
                reply.failure(f"status {reply.status_code} for a removed adapter, expected 404")

    def register(self, name: str, *, replace: bool, expected_status: int) -> str | None:
        content = archive(self.rng.choice(self.sources), seed=self.rng.randrange(10**6))
        boundary = "hira-loadtest-boundary"
        opening = f"--{boundary}\r\nContent-Disposition: form-data; "
        fields = {"name": name, "replace": str(replace).lower()}
        body = b"".join(
            f'{opening}name="{key}"\r\n\r\n{value}\r\n'.encode() for key, value in fields.items()
        )
        body += (
            f'{opening}name="file"; filename="{name}.tar"\r\n'
            "Content-Type: application/x-tar\r\n\r\n"
        ).encode()
        body += content + f"\r\n--{boundary}--\r\n".encode()
        with self.client.post(
            "/admin/adapters",
            data=body,
            headers={
                **self.headers,
                "Content-Type": f"multipart/form-data; boundary={boundary}",
            },
            name=f"/admin/adapters (expects {expected_status})",
            catch_response=True,
        ) as reply:
            if reply.status_code != expected_status:
                reply.failure(
                    f"status {reply.status_code}, expected {expected_status}: {reply.text[:300]}"
                )
                return None
            reply.success()
            return reply.json().get("version") if expected_status == 201 else None
