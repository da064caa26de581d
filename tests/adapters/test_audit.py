from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.architectures import KNOWN, Fit, counted, fits
from adapters.audit import AuditReport, audit, audit_card
from adapters.cards import Finding, read_card
from adapters.checkpoint import CONFIG_FILE, TENSOR_FILE
from adapters.errors import CorruptFile, UnsafeFormat
from tests.adapters.folders import (
    change_config,
    change_tensors,
    first_tensor,
    hira_folder,
    lora_folder,
    save_with_peft,
    small_base,
)

SEEDS = Path(os.environ.get("HIRA_SHARED", Path(__file__).parents[2].parent / "shared")) / "seeds"
UNCASED = ("distilbert-base-uncased",)


def seed(number: str) -> str:
    found = sorted(SEEDS.glob(f"{number}_*.txt"))
    if not found:
        pytest.skip(f"the founding document {number} is not at {SEEDS}")
    return found[0].read_text()


def card(base: str, rank: int, targets: str, counts: tuple[int, int], extra: str = "") -> str:
    """A card as the founding documents have it; ``counts`` are trainable and total."""
    trainable, total = counts
    return f"""---
base_model: {base}
library_name: peft
---
# An adapter
- **Rank (r):** {rank}
- **Target Modules:** {targets}
- **Total Parameters:** {total:,}
- **Trainable Parameters:** {trainable:,}
{extra}
"""


def subjects(report: AuditReport) -> set[str]:
    return {finding.subject for finding in report.contradictions}


def about(report: AuditReport, subject: str) -> Finding:
    return next(entry for entry in report.contradictions if entry.subject == subject)


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


# Folders.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hira_folder(tmp_path / "adapter", labels=3)


def test_an_honest_folder_has_no_contradiction(folder: Path) -> None:
    report = audit(folder)
    proof = report.tensors
    assert report.contradictions == ()
    assert proof is not None
    assert (proof.method, proof.layers) == ("hira", 4)
    assert proof.ranks == {"q_lin": (4,), "v_lin": (4,)}
    assert proof.factor_parameters == 4 * 4 * (64 + 64)
    assert proof.head_parameters == 64 * 64 + 64 + 64 * 3 + 3
    assert (proof.head, proof.outputs) == (("classifier", "pre_classifier"), 3)
    assert proof.dtypes == {"float32": 8 + 4 - 4 + 4}
    assert proof.tensor_bytes == 4 * proof.parameters
    assert proof.sparsity == 0.0
    assert audit(folder, small_base()).contradictions == ()


def test_sparsity_and_dtype_are_measured(folder: Path) -> None:
    name, tensor = first_tensor(folder, "hira_A")
    change_tensors(folder, {name: torch.zeros_like(tensor, dtype=torch.bfloat16)})
    proof = audit(folder).tensors
    assert proof is not None
    assert proof.sparsity == pytest.approx(1 / 8)
    assert proof.dtypes["bfloat16"] == 1


def test_a_rank_that_the_tensors_do_not_have_is_a_contradiction(folder: Path) -> None:
    report = audit(change_config(folder, r=8))
    finding = about(report, "rank")
    assert finding.claim.startswith("r = 8")
    assert finding.proof == "r = 4"


def test_lora_tensors_under_a_hira_configuration_are_a_contradiction(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "adapter")
    content = json.loads((folder / CONFIG_FILE).read_text())
    kept = ("r", "target_modules", "modules_to_save", "task_type", "base_model_name_or_path")
    changed = {"peft_type": "HIRA", **{name: content[name] for name in kept}}
    (folder / CONFIG_FILE).write_text(json.dumps(changed))
    assert subjects(audit(folder)) == {"method"}
    assert "unsupported_method" in subjects(audit(folder, small_base()))


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"target_modules": ["q_lin", "v_lin", "lin1"]}, "targets"),
        ({"target_modules": ["q_lin"]}, "targets"),
        ({"modules_to_save": ["score"]}, "head"),
        ({"base_model_name_or_path": "bert-base-uncased"}, "base model"),
        ({"peft_type": "IA3"}, "unsupported_method"),
        ({"some_option": 1}, "unsupported_option"),
        ({"r": "eight"}, "corrupt_file"),
    ],
)
def test_what_the_configuration_says_wrongly_is_found(
    folder: Path, changes: dict[str, Any], subject: str
) -> None:
    assert subjects(audit(change_config(folder, **changes))) == {subject}


def test_a_missing_configuration_is_found(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    report = audit(folder)
    assert subjects(report) == {"corrupt_file"}
    assert report.tensors is not None


def test_labels_that_the_head_does_not_have_are_found(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b"}}))
    assert subjects(audit(folder)) == {"labels"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_found(folder: Path, value: float) -> None:
    name, tensor = first_tensor(folder, "hira_B")
    change_tensors(folder, {name: torch.full_like(tensor, value)})
    assert subjects(audit(folder)) == {"non_finite"}


def test_factors_that_have_no_product_are_found(folder: Path) -> None:
    name, tensor = first_tensor(folder, "hira_B")
    change_tensors(folder, {name: tensor[:, :2].contiguous()})
    assert subjects(audit(folder)) == {"factors"}
    change_tensors(folder, {name: None})
    assert "factors" in subjects(audit(folder))


def test_a_card_is_held_against_the_tensors(folder: Path) -> None:
    text = card("bert-base-uncased", 8, "query", (10, 20), "- **Method:** LoRA\nSparsity: 50%")
    change_config(folder, base_model_name_or_path="small")
    found = subjects(audit(folder, card=text))
    assert found >= {"rank", "targets", "trainable", "method", "sparsity", "base model"}


def test_an_honest_card_beside_its_adapter_has_no_contradiction(tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    torch.manual_seed(0)
    model = DistilBertForMaskedLM(DistilBertConfig())
    config = LoraConfig(r=8, target_modules=["q_lin", "v_lin"])
    made = save_with_peft(model, config, tmp_path / "adapter")
    change_config(made, base_model_name_or_path="distilbert/distilbert-base-uncased")
    text = card("distilbert-base-uncased", 8, "q_lin, v_lin", (147_456, 67_132_986))
    report = audit(made, card=text)
    assert report.contradictions == ()
    assert report.tensors is not None
    assert report.tensors.fits[:1] == UNCASED
    assert "bert-base-uncased" not in report.tensors.fits


def test_nothing_can_be_proved_without_readable_tensors(folder: Path) -> None:
    (folder / TENSOR_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(UnsafeFormat):
        audit(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CorruptFile):
        audit(folder)


@pytest.mark.parametrize("with_card", [True, False])
def test_a_report_is_json(folder: Path, with_card: bool) -> None:
    text = card("distilbert-base-uncased", 8, "q_lin, v_lin", (147_456, 67_132_986))
    report = audit(folder, small_base(), text if with_card else None)
    content = json.loads(json.dumps(report.to_json_dict()))
    assert content["tensors"]["method"] == "hira"
    assert content["contradictions"] == len(report.contradictions)
    if with_card:
        assert content["fit"]["rank"] == 8
        assert content["fits_total"] >= len(content["fits"]) > 0
