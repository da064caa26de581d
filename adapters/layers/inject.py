"""Puts adapted layers into a model, and the model's side of serving many adapters.

After ``inject`` no module of bitsandbytes runs. What adapters are resident, and when they come and
go, is the business of ``adapters.residency.slots``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from adapters.errors import MissingTensors, NonFinite, ShapeMismatch, SlotNotResident
from adapters.layers.adapted import AdaptedLayer, AdaptedLinear, adapt_in_place
from adapters.modulation.fused import FusedLayers
from adapters.modulation.kernel_probe import obstacle
from adapters.modulation.modulator import Modulator
from adapters.modulation.plan import Plan
from adapters.modulation.slot_factors import SlotFactors
from adapters.modulation.static_layers import StaticLayers
from adapters.modulation.strategy import Strategy
from adapters.segments import BASE_SLOT, Segments
from adapters.signature import BaseSignature, LayerSignature, describe, target_modules

logger = logging.getLogger(__name__)


class AdaptedModel:
    """A base model whose layers serve the adapters in its slots.

    One thread runs forwards. ``install`` and ``uninstall`` may run in another, for slots that no
    running batch uses.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, AdaptedLayer],
        signature: BaseSignature,
        modulator: Modulator,
    ) -> None:
        self.model = model
        self.layers = layers
        self.signature = signature
        self.modulator = modulator
        self._installed: set[int] = set()
        self._static_users = 0  # of ``modulator.static``

    @property
    def fused(self) -> FusedLayers | None:
        """The layers on the fused kernel; None: no layer uses it."""
        return self.modulator.fused

    @property
    def form_bytes(self) -> int:
        """Bytes of buffers that the chosen forms of the GPU kernels share, and of their tables."""
        return 0 if self.fused is None else self.fused.buffer_bytes

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextmanager
    def batch(
        self,
        segments: Segments,
        sequences: Segments | None = None,
        logits: Segments | None = None,
    ) -> Iterator[None]:
        """Forwards within it serve each row by its slot; outside of it the model is the bare base.

        Inputs ``[B, T, H]`` and ``[1, N, H]`` are tokens; ``[B, H]`` are sequences; an output layer
        also takes ``logits``. ``[B, t, H]`` with another t than the segments' is taken as t rows
        for each of ``sequences``, so one batch holds for a prompt and the decoding after it.

        Args:
            segments: Per token row, padding included.
            sequences: Per sequence, for poolers, convolutions and decoding steps.
            logits: Per row that reaches the language-model head, when not all tokens do.

        Raises:
            SlotNotResident: A slot without an adapter; nothing has run then.
        """
        plan = Plan(segments, sequences, logits)
        missing = [slot for slot in plan.slots if slot not in self._installed]
        if missing:
            raise SlotNotResident(
                "The batch names slots that hold no adapter.",
                found=f"slots {missing}",
                expected=f"one of {sorted(self._installed)}, or {BASE_SLOT} for the base",
                fix="Lease the adapter's slot before running the batch.",
            )
        with self.modulator.planned(plan):
            yield

    def check(self, factors: Mapping[str, SlotFactors]) -> None:
        """Check that ``factors`` fit this model's layers and stay finite; mutates nothing.

        Raises:
            MissingTensors: There are no factors, or they are for a layer that is not here.
            ShapeMismatch: A rank below 1, or a factor that does not fit its layer.
            NonFinite: NaN or infinity, in a factor or in the product BA.
        """
        for path, entry in factors.items():
            layer = self.signature.layers.get(path)
            if layer is None:
                raise MissingTensors(
                    "Factors for a layer that this base does not have.",
                    found=path,
                    expected="a path of the base's signature",
                )
            _check_shapes(layer, entry)
            _check_finite_factors(layer, entry)

    def install(
        self, slot: int, factors: Mapping[str, SlotFactors], *, checked: bool = False
    ) -> None:
        """Put an adapter into a slot that no batch uses; what was there is gone.

        Args:
            slot: 1 or more.
            factors: By layer path, on this model's device.
            checked: They have been through ``check``, which reads every number, already.

        Raises:
            As ``check``, before any change.
        """
        if slot <= BASE_SLOT:
            raise SlotNotResident(
                "Slot 0 is the bare base.", found=f"slot {slot}", expected="1 or more"
            )
        if not checked:
            self.check(factors)
        self.uninstall(slot)
        if self.fused is not None:
            factors = self.fused.place(slot, factors)
        if self.modulator.static is not None:
            self.modulator.static.place(slot, factors)
        for path, entry in factors.items():
            self.layers[path].slots[slot] = entry
        self._installed.add(slot)

    def uninstall(self, slot: int) -> None:
        """Empty a slot that no batch uses; an empty one stays empty."""
        self._installed.discard(slot)
        self.modulator.forget(slot)
        for layer in self.layers.values():
            layer.slots.pop(slot, None)
        if self.fused is not None:
            self.fused.clear(slot)
        if self.modulator.static is not None:
            self.modulator.static.clear(slot)

    def make_static(
        self, slots: int, most_rows: int = 0, ranks: Sequence[int] = ()
    ) -> StaticLayers:
        """Let steps over fixed buffers run over the linear layers; before anything is installed.

        Args:
            slots: How many slots there will ever be, slot 0 included.
            most_rows: Of a step in which rows are of many slots; 0: there are no such steps.
            ranks: Padded, that these steps are made for.

        Returns:
            The same to whoever asks again; each gives it back with ``leave_static``.
        """
        known = self.modulator.static
        if known is not None:
            assert known.slots == slots
            self._static_users += 1
            return known
        assert not self._installed
        weights = {
            path: layer.quantized
            for path, layer in self.layers.items()
            if isinstance(layer, AdaptedLinear)
        }
        dtype = next(one.dtype for one in self.model.parameters() if one.is_floating_point())
        steps = None if self.fused is None else self.fused.steps
        if steps is not None and most_rows:
            steps.choose(most_rows, ranks)
        try:
            made = StaticLayers(weights, slots, dtype, self.device, steps)
        except Exception:
            if steps is not None and most_rows:
                steps.choose(1, ())
            raise
        self.modulator.static = made
        self._static_users = 1
        return made

    def leave_static(self, made: StaticLayers, *, forms: bool = False) -> None:
        """Give back what ``make_static`` gave: nobody has steps of that kind from now on.

        The tables go with the last one who has them; adapters are noted in them no more.

        Args:
            made: As ``make_static`` returned it, once for each time.
            forms: Steps with rows of many slots were asked for: their buffers go now.
        """
        assert made is self.modulator.static
        if forms and made.fused is not None:
            made.fused.choose(1, ())  # nothing: the buffers of all forms go
        self._static_users -= 1
        if not self._static_users:
            self.modulator.static = None

    def base_bytes(self) -> tuple[int, int]:
        """Bytes of the base: its linear layers' weights, and everything else, each counted once.

        Output layers count as everything else: they are not quantized and often tied.
        """
        linear, seen = 0, set[int]()
        for path, layer in self.layers.items():
            if isinstance(layer, AdaptedLinear) and path not in self.signature.output_layers:
                weight = layer.quantized
                if weight.stored.data_ptr() not in seen:
                    linear += weight.nbytes
                seen.add(weight.stored.data_ptr())
        other = 0
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.data_ptr() not in seen:
                other += tensor.nbytes
                seen.add(tensor.data_ptr())
        return linear, other


