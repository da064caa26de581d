"""Adapters made by PEFT, registered over HTTP, against float64 on the dequantized base.

The truth is computed here from the checkpoint alone: every linear layer of the backbone is sent
through bitsandbytes' NF4 and back, W0 ⊙ (1 + B A) is formed in float64, and transformers' own
classifier runs on that.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from server.demo import BASE_DIR
from tests.stand.folders import save_with_peft
from tests.stand.live import Live, hira
from tests.stand.uploads import upload

pytestmark = [
    pytest.mark.http,
    pytest.mark.skipif(
        not (BASE_DIR / "config.json").exists(), reason="the embedded demo has not been trained"
    ),
]

TEXTS = (
    "One of the finest films of the year.",
    "A dull, clumsy mess from its first minute to its last, and badly cut on top of it all.",
    "Fine.",
)
RANKS = (4, 8, 32)
# Of adapters that bfloat16 can answer: with some random factors the rounding of activations alone,
# every layer exact in float64, moves a probability by 0.03.
SEEDS = {4: 4, 8: 18, 32: 52}
LABELS = 3
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}


@dataclass(frozen=True)
class Made:
    name: str
    folder: Path
    truth: tuple[tuple[float, ...], ...]  # probabilities by text


def make(folder: Path, rank: int, seed: int) -> Path:
    """A HiRA classifier on the demo base with random A and B, as PEFT saves it."""
    from peft.tuners.hira import HiraConfig
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(BASE_DIR, num_labels=LABELS)
    with torch.no_grad():
        model.score.weight.normal_(std=0.3)
    config = HiraConfig(
        r=rank,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    return save_with_peft(model, config, folder, seed=seed)


def truth(folder: Path) -> tuple[tuple[float, ...], ...]:
    """Class probabilities in float64 for every text."""
    from bitsandbytes import functional
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(
        BASE_DIR, num_labels=LABELS, dtype=torch.bfloat16
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    packed = {
        path: functional.dequantize_4bit(
            *functional.quantize_4bit(
                module.weight.data.float(), quant_type="nf4", compress_statistics=True
            )
        )
        for path, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    model = model.double().eval()
    with torch.no_grad():
        for path, weight in packed.items():
            key = f"base_model.model.model.{path}.hira_"
            w0 = weight.double()
            if key + "A" in tensors:
                w0 = w0 * (1 + tensors[key + "B"].double() @ tensors[key + "A"].double())
            model.model.get_submodule(path).weight.copy_(w0)
        model.score.weight.copy_(tensors["base_model.model.score.weight"].double())
        tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
        answers = []
        for text in TEXTS:
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
            answers.append(tuple(logits.softmax(-1).tolist()))
    return tuple(answers)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    root = tmp_path_factory.mktemp("exact")
    folders = [make(root / f"r{rank}", rank, seed=SEEDS[rank]) for rank in RANKS]
    return [Made(folder.name, folder, truth(folder)) for folder in folders]


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def live(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, made: list[Made]
) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("exact-http") / request.param
    with hira(folder, "--base", str(BASE_DIR), "--dtype", request.param) as server:
        for one in made:
            assert upload(server, one.name, one.folder).status_code == 201
        yield server


def error_of(live: Live, one: Made) -> float:
    """The largest error of a probability, all texts in one request."""
    answer = live.client.post(f"/predict?adapter={one.name}", json={"inputs": list(TEXTS)})
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Adapter"] == one.name
    errors = []
    for row, expected in zip(answer.json(), one.truth, strict=True):
        found = {entry["label"]: entry["score"] for entry in row}
        errors += [abs(found[f"LABEL_{index}"] - p) for index, p in enumerate(expected)]
    return float(max(errors))


def tolerance(live: Live) -> float:
    return TOLERANCE[live.folder.name]


def test_the_truths_are_far_apart(made: list[Made]) -> None:
    first, second, third = (torch.tensor(one.truth) for one in made)
    assert (first - second).abs().max() > 0.1
    assert (second - third).abs().max() > 0.1


def test_each_alone_is_exact(live: Live, made: list[Made]) -> None:
    for one in made:
        assert error_of(live, one) <= tolerance(live)


def test_each_is_exact_in_a_mixed_batch_with_seven_others(live: Live, made: list[Made]) -> None:
    for index in range(5):  # five more names; PEFT made them all
        one = made[index % len(made)]
        assert upload(live, f"more-{index}", one.folder).status_code in (200, 201)
    names = [*made, *(Made(f"more-{i}", Path(), made[i % 3].truth) for i in range(5))]
    batches = "hira_batch_adapters_sum{lane="
    with ThreadPoolExecutor(len(names)) as pool:
        for _ in range(3):
            errors = list(pool.map(lambda one: error_of(live, one), names))
            assert max(errors) <= tolerance(live), dict(zip(names, errors, strict=True))
    assert batches in live.client.get("/metrics").text


def test_fifty_adapters_later_the_base_is_there_once(
    live: Live, made: list[Made], tmp_path: Path
) -> None:
    def base_bytes() -> dict[str, str]:
        lines = live.client.get("/metrics").text.splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if line.startswith("hira_base_bytes"))

    before = base_bytes()
    assert before
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(
            lambda index: upload(live, f"fifty-{index}", made[index % 3].folder), range(50)
        )
        assert {answer.status_code for answer in answers} == {201}
        asked = pool.map(
            lambda index: error_of(live, Made(f"fifty-{index}", Path(), made[index % 3].truth)),
            range(50),
        )
        assert max(asked) <= tolerance(live)
    assert base_bytes() == before
