"""Texts without padding: what padded ones give, on the families that can, and why others cannot."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetModel,
)

from adapters.signature import Method
from server.base.load import load_base
from server.base.probe_adapters import probe_factors
from server.base.rope import RopeByLength
from server.encoding import unpadded
from server.encoding.batch import Rows
from server.encoding.read import BatchStates
from server.encoding.text_bounds import TextBounds
from server.encoding.unpadded import (
    UnpaddedForward,
    attend_by_varlen,
    attend_text_by_text,
    unpadded_obstacle,
)
from server.messages import EncodeResult, TokenizedInput
from tests.stand import tiny_bases
from tests.stand.encode_lane import Lane

# Weights of these bases are four times the usual, and so is what a rounding becomes in them.
SUM_ORDER_TOLERANCE = 1e-4
SIZES: dict[str, Any] = {
    "vocab_size": tiny_bases.VOCABULARY, "pad_token_id": 0, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 48,
}  # fmt: skip


class Ways:
    """One base, and both ways to run its backbone."""

    def __init__(self, folder: Path, root: Path, **changes: Any) -> None:
        chosen = tiny_bases.options(folder, root, **changes)
        self.base = load_base(chosen)
        self.rows = Rows(self.base, tiny_bases.text_of(folder))
        self.rope = RopeByLength(self.base.model)
        self.unpadded = UnpaddedForward(self.base, self.rows, self.rope)
        kinds: tuple[tuple[Method, int], ...] = (("hira", 3), ("lora", 5))
        for slot, (method, rank) in enumerate(kinds, start=1):
            factors = probe_factors(self.base.adapted, slot, method, rank, dtype=self.base.dtype)
            self.base.adapted.install(slot, factors)

    def empty(self) -> None:
        for slot in (1, 2):
            self.base.adapted.uninstall(slot)

    def alone(self, items: Sequence[TokenizedInput], slots: Sequence[int]) -> list[torch.Tensor]:
        """The states of each text when it is all that there is: what no padding can change."""
        from adapters import segments

        found = []
        for item, slot in zip(items, slots, strict=True):
            feed = self.rows.feed([item])
            one = segments.from_rows([slot])
            with torch.inference_mode(), self.base.adapted.batch(one.repeat(feed.tokens), one):
                found.append(self.base.backbone(**feed.arguments).last_hidden_state[0])
        return found

    def padded(self, items: Sequence[TokenizedInput], slots: Sequence[int]) -> BatchStates:
        from adapters import segments

        feed = self.rows.feed(items)
        each = segments.from_rows(slots)
        with self.base.adapted.batch(each.repeat(feed.tokens), each):
            out = self.base.backbone(**feed.arguments)
        ids, mask = feed.tables(out.last_hidden_state)
        return BatchStates(out.last_hidden_state, getattr(out, "pooler_output", None), ids, mask)


def saved(model: Any, folder: Path, kind: str = "bert") -> Path:
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(4.0) if one.dim() > 1 else one.add_(torch.randn_like(one) * 0.1)
    model.save_pretrained(folder)
    tiny_bases.tokenizer(kind).save_pretrained(folder)
    return folder


def texts(lengths: Sequence[int], seed: int = 0) -> list[TokenizedInput]:
    chance = random.Random(seed)
    return [
        TokenizedInput(tuple(chance.randrange(tiny_bases.VOCABULARY) for _ in range(one)))
        for one in lengths
    ]


def assert_states(found: BatchStates, wanted: Sequence[torch.Tensor]) -> None:
    for states, mask, text in zip(found.hidden, found.mask, wanted, strict=True):
        got = states[mask == 1]
        assert got.shape == text.shape
        assert (got - text).abs().max() <= SUM_ORDER_TOLERANCE * text.abs().max()


@pytest.mark.parametrize(
    "kind", ["bert", "bert-backbone", "roberta", "distilbert", "llama", "qwen2", "gpt2", "opt"]
)
def test_a_batch_gives_what_each_text_gives_alone(kind: str, tmp_path: Path) -> None:
    ways = Ways(tiny_bases.base_folder(tmp_path, kind), tmp_path)
    for seed in range(4):
        chance = random.Random(seed)
        # Ids of padding within a text are tokens as others are; runs of one length are likely.
        lengths = [chance.choice([1, 2, 7, 7, 7, 19, 30]) for _ in range(9)]
        slots = sorted(chance.choice([0, 1, 2]) for _ in lengths)
        items = texts(lengths, seed)
        with torch.inference_mode():
            found = ways.unpadded(items, slots)
        if kind == "roberta":
            items = [TokenizedInput(tuple(one or 5 for one in item.token_ids)) for item in items]
            with torch.inference_mode():
                found = ways.unpadded(items, slots)
        assert_states(found, ways.alone(items, slots))
        if found.pooled is not None:
            wanted = ways.padded(items, slots).pooled
            assert wanted is not None
            assert torch.allclose(found.pooled, wanted, atol=5e-4)
        assert torch.isfinite(found.hidden).all()
    ways.empty()
    assert unpadded_obstacle(ways.base, ways.unpadded, ways.padded) is None


def test_roberta_counts_its_padding_as_it_does_itself(tmp_path: Path) -> None:
    ways = Ways(tiny_bases.base_folder(tmp_path, "roberta"), tmp_path)
    items = [TokenizedInput((5, 0, 7, 8)), TokenizedInput((9, 4, 0, 0, 6, 5))]
    with torch.inference_mode():
        feed = ways.rows.side_by_side(items)
    make = ways.base.backbone.embeddings.create_position_ids_from_input_ids
    wanted = [make(torch.tensor([item.token_ids]), 0)[0].tolist() for item in items]
    assert feed.arguments["position_ids"][0].tolist() == [one for row in wanted for one in row]


@pytest.mark.parametrize("family", ["modernbert", "mistral"])
def test_windows_are_kept(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any
    if family == "modernbert":
        config = ModernBertConfig(
            **SIZES, local_attention=6, global_attn_every_n_layers=2, cls_token_id=2, sep_token_id=3
        )
        model = ModernBertForMaskedLM(config)
    else:
        model = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4))
    ways = Ways(saved(model, tmp_path / "base", "bert"), tmp_path)
    items, slots = texts([20, 3, 3, 11, 30, 5]), [0, 0, 1, 1, 2, 2]
    with torch.inference_mode():
        found = ways.unpadded(items, slots)
    assert any(ways.unpadded.windows)
    assert_states(found, ways.alone(items, slots))
    ways.empty()
    assert unpadded_obstacle(ways.base, ways.unpadded, ways.padded) is None


def test_a_window_that_is_not_told_is_found_though_short_texts_do_not_show_it(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=40)
    ways = Ways(saved(MistralForCausalLM(config), tmp_path / "base"), tmp_path)
    ways.empty()
    for layer in ways.base.backbone.layers:
        layer.self_attn.config.sliding_window = 40
        plain = layer.self_attn.forward

        def untold(*args: Any, plain: Any = plain, layer: Any = layer, **more: Any) -> Any:
            before, layer.self_attn.config.sliding_window = 40, None
            try:
                return plain(*args, **more)
            finally:
                layer.self_attn.config.sliding_window = before

        layer.self_attn.forward = untold
    found = unpadded_obstacle(ways.base, ways.unpadded, ways.padded)
    assert found is not None
    assert found[0] == "window"


def test_what_does_not_use_the_interface_keeps_its_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = saved(MPNetModel(MPNetConfig(**SIZES)), tmp_path / "base")
    ways = Ways(folder, tmp_path)
    ways.empty()
    found = unpadded_obstacle(ways.base, ways.unpadded, ways.padded)
    assert found is not None
    assert found[0] == "interface"


def test_a_pooler_that_is_handed_one_row_is_said_to_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    ways = Ways(saved(AlbertModel(AlbertConfig(**SIZES)), tmp_path / "base"), tmp_path)
    ways.empty()
    with pytest.raises(ValueError, match="not one for each token"):
        unpadded_obstacle(ways.base, ways.unpadded, ways.padded)
    # A hook is left nowhere, and no slot is taken.
    items = texts([4, 6])
    assert_states(ways.padded(items, [0, 0]), ways.alone(items, [0, 0]))


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*given: Any) -> torch.Tensor:
        return attend_text_by_text(*given) * 1.01

    monkeypatch.setattr(unpadded, "attend_text_by_text", off)
    ways = Ways(tiny_bases.base_folder(tmp_path, "distilbert"), tmp_path)
    ways.empty()
    found = unpadded_obstacle(ways.base, ways.unpadded, ways.padded)
    assert found is not None
    assert found[0] == "differs"


def by_bounds(
    query: Any, key: Any, value: Any, starts: Any, *, window: Any, scale: Any
) -> torch.Tensor:
    """What torch documents of ``varlen_attn``: bounds by text, a window to the left and right."""
    out = torch.empty_like(query)
    shared = query.shape[1] // key.shape[1]
    for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        for row in range(start, stop):
            first = start if window[0] < 0 else max(start, row - window[0])
            last = stop if window[1] < 0 else min(stop, row + window[1] + 1)
            for head in range(query.shape[1]):
                keys, values = (one[first:last, head // shared].double() for one in (key, value))
                scores = keys @ query[row, head].double() * (scale or query.shape[-1] ** -0.5)
                out[row, head] = scores.softmax(0) @ values
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_both_ways_to_attend_are_the_equation(
    monkeypatch: pytest.MonkeyPatch, causal: bool, window: int | None, kv_heads: int
) -> None:
    torch.manual_seed(1)
    lengths = [5, 5, 1, 9, 5, 2, 2]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    texts = TextBounds(lengths, starts, attend_text_by_text)
    query = torch.randn(sum(lengths), 4, 8)
    key, value = (torch.randn(sum(lengths), kv_heads, 8) for _ in range(2))
    calls: list[dict[str, Any]] = []

    def fake(q: Any, k: Any, v: Any, *bounds: Any, **more: Any) -> torch.Tensor:
        calls.append(more)
        assert bounds[0] is bounds[1]
        assert bounds[2:] == (9, 9)
        return by_bounds(q, k, v, bounds[0], window=more["window_size"], scale=more["scale"])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake)
    for scale in (None, 0.2):
        given = (query, key, value, texts, scale, window, causal)
        one, other = attend_text_by_text(*given), attend_by_varlen(*given)
        assert (one - other).abs().max() <= SUM_ORDER_TOLERANCE * other.abs().max()
    assert [call["num_splits"] for call in calls] == [1, 1]
    assert [call["enable_gqa"] for call in calls] == [kv_heads != 4] * 2


def test_the_lane_says_how_its_batches_ran(tmp_path: Path) -> None:
    tasks = {"cls": "text-classification", "ner": "token-classification"}
    plain = Lane(tmp_path / "a", "distilbert", tasks)
    fixed = Lane(tmp_path / "b", "distilbert", tasks, deterministic=True)
    try:
        for lane in (plain, fixed):
            for number, name in enumerate((None, "cls", "ner")):
                task = "feature-extraction" if name is None else tasks[name]
                made: Any = tiny_bases.texts(3, seed=number)
                lane.lane.submit(lane.request(f"q{number}", name, task, made))
            assert all(isinstance(one, EncodeResult) for one in lane.drain().values())
        assert set(plain.lane.figures().steps_by) == {"unpadded"}
        assert set(fixed.lane.figures().steps_by) == {"deterministic"}
    finally:
        plain.residency.close()
        fixed.residency.close()


def test_a_base_that_cannot_says_why_once_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(unpadded, "attend_text_by_text", broken)
    caplog.set_level("INFO", logger="server.encoding.lane")
    lane = Lane(tmp_path, "distilbert", {"cls": "text-classification"})
    try:
        lane.lane.submit(lane.request("q", "cls", "text-classification", tiny_bases.texts(3)))
        (found,) = lane.drain().values()
        assert isinstance(found, EncodeResult)
        assert dict(lane.lane.figures().steps_by) == {"failed": 1}
    finally:
        lane.residency.close()
    (line,) = [one.getMessage() for one in caplog.records if "with padding" in one.getMessage()]
    assert "RuntimeError: no kernel image is available" in line
