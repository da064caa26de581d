"""One row of the registry as a value, and the statements that read and write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa

from adapters.intake.checkpoint import AdapterWeights
from adapters.intake.conversation import UsedConversation
from adapters.registry.history import Act, HistoryEntry, forget_name, note_move
from adapters.registry.naming import NAME
from adapters.registry.tables import ADAPTERS, ALIASES, CANARIES, STATE

_NAMES_A_QUERY = 500  # fewer than the variables that a database takes in one statement


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One name, the version behind it, and what its tensors prove.

    Args:
        name: As requests use it.
        version: Digest of the content.
        method: ``hira`` or ``lora``.
        task: What it answers.
        labels: Of its head, in order; None without one.
        ranks: The smallest and the largest.
        targets: Short names of the layers it adapts.
        tensor_bytes: As stored.
        parameters: Numbers in all its tensors.
        sparsity: The share of zeros in its factors.
        pinned: Kept on the device.
        created: When this version was registered under this name, UTC.
        source: Where it came from.
        base_name: The base that its configuration names.
        notes: Contradictions between what it claims and what it is.
        base_digest: Of the base that this version was checked on; None when it is not known.
        chat_template: Whether conversations are written with its own template.
        generation: ``end_ids``, where its own tokens end an answer, and its own defaults for what
            a request leaves out.
        aliases: Other names for it, in order.
        canary: Who gets a share of its traffic.
    """

    name: str
    version: str
    method: str
    task: str
    labels: tuple[str, ...] | None
    ranks: tuple[int, int]
    targets: tuple[str, ...]
    tensor_bytes: int
    parameters: int
    sparsity: float
    pinned: bool
    created: datetime
    source: str
    base_name: str | None
    notes: tuple[str, ...]
    base_digest: str | None = None
    chat_template: bool = False
    generation: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    canary: Canary | None = None

    def versions(self) -> tuple[str, ...]:
        """What answers for it: its version, and its canary's."""
        return (self.version, *(() if self.canary is None else (self.canary.record.version,)))

    def fits(self, base_digest: str) -> bool:
        """Whether it was checked on the base of this digest; an empty one means any base."""
        return not base_digest or self.base_digest == base_digest


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that answers a share of a name's requests.

    Args:
        record: Of the version under that name; ``created`` is when it began.
        share: Of the requests, in percent, 0 to 100.
    """

    record: AdapterRecord
    share: float


Change = Literal["created", "replaced", "pinned", "unpinned", "removed", "unchanged"]


@dataclass(frozen=True, slots=True)
class WantedName:
    """One name of a set that is applied as a whole.

    Args:
        name: That is put on the version.
        record: Of the version, checked; its own name, source and pin do not count.
        source: Where the adapter came from.
        pinned: None: as it is.
    """

    name: str
    record: AdapterRecord
    source: str
    pinned: bool | None = None


@dataclass(frozen=True, slots=True)
class NameChange:
    """What applying a set does to one name.

    Args:
        name: Of the adapter.
        change: In a word.
        record: As it is afterwards; of a name that goes, as it was.
        before: As it was; None where there was none.
    """

    name: str
    change: Change
    record: AdapterRecord
    before: AdapterRecord | None


def record_of(
    name: str,
    version: str,
    weights: AdapterWeights,
    settled: UsedConversation,
    *,
    source: str,
    pinned: bool,
    base_digest: str = "",
) -> AdapterRecord:
    """The record of a checked adapter, created now."""
    return AdapterRecord(
        name=name,
        version=version,
        method=weights.config.method,
        task=weights.task,
        labels=None if weights.labels is None else weights.labels.names,
        ranks=weights.ranks,
        targets=tuple(sorted({path.rsplit(".", 1)[-1] for path in weights.factors})),
        tensor_bytes=weights.tensor_bytes,
        parameters=weights.parameters,
        sparsity=round(weights.sparsity, 6),
        pinned=pinned,
        created=datetime.now(UTC),
        source=source,
        base_name=weights.config.base_name,
        notes=(*weights.notes, *settled.notes),
        base_digest=base_digest or None,
        chat_template=settled.template,
        generation=dict(settled.generation),
    )


def write(
    connection: sa.Connection,
    record: AdapterRecord,
    *,
    update: bool,
    act: Act,
    restores: int | None = None,
) -> None:
    """Insert the row of a record, or move the present one to it, and write down that it was so.

    Args:
        connection: Of a transaction.
        record: As the name shall be.
        update: Whether there is a row.
        act, restores: For the history.
    """
    values = {
        "version": record.version,
        "pinned": record.pinned,
        "created": record.created.isoformat(),
        "source": record.source,
        "base_digest": record.base_digest,
        "facts": _facts(record),
    }
    if update:
        connection.execute(sa.update(ADAPTERS).where(ADAPTERS.c.name == record.name), values)
        _end_canary(connection, record, rolled_back=act == "rolled_back")
    else:
        connection.execute(sa.insert(ADAPTERS), {"name": record.name, **values})
    moved = HistoryEntry(
        number=0,
        version=record.version,
        act=act,
        acted=record.created,
        source=record.source,
        tensor_bytes=record.tensor_bytes,
        restores=restores,
    )
    note_move(connection, record.name, moved)
    count_change(connection)


def _end_canary(connection: sa.Connection, record: AdapterRecord, *, rolled_back: bool) -> None:
    """End the canary of a name that has moved, where it makes no sense beside the new version:
    it is that version, it does another task, or the name was rolled back, to be on one alone."""
    row = connection.execute(sa.select(CANARIES).where(CANARIES.c.name == record.name)).first()
    if row is not None and (
        rolled_back or row.version == record.version or row.facts["task"] != record.task
    ):
        delete_canary(connection, record.name)


def write_canary(connection: sa.Connection, canary: Canary) -> None:
    """Give a version a share of the traffic of the name that its record has."""
    record = canary.record
    delete_canary(connection, record.name)
    values = {
        "name": record.name,
        "version": record.version,
        "share": canary.share,
        "started": record.created.isoformat(),
        "source": record.source,
        "base_digest": record.base_digest,
        "facts": _facts(record),
    }
    connection.execute(sa.insert(CANARIES), values)
    count_change(connection)


def delete_canary(connection: sa.Connection, name: str) -> None:
    """End the canary of a name; what moves the name counts the change."""
    connection.execute(sa.delete(CANARIES).where(CANARIES.c.name == name))


def _facts(record: AdapterRecord) -> dict[str, Any]:
    """What is the same for every name on a version; one that says nothing is left out, so that
    older releases can read the rest."""
    facts: dict[str, Any] = {
        "method": record.method,
        "task": record.task,
        "labels": record.labels,
        "ranks": record.ranks,
        "targets": record.targets,
        "tensor_bytes": record.tensor_bytes,
        "parameters": record.parameters,
        "sparsity": record.sparsity,
        "base_name": record.base_name,
        "notes": record.notes,
    }
    if record.chat_template:
        facts["chat_template"] = True
    if record.generation:
        facts["generation"] = dict(record.generation)
    return facts


def set_pinned(connection: sa.Connection, name: str, *, pinned: bool) -> None:
    """Pin or unpin a name."""
    connection.execute(sa.update(ADAPTERS).where(ADAPTERS.c.name == name), {"pinned": pinned})
    count_change(connection)


def set_base(connection: sa.Connection, version: str, base_digest: str) -> None:
    """Every name on ``version`` was checked on the base of this digest."""
    table = ADAPTERS
    connection.execute(
        sa.update(table).where(table.c.version == version), {"base_digest": base_digest}
    )
    count_change(connection)


def set_checked(connection: sa.Connection, record: AdapterRecord) -> None:
    """Every name on the record's version was checked on its base, with what came of it there."""
    table = ADAPTERS
    connection.execute(
        sa.update(table).where(table.c.version == record.version),
        {"base_digest": record.base_digest, "facts": _facts(record)},
    )
    count_change(connection)


