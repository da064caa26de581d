"""Names of adapters and the versions behind them, durable before anybody is told.

SQLAlchemy on SQLite (write-ahead log, every commit synced) as the embedded default; any other URL
works with the same statements. Bytes are in the store; a row names a version only after its bytes
are on the disk, so a crash between the two leaves bytes that nobody names, which are collected.
"""

from __future__ import annotations

import builtins
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from adapters.errors import (
    AdapterError,
    AdapterExists,
    CacheDiskFull,
    StoreFull,
)
from adapters.intake.checkpoint import AdapterWeights, load_adapter
from adapters.intake.conversation import Conversation, UsedConversation, unused
from adapters.registry.adapter_bytes import AdapterBytes
from adapters.registry.aliases import (
    AliasChange,
    Aliases,
    check_no_alias,
    check_not_aliased,
    plan_aliases,
)
from adapters.registry.database import Database
from adapters.registry.held_bytes import HeldBytes, Needed
from adapters.registry.history import (
    Act,
    entries_of,
    kept_versions,
    oldest_first,
    was_rolled_back_from,
)
from adapters.registry.moves import Moves, present_record
from adapters.registry.naming import check_name, name_not_found
from adapters.registry.records import (
    AdapterRecord,
    Change,
    NameChange,
    WantedName,
    checked_anew,
    delete,
    read_one,
    record_of,
    set_base,
    set_checked,
    set_pinned,
    with_pin,
    write,
)
from adapters.registry.removals import Removals
from adapters.registry.store import version_of, versions_of
from adapters.registry.tables import IDENTITY, STATE, migrate
from adapters.signature import BaseSignature

KEPT_VERSIONS = 3  # old versions of a name whose bytes are kept
UNNAMED_BYTES_KEPT_S = (
    300.0  # bytes that no row names any more are kept this long for requests under way
)

__all__ = ["AdapterRecord", "Registry"]

logger = logging.getLogger(__name__)


