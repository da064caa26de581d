from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.inspection.audit import AuditReport, audit_card
from adapters.inspection.cards import read_card
from adapters.inspection.known_bases import KNOWN, Fit, counted, fits
from tests.stand.cards import about, card, subjects

SEEDS = Path(os.environ.get("HIRA_SHARED", Path(__file__).parents[3].parent / "shared")) / "seeds"
UNCASED = ("distilbert-base-uncased",)


def seed(number: str) -> str:
    found = sorted(SEEDS.glob(f"{number}_*.txt"))
    if not found:
        pytest.skip(f"the founding document {number} is not at {SEEDS}")
    return found[0].read_text()


def chosen(report: AuditReport) -> Fit:
    assert report.fit is not None
    return report.fit


# The four cards of the founding documents.


def test_a_distilbert_card_that_says_rank_8_proves_rank_32_and_a_head() -> None:
    report = audit_card(seed("000"))
    fit = chosen(report)
    assert fit.model.names == UNCASED
    assert fit.model.model_class == "DistilBertForSequenceClassification"
    assert (fit.rank, fit.targets) == (32, ("q_lin", "v_lin"))
    assert set(fit.head) == {"pre_classifier", "classifier"}
    assert (fit.factor_parameters, fit.head_parameters) == (589_824, 592_130)
    assert fit.copied
    assert subjects(report) == {"rank"}
    assert about(report, "rank").claim == "r = 8 on q_lin, v_lin"


def test_a_card_that_names_distilbert_proves_bert() -> None:
    report = audit_card(seed("001"))
    fit = chosen(report)
    assert fit.model.names == ("bert-base-uncased",)
    assert fit.model.model_class == "BertForSequenceClassification"
    assert (fit.rank, fit.targets) == (8, ("query", "key", "value"))
    assert (fit.factor_parameters, fit.head_parameters) == (442_368, 1_538)
    assert subjects(report) == {"base model", "targets"}


@pytest.mark.parametrize("number", ["002", "003"])
def test_a_card_that_names_bert_proves_a_distilbert_language_model(number: str) -> None:
    report = audit_card(seed(number))
    fit = chosen(report)
    assert fit.model.names == UNCASED
    assert fit.model.model_class == "DistilBertForMaskedLM"
    assert (fit.rank, fit.targets, fit.head) == (8, ("q_lin", "v_lin"), ())
    assert subjects(report) == {"base model", "model class"}


def test_the_example_of_the_method_itself_holds() -> None:
    report = audit_card(seed("004"))
    fit = chosen(report)
    assert (fit.model.model_class, fit.rank) == ("OPTForCausalLM", 32)
    assert set(fit.targets) == {"q_proj", "k_proj", "v_proj", "fc1", "fc2"}
    assert report.contradictions == ()


# Counting.


@pytest.mark.parametrize(
    ("name", "head", "parameters"),
    [  # as their model cards and `num_parameters` say
        ("distilbert-base-uncased", "", 66_362_880),
        ("bert-base-uncased", "", 109_482_240),
        ("bert-base-cased", "", 108_310_272),
        ("bert-large-uncased", "", 335_141_888),
        ("roberta-base", "MaskedLM", 124_697_433),
        ("all-MiniLM-L6-v2", "", 22_713_216),
        ("gpt2", "CausalLM", 124_439_808),
        ("distilgpt2", "CausalLM", 81_912_576),
        ("opt-125m", "CausalLM", 125_239_296),
        ("Qwen2-0.5B", "CausalLM", 494_032_768),
        ("TinyLlama-1.1B-Chat-v1.0", "CausalLM", 1_100_048_384),
        ("Llama-2-7b-hf", "CausalLM", 6_738_415_616),
        ("Meta-Llama-3-8B", "CausalLM", 8_030_261_248),
    ],
)
def test_known_models_have_their_published_sizes(name: str, head: str, parameters: int) -> None:
    names = next(names for names in KNOWN if name in names)
    model = counted(names, head)
    assert model is not None
    assert model.parameters == parameters


