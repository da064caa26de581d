"""Sends hostile uploads to a server of its own, and judges: `python -m loadtests.fuzz_uploads`.

`python -m loadtests.fuzz_uploads --count 5000 [--json FILE]`; one mutant again, for a closer look:
`--first INDEX --count 1 --save FILE`. Each must be refused by a 4xx problem with a code, within
20 s. A mutation that did no harm may be accepted; such an adapter is asked once and removed again.
At the end the list of adapters, their answers, the memory and open files of all processes and the
staging folders must be as they were, and the log without a traceback. The exit status is not 0
when any of that does not hold.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from loadtests.mutants import Maker, Mutant
from loadtests.servers import Server, memory_faults, memory_lines, ready_server
from loadtests.stage import SCORE_TOLERANCE, TEXTS, archive

DEMO_DIR = Path(__file__).parents[1] / "server" / "demo" / "adapters"
SOURCE = DEMO_DIR / "hira-sst2"
KEPT = ("keep-0", "keep-1", "keep-2")
TIMEOUT_S = 20.0
WARM_UP = 200  # mutants before anything is measured
PAUSE_S = 8.0  # for the server to let go of what it holds
GROWTH_BYTES = 64 << 20  # that a process may gain
DESCRIPTORS = 4  # that a process may gain: connections of pools
SHOWN = 20
CLIENT_ERROR, SERVER_ERROR = 400, 500
OVERFLOWED = "output is not finite"  # large factors can be finite and their products not
PROBLEM_TYPE = "application/problem+json"
Row = tuple[str, str]  # kind, outcome


@dataclass
class Tally:
    """What the mutants of all threads came to."""

    rows: Counter[Row] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)  # answers of harmless mutants
    violations: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, mutant: Mutant, outcome: str, seconds: float) -> None:
        with self.lock:
            self.rows[mutant.kind, outcome] += 1
            self.slowest = max(self.slowest, (seconds, f"{mutant.kind}, mutant {mutant.index}"))

    def violate(self, mutant: Mutant, what: str) -> None:
        with self.lock:
            self.violations.append(f"mutant {mutant.index} ({mutant.kind}): {what}")


@dataclass(frozen=True)
class State:
    """What must be the same before and after."""

    adapters: dict[str, str]  # version by name
    answers: dict[str, list[dict[str, float]]]  # by name, one for each text
    resident: dict[str, int]
    files: dict[int, int]


def main() -> int:
    options = parse_options()
    warnings.filterwarnings("ignore", "Duplicate name", UserWarning)  # zipfile, of what we want
    maker = Maker(SOURCE, options.seed, KEPT)
    if options.save:
        options.save.write_bytes(maker.make(options.first).body)
    results = Path("loadtests/results/fuzz")
    # Small budgets: what the accepted mutants leave on the device is bounded before it is measured.
    budgets = ("--slots=8", "--host-bytes=16MiB", "--device-bytes=16MiB", "--folded-bytes=16MiB")
    with (
        tempfile.TemporaryDirectory(prefix="hira-fuzz-") as folder,
        ready_server(Path(folder), "fp32", results, *budgets) as server,
    ):
        register_kept(server)
        send_all(server, maker, range(-WARM_UP, 0), options.clients, Tally())
        before = state_of(server)
        began = time.monotonic()
        tally = Tally()
        indices = range(options.first, options.first + options.count)
        course = []  # a leak grows from quarter to quarter, a full cache does not
        for quarter in range(4):
            part = indices[quarter * len(indices) // 4 : (quarter + 1) * len(indices) // 4]
            send_all(server, maker, part, options.clients, tally)
            course.append(server.resident_bytes())
        seconds = time.monotonic() - began
        after = state_of(server)
        faults = tally.violations + differences(before, after) + left_behind(server)
        stopped = server.stop()
        if stopped != 0:
            faults.append(f"the server ended with status {stopped} (see {server.log})")
        faults += traces(server.log)
    report = {
        "count": options.count,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "outcomes": [[*row, count] for row, count in sorted(tally.rows.items())],
        "accepted_asked": dict(tally.asked),
        "slowest": [round(tally.slowest[0], 3), tally.slowest[1]],
        "resident_bytes": {
            "before": before.resident,
            "quarters": course,
            "after": after.resident,
        },
        "open_files": {
            "before": list(before.files.values()),
            "after": list(after.files.values()),
        },
        "faults": faults,
    }
    print_report(report)
    for fault in faults[:SHOWN]:
        print(f"FAULT: {fault}", file=sys.stderr)
    if len(faults) > SHOWN:
        print(f"FAULT: and {len(faults) - SHOWN} more", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if faults else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.fuzz_uploads", description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="index of the first mutant")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--clients", type=int, default=2, help="threads that upload")
    parser.add_argument("--save", type=Path, help="write the body of the first mutant here")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


def client_of(server: Server) -> httpx2.Client:
    return httpx2.Client(base_url=server.url, timeout=TIMEOUT_S, headers=server.admin)


def register_kept(server: Server) -> None:
    with client_of(server) as client:
        for name in KEPT:
            restore(client, name)


def restore(client: httpx2.Client, name: str) -> None:
    """Register a kept adapter, or put its right version back."""
    reply = client.post(
        "/admin/adapters",
        data={"name": name, "replace": "true"},
        files={"file": (f"{name}.tar", archive(SOURCE, KEPT.index(name)))},
    )
    reply.raise_for_status()


def send_all(server: Server, maker: Maker, indices: range, clients: int, tally: Tally) -> None:
    """Send the mutants of these indices, several at a time."""
    queue = iter(indices)

    def work() -> None:
        with client_of(server) as client:
            while True:
                with tally.lock:
                    index = next(queue, None)
                if index is None or server.process.poll() is not None:
                    return
                send(server, client, maker.make(index), tally)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if server.process.poll() is not None:
        raise SystemExit(f"the server ended with status {server.process.returncode}")


def send(server: Server, client: httpx2.Client, mutant: Mutant, tally: Tally) -> None:
    """Send one mutant, judge what came back, and undo what it did if it was harmless."""
    began = time.monotonic()
    if mutant.leave_after is not None:
        leave(server, mutant)
        tally.note(mutant, "no answer awaited", time.monotonic() - began)
        return
    headers = {} if mutant.content_type is None else {"Content-Type": mutant.content_type}
    try:
        reply = client.post("/admin/adapters", content=mutant.body, headers=headers)
    except httpx2.HTTPError as error:
        tally.note(mutant, type(error).__name__, time.monotonic() - began)
        tally.violate(mutant, f"{type(error).__name__} after {time.monotonic() - began:.1f} s")
        return
    seconds = time.monotonic() - began
    tally.note(mutant, outcome_of(reply), seconds)
    fault = fault_in(reply)
    if fault is not None:
        tally.violate(mutant, f"{fault}: {reply.text[:300]}")
    if reply.is_success:
        try:
            undo(client, reply, mutant, tally)
        except (httpx2.HTTPError, ValueError, KeyError) as error:
            tally.violate(mutant, f"accepted, and then {type(error).__name__}: {error}")


def leave(server: Server, mutant: Mutant) -> None:
    """Begin an upload and hang up."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    head = [
        "POST /admin/adapters HTTP/1.1",
        f"Host: {host}:{port}",
        *(f"{name}: {value}" for name, value in server.admin.items()),
        f"Content-Type: {mutant.content_type}",
        f"Content-Length: {len(mutant.body)}",
    ]
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n")
        connection.sendall(mutant.body[: mutant.leave_after])


