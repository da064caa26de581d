"""Where the bytes of adapters are, when they are in no folder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RemotePlace:
    """An object store, and what may be kept of it on this disk.

    Args:
        url: ``s3://bucket/prefix``.
        endpoint: Of a store that is not Amazon's; None for what the environment says.
        cache_bytes: Of the versions that are kept on this disk.
        least_idle_s: Seconds that bytes stay after a name has left them, whoever asks.
    """

    url: str
    endpoint: str | None
    cache_bytes: int
    least_idle_s: float