class Registry:
    """The adapters of one server; safe in many threads and processes.

    After a fork, call ``reopen`` in the child before anything else. ``moves`` has the history of
    names, rolls them back and gives others a share of their traffic; ``aliases`` has other names
    for them.

    Args:
        url: A SQLAlchemy URL, or the path of an SQLite file, made when missing.
        store: Where the bytes are.
        kept_versions: Old versions of each name whose bytes are kept, so that it can be rolled
            back to them. Where the store has no room for a new adapter, the oldest make place.
        grace_s: Bytes that were added, named or left by a name within this many seconds never
            make place: requests under way may need them.
    """

    def __init__(
        self,
        url: str | Path,
        store: AdapterBytes,
        *,
        kept_versions: int = KEPT_VERSIONS,
        grace_s: float = UNNAMED_BYTES_KEPT_S,
    ) -> None:
        self._database = Database(url)
        self.url = self._database.url
        self.store = store
        self.kept_versions = kept_versions
        self.grace_s = grace_s
        self._held = HeldBytes(self._database.reading, self._database.transaction, store)
        self._removals = Removals(self._database.transaction, store)
        self.moves = Moves(self._database.reading, self._held, store)
        self.aliases = Aliases(self._database.reading, self._database.transaction)
        with self._database.transaction(alone=False) as connection:  # there may be no table yet
            migrate(connection)

    def register(
        self,
        name: str,
        folder: Path,
        base: BaseSignature,
        *,
        source: str,
        replace: bool = False,
        pinned: bool = False,
        spare_rollback: bool = False,
        check: Callable[[AdapterWeights], None] | None = None,
        settle: Callable[[Conversation], UsedConversation] = unused,
    ) -> tuple[AdapterRecord, bool]:
        """Check the adapter in ``folder``, store its bytes, and put ``name`` on it.

        Idempotent: the same content under the same name changes nothing but the pin, and the base
        that it is known to fit.

        Args:
            name: ``[a-z0-9][a-z0-9._-]{0,63}``.
            folder: As PEFT saves it; not changed, and not needed afterwards.
            base: What it must fit.
            source: For the record.
            replace: Whether ``name`` may move from another version to this one.
            pinned: Keep it on the device. A name that is pinned stays so until ``update``.
            spare_rollback: Leave ``name`` where it is if it was rolled back from this version.
            check: Raises what else may be wrong with an adapter, such as its head.
            settle: Says what is used of the chat template and the end tokens that it brings.

        Returns:
            The record, and whether anything was created or moved. Both are durable.

        Raises:
            InvalidName: The name is malformed.
            AdapterExists: The name is on another version, and ``replace`` is false; or it is an
                alias.
            StoreFull: There is no room for its bytes.
            AdapterError: Whatever ``load_adapter`` finds wrong. Nothing has changed in any case.
        """
        check_name(name)
        weights = load_adapter(folder, base)
        if check is not None:
            check(weights)
        with self._database.reading() as connection:
            check_no_alias(connection, name)
            taken = None if replace else read_one(connection, name)
        if taken is not None:  # else nothing is hashed twice
            _check_free(name, taken, folder)
        settled = settle(weights.conversation)
        version = self._stored(folder)
        record = record_of(
            *(name, version, weights, settled),
            source=source, pinned=pinned, base_digest=base.digest,
        )  # fmt: skip

        def needed(connection: sa.Connection) -> Needed:
            present = read_one(connection, name)
            if present is None:
                return Needed(named=(version,))
            if present.version == version or not replace:
                return Needed()
            return Needed(named=(version,), left=present.versions())

        def put(connection: sa.Connection) -> tuple[AdapterRecord, bool]:
            return self._put(
                connection, record, base, replace=replace, spare_rollback=spare_rollback,
                folder=folder,
            )  # fmt: skip

        return self._held.change(needed, put)

    def _put(
        self,
        connection: sa.Connection,
        record: AdapterRecord,
        base: BaseSignature,
        *,
        replace: bool,
        spare_rollback: bool,
        folder: Path,
    ) -> tuple[AdapterRecord, bool]:
        """Put a name on a checked version, in a transaction; see ``register``."""
        name, version, pinned = record.name, record.version, record.pinned
        check_no_alias(connection, name)
        present = read_one(connection, name)
        if present is not None and present.version == version:
            if pinned and not present.pinned:
                set_pinned(connection, name, pinned=True)
                present = with_pin(present, pinned=True)
            if not present.fits(base.digest):
                set_checked(connection, record)
                present = checked_anew(present, record)
            return present, False
        if not replace:
            _check_free(name, present, folder)
        if (
            present is not None
            and spare_rollback
            and was_rolled_back_from(entries_of(connection, name), version)
        ):
            return present, False
        if present is not None and present.pinned:
            record = with_pin(record, pinned=True)  # the pin is the name's, not the content's
        act: Act = "registered" if present is None else "replaced"
        try:
            write(connection, record, update=present is not None, act=act)
        except IntegrityError as cause:
            raise AdapterExists(
                f"The name {name} was registered by someone else at the same moment.",
                fix="Set replace to true, or choose another name.",
            ) from cause
        return read_one(connection, name) or record, True  # with its aliases and its canary

    def stage(
        self,
        folder: Path,
        base: BaseSignature,
        *,
        check: Callable[[AdapterWeights], None] | None = None,
        settle: Callable[[Conversation], UsedConversation] = unused,
    ) -> AdapterRecord:
        """Check the adapter in ``folder`` and store its bytes, without putting a name on them.

        Bytes that no name is on are collected after a while; ``apply`` names them before that.

        Args:
            folder, base, check, settle: As for ``register``.

        Returns:
            A record without a name and without a source.

        Raises:
            StoreFull: There is no room for its bytes.
            AdapterError: Whatever is wrong with it. Nothing has changed then.
        """
        weights = load_adapter(folder, base)
        if check is not None:
            check(weights)
        settled = settle(weights.conversation)
        version = self._stored(folder)
        return record_of(
            "", version, weights, settled, source="", pinned=False, base_digest=base.digest
        )

    def staged(
        self,
        version: str,
        base: BaseSignature,
        *,
        check: Callable[[AdapterWeights], None] | None = None,
        settle: Callable[[Conversation], UsedConversation] = unused,
    ) -> AdapterRecord:
        """The record of bytes that are in the store, checked as ``register`` does; without a name.

        Raises:
            AdapterNotFound: They are not there, or not any more.
            AdapterError: Whatever is wrong with them.
        """
        records = self._all()
        canaries = [one.canary.record for one in records if one.canary is not None]
        named = next((one for one in (*records, *canaries) if one.version == version), None)
        if named is not None:
            named = replace(named, aliases=(), canary=None)
        if named is not None and named.fits(base.digest) and self.store.has(version):
            return named
        weights = load_adapter(self.store.sound_path(version), base)
        if check is not None:
            check(weights)
        settled = settle(self.store.conversation(version))
        return record_of(
            "", version, weights, settled, source="", pinned=False, base_digest=base.digest
        )

    def apply(
        self,
        wanted: Sequence[WantedName],
        removed: Collection[str] = (),
        *,
        aliases: Mapping[str, str] | None = None,
        dry_run: bool = False,
    ) -> tuple[builtins.list[NameChange], builtins.list[AliasChange]]:
        """Put many names on checked versions, and take others away: all of it, or nothing.

        Args:
            wanted: With records of ``staged``.
            removed: Names that go.
            aliases: All that there shall be, and where each points; None: as they are.
            dry_run: Say what would change, and change nothing.

        Returns:
            One entry for every name in ``wanted``, then one for every name that goes; and one for
            every alias that is there before or afterwards.

        Raises:
            AdapterNotFound: A name that is to go is not there, or a version's bytes are gone.
            AdapterFaults: Of the aliases, all of them: as ``Aliases.set`` has them, and
                AdapterAliased where one points to a name that goes.
        """

        def needed(connection: sa.Connection) -> Needed:
            named: builtins.list[str] = []
            left: builtins.list[str] = []
            for one in wanted:
                present = read_one(connection, one.name)
                change = _change_of(present, _wanted_record(one, present))
                if change != "unchanged":
                    named.append(one.record.version)
                if change == "replaced" and present is not None:
                    left += present.versions()
            for name in removed:
                present = read_one(connection, name)
                left += [] if present is None else present.versions()
            return Needed(named=dict.fromkeys(named), left=dict.fromkeys(left))

        def put(
            connection: sa.Connection,
        ) -> tuple[builtins.list[NameChange], builtins.list[AliasChange]]:
            return _apply(connection, wanted, removed, aliases, dry_run=dry_run)

        if not dry_run:
            return self._held.change(needed, put)
        with self._database.reading() as connection:
            return put(connection)

    def resolve(self, name: str) -> AdapterRecord:
        """The record of ``name`` as last committed by any process; quick when nothing changed.

        Raises:
            AdapterNotFound: There is none.
        """
        record = self.records().get(name)
        if record is None:
            raise name_not_found(name)
        return record

    def list(
        self, *, prefix: str = "", offset: int = 0, limit: int = 100
    ) -> tuple[builtins.list[AdapterRecord], int]:
        """Records whose names begin with ``prefix``, by name, and how many there are in all."""
        chosen = [record for record in self._all() if record.name.startswith(prefix)]
        return chosen[offset : offset + limit], len(chosen)

    def update(self, name: str, *, pinned: bool) -> AdapterRecord:
        """Pin or unpin.

        Raises:
            AdapterNotFound: There is no such name.
        """
        with self._database.transaction() as connection:
            present = read_one(connection, name)
            if present is None:
                raise name_not_found(name)
            set_pinned(connection, name, pinned=pinned)
        return with_pin(present, pinned=pinned)

    def remove(self, name: str) -> AdapterRecord:
        """Take ``name`` away; its bytes stay until no request can need them.

        Raises:
            AdapterNotFound: There is no such name.
            AdapterAliased: Aliases point to it.
        """

        def take_away(connection: sa.Connection) -> AdapterRecord:
            present = present_record(connection, name)
            check_not_aliased(present)
            delete(connection, name)
            return present

        return self._held.change(
            lambda connection: Needed(left=present_record(connection, name).versions()), take_away
        )

    def pinned_versions(self) -> tuple[str, ...]:
        """Versions that pinned names are on, in the order of names, each with its canary's."""
        pinned = (version for one in self._all() if one.pinned for version in one.versions())
        return tuple(dict.fromkeys(pinned))

    def versions(self) -> set[str]:
        """Every version that some name is on, or gives a share of its traffic."""
        return {version for record in self._all() for version in record.versions()}

    def generation(self) -> int:
        """A number that grows with every change, by whatever process."""
        with self._database.reading() as connection:
            return int(connection.execute(sa.select(STATE.c.generation)).scalar_one())

    def collect_garbage(
        self, in_use: Collection[str] = (), *, grace_s: float = UNNAMED_BYTES_KEPT_S
    ) -> builtins.list[str]:
        """Delete the bytes of versions that no name is on, and none keeps; returns which.

        Nothing is deleted where the bytes are another registry's as well, or may be.

        Args:
            in_use: Versions that requests or a device still need.
            grace_s: Versions added, named or removed within this many seconds are kept.
        """
        if not self._owns_store():
            return []
        candidates = self.store.versions() - set(in_use) - self.versions()
        if candidates:
            candidates -= self.versions_kept()
        # Not one by one, for each look is a transaction that others wait for.
        candidates = self.store.idle(candidates, grace_s) if candidates else candidates
        return [
            one
            for one in sorted(candidates)
            if self._removals.remove(one, grace_s, self.kept_versions)
        ]

    def versions_kept(self) -> set[str]:
        """Old versions of all names whose bytes are kept."""
        with self._database.reading() as connection:
            return kept_versions(connection, self.kept_versions)

    def _owns_store(self) -> bool:
        """Whether bytes that this registry does not need are needed by nobody."""
        with self._database.reading() as connection:
            own = connection.execute(sa.select(IDENTITY.c.registry_id)).scalar_one()
        return self.store.is_owned_by(own, lambda: self.versions() | self.versions_kept())

    def _stored(self, folder: Path) -> str:
        """Store the adapter in ``folder``; where there is no room, old versions make place.

        Raises:
            StoreFull: There is still none, or old versions may be another registry's too.
            CacheDiskFull: It is the disk before an object store; nothing has been deleted.
        """
        while True:
            try:
                return self.store.add(folder)
            except CacheDiskFull:
                raise  # the bytes of old versions are not on it
            except StoreFull:
                if not self._owns_store():
                    raise
                with self._database.reading() as connection:
                    old = [one for one in oldest_first(connection) if self.store.has(one)]
                if not any(self._removals.remove(one, self.grace_s, None) for one in old):
                    raise

    def records(self) -> Mapping[str, AdapterRecord]:
        """Every record by name, in the order of names, as last committed by any process."""
        return self._database.records()

    def check_base(
        self, base: BaseSignature, check: Callable[[AdapterWeights], None]
    ) -> builtins.list[AdapterRecord]:
        """Find out which names fit ``base``; call at start.

        Versions of which it is not known what they were checked on, because an older release wrote
        them, are checked now as ``register`` does, and those that fit are recorded.

        Args:
            base: With its digest; without one everything fits.
            check: As for ``register``.

        Returns:
            The records that were checked on another base, or fit none that is known.
        """
        unknown = {one.version for one in self._all() if base.digest and one.base_digest is None}
        for version in sorted(unknown):
            try:
                check(load_adapter(self.store.path(version), base))
            except (AdapterError, OSError) as error:
                logger.warning("Version %s does not fit the base: %s", version, error)
                continue
            with self._database.transaction() as connection:
                set_base(connection, version, base.digest)
        return [one for one in self._all() if not one.fits(base.digest)]

    def check(self) -> builtins.list[str]:
        """Repair what a crash left; call at start, while nothing else uses the store.

        Returns:
            Names whose bytes are missing, or their canary's: what is missing cannot be served, and
            says so when it is asked for.
        """
        self.store.sweep()
        self.collect_garbage(grace_s=0.0)
        records = self._all()
        missing = self.store.missing({one for record in records for one in record.versions()})
        for record in records:
            if record.version in missing:
                logger.error("The bytes of adapter %s are missing; register it again.", record.name)
            if record.canary is not None and record.canary.record.version in missing:
                logger.error(
                    "The bytes of the canary of %s, version %s, are missing; stage it again, or "
                    "abort the canary.",
                    *(record.name, record.canary.record.version),
                )
        return [record.name for record in records if not missing.isdisjoint(record.versions())]

    def reopen(self) -> None:
        """Forget connections that came over a fork; the next call makes new ones."""
        self._database.reopen()

    def close(self) -> None:
        """Let go of every connection; a later call opens anew."""
        self._database.close()

    def _all(self) -> builtins.list[AdapterRecord]:
        return list(self.records().values())