def read_one(connection: sa.Connection, name: str) -> AdapterRecord | None:
    """The record of a name, as this transaction sees it."""
    if not NAME.fullmatch(name):
        return None  # nor would every database take it
    row = connection.execute(sa.select(ADAPTERS).where(ADAPTERS.c.name == name)).first()
    if row is None:
        return None
    return _beside(connection, {name: from_row(row)}, name)[name]


def read_changes(
    connection: sa.Connection, known: Mapping[str, AdapterRecord]
) -> dict[str, AdapterRecord]:
    """Every record by name, in the order of names; those of ``known`` that still hold are kept.

    What a name is on, its pin, its base and the time it came there tell whether a row has changed;
    the rest, which is most of the work of reading one, is read of changed rows alone.
    """
    columns = ADAPTERS.c
    marks = sa.select(
        columns.name, columns.version, columns.pinned, columns.base_digest, columns.created
    )
    found: dict[str, AdapterRecord | None] = {}
    for name, *mark, created in connection.execute(marks.order_by(columns.name)):
        record = known.get(name)
        if record is not None and (
            [record.version, record.pinned, record.base_digest] != mark
            or record.created.isoformat() != created
        ):
            record = None
        found[name] = record
    changed = [name for name, record in found.items() if record is None]
    fresh: dict[str, AdapterRecord] = {}
    for start in range(0, len(changed), _NAMES_A_QUERY):
        names = changed[start : start + _NAMES_A_QUERY]
        rows = connection.execute(sa.select(ADAPTERS).where(columns.name.in_(names)))
        fresh |= {row.name: from_row(row) for row in rows}
    # A name that went between the two reads is in neither.
    records = {
        name: record for name in found if (record := found[name] or fresh.get(name)) is not None
    }
    return _beside(connection, records)


