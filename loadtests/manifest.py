"""Many adapters by one manifest: seconds, the same again, and one that is broken among them.

`python -m loadtests.manifest --adapters 50`

Adapters are made of those of the demo and named in one file, which `hira apply` brings to a server
of one's own: first with some of them broken, when nothing may be there afterwards and each fault
must be told; then whole, when each must answer; then once more, when nothing may change. The exit
status is not 0 when anything of this is otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import httpx2

from loadtests.servers import ROOT, Server, ready_server
from loadtests.stage import TEXTS, archive

DEMO_DIR: Final = ROOT / "server" / "demo" / "adapters"
BROKEN: Final = 3  # of the adapters, for the run that must change nothing
SHOWN_LINES: Final = 6


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.manifest", description=__doc__)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2, help="of the server")
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hira-manifest-") as folder:
        results = Path("loadtests/results/manifest")
        threads = f"--threads={options.threads}"
        with ready_server(Path(folder) / "data", "fp32", results, threads) as server:
            report, faults = try_all(server, Path(folder), options.adapters)
            if server.stop() != 0:
                faults.append(f"the server did not end as it should (see {server.log})")
    print(json.dumps(report, indent=1))
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if faults else 0


def try_all(server: Server, folder: Path, count: int) -> tuple[dict[str, Any], list[str]]:
    """Make the adapters and the manifest, and apply it in its three states."""
    sources = sorted(one for one in DEMO_DIR.iterdir() if one.is_dir())
    files = {}
    for number in range(count):
        source = sources[number % len(sources)]
        file = folder / f"{source.name}-{number:03d}.tar"
        file.write_bytes(archive(source, seed=number))
        files[file.stem] = file
    manifest = folder / "adapters.yaml"
    lines = [f"  {name}: ./{file.name}" for name, file in files.items()]
    manifest.write_text("adapters:\n" + "\n".join(lines) + "\n")
    megabytes = sum(file.stat().st_size for file in files.values()) / 1e6
    before, faults = known(server), list[str]()

    broken = list(files.values())[:: max(1, count // BROKEN)][:BROKEN]
    whole = {file: file.read_bytes() for file in broken}
    for file in broken:
        file.write_bytes(whole[file][: len(whole[file]) // 2])
    refused, refused_s = apply(server, manifest)
    untold = [file.stem for file in broken if f"hira: {file.stem}: " not in refused.stderr]
    if refused.returncode != 1 or untold or known(server) != before:
        faults.append(f"with broken ones: status {refused.returncode}, not told: {untold}")
        faults += refused.stderr.splitlines()[:SHOWN_LINES]
    for file, content in whole.items():
        file.write_bytes(content)

    applied, applied_s = apply(server, manifest)
    after = known(server)
    if applied.returncode != 0 or not files.keys() <= after.keys():
        faults += [f"status {applied.returncode}", *applied.stderr.splitlines()[:SHOWN_LINES]]
    silent = [name for name in files if not answers(server, name)]
    if silent:
        faults.append(f"no answer of {', '.join(silent)}")

    again, again_s = apply(server, manifest)
    if f"no change: {count} adapters" not in again.stdout or known(server) != after:
        faults.append(f"the same again: {again.stdout[-200:]}")
    seconds = {"broken": refused_s, "applied": applied_s, "again": again_s}
    return {
        "adapters": count,
        "megabytes": round(megabytes, 1),
        "broken": len(broken),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "said": applied.stdout.strip().splitlines()[-1:],
    }, faults


def apply(server: Server, manifest: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run `hira apply`; returns what it said, and the seconds with its own start."""
    began = time.monotonic()
    key = server.admin["Authorization"].removeprefix("Bearer ")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "server.cli",
            "apply",
            str(manifest),
            "--url",
            server.url,
            "--key",
            key,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, time.monotonic() - began


def known(server: Server) -> dict[str, str]:
    """The version that each name is on."""
    answer = httpx2.get(
        f"{server.url}/admin/adapters", params={"limit": 1000}, headers=server.admin, timeout=60
    )
    answer.raise_for_status()
    return {one["name"]: one["version"] for one in answer.json()["adapters"]}


def answers(server: Server, name: str) -> bool:
    """Whether an adapter answers, by whatever call is for its task."""
    asked = {"params": {"adapter": name}, "json": {"inputs": TEXTS[0]}, "timeout": 120}
    return any(
        httpx2.post(f"{server.url}/{path}", **asked).is_success  # type: ignore[arg-type]
        for path in ("predict", "generate")
    )


if __name__ == "__main__":
    sys.exit(main())
