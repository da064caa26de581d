"""The comparison's own arithmetic: scores, pieces of a text, and who is asked what."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest

from loadtests.compare import scores
from loadtests.compare.ask import classify, cut, likelihood
from loadtests.compare.measuring import Measured, Served
from loadtests.compare.plan import METHODS, OWN_RATES, full_plan, quick_plan
from loadtests.compare.sources import test_rows as rows_of_test
from loadtests.compare.sources import training_file
from loadtests.compare.tables import table, write
from loadtests.compare.training import Trained

PUBLIC = Path(__file__).parents[1] / ".." / "shared" / "data"


def test_scores_are_those_of_a_case_worked_by_hand() -> None:
    predicted, actual = [1, 1, 1, 0, 0, 0, 0, 1], [1, 0, 1, 1, 0, 0, 0, 0]
    assert scores.accuracy(predicted, actual) == 5 / 8
    assert scores.f1(predicted, actual) == pytest.approx(
        2 * 2 / (4 + 3)
    )  # precision 1/2, recall 2/3
    assert scores.f1(predicted, actual, 0) == pytest.approx(2 * 3 / (4 + 5))
    assert scores.f1([0, 0], [0, 0]) == 0
    assert scores.margin(0.9, 900) == pytest.approx(0.0196)


@pytest.mark.parametrize("most", [1, 7, 20, 1000])
def test_pieces_join_to_the_text_and_are_no_longer_than_asked(most: int) -> None:
    text = " = Title = \n\n A line of some words , and more .\nshort\n averyveryverylongword end"
    pieces = list(cut(text, most))
    assert "".join(pieces) == text
    longest = max(len(word) for word in text.split()) + 1
    assert max(map(len, pieces)) <= max(most, longest)
    for left, right in pairwise(pieces):
        assert left[-1] in " \n" or right[0] in " \n"


def test_perplexity_is_over_all_tokens_but_the_opening_ones() -> None:
    text = "one two three four\n" * 40

    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        assert (body["model"], body["max_tokens"], body["echo"]) == ("a", 0, True)
        tokens = body["prompt"].split()
        logprobs = [None, *(-math.log(2.0 if one == "one" else 8.0) for one in tokens)]
        return httpx2.Response(200, json={"choices": [{"logprobs": {"token_logprobs": logprobs}}]})

    with httpx2.Client(base_url="http://x", transport=httpx2.MockTransport(answer)) as client:
        found = likelihood(client, "a", text)
    nats = 40 * math.log(2) + 120 * math.log(8)
    assert (found.tokens, found.words, found.text_bytes) == (160, 200, len(text))
    assert found.perplexity == pytest.approx(math.exp(nats / 160))
    assert found.word_perplexity == pytest.approx(math.exp(nats / 200))
    assert found.bits_per_byte == pytest.approx((40 + 120 * 3) / len(text))


def labelling(names: dict[str, str]) -> httpx2.MockTransport:
    """A server whose adapters each answer by a rule of their own; `names` is who says it was."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        name = request.url.params["adapter"]
        texts = json.loads(request.content)["inputs"]
        long = [len(text) > 3 for text in texts]
        labels = ["POSITIVE" if one == (name == "long") else "NEGATIVE" for one in long]
        rows = [[{"label": label, "score": 1.0}] for label in labels]
        return httpx2.Response(200, json=rows, headers={"X-Adapter": names.get(name, name)})

    return httpx2.MockTransport(answer)


def test_every_adapter_gets_every_text_in_its_place() -> None:
    texts = ["abc", "abcd"] * 20 + ["a"]
    with httpx2.Client(base_url="http://x", transport=labelling({})) as client:
        found = classify(client, ["long", "short"], texts, ("NEGATIVE", "POSITIVE"))
    assert found["long"].predicted == (*(0, 1) * 20, 0)
    assert found["short"].predicted == (*(1, 0) * 20, 1)


def test_an_answer_of_another_adapter_ends_the_comparison() -> None:
    transport = labelling({"long": "short"})
    with (
        httpx2.Client(base_url="http://x", transport=transport) as client,
        pytest.raises(SystemExit, match="long was asked and short answered"),
    ):
        classify(client, ["long"], ["a"], ("NEGATIVE", "POSITIVE"))


def test_every_method_has_a_rate_in_every_plan() -> None:
    for plan in (full_plan(), quick_plan()):
        for task in plan.tasks:
            assert {method.name for method in METHODS} <= set(task.rates)
    assert {method.name for method in METHODS} == set(OWN_RATES)
    assert {task.kind for task in quick_plan().tasks} == {"SEQ_CLS", "CAUSAL_LM"}


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public files are not beside the project")
def test_no_row_of_the_test_part_is_trained_on(tmp_path: Path) -> None:
    for task in full_plan().tasks:
        learned = training_file(task, PUBLIC, tmp_path).read_text()
        test = rows_of_test(task, PUBLIC)
        if task.kind == "CAUSAL_LM":
            lines = {line for line in test.texts[0].splitlines() if len(line) > 80}
            assert not lines & set(learned.splitlines())
            continue
        texts = {json.loads(line)["text"] for line in learned.splitlines()}
        assert len(texts) > 0.95 * task.train_rows
        assert not texts & set(test.texts)
        assert 0.4 < sum(test.labels) / len(test.labels) < 0.6


def test_a_table_is_markdown() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_every_figure_stands_in_the_row_of_its_own_task_and_method(tmp_path: Path) -> None:
    plan = full_plan()
    report = {"train_rows": 10, "eval_rows": 2, "resident_peak_bytes": 1 << 30}
    trained = [Trained(task, one, tmp_path, report) for task in plan.tasks for one in METHODS]
    marks: dict[tuple[str, str], float] = {}
    measured: dict[str, list[Measured]] = {"SEQ_CLS": [], "CAUSAL_LM": []}
    for number, one in enumerate(trained):
        mark = marks[one.task.key, one.method.key] = 0.5 + number / 100
        names = ("accuracy", "margin", "f1", "rows_per_s", "perplexity", "word_perplexity")
        figures = dict.fromkeys((*names, "bits_per_byte", "tokens_per_s"), mark)
        record = {"parameters": number, "bytes": number, "sparsity": 0.0}
        measured[one.task.kind].append(Measured(one.task.key, one.method.key, record, figures))
    served = {
        kind: Served(
            base=kind,
            adapters=len(own),
            rows={task.key: 9 for task in plan.tasks},
            measured=tuple(own),
            mixed={},
            idle_bytes={"worker-0": 1},
            peak_bytes={"worker": 1, "all processes": 2},
            load=(0.0, 0.0),
        )
        for kind, own in measured.items()
    }
    page = write(plan, trained, served, tmp_path, machine={}, command="x")
    for task in plan.tasks:
        part = page.split(f"## {task.title}\n")[1].split("\n## ")[0]
        for method in METHODS:
            (line,) = (row for row in part.splitlines() if row.startswith(f"| {method.title} |"))
            mark = marks[task.key, method.key]
            shown = f"{mark:.2f}" if task.kind == "CAUSAL_LM" else f"{mark:.4f}"
            assert line.split(" | ")[1].startswith(shown)
    beside = page.split("## Beside")[1]
    assert f"| {marks['imdb', 'hira-r8']:.4f} |" in beside
    assert f"| {marks['sst2', 'qlora-r8']:.4f} |" in beside
    known = json.loads((tmp_path / "results.json").read_text())
    assert len(known["trained"]) == len(trained)
