"""From the inputs of a batch to what the backbone takes: token ids with padding, or pixels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from server.base.load import LoadedBase
from server.base.plan import one_id
from server.inputs.images import Images
from server.inputs.text import Text
from server.messages import ProcessedImage, TokenizedInput
from server.options import EngineOptions


@dataclass(frozen=True)
class Feed:
    """One batch as the backbone takes it.

    Args:
        arguments: Of its forward.
        tokens: Tokens (patches) a row, padding included.
        ids, mask: ``[n, T]``, padded on the right; None for images.
    """

    arguments: dict[str, Any]
    tokens: int
    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def tables(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask for every state of ``hidden`` ``[n, T, H]``; all ones for images."""
        if self.ids is not None and self.mask is not None:
            return self.ids, self.mask
        ones = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return ones, ones


@dataclass(frozen=True)
class FlatFeed:
    """One batch of texts as the backbone takes it without padding.

    Args:
        arguments: Of its forward, ``[1, N]`` for N tokens in all.
        lengths: Tokens of each text.
        starts: int32 ``[n + 1]``: the first row of each text, then N.
        places: ``[n, T]``: the row at each place of a table with padding; at padding, the text's
            last.
        ids, mask: ``[n, T]``, padded on the right.
    """

    arguments: dict[str, Any]
    lengths: tuple[int, ...]
    starts: torch.Tensor
    places: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor

    def laid_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[1, N, H]`` states as ``[n, T, H]``.

        Raises:
            ValueError: These are not the states of all tokens.
        """
        if hidden.dim() != 3 or hidden.shape[1] != sum(self.lengths):
            raise ValueError(f"States of {tuple(hidden.shape)}, not one for each token.")
        if len(set(self.lengths)) == 1:
            return hidden.reshape(*self.places.shape, hidden.shape[-1])
        return hidden[0][self.places]


class Rows:
    """Makes feeds for one base.

    Args:
        base: The loaded base.
        inputs: Its tokenizer, or its image processor.
    """

    def __init__(self, base: LoadedBase, inputs: Text | Images) -> None:
        known = inspect.signature(base.backbone.forward).parameters
        self._takes_type_ids = "token_type_ids" in known
        self._constant: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
        self._pad_id = inputs.pad_id if isinstance(inputs, Text) else 0
        embeddings = getattr(base.backbone, "embeddings", None)
        # RoBERTa counts its positions from its padding on, and its padding does not count.
        self._counted: Any = getattr(embeddings, "create_position_ids_from_input_ids", None)
        self._first_position = getattr(embeddings, "padding_idx", None)
        self._base = base

    def feed(self, items: Sequence[Any]) -> Feed:
        """The batch of some inputs, all texts (``TokenizedInput``) or all images."""
        if isinstance(items[0], ProcessedImage):
            return self._pixels(items)
        return self._tokens(items)

    def _pixels(self, items: Sequence[ProcessedImage]) -> Feed:
        images = [
            torch.frombuffer(bytearray(item.pixels), dtype=torch.float32).view(item.shape)
            for item in items
        ]
        pixels = torch.stack(images).to(self._base.device, self._base.dtype)
        return Feed({"pixel_values": pixels}, items[0].tokens)

    def _tokens(self, items: Sequence[TokenizedInput]) -> Feed:
        device = self._base.device
        ids = _padded([item.token_ids for item in items], self._pad_id, device)
        mask = _padded([(1,) * len(item.token_ids) for item in items], 0, device)
        arguments = {"input_ids": ids, "attention_mask": mask, **self._constant}
        if self._takes_type_ids and any(item.type_ids for item in items):
            arguments["token_type_ids"] = _padded(
                [item.type_ids or (0,) * len(item.token_ids) for item in items], 0, device
            )
        return Feed(arguments, ids.shape[1], ids, mask)

    def side_by_side(self, items: Sequence[TokenizedInput]) -> FlatFeed:
        """The batch of some texts, all of their tokens in one row; one copy to the device."""
        device = self._base.device
        lengths = torch.tensor([len(item.token_ids) for item in items])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        column = torch.arange(int(lengths.max()))
        mask = (column < lengths[:, None]).long()
        places = starts[:, None] + torch.minimum(column, lengths[:, None] - 1)
        ids = torch.tensor([one for item in items for one in item.token_ids])
        table = ids[places].masked_fill(mask == 0, self._pad_id)
        if self._counted is not None and self._first_position is not None:
            positions = self._counted(table, self._first_position)[mask == 1]
        else:
            positions = torch.arange(len(ids)) - starts.repeat_interleave(lengths)
        pieces = [ids, positions, starts, ends[-1:], places.view(-1), table.view(-1), mask.view(-1)]
        typed = self._takes_type_ids and any(item.type_ids for item in items)
        if typed:
            kinds = [item.type_ids or (0,) * len(item.token_ids) for item in items]
            pieces.append(torch.tensor([one for row in kinds for one in row]))
        together = torch.cat(pieces)
        if device.type == "cuda":
            together = together.pin_memory().to(device, non_blocking=True)
        split = torch.split(together, [len(one) for one in pieces])
        arguments = {"input_ids": split[0][None], "position_ids": split[1][None], **self._constant}
        if typed:
            arguments["token_type_ids"] = split[7][None]
        bounds = together[2 * len(ids) : 2 * len(ids) + len(items) + 1].int()
        tables = [one.view(mask.shape) for one in split[4:7]]
        return FlatFeed(arguments, tuple(lengths.tolist()), bounds, *tables)


def inputs_of(base: LoadedBase, options: EngineOptions) -> Text | Images:
    """What turns inputs into what the base takes."""
    if base.takes_images:
        return Images.load(
            base.folder,
            base.config,
            max_pixels=options.max_image_pixels,
            max_request_pixels=options.max_request_pixels,
        )
    most = base.adapted.signature.max_length
    return Text.load(
        base.folder,
        max_tokens=min(most, options.max_input_tokens or most),
        vocab_size=base.adapted.signature.vocab_size or None,
        pad_id=one_id(getattr(base.config, "pad_token_id", None)),
        source=options.tokenizer,
    )


def _padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=device)
