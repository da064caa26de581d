"""What the administration answers of adapters: the record of one, the history of its name, and what
applying has changed. Functions alone; what they show is fetched by the endpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from adapters.registry.aliases import AliasChange
from adapters.registry.history import HistoryEntry
from adapters.registry.records import AdapterRecord, Canary, NameChange
from server.edge.endpoints.schemas_admin import (
    AdapterAnswer,
    AliasChangeAnswer,
    ApplyAnswer,
    CanaryAnswer,
    NameChangeAnswer,
    VersionAnswer,
    VersionsAnswer,
)


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """What others than the registry know of adapters at this moment."""

    residency: Mapping[str, str]  # tier by version, of those that the engine knows
    lost: Collection[str]  # versions that the engine does not know, and the store does not have
    quarantined: Mapping[str, tuple[float, str]]  # by version: until when, and why
    usage: Mapping[str, tuple[int, float | None]]  # by name: requests, time of the last

    def place_of(self, version: str) -> str:
        """Where a version is: its tier, disk, or lost where its bytes are nowhere."""
        return self.residency.get(version) or ("lost" if version in self.lost else "disk")


def adapter_answer(record: AdapterRecord, known: AdapterStatus, base_digest: str) -> dict[str, Any]:
    """An adapter as every call shows it that shows one.

    Args:
        record: Of its name.
        known: What is known of adapters at this moment.
        base_digest: Of the base that is served.
    """
    requests, last_used = known.usage.get(record.name, (0, None))
    until, why = known.quarantined.get(record.version, (None, None))
    return AdapterAnswer(
        name=record.name,
        version=record.version,
        method=record.method,
        task=record.task,
        labels=None if record.labels is None else list(record.labels),
        ranks=list(record.ranks),
        targets=list(record.targets),
        parameters=record.parameters,
        bytes=record.tensor_bytes,
        sparsity=record.sparsity,
        base=record.base_name,
        source=record.source,
        pinned=record.pinned,
        served=record.fits(base_digest),
        created=record.created.isoformat(),
        residency=known.place_of(record.version),
        requests=requests,
        last_used=_when(last_used),
        quarantined_until=_when(until),
        quarantine_reason=why,
        chat_template=record.chat_template,
        generation=dict(record.generation),
        notes=list(record.notes),
        aliases=list(record.aliases),
        canary=None if record.canary is None else _canary_answer(record.canary, known, base_digest),
    ).model_dump()


def _canary_answer(canary: Canary, known: AdapterStatus, base_digest: str) -> CanaryAnswer:
    record = canary.record
    return CanaryAnswer(
        version=record.version,
        share=canary.share,
        started=record.created.isoformat(),
        source=record.source,
        served=record.fits(base_digest),
        residency=known.place_of(record.version),
        quarantined_until=_when(known.quarantined.get(record.version, (None, None))[0]),
    )


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def versions_answer(
    name: str, kept_versions: int, found: Sequence[tuple[HistoryEntry, bool]]
) -> dict[str, Any]:
    """The history of a name.

    Args:
        name: Of the adapter.
        kept_versions: Old versions of each name whose bytes are kept.
        found: Its entries, the newest first, each with whether the bytes are there.
    """
    current = found[0][0].version if found else None
    return VersionsAnswer(
        name=name,
        kept_versions=kept_versions,
        versions=[
            VersionAnswer(
                number=one.number,
                version=one.version,
                act=one.act,
                at=one.acted.isoformat(),
                source=one.source,
                bytes=one.tensor_bytes,
                current=one.version == current,
                kept=kept,
                restores=one.restores,
            )
            for one, kept in found
        ],
    ).model_dump()


def apply_answer(
    changes: Sequence[NameChange], aliases: Sequence[AliasChange], *, dry_run: bool
) -> dict[str, Any]:
    """What applying many names has changed, or would change."""
    return ApplyAnswer(
        applied=not dry_run,
        changes=[
            NameChangeAnswer(
                name=one.name,
                change=one.change,
                version=one.record.version,
                before=None if one.before is None else one.before.version,
                pinned=one.record.pinned,
            )
            for one in changes
        ],
        aliases=[
            AliasChangeAnswer.model_validate(
                {
                    "alias": one.alias,
                    "change": one.change,
                    "adapter": one.name,
                    "before": one.before,
                }
            )
            for one in aliases
        ],
    ).model_dump()
