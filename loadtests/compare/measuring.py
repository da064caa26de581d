"""Puts every trained adapter on one running server for its base, and measures them through HTTP."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

from loadtests.compare import scores
from loadtests.compare.ask import classify, likelihood
from loadtests.compare.plan import SENTIMENT
from loadtests.compare.sources import Rows, test_rows
from loadtests.compare.training import Base, Trained
from loadtests.servers import Server, ready_server

TIMEOUT_S = 300
MIXED_ROWS = 256
UPLOADED = ("adapter_config.json", "adapter_model.safetensors", "config.json")


@dataclass(frozen=True)
class Measured:
    """One adapter, or the bare base, on one task.

    Args:
        task, method: Keys of the plan; no method is the bare base.
        record: What the server says of the adapter: parameters, bytes, sparsity, version.
        figures: What was measured, by name.
    """

    task: str
    method: str | None
    record: Mapping[str, Any]
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Served:
    """One server and all that was measured through it.

    Args:
        base: Its name.
        adapters: How many were registered at once.
        rows: What each task was measured on: rows, or characters of plain text.
        measured: In the order of the plan.
        mixed: By task: rows a second with all its adapters in turn, and labels that differ from
            those given alone.
        idle_bytes: Resident memory by process before the first adapter.
        peak_bytes: The most that each process ever held.
        load: Of the machine, one minute's average, at the beginning and at the end.
    """

    base: str
    adapters: int
    rows: Mapping[str, int]
    measured: tuple[Measured, ...]
    mixed: Mapping[str, Mapping[str, float]]
    idle_bytes: Mapping[str, int]
    peak_bytes: Mapping[str, int]
    load: tuple[float, float]


def measure_once(
    trained: Sequence[Trained], base: Base, root: Path, work: Path, *, dtype: str
) -> Served:
    """As `measure`; what was measured before of the same runs is not measured again."""
    kept = work / f"served-{base.name}.json"
    asked = [dtype, *(f"{one.task} {one.report}" for one in trained)]
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    if known.get("asked") == asked:
        made = known["served"]
        measured = tuple(Measured(**one) for one in made.pop("measured"))
        return Served(**made, measured=measured)
    served = measure(trained, base, root, work, dtype=dtype)
    kept.write_text(json.dumps({"asked": asked, "served": asdict(served)}, indent=1))
    return served


def measure(
    trained: Sequence[Trained], base: Base, root: Path, work: Path, *, dtype: str
) -> Served:
    """Register adapters of one base on one server and measure each task's test part.

    Args:
        trained: Of this base only.
        base: Served in NF4.
        root: Of the public files.
        work: The server's registry and log are kept here.
        dtype: The server's.

    Raises:
        SystemExit: The server did not come up.
        httpx2.HTTPStatusError: An adapter was refused, or an answer is none.
    """
    arguments = [f"--base={base.folder}", f"--base-name={base.name}", "--quantization=nf4"]
    longest = max(one.task.max_tokens for one in trained)
    if trained[0].task.kind == "SEQ_CLS":
        arguments.append(f"--max-input-tokens={longest}")
    store = work / f"served-{base.name}"
    with (
        ready_server(store, dtype, store, *arguments) as server,
        httpx2.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
    ):
        load = os.getloadavg()[0]
        idle = server.resident_bytes()
        records = {one.name: _register(client, server, one) for one in trained}
        measured: list[Measured] = []
        mixed: dict[str, dict[str, float]] = {}
        rows: dict[str, int] = {}
        tasks = {one.task.key: one.task for one in trained}
        for task in tasks.values():
            own = [one for one in trained if one.task.key == task.key]
            test = test_rows(task, root)
            if task.kind == "SEQ_CLS":
                rows[task.key] = len(test.texts)
                found, mixed[task.key] = _classified(client, own, test, records)
            else:
                rows[task.key] = len(test.texts[0])
                found = _read(client, own, records, base=base.name, text=test.texts[0])
            measured += found
        peak = _peak_bytes(server)
    return Served(
        base=base.name,
        adapters=len(trained),
        rows=rows,
        measured=tuple(measured),
        mixed=mixed,
        idle_bytes=idle,
        peak_bytes=peak,
        load=(load, os.getloadavg()[0]),
    )


def _register(client: httpx2.Client, server: Server, one: Trained) -> dict[str, Any]:
    with ExitStack() as stack:
        files = [
            ("files", (name, stack.enter_context((one.folder / name).open("rb"))))
            for name in UPLOADED
            if (one.folder / name).is_file()
        ]
        reply = client.post(
            "/admin/adapters",
            data={"name": one.name, "replace": "true"},
            files=files,
            headers=server.admin,
        )
    reply.raise_for_status()
    record: dict[str, Any] = reply.json()
    return record


def _classified(
    client: httpx2.Client,
    own: Sequence[Trained],
    test: Rows,
    records: Mapping[str, Mapping[str, Any]],
) -> tuple[list[Measured], dict[str, float]]:
    alone = {}
    measured = []
    for one in own:
        classify(client, [one.name], test.texts[:32], SENTIMENT)  # loads it
        answer = classify(client, [one.name], test.texts, SENTIMENT)[one.name]
        alone[one.name] = answer.predicted
        share = scores.accuracy(answer.predicted, test.labels)
        figures = {
            "accuracy": share,
            "margin": scores.margin(share, len(test.labels)),
            "f1": scores.f1(answer.predicted, test.labels),
            "rows_per_s": answer.rows_per_s,
        }
        measured.append(Measured(one.task.key, one.method.key, records[one.name], figures))
        _tell(one.name, figures)
    together = classify(client, list(alone), test.texts[:MIXED_ROWS], SENTIMENT)
    differing = sum(
        a != b
        for name, answer in together.items()
        for a, b in zip(answer.predicted, alone[name], strict=False)
    )
    # Each answer's time is its share of the whole, so the speed of all is that of any.
    speed = next(iter(together.values())).rows_per_s
    mixed = {
        "rows_per_s": speed,
        "labels": float(sum(len(one.predicted) for one in together.values())),
        "differing": float(differing),
    }
    _tell("all in turn", mixed)
    return measured, mixed


def _read(
    client: httpx2.Client,
    own: Sequence[Trained],
    records: Mapping[str, Mapping[str, Any]],
    *,
    base: str,
    text: str,
) -> list[Measured]:
    measured = []
    named = [(base, None), *((one.name, one.method.key) for one in own)]
    for name, method in named:
        likelihood(client, name, text[:2000])  # loads it
        found = likelihood(client, name, text)
        figures = {
            "perplexity": found.perplexity,
            "word_perplexity": found.word_perplexity,
            "bits_per_byte": found.bits_per_byte,
            "tokens": float(found.tokens),
            "tokens_per_s": found.tokens / found.seconds,
        }
        measured.append(Measured(own[0].task.key, method, records.get(name, {}), figures))
        _tell(name, figures)
    return measured


def _tell(name: str, figures: Mapping[str, float]) -> None:
    shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
    print(f"{name:<24}{shown}", flush=True)


def _peak_bytes(server: Server) -> dict[str, int]:
    """The most that the worker, and all processes together, ever held in memory."""
    main = psutil.Process(server.process.pid)
    peaks = []
    for one in (main, *main.children(recursive=True)):
        status = Path(f"/proc/{one.pid}/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        peaks += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return {"worker": max(peaks, default=0), "all processes": sum(peaks)}
