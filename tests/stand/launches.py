"""What a function asks of a device: every launch, on which memory, and no look at any number.

On a CPU a host may read what it likes, and nobody sees it; on a GPU each look waits for the device,
and none can be captured. These modes see on a CPU what would happen there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose answer, or whose shape of an answer, must be on the host.
LOOKS = frozenset(
    {
        "aten._local_scalar_dense",
        "aten.item",
        "aten.is_nonzero",
        "aten.equal",
        "aten.allclose",
        "aten.nonzero",
        "aten.masked_select",
        "aten.unique_consecutive",
        "aten._unique2",
        "aten.unique_dim",
        "aten.bincount",
        "aten.repeat_interleave",
    }
)
# Operators that take a mask for an index, if they are given one.
MASKED = frozenset({"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"})
# A tensor made of numbers of the host: on a GPU a copy, and in a captured step a constant.
CONSTANTS = frozenset({"aten.lift_fresh", "aten.lift_fresh_copy"})


class HostLook(AssertionError):
    """The host looked at a number, or brought one of its own."""


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for one in values:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from _tensors(one)


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator with the shapes and types of its tensors, and where known memory is.

    Args:
        fixed: Memory that should stay where it is: every use of it is noted with its address.

    Raises:
        HostLook: By whatever runs within.
    """

    def __init__(self, fixed: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fixed = {one.untyped_storage().data_ptr() for one in fixed}
        self.found: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().replace("::", ".").split(".")
        short = ".".join(name[:2])
        tensors = list(_tensors([*args, *kwargs.values()]))
        if short in LOOKS or short in CONSTANTS:
            raise HostLook(f"{func.name()} of {[tuple(one.shape) for one in tensors]}")
        masked = short in MASKED
        if masked and any(one.dtype == torch.bool for one in _tensors(args[1])):
            raise HostLook(f"{func.name()} by a mask: how many rows are in it must be known")
        self.found.append(
            (
                func.name(),
                *((tuple(one.shape), one.dtype) for one in tensors),
                *(
                    one.data_ptr()
                    for one in tensors
                    if one.untyped_storage().data_ptr() in self._fixed
                ),
            )
        )
        return func(*args, **kwargs)
