"""Structured output: a thousand schemas, alone and beside free generation, and what it costs.

    python -m loadtests.structured --schemas FOLDER --count 1000

Every ``*.json`` below the folder is a JSON schema; without a folder random ones are made, the same
for the same seed. Each is asked for alone in its turn, and again in a batch with free generation.
Every finished answer has to be JSON that a validator of another make takes; what the server refuses
is counted by its reason. Then the same server generates free texts and held ones in turns, as many
tokens at once, and the rates are compared. The server runs the embedded demo, or ``--base``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs

from loadtests.servers import ready_server

PROMPT = "The film was"
WORKERS = 16
RATE_TOKENS = 96
LONG_PATTERN = "[A-Za-z ,.]{600,700}"  # no answer ends before its tokens do
GOAL_RATIO = 0.9
KINDS = ("string", "integer", "boolean", "enum", "number", "object", "array", "anyOf")


@dataclass
class Tally:
    """What became of the schemas."""

    valid: int = 0
    cut: int = 0  # by max_tokens
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        asked = self.valid + self.cut + len(self.wrong) + sum(self.refused.values())
        finished = self.valid + len(self.wrong)
        return (
            f"{asked} asked, {finished} finished, {self.valid} valid, {self.cut} cut short, "
            f"{sum(self.refused.values())} refused, {len(self.wrong)} wrong"
        )


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of the keywords that are kept."""
    kind = rng.choice(KINDS)
    if depth > 2 and kind in {"object", "array", "anyOf"}:
        kind = "enum"
    if depth == 0:
        kind = "object"
    match kind:
        case "string":
            return rng.choice(
                [
                    {"type": "string", "maxLength": rng.randint(1, 12)},
                    {"type": "string", "pattern": f"^[a-z]{{1,{rng.randint(1, 9)}}}$"},
                    {"type": "string", "format": rng.choice(["date", "time", "ipv4", "uuid"])},
                ]
            )
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 999)}
        case "number":
            return {"type": "number", "exclusiveMinimum": 0, "maximum": rng.randint(1, 9)}
        case "boolean":
            return {"type": rng.choice(["boolean", ["boolean", "null"]])}
        case "enum":
            return {"enum": rng.sample(["a", "né", 1, 2.5, None, True, "x\ny"], rng.randint(1, 4))}
        case "array":
            least = rng.randint(0, 2)
            items = random_schema(rng, depth + 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + 2}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    names = rng.sample(["id", "name", "tags", "größe", "at", "next"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def schemas(folder: Path | None, count: int, seed: int) -> Iterator[tuple[str, Any]]:
    """Names and schemas."""
    rng = random.Random(seed)
    if folder is None:
        for number in range(count):
            yield f"random-{seed}-{number}", random_schema(rng)
        return
    files = sorted(folder.rglob("*.json"))
    rng.shuffle(files)
    for file in files[:count]:
        yield str(file.relative_to(folder)), json.loads(file.read_text(encoding="utf-8"))


def reason_of(error: dict[str, Any]) -> str:
    """A refusal without what is the schema's own."""
    found = re.search(r"found: ([^;]*)", error["message"])
    text = found.group(1) if found else error["message"]
    named = re.sub(r" at /.*|^at .*JSON schema: ", "", text)
    return f"{error['code']}: {re.sub(r'[0-9]+', 'N', named)[:60]}"


class Asker:
    """Asks one server.

    Args:
        client: Of its address.
        tokens: Of an answer at most.
    """

    def __init__(self, client: httpx2.Client, tokens: int) -> None:
        self.client = client
        self.tokens = tokens

    def schema(self, named: tuple[str, Any], seed: int, tally: Tally) -> None:
        name, schema = named
        body = {
            "prompt": PROMPT,
            "max_tokens": self.tokens,
            "seed": seed,
            "temperature": 1.0,
            "structured_outputs": {"json": schema},
        }
        answer = self.client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            error = answer.json()["error"]
            tally.refused[reason_of(error)] += 1
            return
        (choice,) = answer.json()["choices"]
        if choice["finish_reason"] == "length":
            tally.cut += 1
            return
        try:
            fault = fault_of(schema, json.loads(choice["text"]))
        except ValueError as error:
            fault = str(error)
        if fault is None:
            tally.valid += 1
        else:
            tally.wrong.append(f"{name}: {choice['text'][:120]!r}: {fault[:160]}")

    def free(self, seed: int) -> None:
        body = {"prompt": PROMPT, "max_tokens": 48, "seed": seed}
        self.client.post("/v1/completions", json=body).raise_for_status()

    def rate(self, rows: list[dict[str, Any]]) -> float:
        """Tokens a second of rows that are asked at once."""

        def one(at: int) -> int:
            body = {"prompt": PROMPT, "max_tokens": RATE_TOKENS, "seed": at, "ignore_eos": True}
            answer = self.client.post("/v1/completions", json={**body, **rows[at]})
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        began = time.perf_counter()
        with ThreadPoolExecutor(len(rows)) as pool:
            tokens = sum(pool.map(one, range(len(rows))))
        return tokens / (time.perf_counter() - began)


def fault_of(schema: Any, value: Any) -> str | None:
    """What another validator says against a value; None: nothing, or nothing of the schema."""
    try:
        validator = jsonschema_rs.validator_for(schema)
    except Exception:  # noqa: BLE001  # a schema that it does not take at all
        return None
    found = next(iter(validator.iter_errors(value)), None)
    return None if found is None else str(found.message)


def measure(asker: Asker, rounds: int) -> dict[str, list[float]]:
    """Rates of free and of held rows, in turns."""
    held = {"structured_outputs": {"regex": LONG_PATTERN}}
    sides: dict[str, list[dict[str, Any]]] = {
        "free": [{}] * WORKERS,
        "1 held of 16": [held, *([{}] * (WORKERS - 1))],
        "all held": [held] * WORKERS,
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for rows in sides.values():
        asker.rate(rows)  # strategies are timed, grammars compiled
    for _ in range(rounds):
        for name, rows in sides.items():
            rates[name].append(asker.rate(rows))
    return rates


def tell_rates(rates: dict[str, list[float]]) -> None:
    """Each side's rate, and how much of the free one in the same round."""
    for name, values in rates.items():
        ratios = [value / free for value, free in zip(values, rates["free"], strict=True)]
        goal = f", goal {GOAL_RATIO}" if name == "all held" else ""
        print(
            f"{name}: {statistics.median(values):.1f} tokens/s, {statistics.median(ratios):.3f} of "
            f"free (rounds {min(ratios):.3f} to {max(ratios):.3f}{goal})",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.structured", description=__doc__)
    parser.add_argument("--schemas", type=Path, default=None)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5, help="0: no rates are measured")
    parser.add_argument("--base", default=None)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    arguments = ["--base", given.base] if given.base else []
    arguments += ["--threads", str(given.threads)] if given.threads else []
    failed = False
    with (
        tempfile.TemporaryDirectory() as folder,
        ready_server(Path(folder) / "data", given.dtype, Path(folder), *arguments) as server,
    ):
        limits = httpx2.Limits(max_connections=2 * WORKERS)
        asker = Asker(httpx2.Client(base_url=server.url, timeout=600, limits=limits), given.tokens)
        if given.rounds:
            tell_rates(measure(asker, given.rounds))
        listed = list(schemas(given.schemas, given.count, given.seed))
        for beside in (0, WORKERS // 2):
            tally = Tally()
            with ThreadPoolExecutor(WORKERS) as pool:
                work: list[Any] = []
                for seed, one in enumerate(listed):
                    work.append(pool.submit(asker.schema, one, seed, tally))
                    if beside and seed % 2:
                        work.append(pool.submit(asker.free, seed))
                for task in work:
                    task.result()
            print(f"{'beside free generation' if beside else 'alone'}: {tally.line()}", flush=True)
            for reason, times in tally.refused.most_common():
                print(f"  {times:5} {reason}")
            for line in tally.wrong:
                print(f"  WRONG {line}")
            failed |= bool(tally.wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
