"""Starts a server of its own, lets Locust loose on it, and judges: `python -m loadtests`.

The exit status is not 0 when any answer was wrong, any error was unexpected, nothing was asked, or
the server did not come up or go down as it should.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests", description=__doc__)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=40)
    parser.add_argument("--variants", type=int, default=24, help="adapters registered beforehand")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--results", type=Path, default=Path("loadtests/results"))
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hira-loadtest-") as folder:
        url, server = start_server(Path(folder), options.dtype, options.results)
        try:
            wait_until_ready(url, server)
            locust = run_locust(url, Path(folder), options)
        finally:
            stopped = stop_server(server)
    faults = read_faults(options.results)
    print_table(options.results)
    if locust != 0:
        faults.append(f"locust ended with status {locust}")
    if stopped != 0:
        faults.append(f"the server ended with status {stopped} (see {options.results}/server.log)")
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


def start_server(data_dir: Path, dtype: str, results: Path) -> tuple[str, subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("hira")),
        "serve",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--dtype={dtype}",
        f"--data-dir={data_dir}",
    ]
    log = (results / "server.log").open("wb")
    return f"http://127.0.0.1:{port}", subprocess.Popen(command, stdout=log, stderr=log)


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < limit:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode} while starting")
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {START_TIMEOUT_S} s")


def run_locust(url: str, data_dir: Path, options: argparse.Namespace) -> int:
    command = [
        *(sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("locustfile.py"))),
        *("--headless", "--only-summary", "--host", url),
        *("--users", str(options.users), "--spawn-rate", str(options.users)),
        *("--run-time", f"{options.seconds}s", "--stop-timeout", "30"),
        *("--html", str(options.results / "report.html")),
        *("--csv", str(options.results / "report")),
        *("--exit-code-on-error", "1"),
    ]
    environment = {
        **os.environ,
        "HIRA_LOADTEST_ADMIN_KEY": (data_dir / "admin.key").read_text().strip(),
        "HIRA_LOADTEST_VARIANTS": str(options.variants),
        "HIRA_LOADTEST_DTYPE": options.dtype,
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    return subprocess.run(command, env=environment, check=False).returncode


def stop_server(server: subprocess.Popen[bytes]) -> int:
    server.send_signal(signal.SIGTERM)
    try:
        return server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def read_faults(results: Path) -> list[str]:
    with (results / "report_failures.csv").open() as file:
        faults = [
            f"{row['Name']}: {row['Error']} x{row['Occurrences']}" for row in csv.DictReader(file)
        ]
    with (results / "report_stats.csv").open() as file:
        asked = sum(
            int(row["Request Count"]) for row in csv.DictReader(file) if row["Name"] != "Aggregated"
        )
    if asked == 0:
        faults.append("no request was made")
    return faults


def print_table(results: Path) -> None:
    print(f"\n{'endpoint':<36}{'requests':>9}{'failures':>9}{'p50 ms':>8}{'p99 ms':>8}{'req/s':>8}")
    with (results / "report_stats.csv").open() as file:
        for row in csv.DictReader(file):
            print(
                f"{row['Name']:<36}{row['Request Count']:>9}{row['Failure Count']:>9}"
                f"{row['50%']:>8}{row['99%']:>8}{float(row['Requests/s']):>8.1f}"
            )


if __name__ == "__main__":
    sys.exit(main())
