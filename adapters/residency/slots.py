"""Which adapters are where: on disk, in host memory, in a slot of the device; and moving them.

Threads of its own read and check adapters, LOADS at once, of which large ones take all but one;
another places them. So a cold adapter delays only its own requests, however large it is. A version
in use (leased) or pinned never leaves its slot; pins that would leave others no room are not kept
(``Tiers.divide_pins``). More versions than slots queue. A version that nobody asks for costs
nothing here: disk is the registry's business.

On the CPU, host and device memory are the same: a version's factors exist once, in the compute
dtype, whether it has a slot or waits for the next request in the host tier.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

import torch

from adapters.errors import SlotNotResident
from adapters.intake.file_names import Stamp
from adapters.layers.inject import AdaptedModel
from adapters.modulation.folded import FoldedCache
from adapters.modulation.slot_factors import SlotFactors
from adapters.residency.low_priority import step_back
from adapters.residency.packed_files import PackedFiles
from adapters.residency.packing import PackedAdapter, PackedImage, pack_adapter
from adapters.residency.tiers import PINNED_QUARTERS, ResidencySnapshot, State, Tiers, Vacated

if TYPE_CHECKING:
    from adapters.intake.checkpoint import AdapterWeights

# A version just placed keeps its slot this long for whoever asked for it, or versions that wait
# for one slot would evict each other before any of them is used.
_NEWCOMER_GRACE_S = 2.0
LOADS = 3  # adapters that are read at once
LARGE_BYTES = 32 << 20  # of a file; so large ones leave one of the LOADS to the others
_PAUSE_S = 0.1  # after a fault of the loader itself, lest it do nothing but repeat it

logger = logging.getLogger(__name__)


class Residency:
    """The slots of one device, and the thread that fills them.

    Args:
        adapted: The model whose layers have the slots.
        load: Reads a version's checked weights; called in several threads at once.
        slots: Adapters in slots at once.
        device_bytes: Budget of their factors, in the compute dtype.
        host_bytes: Budget of factors kept out of slots, and of heads.
        folded_bytes: Budget of cached folded weights.
        dtype: The compute dtype.
        grace_s: How long a version just placed is kept for whoever asked for it.
        size: Bytes of a version's file, found out quickly; 0 when it is not known.
        files: Where adapters are kept as they lie in memory; None: they are not.
        clock: Seconds that only grow; what graces and waits are counted by.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        load: Callable[[str], AdapterWeights],
        *,
        slots: int,
        device_bytes: int,
        host_bytes: int,
        folded_bytes: int,
        dtype: torch.dtype,
        grace_s: float = _NEWCOMER_GRACE_S,
        size: Callable[[str], int] = lambda _: 0,
        files: PackedFiles | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be 1 or more, not {slots}")
        self._tiers = Tiers(
            adapted, slots=slots, device_bytes=device_bytes, host_bytes=host_bytes, clock=clock
        )
        self.dtype = dtype
        self.grace_s = grace_s
        self._adapted = adapted
        self._load = load
        self._size = size
        self._files = files
        self._device = adapted.device
        on_cuda = self._device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(self._device) if on_cuda else None  # type: ignore[no-untyped-call]
        self._folded = FoldedCache(folded_bytes, self._device)
        adapted.modulator.folded = self._folded
        self._callbacks: list[Callable[[str], None]] = []
        self._loads = 0
        self._ready_made = 0  # of the loads: from packed files
        self._pins_reported: list[str] = []
        self._changed = Condition()
        self._closed = False
        self._waited: list[str] = []  # when the loader's turn began
        self._reading: dict[str, int] = {}  # bytes by version, of those that are being read
        self._unread: dict[str, Exception] = {}  # those that could not be, to be told of
        self._readers = ThreadPoolExecutor(
            LOADS, thread_name_prefix="adapter-reader", initializer=step_back
        )
        self._thread = Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    # What the engine calls: none of these waits for a load.

    def prefetch(self, version: str) -> None:
        """Ask for ``version`` in a slot; returns at once. Asking again, or when ready, is free."""
        with self._changed:
            if self._tiers.want(version):
                self._changed.notify_all()

    def state(self, version: str) -> State:
        """``absent`` also for a version in the host tier: prefetch it, which is quick then."""
        with self._changed:
            entry = self._tiers.entries.get(version)
            return "absent" if entry is None else entry.state

    def error(self, version: str) -> Exception | None:
        """Why a version failed; None when it did not. A new prefetch tries again."""
        with self._changed:
            entry = self._tiers.entries.get(version)
            return None if entry is None else entry.error

    def lease(self, versions: Collection[str]) -> dict[str, int]:
        """Hold the slots of ``versions`` until ``release``; a use of each.

        Returns:
            The slot of each version.

        Raises:
            SlotNotResident: Not all of them are ready; none is held then.
        """
        with self._changed:
            held = self._tiers.ready(versions)
            for version in versions:
                if version in held:
                    continue
                entry = self._tiers.entries.get(version)
                raise SlotNotResident(
                    "An adapter is not in a slot.",
                    found=f"{version}: {'absent' if entry is None else entry.state}",
                    expected="ready",
                    fix="Prefetch it and wait until it is ready.",
                )
            for version in held:
                self._tiers.entries[version].leases += 1
            self._use(held)
            return held

    def hold(self, versions: Collection[str]) -> dict[str, int]:
        """Lease those of ``versions`` that are ready, without a use of any: to choose among them.

        ``release`` all of them as after ``lease``; ``use`` those that are chosen.

        Returns:
            Their slots.
        """
        with self._changed:
            held = self._tiers.ready(versions)
            for version in held:
                self._tiers.entries[version].leases += 1
            return held

    def use(self, versions: Collection[str]) -> None:
        """Count a use of each of ``versions``, which are held."""
        with self._changed:
            self._use(versions)

    def release(self, versions: Collection[str]) -> None:
        """Give back what ``lease`` or ``hold`` held, version by version."""
        if not versions:
            return
        with self._changed:
            for version in dict.fromkeys(versions):
                entry = self._tiers.entries[version]
                assert entry.leases > 0, version
                entry.leases -= 1
                if entry.doomed and not entry.leases:
                    self._tiers.forget(version)
            self._changed.notify_all()

    def set_pinned(self, versions: Collection[str]) -> None:
        """These versions, and no others, may not leave their slots; those absent are fetched.

        As far as there is room: the first of them, up to all slots but one and three quarters of
        the bytes. The others are served as if they were not pinned.
        """
        with self._changed:
            self._tiers.pinned = tuple(dict.fromkeys(versions))
            for version in self._tiers.pinned[: self._tiers.most_pins]:
                self._tiers.want(version)
            self._report_pins()
            self._changed.notify_all()

    def drop(self, version: str) -> None:
        """Forget ``version`` in every tier: at once, or when its last lease ends, or when it has
        arrived in a slot that is being filled."""
        with self._changed:
            entry = self._tiers.entries.get(version)
            if entry is None:
                return
            if entry.leases or entry.is_arriving:
                entry.doomed = True
            else:
                self._tiers.forget(version)
                self._changed.notify_all()

    def forget_files(self, versions: Collection[str]) -> None:
        """Delete the packed files of all but ``versions``, in a reader's thread; returns at once.

        A file that is needed after all is made again.
        """
        if self._files is not None and not self._closed:
            self._readers.submit(self._files.keep_only, frozenset(versions))

    def weights(self, version: str) -> AdapterWeights:
        """The adapter as loaded, its factors in the compute dtype; for its head and labels.

        Raises:
            SlotNotResident: The version is in no tier here.
        """
        with self._changed:
            entry = self._tiers.entries.get(version)
            if entry is None or entry.packed is None:
                raise SlotNotResident("An adapter is not in memory.", found=version)
            return entry.packed.weights

    def on_ready(self, callback: Callable[[str], None]) -> None:
        """Call ``callback(version)`` in the loader's thread whenever one is ready or has failed."""
        with self._changed:
            self._callbacks.append(callback)

    def snapshot(self) -> ResidencySnapshot:
        """Where every known version is, and the bytes of each tier."""
        with self._changed:
            held, excess = self._tiers.divide_pins()
            return ResidencySnapshot(
                tiers={version: entry.tier for version, entry in self._tiers.entries.items()},
                device_bytes=self._tiers.device_used(),
                host_bytes=self._tiers.host_used(),
                folded_bytes=self._folded.nbytes,
                slots_used=self._tiers.slots - len(self._tiers.free),
                slots=self._tiers.slots,
                pinned=tuple(held),
                pins_without_room=tuple(excess),
                loads=self._loads,
                ready_made=self._ready_made,
                evictions=self._tiers.evictions,
                failures=self._tiers.failures,
            )

    def take_load_seconds(self) -> list[float]:
        """How long each load from disk took, from the first wish for the version until it was in
        its slot, in seconds, oldest first: of those that have arrived since this was last called.
        """
        with self._changed:
            taken = list(self._tiers.cold_load_s)
            self._tiers.cold_load_s.clear()
            return taken

    def close(self) -> None:
        """Stop the loaders; what is in slots stays usable."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._readers.shutdown(cancel_futures=True)

    # The loader's thread.

    def _run(self) -> None:
        step_back()
        while not self._closed:
            try:
                settled = self._turn()
            except Exception as error:  # nobody may wait for a dead thread
                logger.exception("loading adapters failed, and those that waited with it")
                with self._changed:
                    # Those of this turn: whoever came since has met no fault yet.
                    settled = [
                        one for name in self._waited for one in self._tiers.fail(name, error)
                    ]
                    if not self._closed:
                        self._changed.wait(_PAUSE_S)
            for done in settled:
                self._tell(done)

    def _turn(self) -> list[str]:
        """Fill slots, or else make one adapter whole or compact, or else wait; have others read.

        Returns:
            What is ready or has failed.
        """
        with self._changed:
            if self._closed:
                return []
            self._waited = list(self._tiers.wanted)
            unread, self._unread = self._unread, {}
            failed = [one for name in unread for one in self._tiers.fail(name, unread[name])]
            self._read_more()
            leaving, arriving, settled = self._tiers.divide_slots()
            settled += failed
            version: str | None = None
            loose: tuple[str, PackedAdapter] | None = None
            if not arriving and not settled:
                version = self._tiers.next_to_restore()
                loose = self._tiers.to_compact()
                if version is None and loose is None:
                    self._changed.wait(
                        self._tiers.until_grace_ends() if self._tiers.wanted else None
                    )
        # Not under the lock, which those who answer requests wait for: this thread steps back.
        if arriving:
            settled += self._fill_slots(leaving, arriving)
        if version is not None:
            settled += self._restore(version)
        if loose is not None:
            self._compact(*loose)
        return settled

    def _restore(self, version: str) -> list[str]:
        """What is compact in host memory becomes whole; returns the version if that failed."""
        known = self._tiers.entries.get(version)  # None: dropped meanwhile
        try:
            if known is not None and known.packed is not None:
                known.packed.restore()
            with self._changed:
                self._tiers.changed(version)
        except Exception as error:  # noqa: BLE001  # whatever is wrong with one adapter is its own
            with self._changed:
                return self._tiers.fail(version, error)
        return []

    def _read(self, version: str) -> None:
        """Disk to host, in a reader's thread; the loader tells of it when it failed."""
        packed: PackedAdapter | None = None
        image: PackedImage | None = None
        stamp: Stamp = ()
        failure: Exception | None = None
        try:
            if self._files is not None:
                packed = self._files.read(version)
            is_ready_made = packed is not None
            if packed is None:
                if self._files is not None:
                    stamp = self._files.stamp(version)
                packed = self._read_stored(version)
                image = packed.image()
        except Exception as error:  # noqa: BLE001  # whatever is wrong with one adapter is its own
            failure = error
        with self._changed:
            del self._reading[version]
            entry = self._tiers.entries.get(version)
            if failure is not None:
                self._unread[version] = failure
            elif entry is not None and version in self._tiers.wanted and entry.packed is None:
                assert packed is not None
                self._tiers.take(version, packed)
                self._loads += 1
                self._ready_made += is_ready_made
                self._tiers.trim_host()
            self._changed.notify_all()
        if self._files is not None and image is not None:  # when nobody waits for it any more
            self._files.write(version, image, stamp)

    def _read_stored(self, version: str) -> PackedAdapter:
        """The stored adapter, with every byte and every number looked at."""
        fused = self._adapted.fused is not None
        packed = pack_adapter(self._load(version), self.dtype, self._device, b_by_column=fused)
        self._adapted.check(packed.factors)
        return packed

    def _compact(self, version: str, packed: PackedAdapter) -> None:
        try:
            packed.compact()
        except Exception:  # out of memory, for one: then it is kept as it is
            logger.exception("an adapter could not be kept without its zeros")
            packed.stay_whole()
            with self._changed:
                self._tiers.changed(version)
                self._tiers.trim_host()

    def _fill_slots(self, leaving: list[Vacated], arriving: list[str]) -> list[str]:
        """Host to slots, for those that were given one; nobody else touches these slots."""
        for vacated in leaving:
            self._tiers.empty(vacated)
        copied: dict[str, Mapping[str, SlotFactors]] = {}
        errors: dict[str, Exception] = {}
        with self._copying():
            for version in arriving:
                packed = self._tiers.entries[version].packed
                assert packed is not None
                try:
                    copied[version] = packed.to_device(self._device)
                except Exception as error:  # noqa: BLE001  # out of device memory, for one
                    errors[version] = error
        for version, factors in copied.items():
            slot = self._tiers.entries[version].slot
            assert slot is not None
            try:
                self._adapted.install(slot, factors, checked=True)
            except Exception as error:  # noqa: BLE001  # out of device memory, for one
                errors[version] = error
        with self._changed:
            settled = []
            # Their factors have moved since they were given and taken their slots.
            for version in (*(one.version for one in leaving), *arriving):
                self._tiers.changed(version)
            for version in arriving:
                if version in errors:
                    settled += self._tiers.fail(version, errors[version])
                else:
                    settled += self._tiers.arrive(version, self.grace_s)
            self._tiers.trim_host()
            self._report_pins()
            return settled

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Copies to the device that are begun within it are done when it ends: all at once, beside
        the forward that runs. A lease ends when the answers of its batch are on the host, so no
        kernel still reads what was let go for them."""
        if self._copies is None:
            yield
            return
        with torch.cuda.stream(self._copies):
            yield
        self._copies.synchronize()

    def _tell(self, version: str) -> None:
        for callback in list(self._callbacks):
            try:
                callback(version)
            except Exception:  # a listener's fault must not end the loader
                logger.exception("a residency callback failed for %s", version)

    # All below: with the lock held.

    def _read_more(self) -> None:
        """Have those that are wanted read from disk, first asked for first, while readers are free
        and what waits for slots leaves room in the host tier."""
        pending = [one for one in self._tiers.to_read() if one not in self._reading]
        for version in pending:
            if len(self._reading) >= LOADS:
                return
            waiting = self._tiers.waiting_bytes()  # what is being read is bounded by LOADS
            if waiting and waiting >= self._tiers.host_bytes:
                return
            size = self._size(version)
            large = sum(one >= LARGE_BYTES for one in self._reading.values())
            if size >= LARGE_BYTES and large >= LOADS - 1:
                continue  # smaller ones may pass it
            self._reading[version] = size
            self._readers.submit(self._read, version)

    def _use(self, versions: Collection[str]) -> None:
        for version in versions:
            self._tiers.use(version)

    def _report_pins(self) -> None:
        """Log pins that there is no room for, once."""
        excess = self._tiers.divide_pins()[1]
        if excess and excess != self._pins_reported:
            logger.warning(
                "There is no room to pin %d of %d pinned versions (%s); they are served unpinned. "
                "Pins take at most %d slots and %d bytes.",
                len(excess),
                len(self._tiers.pinned),
                ", ".join(excess[:3]),
                self._tiers.most_pins,
                self._tiers.device_bytes * PINNED_QUARTERS // 4,
            )
        self._pins_reported = excess
