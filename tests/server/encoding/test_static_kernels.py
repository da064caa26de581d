"""Whole static batches of texts over the GPU kernels, as the interpreter runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.signature import Method
from server.base import captured_steps
from server.base.load import load_base
from server.base.probe_adapters import probe_factors
from server.base.rope import RopeByLength
from server.encoding.batch import Rows
from server.encoding.unpadded import UnpaddedForward
from server.messages import TokenizedInput
from tests.stand import tiny_bases
from tests.stand.interpreted import assert_relative, interpreted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
STATES_TOLERANCE = 1e-2  # of the largest: both ways round to float16 in every layer
ADAPTERS: tuple[tuple[Method, int], ...] = (("hira", 5), ("lora", 4))
LINEAR_LAYERS = 2 * 6  # of the backbone, its pooler left out


def unpadded(root: Path, folder: Path, **changes: Any) -> UnpaddedForward:
    """A base without adapters, whose static batches have 16 tokens."""
    base = load_base(tiny_bases.options(folder, root, dtype="fp16", quantization="nf4", **changes))
    made = UnpaddedForward(base, Rows(base, tiny_bases.text_of(folder)), RopeByLength(base.model))
    assert made.make_static(3, 16, 3) is None
    layers = base.adapted.modulator.static
    assert layers is not None
    for slot, (method, rank) in enumerate(ADAPTERS, start=1):
        factors = probe_factors(
            base.adapted, slot, method, rank, dtype=base.dtype,
            serves=lambda path: path.startswith("bert.encoder"),
        )  # fmt: skip
        base.adapted.install(slot, factors)
    return made


def test_states_are_those_of_torchs_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of one low rank: the interpreter takes long for more.
    monkeypatch.setattr(captured_steps, "LAUNCH_CLASSES", ((0, False), (16, True)))
    folder = tiny_bases.base_folder(tmp_path, "bert")
    items = [TokenizedInput(tuple(range(5, 5 + count))) for count in (3, 6, 2)]
    with torch.inference_mode():
        wanted = unpadded(tmp_path, folder).side_by_side(items, [0, 1, 2])
    with interpreted() as kernels:
        made = unpadded(tmp_path, folder, modulation="fused")
        ran: list[int] = []
        plain = kernels.tiles.token_rows_linear

        def counted(x: torch.Tensor, *given: Any, **more: Any) -> Any:
            ran.append(x.shape[0])
            return plain(x, *given, **more)

        monkeypatch.setattr(kernels.tiles, "token_rows_linear", counted)
        with torch.inference_mode():
            found = made(items, [0, 1, 2])
    assert made.ran == "static"
    assert ran == [16] * LINEAR_LAYERS  # over all rows of the bucket
    for text in range(3):
        of_text = wanted.mask[text] == 1
        assert_relative(found.hidden[text][of_text], wanted.hidden[text][of_text], STATES_TOLERANCE)
    assert found.pooled is not None
    assert wanted.pooled is not None
    assert_relative(found.pooled, wanted.pooled, STATES_TOLERANCE)