def outcome_of(reply: httpx2.Response) -> str:
    try:
        return f"{reply.status_code} {reply.json()['code']}"
    except (ValueError, KeyError, TypeError):
        return str(reply.status_code)


def fault_in(reply: httpx2.Response) -> str | None:
    """None, or how an answer to an upload breaks the contract."""
    if reply.is_success:
        return None if reply.status_code in {200, 201} else f"status {reply.status_code}"
    if not CLIENT_ERROR <= reply.status_code < SERVER_ERROR:
        return f"status {reply.status_code}"
    if reply.headers.get("Content-Type") != PROBLEM_TYPE:
        return f"content type {reply.headers.get('Content-Type')}"
    try:
        problem = reply.json()
    except ValueError:
        return "a problem that is not JSON"
    if not isinstance(problem, dict) or not isinstance(problem.get("code"), str):
        return "a problem without a code"
    if problem.get("status") != reply.status_code:
        return f"status {reply.status_code}, the problem says {problem.get('status')}"
    return None


def undo(client: httpx2.Client, accepted: httpx2.Response, mutant: Mutant, tally: Tally) -> None:
    """Ask an adapter that was accepted after all, and remove it."""
    name = accepted.json()["name"]
    if random.Random(mutant.index).random() < 0.5:
        client.patch(f"/admin/adapters/{name}", json={"preload": True})
    reply = client.post("/predict", params={"adapter": name}, json={"inputs": TEXTS[0]})
    with tally.lock:
        tally.asked[outcome_of(reply)] += 1
    if reply.status_code >= SERVER_ERROR and OVERFLOWED not in reply.text:
        tally.violate(mutant, f"accepted, then /predict {reply.status_code}: {reply.text[:300]}")
    if name in KEPT:
        restore(client, name)
    else:
        client.delete(f"/admin/adapters/{name}").raise_for_status()


