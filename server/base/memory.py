"""How much memory this process may still take, and what steps over fixed buffers will."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

    from server.options import EngineOptions

CGROUPS: Final = Path("/sys/fs/cgroup")
MEMBERSHIP: Final = Path("/proc/self/cgroup")
# Of a logit while a token is chosen: scores, sorted scores and probabilities in float32, places.
_SAMPLED_BYTES: Final = 3 * 4 + 8
# Of a token of a static batch of texts: id, position, type and slot.
_TOKEN_BYTES: Final = 3 * 8 + 4


def available_bytes(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Memory that is free or can be freed, within the limit of a container if there is one.

    Args:
        cgroups: Where control groups are mounted, of version 2 or 1.
        membership: Which ones this process is in.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder in _folders(cgroups, membership):
        left = _left_bytes(folder)
        if left is not None:
            free = min(free, left)
    return free


@dataclass(frozen=True, slots=True)
class StaticBytes:
    """About what steps over fixed buffers take of the device beside the base.

    Args:
        buffers: Without which there are no such steps.
        graphs: Of all that were captured, in the memory that they share: that of the largest. With
            less, fewer are captured.
    """

    buffers: int = 0
    graphs: int = 0


def static_bytes(
    options: EngineOptions, config: Any, dtype: torch.dtype, generates: bool
) -> StaticBytes:
    """About what steps over fixed buffers take of the device beside the base.

    Args:
        options: Which of them there are, and their largest.
        config: The text config of the base.
        dtype: To compute in.
        generates: Whether the base continues texts.

    Returns:
        Of decoding: which tokens were seen, as buffers; logits as they are and as they are sampled,
        as graphs. Of texts: their states; the widest moment of a layer.
    """
    buffers, graphs = 0, 0
    if generates and options.decode_steps != "dynamic":
        vocabulary = int(getattr(config, "vocab_size", 0) or 0)
        buffers += (options.max_sequences + 1) * vocabulary
        graphs = _sampled_bytes(options, config, dtype)
    if options.encode_batches != "dynamic":
        hidden = int(getattr(config, "hidden_size", 0) or 0)
        buffers += options.max_batch_tokens * (hidden * dtype.itemsize + _TOKEN_BYTES)
        graphs = max(graphs, options.max_batch_tokens * _widest_bytes(config, dtype))
    return StaticBytes(buffers, graphs)


def later_bytes(
    options: EngineOptions, config: Any, dtype: torch.dtype, prefill_tokens: int = 0
) -> int:
    """What must be left of the device once steps are captured, which then never give any back.

    Args:
        options: The budgets of adapters, heads and folded weights, which are taken as adapters
            come; the largest batch of texts, and how many sequences decode at once.
        config: The text config of the base.
        dtype: To compute in.
        prefill_tokens: Of a step that reads prompts; 0: the base continues no text.

    Returns:
        Those budgets, and the widest moment of the largest step that is not captured: in a layer,
        or, where every token of a prompt is scored, in the output layer and after it.
    """
    budgets = options.device_bytes + options.folded_bytes + options.head_bytes
    tokens = max(options.max_batch_tokens, prefill_tokens)
    layer = tokens * _widest_bytes(config, dtype)
    if not prefill_tokens:
        return budgets + layer
    # Layers are done when there are logits; those of prompts are there twice, whole and picked out.
    scored = 2 * prefill_tokens * int(getattr(config, "vocab_size", 0) or 0) * dtype.itemsize
    return budgets + max(layer, scored + _sampled_bytes(options, config, dtype))


def _sampled_bytes(options: EngineOptions, config: Any, dtype: torch.dtype) -> int:
    """Of the logits of all sequences that decode, as they are and as they are sampled."""
    vocabulary = int(getattr(config, "vocab_size", 0) or 0)
    return options.max_sequences * vocabulary * (dtype.itemsize + _SAMPLED_BYTES)


def _widest_bytes(config: Any, dtype: torch.dtype) -> int:
    """Of a token, in the widest moment of a layer."""
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    return (3 * inner + 6 * hidden) * dtype.itemsize


def _folders(cgroups: Path, membership: Path) -> list[Path]:
    """Control groups with a say in this process's memory: its own and all above it.

    In a container its own group is usually mounted as the root, under which the path that the
    kernel names does not exist.
    """
    found = [cgroups, cgroups / "memory"]
    try:
        lines = membership.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        inner = root / path.strip("/")
        while inner != root and root in inner.parents:
            found.append(inner)
            inner = inner.parent
    return found


def _left_bytes(folder: Path) -> int | None:
    """What a control group may still take, or None where it has no limit.

    Cache of files that nobody used lately counts as free: the kernel drops it before it kills.
    """
    for limit_name, used_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((folder / limit_name).read_text(encoding="ascii"))
            used = int((folder / used_name).read_text(encoding="ascii"))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        cache = 0
        try:
            for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(" ")
                if name == cache_name:
                    cache = int(value)
        except (OSError, ValueError):
            cache = 0
        return max(0, limit - used + cache)
    return None