def _wanted_record(one: WantedName, present: AdapterRecord | None) -> AdapterRecord:
    kept_pin = present is not None and present.pinned
    return replace(
        one.record,
        name=one.name,
        source=one.source,
        pinned=kept_pin if one.pinned is None else one.pinned,
        created=datetime.now(UTC),
    )


def _apply(
    connection: sa.Connection,
    wanted: Sequence[WantedName],
    removed: Collection[str],
    aliases: Mapping[str, str] | None,
    *,
    dry_run: bool,
) -> tuple[list[NameChange], list[AliasChange]]:
    """As ``Registry.apply``, in a transaction."""
    changes = []
    moved = plan_aliases(
        connection, [one.name for one in wanted], removed, aliases, dry_run=dry_run
    )
    for one in wanted:
        check_name(one.name)
        present = read_one(connection, one.name)
        record = _wanted_record(one, present)
        change = _change_of(present, record)
        changes.append(NameChange(one.name, change, record, present))
        if dry_run or change == "unchanged":
            continue
        if change in ("pinned", "unpinned"):
            set_pinned(connection, one.name, pinned=record.pinned)
        else:
            write(connection, record, update=present is not None, act="applied")
    for name in removed:
        present = present_record(connection, name)
        changes.append(NameChange(name, "removed", present, present))
        if not dry_run:
            delete(connection, name)
    return changes, moved


def _change_of(present: AdapterRecord | None, record: AdapterRecord) -> Change:
    """What it means for a name to go from ``present`` to ``record``."""
    if present is None:
        return "created"
    if present.version != record.version or present.base_digest != record.base_digest:
        return "replaced"
    if present.pinned != record.pinned:
        return "pinned" if record.pinned else "unpinned"
    return "unchanged"


def _check_free(name: str, present: AdapterRecord | None, folder: Path) -> None:
    """Raise AdapterExists when the name is on other content than what is in ``folder``.

    What a former release stored of the same folder, and called otherwise, is no other content.
    """
    if present is None:
        return
    if present.version not in versions_of(folder):
        raise AdapterExists(
            f"The name {name} is taken by another version.",
            found=present.version,
            expected=version_of(folder),
            fix="Set replace to true, or choose another name.",
        )
