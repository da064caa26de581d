"""Holds every endpoint to the OpenAPI document: `python -m loadtests.schema --examples 200`.

schemathesis makes requests from the document, right ones and wrong ones, and `schema_hooks` adds
the names of adapters that are there. No answer may be a 500, and each must be one that the document
announces: its status, its media type, its shape.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx2

from loadtests.servers import ready_server

DEMO_DIR = Path(__file__).parents[1] / "server" / "demo" / "adapters"
# Not positive_data_acceptance: a name that is well formed need not be one of an adapter.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
    "use_after_free",
)
PHASES = ("examples", "coverage", "fuzzing", "stateful")


def run(
    url: str,
    key: str,
    examples: int,
    seed: int,
    *,
    phases: Sequence[str] = PHASES,
    sources: Sequence[Path] = (),
) -> subprocess.CompletedProcess[str]:
    """Run schemathesis on a server that is ready.

    Args:
        url: Of the server.
        key: Of its admin calls.
        examples: Most cases for one operation and phase.
        seed: Of the generation.
        phases: Of schemathesis.
        sources: Adapter folders that may be registered.

    Returns:
        The finished command: its status is 0 when all answers were as announced.
    """
    listed = httpx2.get(f"{url}/v1/models", timeout=30).json()["data"]
    with tempfile.TemporaryDirectory(prefix="hira-schema-") as folder:
        # Read from the working folder; the exact seed and no database make a run repeatable.
        config = 'hooks = "loadtests.schema_hooks"\n'
        (Path(folder) / "schemathesis.toml").write_text(config)
        command = [
            *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
            *("run", f"{url}/openapi.json"),
            *("--header", f"Authorization: Bearer {key}"),
            *("--checks", ",".join(CHECKS), "--phases", ",".join(phases)),
            *("--max-examples", str(examples), "--seed", str(seed)),
            *("--continue-on-failure", "--request-timeout", "60", "--no-color"),
            *("--suppress-health-check", "all", "--warnings", "off"),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "HIRA_SCHEMA_ADAPTERS": json.dumps([one["id"] for one in listed]),
            "HIRA_SCHEMA_SOURCES": json.dumps([str(one) for one in sources]),
        }
        return subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.schema", description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="for one operation and phase")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    results = Path("loadtests/results/schema")
    argument = f"--source-root={DEMO_DIR}"
    with (
        tempfile.TemporaryDirectory(prefix="hira-schema-") as folder,
        ready_server(Path(folder), "fp32", results, argument) as server,
    ):
        key = server.admin["Authorization"].removeprefix("Bearer ")
        sources = sorted(one for one in DEMO_DIR.iterdir() if one.is_dir())
        done = run(server.url, key, options.examples, options.seed, sources=sources)
        stopped = server.stop()
    (results / "schemathesis.txt").write_text(done.stdout)
    print(done.stdout)
    tracebacks = server.log.read_text(errors="replace").count("Traceback")
    if tracebacks:
        print(f"FAULT: {tracebacks} tracebacks in {server.log}", file=sys.stderr)
    if stopped != 0:
        print(f"FAULT: the server ended with status {stopped}", file=sys.stderr)
    return 1 if done.returncode or stopped or tracebacks else 0


if __name__ == "__main__":
    sys.exit(main())
