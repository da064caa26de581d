"""Runs benchmarks and prints their figures: `python -m loadtests.bench [modulation] [generation]
[choice] [http] [residency] [deterministic] [structured] [gpu] [--dtype auto] [--quick]
[--dry-run] [--one-thread] [--kernel best] [--json FILE] [--markdown FILE] [--record]`. Without a
name it runs all of them."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

from adapters.kernels import native_ops
from loadtests.bench import gpu_record, peers
from loadtests.bench.timing import Report, dtype_of, machine, print_machine
from loadtests.busy import busy_processes

BENCHES = (
    "modulation",
    "choice",
    "generation",
    "http",
    "residency",
    "deterministic",
    "structured",
    "gpu",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="BENCH", help=", ".join(BENCHES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the figures here as a table, too"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few rounds: shows that it works, measures little"
    )
    parser.add_argument(
        "--one-thread",
        action="store_true",
        help="modulation and choice in one thread, by its processor time: for a busy machine",
    )
    parser.add_argument(
        "--load",
        type=int,
        default=0,
        metavar="PROCESSES",
        help="so many processes of its own do nothing but calculate meanwhile (default: none)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="gpu: every part on the processor and on shapes of nothing, to see that it runs",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="gpu: write its figures into README.md and docs/measured.md, too",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of all on the processor; auto: as a server on it (default)",
    )
    parser.add_argument(
        "--kernel",
        choices=("best", "avx512", "avx2", "none"),
        default="best",
        help="the best instruction set that the compiled kernel may use (default: best); torch's "
        "own goes by ATEN_CPU_CAPABILITY=avx2 in the environment",
    )
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(BENCHES))
    if unknown:
        parser.error(f"no bench named {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    if options.record and (options.names != ["gpu"] or options.dry_run):
        parser.error("--record is for `gpu` alone, and not for a dry run")
    peers.quiet()
    began = time.monotonic()
    dtype = dtype_of(options.dtype)
    with native_ops.limited_to(options.kernel):
        known = {**machine(), "dtype": dtype, "load beside it": options.load}
    report = Report(known, options.quick, options.one_thread, dtype)
    report.dry_run = options.dry_run
    print_machine(report.machine)
    with busy_processes(options.load), native_ops.limited_to(options.kernel):
        for name in BENCHES:
            if not options.names or name in options.names:
                importlib.import_module(f"loadtests.bench.{name}").bench(report)
    print(f"\n{time.monotonic() - began:.0f} s in all")
    if options.dry_run:
        print("dry run: nothing here is a figure of a GPU")
    if options.quick:
        print("quick run: too few rounds for conclusions")
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(report.as_markdown(), encoding="utf-8")
    if options.record:
        gpu_record.record(report.as_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