def peft_counts(head: str, labels: int, config: Any) -> tuple[int, int]:
    """Trainable and total as PEFT itself counts them, on the meta device."""
    import transformers
    from peft import get_peft_model

    model_class = getattr(transformers, f"DistilBertFor{head}")
    with torch.device("meta"):
        model = model_class(transformers.DistilBertConfig(num_labels=labels))
        trainable, total = get_peft_model(model, config).get_nb_trainable_parameters()
    return trainable, total


@pytest.mark.parametrize(
    "case",
    [
        ("SequenceClassification", 2, 8, ["q_lin", "v_lin"], "SEQ_CLS"),
        ("SequenceClassification", 5, 16, ["q_lin", "k_lin", "v_lin"], "SEQ_CLS"),
        ("TokenClassification", 9, 4, ["q_lin", "lin1", "lin2"], "TOKEN_CLS"),
        ("MaskedLM", 2, 64, ["q_lin", "k_lin", "v_lin", "out_lin"], None),
        ("MaskedLM", 2, 12, ["lin1"], None),
    ],
)
@pytest.mark.parametrize("method", ["hira", "lora"])
def test_what_peft_counts_is_explained(
    case: tuple[str, int, int, list[str], str | None], method: str
) -> None:
    from peft import LoraConfig
    from peft.tuners.hira import HiraConfig

    head, labels, rank, targets, task = case
    kind = HiraConfig if method == "hira" else LoraConfig
    config = kind(r=rank, target_modules=targets, task_type=task)
    trainable, total = peft_counts(head, labels, config)
    text = card("distilbert-base-uncased", rank, ", ".join(targets), (trainable, total))
    report = audit_card(text)
    fit = chosen(report)
    assert report.contradictions == ()
    assert fit.model.model_class == f"DistilBertFor{head}"
    assert (fit.rank, set(fit.targets)) == (rank, set(targets))
    assert fit.labels == (None if head == "MaskedLM" else labels)


def some_fits(count: int) -> Iterator[tuple[Fit, int, int]]:
    """Random adapters of random known models, with their trainable and frozen parameters."""
    chance = random.Random(7)
    names = [("distilbert-base-cased",), ("bert-base-uncased",), ("roberta-base",), ("gpt2",)]
    for _ in range(count):
        model = counted(chance.choice(names), "SequenceClassification")
        assert model is not None
        kinds = frozenset(chance.sample(sorted(model.kinds), chance.randint(1, 3)))
        rank, labels = chance.choice([1, 2, 8, 32, 48]), chance.randint(2, 40)
        at_two = sum(model.head.values())
        head = at_two + (labels - 2) * model.per_label
        factors = rank * sum(model.kinds[kind] for kind in kinds)
        copied = chance.random() < 0.7
        fit = Fit(model, labels, rank, kinds, tuple(model.head), head, factors, copied)
        yield fit, head + factors, fit.base_parameters - (0 if copied else head)


def test_every_adapter_is_among_the_solutions_of_its_own_counts() -> None:
    for fit, trainable, frozen in some_fits(12):
        found = list(fits(trainable, frozen))
        assert any(
            (other.model, other.rank, other.kinds, other.head, other.copied)
            == (fit.model, fit.rank, fit.kinds, fit.head, fit.copied)
            and (other.labels == fit.labels or not fit.copied)
            for other in found
        )
        for other in found:  # and every solution is exact
            weight = sum(other.model.kinds[kind] for kind in other.kinds)
            assert other.head_parameters + other.rank * weight == trainable
            own = 0 if other.copied else other.head_parameters
            assert other.base_parameters - own == frozen


def test_one_parameter_more_or_less_is_not_explained() -> None:
    trainable, total = 147_456, 67_132_986
    assert audit_card(card("distilbert-base-uncased", 8, "q_lin, v_lin", (trainable, total))).fit
    for change in (-1, 1):
        text = card("distilbert-base-uncased", 8, "q_lin, v_lin", (trainable, total + change))
        report = audit_card(text)
        assert report.fit is None
        assert subjects(report) == {"base model"}


# Synthetic cards.


def test_an_honest_card_has_no_contradiction() -> None:
    text = card("distilbert/distilbert-base-uncased", 8, "`q_lin`, `v_lin`", (739_586, 67_694_596))
    report = audit_card(text)
    assert report.contradictions == ()
    assert chosen(report).rank == 8


