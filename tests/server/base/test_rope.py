"""Every rope type of transformers: each sequence gets what it gets alone, in any company."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.base.rope import RopeByLength
from server.engine.engine import Engine
from server.messages import (
    EncodeRequest,
    EncodeResult,
    Failure,
    GenerateRequest,
    GenerateResult,
    SamplingOptions,
    TokenizedInput,
)
from tests.stand import tiny_bases

ORIGINAL, LONGEST = 24, 64
HALF = 8  # frequencies of a head
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(HALF)],
    "long_factor": [1.5 + 0.7 * i for i in range(HALF)],
    "factor": LONGEST / ORIGINAL,
    "original_max_position_embeddings": ORIGINAL,
}
TYPES: Mapping[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": LONGEST / ORIGINAL,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": LONG,
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
}
KINDS = (*TYPES, "phi3", "gemma3")
LENGTHS = (3, 60, 17, 24, 25, 40)


def base_of(folder: Path, kind: str) -> Path:
    """A random base whose answers depend visibly on positions."""
    sizes: dict[str, Any] = {
        "vocab_size": tiny_bases.VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2 * HALF,
        "max_position_embeddings": LONGEST,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    torch.manual_seed(1)
    model: Any
    if kind == "phi3":
        del sizes["head_dim"]
        rope = {key: value for key, value in LONG.items() if key.endswith(("factor", "type"))}
        made = Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=ORIGINAL)
        model = Phi3ForCausalLM(made)
    elif kind == "gemma3":
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **sizes,
                query_pre_attn_scalar=2 * HALF,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"],
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                    "full_attention": {**LONG, "rope_theta": 1e4},
                },
            )
        )
    else:
        rope = {"rope_theta": 1e4, **TYPES[kind]}
        model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    target = folder / kind
    model.save_pretrained(target)
    tiny_bases.tokenizer("llama").save_pretrained(target)
    return target


def ids(length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randint(5, tiny_bases.VOCABULARY, (length,), generator=generator).tolist())


class Alone:
    """transformers, one sequence at a time, always from its first token and without a cache."""

    def __init__(self, base: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    @torch.no_grad()
    def vector(self, tokens: tuple[int, ...]) -> torch.Tensor:
        hidden: torch.Tensor = self.model.base_model(torch.tensor([tokens])).last_hidden_state
        return hidden[0].mean(0)

    @torch.no_grad()
    def scores(self, tokens: tuple[int, ...]) -> torch.Tensor:
        logits: torch.Tensor = self.model(torch.tensor([tokens])).logits
        return logits[0].log_softmax(-1)

    def generate(self, tokens: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
        known, told = list(tokens), []
        for _ in range(count):
            last = self.scores(tuple(known))[-1]
            known.append(int(last.argmax()))
            told.append(float(last.max()))
        return known[len(tokens) :], told


@pytest.fixture(scope="module", params=KINDS)
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp(request.param)
    return base_of(root, request.param), root / "store"


def engine_of(stage: tuple[Path, Path], **changes: Any) -> Engine:
    base, store = stage
    return Engine.build(tiny_bases.options(base, store, threads=1, **changes))


def run(engine: Engine, requests: list[Any]) -> dict[str, Any]:
    for request in requests:
        engine.submit(request)
    found: dict[str, Any] = {}
    while len(found) < len(requests):
        for event in engine.step():
            found[event.id] = event
    return found


def test_a_vector_is_that_of_the_text_alone(stage: tuple[Path, Path]) -> None:
    engine, alone = engine_of(stage), Alone(stage[0])
    request = EncodeRequest(
        "mixed", "feature-extraction", None, None,
        tuple(TokenizedInput(ids(length)) for length in LENGTHS), None,
        {"normalize": False, "pooling": "mean"},
    )  # fmt: skip
    answer = run(engine, [request])["mixed"]
    assert isinstance(answer, EncodeResult), answer
    for length, vector in zip(LENGTHS, answer.outputs, strict=True):
        torch.testing.assert_close(
            torch.tensor(vector), alone.vector(ids(length)), atol=2e-5, rtol=1e-4
        )
    engine.close()


@pytest.mark.parametrize("prefill_tokens", [16, 512])
@pytest.mark.parametrize("sharing", [False, True])
def test_tokens_and_scores_are_those_of_a_full_forward_at_every_chunk_size(
    stage: tuple[Path, Path], prefill_tokens: int, sharing: bool
) -> None:
    engine = engine_of(stage, prefill_tokens=prefill_tokens, allow_prefix_sharing=sharing)
    alone, new = Alone(stage[0]), 4
    for reads in (True, False):  # with sharing, the second time from what the first has left
        requests = [
            GenerateRequest(
                str(length), None, None, ids(length),
                SamplingOptions(
                    max_new_tokens=new, logprobs=True, ignore_eos=True, prompt_logprobs=reads
                ),
            )
            for length in LENGTHS
        ]  # fmt: skip
        answers = run(engine, requests)
        for length in LENGTHS:
            answer = answers[str(length)]
            assert isinstance(answer, GenerateResult), answer
            tokens, scores = alone.generate(ids(length), new)
            assert [token.id for token in answer.tokens] == tokens
            assert [token.logprob for token in answer.tokens] == pytest.approx(scores, abs=1e-4)
            if reads:
                table = alone.scores(ids(length))[:-1]
                wanted = table.gather(1, torch.tensor(ids(length))[1:, None])[:, 0].tolist()
                assert list(answer.prompt_logprobs[1:]) == pytest.approx(wanted, abs=1e-4)
    engine.close()


def test_a_common_prefix_of_a_short_and_a_long_prompt_is_not_shared(tmp_path: Path) -> None:
    stage = base_of(tmp_path, "longrope"), tmp_path / "store"
    engine, alone = engine_of(stage, allow_prefix_sharing=True), Alone(stage[0])
    prompt = ids(50)
    for length in (20, 50, 21, 49, 22):  # 22 grows past the original length, the others do not
        request = GenerateRequest(
            "one", None, None, prompt[:length],
            SamplingOptions(max_new_tokens=3 if length != 22 else 6, ignore_eos=True),
        )  # fmt: skip
        answer = run(engine, [request])["one"]
        count = request.sampling.max_new_tokens
        assert [token.id for token in answer.tokens] == alone.generate(prompt[:length], count)[0]
    assert engine._parts.generate is not None
    assert engine._parts.generate.figures().shared_tokens > 0
    engine.close()


def test_phi3_grows_past_the_original_length_as_its_own_generate_does(tmp_path: Path) -> None:
    stage = base_of(tmp_path, "phi3"), tmp_path / "store"
    engine, alone = engine_of(stage), Alone(stage[0])
    prompt, new = ids(ORIGINAL - 3), 12
    request = GenerateRequest(
        "one", None, None, prompt, SamplingOptions(max_new_tokens=new, ignore_eos=True)
    )
    answer = run(engine, [request])["one"]
    own = alone.model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new, min_new_tokens=new, do_sample=False, suppress_tokens=[],
        eos_token_id=None,
    )  # fmt: skip
    assert [token.id for token in answer.tokens] == own[0, len(prompt) :].tolist()
    engine.close()


def test_dynamic_rope_is_served_up_to_where_it_would_begin_to_stretch(tmp_path: Path) -> None:
    engine = engine_of((base_of(tmp_path, "dynamic"), tmp_path / "store"))
    vector = EncodeRequest(
        "vector", "feature-extraction", None, None, (TokenizedInput(ids(LONGEST + 1)),), None, {}
    )
    token = GenerateRequest(
        "token", None, None, ids(LONGEST - 1), SamplingOptions(max_new_tokens=2)
    )
    # Texts to encode are measured in the HTTP process; the worker only refuses what it cannot run.
    for request, code in ((vector, "invalid_input"), (token, "input_too_long")):
        event = run(engine, [request])[request.id]
        assert isinstance(event, Failure)
        assert event.code == code
    engine.close()


def test_every_rope_type_of_transformers_is_tried_here() -> None:
    assert {*ROPE_INIT_FUNCTIONS, "default"} == set(TYPES)


def test_outside_a_batch_the_model_is_as_it_was(tmp_path: Path) -> None:
    model = Alone(base_of(tmp_path, "longrope")).model
    rope = RopeByLength(model)
    before = model(torch.tensor([ids(30)])).logits
    with rope.sequences([[3]], model.device):
        assert not torch.equal(model(torch.tensor([ids(30)])).logits, before)
    assert torch.equal(model(torch.tensor([ids(30)])).logits, before)