def _beside(
    connection: sa.Connection, records: dict[str, AdapterRecord], name: str | None = None
) -> dict[str, AdapterRecord]:
    """Records with the aliases and canaries that are there now; all of them, or of one name."""
    aliases: dict[str, list[str]] = {}
    query = sa.select(ALIASES.c.name, ALIASES.c.alias).order_by(ALIASES.c.alias)
    rows = sa.select(CANARIES)
    if name is not None:
        query, rows = query.where(ALIASES.c.name == name), rows.where(CANARIES.c.name == name)
    for named, alias in connection.execute(query):
        aliases.setdefault(named, []).append(alias)
    canaries = {row.name: _canary_of_row(row) for row in connection.execute(rows)}
    for one, record in records.items():
        others, canary = tuple(aliases.get(one, ())), canaries.get(one)
        if (record.aliases, record.canary) != (others, canary):
            records[one] = replace(record, aliases=others, canary=canary)
    return records


def _canary_of_row(row: Any) -> Canary:
    record = _of_facts(
        row.facts,
        name=row.name,
        version=row.version,
        pinned=False,
        created=datetime.fromisoformat(row.started),
        source=row.source,
        base_digest=row.base_digest,
    )
    return Canary(record, row.share)


def from_row(row: Any) -> AdapterRecord:
    """The record that a row of the table holds."""
    return _of_facts(
        row.facts,
        name=row.name,
        version=row.version,
        pinned=row.pinned,
        created=datetime.fromisoformat(row.created),
        source=row.source,
        base_digest=row.base_digest,
    )


def _of_facts(kept: Mapping[str, Any], **columns: Any) -> AdapterRecord:
    facts = dict(kept)
    labels = facts.pop("labels")
    return AdapterRecord(
        labels=None if labels is None else tuple(labels),
        ranks=tuple(facts.pop("ranks")),
        targets=tuple(facts.pop("targets")),
        notes=tuple(facts.pop("notes")),
        **facts,
        **columns,
    )


def with_pin(record: AdapterRecord, *, pinned: bool) -> AdapterRecord:
    """The same record, pinned or not."""
    return replace(record, pinned=pinned)


def checked_anew(record: AdapterRecord, now: AdapterRecord) -> AdapterRecord:
    """The same name, pin and time, with what was found of its version now."""
    return replace(
        now,
        name=record.name,
        pinned=record.pinned,
        created=record.created,
        source=record.source,
        aliases=record.aliases,
        canary=record.canary,
    )


def delete(connection: sa.Connection, name: str) -> None:
    """Take a name away, its history and its canary."""
    connection.execute(sa.delete(ADAPTERS).where(ADAPTERS.c.name == name))
    delete_canary(connection, name)
    forget_name(connection, name)
    count_change(connection)


def count_change(connection: sa.Connection) -> None:
    """Move the generation on, in the transaction of the change itself."""
    connection.execute(sa.update(STATE).values(generation=STATE.c.generation + 1))