def test_a_rank_that_other_targets_would_explain_is_said_so() -> None:
    report = audit_card(card("distilbert-base-uncased", 8, "q_lin", (147_456, 67_132_986)))
    finding = about(report, "rank")
    assert "r = 16 on q_lin" in finding.proof
    assert "r = 8 would take q_lin, v_lin" in finding.proof


@pytest.mark.parametrize(
    ("named", "counts", "proven"),
    [
        ("bert-base-uncased", (147_456, 67_132_986), "distilbert-base-uncased"),
        ("distilbert-base-uncased", (443_906, 109_927_684), "bert-base-uncased"),
        ("distilbert-base-cased", (147_456, 67_132_986), "distilbert-base-uncased"),
    ],
)
def test_a_card_that_names_another_base_is_a_contradiction(
    named: str, counts: tuple[int, int], proven: str
) -> None:
    report = audit_card(card(named, 8, "q_lin, v_lin", counts))
    finding = about(report, "base model")
    assert finding.claim == named
    assert proven in finding.proof
    assert chosen(report).model.names == (proven,)


def test_targets_that_do_not_exist_in_the_proven_base_are_named() -> None:
    report = audit_card(card("distilbert-base-uncased", 8, "query, value", (147_456, 67_132_986)))
    assert about(report, "targets").claim == "query, value"
    assert chosen(report).targets == ("q_lin", "v_lin")


def test_a_head_trained_in_place_is_counted_once() -> None:
    head, factors, base = 592_130, 147_456, 66_955_010
    text = card("distilbert-base-uncased", 8, "q_lin, v_lin", (head + factors, base + factors))
    fit = chosen(audit_card(text))
    assert not fit.copied
    assert fit.head_parameters == head


def test_an_unknown_base_is_a_note() -> None:
    report = audit_card(card("someone/new-model", 8, "wq", (1_000, 50_000)))
    assert report.contradictions == ()
    assert any("none of" in finding.proof for finding in report.findings)


@pytest.mark.parametrize(("trainable", "total"), [(10, 10), (11, 10), (0, 10)])
def test_impossible_counts_are_a_contradiction(trainable: int, total: int) -> None:
    assert subjects(audit_card(card("bert-base-uncased", 8, "query", (trainable, total)))) == {
        "counts"
    }


def test_a_share_that_is_not_that_of_the_counts_is_a_contradiction() -> None:
    text = "Trainable Parameters: 147,456 (0.52% of total)\nTotal Parameters: 67,132,986"
    assert about(audit_card(text), "share").proof.endswith("is 0.220 %")


@pytest.mark.parametrize(
    "text",
    ["", "# Nothing", "---\nbase_model: x\n---", "Total Parameters: 12", "Rank: " + "9" * 400],
)
def test_a_card_without_counts_proves_nothing(text: str) -> None:
    report = audit_card(text)
    assert report.fit is None
    assert report.contradictions == ()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["-" * 500_000, "Total Parameters: " * 50_000, "1,1" * 200_000])
def test_a_hostile_card_takes_no_time(text: str) -> None:
    assert audit_card(text).fit is None


def test_the_claims_of_a_card_are_read() -> None:
    claims = read_card(
        "---\nbase_model:\n- org/base\n---\n**Method:** Sparse LoRA\nlora_alpha: 16\nr=4\n"
        'target_modules=["a", "b.c"]\n**Sparsity:** 50.0%\n**Model Size:** 1.5 MB\n'
        "trainable params: 1,024 || all params: 2048 || trainable%: 50.0"
    )
    assert (claims.base, claims.method, claims.rank) == ("org/base", "Sparse LoRA", 4)
    assert (claims.targets, claims.sparsity) == (("a", "b.c"), 0.5)
    assert (claims.trainable, claims.total, claims.trainable_percent) == (1024, 2048, "50.0")
    assert claims.size_bytes == 3 << 19


def test_rounded_counts_are_not_taken_for_exact_ones() -> None:
    claims = read_card("Total parameters: 67M\nTrainable parameters: 1.2M")
    assert (claims.total, claims.trainable) == (None, None)
