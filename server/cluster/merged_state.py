"""What several engines say of themselves, as one: sums of figures, and the best place of each
adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

TIERS: Final = ("device", "host")  # the best first; what is in none of them is on disk


def merged(snapshots: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One snapshot of several, by the names of ``EngineSnapshot``.

    Counts and bytes add up; a version is in the best tier that any replica has it in, and in
    quarantine where any has it there, as long as the longest. Texts are those of the first.
    """
    found: dict[str, Any] = {}
    for snapshot in snapshots:
        for name, value in snapshot.items():
            if name == "residency":
                tiers = found.setdefault(name, {})
                for version, tier in value.items():
                    tiers[version] = min(tiers.get(version, tier), tier, key=_tier_rank)
            elif name == "quarantined":
                held = found.setdefault(name, {})
                for version, entry in value.items():
                    held[version] = max(held.get(version, entry), entry)
            elif isinstance(value, Mapping):
                sums = found.setdefault(name, {})
                for key, amount in value.items():
                    sums[key] = sums.get(key, 0) + amount
            else:
                found.setdefault(name, value)
    return found


def _tier_rank(tier: str) -> int:
    return TIERS.index(tier) if tier in TIERS else len(TIERS)
