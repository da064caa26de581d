"""What the users act on: a running server, many adapters on it, and the answers they must give.

Before traffic starts, the adapters that the server already has are multiplied (their B factors
scaled, so that each variant answers differently), uploaded through the admin endpoint, and each is
asked every question once, alone. Under load every answer is compared with that one.
"""

from __future__ import annotations

import io
import json
import math
import random
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2

TEXTS = (
    "One of the finest films of the year: warm, funny and beautifully played.",
    "A dull, clumsy mess. I wanted my two hours back and so did everybody in the row.",
    "Stocks fell on Friday as oil prices climbed and retailers cut their forecasts.",
    "The home side scored twice in the last ten minutes to win the cup.",
    "Not as good as the book, but the acting carries it a long way.",
)
PROMPTS = ("The king", "In the morning", "My lord, I have", "The company said")
NEW_TOKENS = 12
SCORE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.06}


@dataclass(frozen=True)
class Adapter:
    """One adapter of the running server and what it must answer, by question."""

    name: str
    version: str
    task: str
    expected: Mapping[str, Any]


@dataclass
class Stage:
    """The adapters under test, with a Zipf law of popularity over them."""

    exact: bool
    tolerance: float
    new_tokens: int = NEW_TOKENS
    classifiers: list[Adapter] = field(default_factory=list)
    generators: list[Adapter] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """For another process that acts on the same server."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Stage:
        """The inverse of `save`."""
        told = json.loads(path.read_text())
        for kind in ("classifiers", "generators"):
            told[kind] = [Adapter(**one) for one in told[kind]]
        return cls(**told)

    def pick(
        self, adapters: Sequence[Adapter], rng: random.Random, exponent: float = 1.0
    ) -> Adapter:
        """An adapter by Zipf's law: the k-th is asked in proportion to 1 / k ** exponent."""
        weights = [rank**-exponent for rank in range(1, len(adapters) + 1)]
        return rng.choices(adapters, weights)[0]

    def fault_in_scores(self, adapter: Adapter, text: str, answer: Any) -> str | None:
        """None, or one line on how a classification differs from the answer given alone."""
        expected = {row["label"]: row["score"] for row in adapter.expected[text]}
        found = {row["label"]: row["score"] for row in answer}
        if expected.keys() != found.keys():
            return f"labels {sorted(found)} in place of {sorted(expected)}"
        worst = max(abs(expected[label] - found[label]) for label in expected)
        if not worst <= self.tolerance:  # also true for NaN
            return f"a score is off by {worst:.3g} (allowed {self.tolerance:g})"
        return None

    def fault_in_text(self, adapter: Adapter, prompt: str, text: str, tokens: int) -> str | None:
        """None, or one line on how a generated text differs from the text given alone.

        bfloat16 rounds differently in batches of different sizes, so there only the length of the
        answer can be held to; in float32 the text must be the same to the letter.
        """
        if self.exact and text != adapter.expected[prompt]:
            return f"text {text!r} in place of {adapter.expected[prompt]!r}"
        if not 1 <= tokens <= self.new_tokens:
            return f"{tokens} tokens, asked for {self.new_tokens}"
        return None


def set_stage(
    url: str,
    admin_key: str,
    demo_dir: Path,
    variants: int,
    dtype: str,
    *,
    new_tokens: int = NEW_TOKENS,
) -> Stage:
    """Multiply the adapters found in ``demo_dir``, register the copies, and note every answer.

    Args:
        url: Of the running server, without a trailing slash.
        admin_key: Bearer key of the admin endpoints.
        demo_dir: Folder of PEFT adapter folders that the server was started with.
        variants: How many copies to make in all; they take turns over the adapters.
        dtype: The server's compute dtype; decides how closely answers must agree.
        new_tokens: Of every generated answer, at most.
    """
    stage = Stage(dtype == "fp32", SCORE_TOLERANCE[dtype], new_tokens)
    with httpx2.Client(base_url=url, timeout=120) as client:
        headers = {"Authorization": f"Bearer {admin_key}"}
        sources = sorted(path for path in demo_dir.iterdir() if path.is_dir())
        for index in range(variants):
            source = sources[index % len(sources)]
            name = f"load-{source.name}-{index:03d}"
            reply = client.post(
                "/admin/adapters",
                data={"name": name, "replace": "true"},
                files={"file": (f"{name}.tar", archive(source, seed=index))},
                headers=headers,
            )
            reply.raise_for_status()
        listed = client.get("/admin/adapters", params={"limit": 1000}, headers=headers)
        listed.raise_for_status()
        for record in listed.json()["adapters"]:
            adapter = examine(client, record, new_tokens)
            if adapter.task == "text-classification":
                stage.classifiers.append(adapter)
            elif adapter.task == "text-generation":
                stage.generators.append(adapter)
    random.Random(7).shuffle(stage.classifiers)
    random.Random(7).shuffle(stage.generators)
    return stage


def examine(
    client: httpx2.Client, record: Mapping[str, Any], new_tokens: int = NEW_TOKENS
) -> Adapter:
    """Ask one adapter every question, one request at a time."""
    name, task = record["name"], record["task"]
    expected: dict[str, Any] = {}
    if task == "text-classification":
        for text in TEXTS:
            reply = client.post("/predict", params={"adapter": name}, json={"inputs": text})
            reply.raise_for_status()
            expected[text] = reply.json()
    elif task == "text-generation":
        for prompt in PROMPTS:
            body = {"inputs": prompt, "parameters": {"max_new_tokens": new_tokens}}
            reply = client.post("/generate", params={"adapter": name}, json=body)
            reply.raise_for_status()
            expected[prompt] = reply.json()["generated_text"]
    return Adapter(name, record["version"], task, expected)


def archive(source: Path, seed: int) -> bytes:
    """A tar of the adapter in ``source`` with its B factors scaled by a seeded amount."""
    from safetensors.torch import load_file, save

    factor = 1.0 + 0.5 * math.sin(1.0 + seed)
    tensors = {
        key: value * factor if key.endswith(("_B", "_B.weight")) else value
        for key, value in load_file(source / "adapter_model.safetensors").items()
    }
    members = {"adapter_model.safetensors": save(tensors, {"format": "pt"})}
    for name in ("adapter_config.json", "config.json"):
        if (source / name).is_file():
            members[name] = json.dumps(json.loads((source / name).read_text())).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()
