"""Whole static batches of texts over the GPU kernels, as the interpreter runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig

from adapters.layers.inject import inject
from adapters.modulation.strategy import Strategy
from adapters.signature import Method
from server.base import captured_steps
from server.base.load import LoadedBase
from server.base.probe_adapters import probe_factors
from server.base.rope import RopeByLength
from server.encoding.batch import Rows
from server.encoding.unpadded import UnpaddedForward
from server.messages import TokenizedInput
from tests.stand import tiny_bases
from tests.stand.interpreted import assert_relative, interpreted
from tests.stand.tiny_models import quantize

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
STATES_TOLERANCE = 1e-2  # of the largest: both ways round to float16 in every layer
ADAPTERS: tuple[tuple[Method, int], ...] = (("hira", 5), ("lora", 4))
ON_KERNELS = ("encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense")


def unpadded(folder: Path, strategy: Strategy) -> UnpaddedForward:
    """A base of one layer, of which two linear layers are in 4 bits, with adapters on these; its
    static batches have 8 tokens."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny_bases.VOCABULARY, hidden_size=64, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=48,
    )  # fmt: skip
    model: Any = AutoModel.from_config(config, attn_implementation="sdpa").half().eval()
    for layer in (model.encoder.layer[0].intermediate, model.encoder.layer[0].output):
        layer.dense.weight.data.mul_(8.0)
        layer.get_output_embeddings = lambda: None
        quantize(layer, "nf4")
        del layer.get_output_embeddings
    adapted = inject(model, strategy=strategy)
    base = LoadedBase(adapted, config, torch.float16, torch.device("cpu"), folder, "")
    made = UnpaddedForward(base, Rows(base, tiny_bases.text_of(folder)), RopeByLength(base.model))
    assert made.make_static(3, 8, 2) is None
    for slot, (method, rank) in enumerate(ADAPTERS, start=1):
        factors = probe_factors(
            adapted, slot, method, rank, dtype=base.dtype, serves=ON_KERNELS.__contains__
        )
        adapted.install(slot, factors)
    return made


def test_states_are_those_of_torchs_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of one low rank: the interpreter takes long for more.
    monkeypatch.setattr(captured_steps, "LAUNCH_CLASSES", ((0, False), (16, True)))
    folder = tiny_bases.base_folder(tmp_path, "bert")
    items = [TokenizedInput(tuple(range(5, 5 + count))) for count in (3, 4)]
    with torch.inference_mode():
        wanted = unpadded(folder, "auto").side_by_side(items, [1, 2])
    with interpreted() as kernels:
        made = unpadded(folder, "fused")
        ran: list[int] = []
        plain = kernels.tiles.token_rows_linear

        def counted(x: torch.Tensor, *given: Any, **more: Any) -> Any:
            ran.append(x.shape[0])
            return plain(x, *given, **more)

        monkeypatch.setattr(kernels.tiles, "token_rows_linear", counted)
        with torch.inference_mode():
            found = made(items, [1, 2])
    assert made.ran == "static"
    assert ran == [8] * len(ON_KERNELS)  # over all rows of the bucket
    for text in range(2):
        of_text = wanted.mask[text] == 1
        assert_relative(found.hidden[text][of_text], wanted.hidden[text][of_text], STATES_TOLERANCE)
    assert found.pooled is not None
    assert wanted.pooled is not None
    assert_relative(found.pooled, wanted.pooled, STATES_TOLERANCE)
