"""Starts a server of its own, lets Locust loose on it, and judges: `python -m loadtests`.

The exit status is not 0 when any answer was wrong, any error was unexpected, nothing was asked, or
the server did not come up or go down as it should.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from loadtests.servers import start_server


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
        server = start_server(Path(folder), options.dtype, options.results)
        try:
            server.wait_until_ready()
            locust = run_locust(server.url, Path(folder), options)
        finally:
            stopped = server.stop()
    faults = read_faults(options.results)
    print_table(options.results)
    if locust != 0:
        faults.append(f"locust ended with status {locust}")
    if stopped != 0:
        faults.append(f"the server ended with status {stopped} (see {options.results}/server.log)")
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


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