def inject(model: nn.Module, *, name: str = "", strategy: Strategy = "auto") -> AdaptedModel:
    """Make every layer that an adapter could target an adapted one; mutates ``model``.

    The model is frozen and set to evaluation. Paths, parameters and ties stay as they were.

    Args:
        model: On its device, quantized or not, not injected yet.
        name: The name of its signature.
        strategy: How HiRA rows are computed; ``auto`` chooses for every layer and segment.

    Raises:
        ValueError: The model is injected already, or bitsandbytes has repacked a weight.
        UnsupportedOption: ``strategy`` is ``fused`` and the fused kernel cannot run here.
    """
    signature = describe(model, name)
    modulator = Modulator(strategy)
    layers: dict[str, AdaptedLayer] = {}
    targets = list(target_modules(model))
    if any(hasattr(module, "layer_signature") for _, module in targets):
        raise ValueError("The model has adapted layers already.")
    model.requires_grad_(False)
    model.eval()
    for layer, module in targets:
        if layer.kind in ("embedding", "conv"):
            adapt_in_place(module, layer, modulator)
            layers[layer.path] = cast(AdaptedLayer, module)
        else:
            is_output = layer.path in signature.output_layers
            replacement = AdaptedLinear(module, layer, modulator, is_output)
            model.set_submodule(layer.path, replacement)
            layers[layer.path] = replacement
    modulator.fused = _fuse(model, layers, strategy)
    return AdaptedModel(model, layers, signature, modulator)


def _fuse(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], strategy: Strategy
) -> FusedLayers | None:
    """The linear layers on the fused kernel, if it is asked for, or can run under ``auto``."""
    parameters = list(model.parameters())
    device = parameters[0].device
    floats = (one.dtype for one in parameters if one.is_floating_point())
    dtype = next(floats, torch.float32)  # a lone 4-bit table has none
    if strategy != "fused":
        if strategy != "auto" or device.type != "cuda":
            return None
        reason = obstacle(dtype, device)
        if reason is not None:
            logger.warning("Torch operators run the adapters, not the fused kernel: %s", reason)
            return None
    linear = {path: one for path, one in layers.items() if isinstance(one, AdaptedLinear)}
    return FusedLayers({path: one.quantized for path, one in linear.items()}, dtype, device)


def _check_shapes(layer: LayerSignature, entry: SlotFactors) -> None:
    expected = layer.factor_shapes(entry.rank, entry.method)
    found = (tuple(entry.a.shape), tuple(entry.b.shape))
    if found != expected:
        raise ShapeMismatch(
            f"The factors for {layer.path} do not fit.",
            found=f"A {found[0]}, B {found[1]}",
            expected=f"A {expected[0]}, B {expected[1]}",
        )
    if entry.bias is not None and tuple(entry.bias.shape) != (layer.out_features,):
        raise ShapeMismatch(
            f"The bias for {layer.path} does not fit.",
            found=str(tuple(entry.bias.shape)),
            expected=str((layer.out_features,)),
        )


def _check_finite_factors(layer: LayerSignature, entry: SlotFactors) -> None:
    a_max, b_max = (float(factor.abs().amax()) for factor in (entry.a, entry.b))
    bound = a_max * b_max * entry.rank  # NaN and infinity show up in it, too
    finite = bound <= torch.finfo(entry.a.dtype).max
    if not finite and bound < float("inf"):
        # The bound is loose: only now form the product.
        rank = entry.rank
        product = entry.b.double().reshape(-1, rank) @ entry.a.double().reshape(rank, -1)
        finite = float(product.abs().amax()) <= torch.finfo(entry.a.dtype).max
    if not finite or (entry.bias is not None and not bool(torch.isfinite(entry.bias).all())):
        raise NonFinite(
            f"The factors for {layer.path}, or their product, are not finite in {entry.a.dtype}.",
            found=f"largest magnitudes A {a_max:g}, B {b_max:g}",
            expected="finite values",
            fix="Check the adapter's training; fp32 and bf16 hold larger values than fp16.",
        )
