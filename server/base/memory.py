"""How much memory this process may still take, and what steps over fixed buffers will."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

    from server.options import EngineOptions

CGROUPS: Final = Path("/sys/fs/cgroup")
MEMBERSHIP: Final = Path("/proc/self/cgroup")
# Of a logit while a token is chosen: scores, sorted scores and probabilities in float32, places.
_SAMPLED_BYTES: Final = 3 * 4 + 8


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


def static_bytes(options: EngineOptions, config: Any, dtype: torch.dtype, generates: bool) -> int:
    """About what steps over fixed buffers take of the device beside the base, graphs included.

    Args:
        options: Which of them there are, and their largest.
        config: The text config of the base.
        dtype: To compute in.
        generates: Whether the base continues texts.

    Returns:
        Of the largest step: of decoding its logits, as they are and as they are sampled, and which
        tokens were seen; of texts the widest moment of a layer. Smaller ones share this memory.
    """
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    found = 0
    if generates and options.decode_steps != "dynamic":
        of_token = dtype.itemsize + _SAMPLED_BYTES + 1
        found += options.max_sequences * int(getattr(config, "vocab_size", 0) or 0) * of_token
    if options.encode_batches != "dynamic":
        found += options.max_batch_tokens * (3 * inner + 6 * hidden) * dtype.itemsize
    return found


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
