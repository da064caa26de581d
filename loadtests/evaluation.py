"""lm-evaluation-harness on a served base and on transformers directly: the same figures?

The harness's own client (``local-completions``) scores a multiple-choice task through
``/v1/completions``, sending token ids with ``echo`` and ``logprobs``; then the harness scores the
same task with its own ``hf`` model on the same checkpoint. The base is served unquantized, both in
float32, and both begin every prompt with the beginning-of-text token.

    python -m venv .clients/lm-eval
    .clients/lm-eval/bin/pip install 'lm_eval[api]==0.4.13' 'transformers==5.23.0' 'torch==2.13.0'
    python -m loadtests.evaluation --data DIR --python .clients/lm-eval/bin/python

``DIR`` holds ``sst2/dev.tsv.gz``. The status is 1 where a choice, what is greedy or the accuracy is
another, or a log-likelihood differs by more than the tolerance.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.servers import ROOT, ready_server

TASK = "served_sentiment"
TOLERANCE_NATS = 1e-4  # of a log-likelihood: a sum of a few dozen float32 log-probabilities
MAX_LENGTH_TOKENS = 512


@dataclass(frozen=True)
class Scored:
    """What the harness says of one task.

    Args:
        accuracy: Of the likelier choice.
        loglikelihoods: Of each choice of each row.
        greedy: Whether each choice is what greedy decoding would have written.
        seconds: That the whole run of the harness took, its start included.
    """

    accuracy: float
    loglikelihoods: tuple[tuple[float, ...], ...]
    greedy: tuple[tuple[bool, ...], ...]
    seconds: float

    @property
    def choices(self) -> list[int]:
        return [one.index(max(one)) for one in self.loglikelihoods]


def write_task(data: Path, rows: int, folder: Path) -> None:
    """The task and its rows: a sentence, and which of two continuations is likelier after it."""
    with gzip.open(data / "sst2" / "dev.tsv.gz", "rt", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:rows]
    written = folder / "rows.jsonl"
    lines = [json.dumps({"sentence": one["sentence"], "label": int(one["label"])}) for one in found]
    written.write_text("\n".join(lines) + "\n", encoding="utf-8")
    described = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(written)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{sentence}} The film was",
        "doc_to_choice": ["bad and dull", "good and fine"],
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    # JSON is YAML.
    (folder / f"{TASK}.yaml").write_text(json.dumps(described, indent=1), encoding="utf-8")


def evaluate(python: str, folder: Path, name: str, model: str, arguments: str) -> Scored:
    """Run the harness once.

    Args:
        python: Of its environment.
        folder: With the task; the results go there.
        name: Of the results.
        model, arguments: As ``lm_eval --model … --model_args …``.
    """
    out = folder / name
    command = [
        *(python, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments),
        *("--tasks", TASK, "--include_path", str(folder), "--device", "cpu"),
        *("--batch_size", "8", "--output_path", str(out), "--log_samples"),
    ]
    began = time.perf_counter()
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    environment = {**os.environ, **offline}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds = time.perf_counter() - began
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    figures = json.loads(results.read_text())["results"][TASK]
    rows: list[dict[str, Any]] = [json.loads(one) for one in samples.read_text().splitlines()]
    rows.sort(key=lambda one: int(one["doc_id"]))
    answers = [[_answer(one) for one in row["filtered_resps"]] for row in rows]
    return Scored(
        float(figures["acc,none"]),
        tuple(tuple(value for value, _ in row) for row in answers),
        tuple(tuple(greedy for _, greedy in row) for row in answers),
        seconds,
    )


def _answer(told: list[Any]) -> tuple[float, bool]:
    """A log-likelihood and whether it is greedy: the harness writes them as text."""
    value, greedy = told
    return float(value), str(greedy) == "True"


def compared(served: Scored, direct: Scored) -> dict[str, Any]:
    """How the two differ; choices and what is greedy are counted in rows."""
    return {
        "rows": len(direct.loglikelihoods),
        "accuracy_served": served.accuracy,
        "accuracy_direct": direct.accuracy,
        "other_choices": sum(a != b for a, b in zip(served.choices, direct.choices, strict=True)),
        "other_greedy": sum(a != b for a, b in zip(served.greedy, direct.greedy, strict=True)),
        "largest_difference": max(
            abs(a - b)
            for one, other in zip(served.loglikelihoods, direct.loglikelihoods, strict=True)
            for a, b in zip(one, other, strict=True)
        ),
        "seconds_served": round(served.seconds, 1),
        "seconds_direct": round(direct.seconds, 1),
    }


def differs(found: dict[str, Any]) -> bool:
    """Whether what ``compared`` found is more than rounding."""
    return bool(
        found["other_choices"]
        or found["other_greedy"]
        or found["accuracy_served"] != found["accuracy_direct"]
        or found["largest_difference"] > TOLERANCE_NATS
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.evaluation", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/dev.tsv.gz")
    parser.add_argument("--python", default=sys.executable, help="of the harness's environment")
    parser.add_argument("--base", type=Path, default=ROOT / "server" / "demo" / "base")
    parser.add_argument("--rows", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_task(given.data, given.rows, folder)
        arguments = (f"--base={given.base}", "--quantization=none", "--base-name=served")
        with ready_server(folder / "data", "fp32", folder, *arguments) as server:
            told = {
                "model": "served",
                "base_url": f"{server.url}/v1/completions",
                "tokenizer": str(given.base),
                "tokenizer_backend": "huggingface",
                "max_length": str(MAX_LENGTH_TOKENS),
                "add_bos_token": "True",
            }
            served = evaluate(given.python, folder, "served", "local-completions", _joined(told))
        own = {"pretrained": str(given.base), "dtype": "float32", "add_bos_token": "True"}
        direct = evaluate(given.python, folder, "direct", "hf", _joined(own))
    found = compared(served, direct)
    print(json.dumps(found, indent=1))
    return int(differs(found))


def _joined(arguments: dict[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in arguments.items())


if __name__ == "__main__":
    sys.exit(main())