def state_of(server: Server) -> State:
    """Look at the server, after a pause without traffic."""
    with client_of(server) as client:
        answers = {}
        for name in KEPT:
            reply = client.post("/predict", params={"adapter": name}, json={"inputs": list(TEXTS)})
            reply.raise_for_status()
            answers[name] = [{row["label"]: row["score"] for row in rows} for rows in reply.json()]
        listed = client.get("/admin/adapters", params={"limit": 1000})
        listed.raise_for_status()
        adapters = {one["name"]: one["version"] for one in listed.json()["adapters"]}
    gc.collect()
    time.sleep(PAUSE_S)
    files = server.open_files()  # before the next connection is made
    return State(adapters, answers, server.resident_bytes(), files)


def differences(before: State, after: State) -> list[str]:
    """One line for each thing that is not as it was."""
    faults = [
        f"adapter {name}: {before.adapters.get(name)} before, {after.adapters.get(name)} after"
        for name in sorted(before.adapters.keys() | after.adapters.keys())
        if before.adapters.get(name) != after.adapters.get(name)
    ]
    for name, expected in before.answers.items():
        for old, new in zip(expected, after.answers[name], strict=True):
            same = old.keys() == new.keys() and all(
                abs(old[label] - new[label]) <= SCORE_TOLERANCE["fp32"] for label in old
            )
            if not same:
                faults.append(f"{name} answers {new} in place of {old}")
    faults += memory_faults(before.resident, after.resident, GROWTH_BYTES)
    if before.files.keys() != after.files.keys():
        faults.append(f"processes {sorted(after.files)} in place of {sorted(before.files)}")
    faults += [
        f"process {pid} has {after.files[pid]} open files in place of {count}"
        for pid, count in before.files.items()
        if after.files.get(pid, 0) > count + DESCRIPTORS
    ]
    return faults


def left_behind(server: Server) -> list[str]:
    """Files of uploads that are still there."""
    folders = (server.data_dir / "staging", server.data_dir / "store" / "staging")
    return [f"left behind: {path}" for folder in folders for path in folder.iterdir()]


def traces(log: Path) -> list[str]:
    """What the server logged as failures of its own."""
    text = log.read_text(errors="replace")
    count = text.count("Traceback (most recent call last)")
    return [f"{count} tracebacks in {log}"] if count else []


def print_report(report: dict[str, Any]) -> None:
    print(f"\n{'kind':<34}{'outcome':<36}{'count':>7}")
    for kind, outcome, count in report["outcomes"]:
        print(f"{kind:<34}{outcome:<36}{count:>7}")
    print(f"\n{'outcome, all kinds':<70}{'count':>7}")
    totals: Counter[str] = Counter()
    for _, outcome, count in report["outcomes"]:
        totals[outcome] += count
    for outcome, count in totals.most_common():
        print(f"{outcome:<70}{count:>7}")
    for outcome, count in sorted(report["accepted_asked"].items()):
        print(f"{'asked once accepted: ' + outcome:<70}{count:>7}")
    slowest, which = report["slowest"]
    print(f"\n{report['count']} uploads in {report['seconds']} s; slowest {slowest} s ({which})")
    files = report["open_files"]
    print(f"open files of each process: {files['before']} before, {files['after']} after\n")
    memory = report["resident_bytes"]
    print("\n".join(memory_lines(memory["before"], memory["after"])))
    for role in memory["before"]:
        course = ", ".join(f"{found.get(role, 0) / 2**20:.1f}" for found in memory["quarters"])
        print(f"{role} after each quarter: {course}")


if __name__ == "__main__":
    sys.exit(main())
