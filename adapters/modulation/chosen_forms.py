"""Which form of the kernels computes a call: compared with the fused kernel first, then timed.

The fused kernel (``tiles``) computes whatever nobody has compared. Another form computes a call
only after its answer to a call of the same kind was within ``FORM_TOLERANCE`` of the fused
kernel's, in this run of the server, and only while it is the fastest. A form that differs, or that
fails, is dropped for such calls with one line in the log, and the fused kernel computes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from adapters.errors import in_a_line
from adapters.modulation.autotune import Autotuner
from adapters.modulation.form_agreement import FORM_TOLERANCE, row_difference
from adapters.modulation.strategy import Bucket, Candidate, Computation
from adapters.modulation.workspace import Workspace

Forms = Mapping[Candidate, Callable[[], torch.Tensor]]
TILES: Final[Candidate] = ("triton", "tiles")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallKind:
    """What decides which code computes a call, in any form: calls of a kind are compared once.

    Args:
        bucket: Of the tuner: sizes, about.
        shape: ``(out, in)`` of the weight.
        order: Whether its codes are grouped, and the weights that share a scale.
        ranks: Padded, of the slots.
        biased: A bias is added.
    """

    bucket: Bucket
    shape: tuple[int, int]
    order: tuple[bool, int]
    ranks: frozenset[int]
    biased: bool

    def __str__(self) -> str:
        out_features, in_features = self.shape
        ranks = ", ".join(map(str, sorted(self.ranks)))
        rows = 2**self.bucket.rows_log2
        return f"about {rows} rows by {out_features} x {in_features}, padded ranks {ranks}"


class ChosenForms:
    """What is known of the forms of one model's calls. One thread uses it.

    Args:
        proved: The forms beside the fused kernel that the start's probe found right.
    """

    def __init__(self, proved: Collection[Computation]) -> None:
        self._proved = frozenset(proved)
        # Whether a form agreed with the fused kernel on calls of a kind; unknown: not compared.
        self._agrees: dict[tuple[CallKind, Candidate], bool] = {}
        self._fastest: dict[CallKind, Candidate] = {}
        self._workspace = Workspace()

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers that the chosen forms share."""
        return self._workspace.nbytes

    def compute(
        self,
        kind: CallKind,
        forms_with: Callable[[Workspace], Forms],
        tuner: Autotuner,
    ) -> torch.Tensor:
        """The answer to a call, by the form that may compute it and is the fastest.

        Args:
            kind: Of the call.
            forms_with: Every form of the call, each a call of its own that gives a new tensor; on
                the buffers of a workspace. The fused kernel is among them.
            tuner: Has timed the forms, or will; times of a former run count once the form was
                compared in this one.

        Raises:
            Exception: What the fused kernel raises.
        """
        bucket = kind.bucket
        runs = self._usable(kind, forms_with(self._workspace))
        tiles = runs[TILES]
        if len(runs) == 1:
            return tiles()
        if tuner.is_due(bucket, runs):
            # On buffers of the moment: those of forms that lose are not kept.
            aside = forms_with(Workspace())
            self._compare(kind, {one: aside[one] for one in runs})
            runs = self._usable(kind, runs)
            if len(runs) > 1:
                tuner.run(bucket, {one: aside[one] for one in runs})
            del aside
        if not tuner.is_settled(bucket):
            return tiles()
        known = {one: ns for one in runs if (ns := tuner.ns(bucket, one)) is not None}
        fastest = min(known, key=known.__getitem__, default=TILES)
        self._note(kind, fastest)
        if fastest == TILES:
            return tiles()
        if (kind, fastest) not in self._agrees:
            aside = forms_with(Workspace())
            return self._compare(kind, {one: aside[one] for one in (TILES, fastest)})
        try:
            return runs[fastest]()
        except Exception as error:  # noqa: BLE001  # the fused kernel decides whether it is worse
            self._drop(kind, fastest, in_a_line(error))
        return tiles()

    def _usable(self, kind: CallKind, runs: Forms) -> dict[Candidate, Callable[[], torch.Tensor]]:
        return {
            one: run
            for one, run in runs.items()
            if one == TILES or (one[1] in self._proved and self._agrees.get((kind, one), True))
        }

    def _compare(self, kind: CallKind, runs: Forms) -> torch.Tensor:
        """Hold those that were not to the fused kernel's answer, which is returned."""
        wanted = runs[TILES]()
        for one, run in runs.items():
            if one == TILES or (kind, one) in self._agrees:
                continue
            try:
                off = row_difference(run(), wanted)
            except Exception as error:  # noqa: BLE001  # a compiler, a library, memory
                self._drop(kind, one, in_a_line(error))
                continue
            if off is None:
                continue  # nothing in it is finite: the next call says more
            if off <= FORM_TOLERANCE:
                self._agrees[kind, one] = True
            else:
                self._drop(kind, one, f"off the fused kernel by {off:.2g}")
        return wanted

    def _drop(self, kind: CallKind, one: Candidate, why: str) -> None:
        self._agrees[kind, one] = False
        self._workspace = Workspace()
        logger.warning("The form %s does not compute %s: %s", one[1], kind, why)

    def _note(self, kind: CallKind, fastest: Candidate) -> None:
        """Let buffers go when another form computes a kind: those that are left grow again.

        By kind and not by bucket: in one bucket, a form may be dropped for one layer and be the
        fastest for the next, in every forward.
        """
        before = self._fastest.get(kind, TILES)
        self._fastest[kind] = fastest
        if fastest != before != TILES:
            self._workspace = Workspace()
