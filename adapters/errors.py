"""What can be wrong with an adapter, as typed errors.

Each error says what was found, what was expected and how to fix it. HTTP statuses are not known
here: the server maps every code to one in its own table.

    AdapterError
    ├── UnsafeFormat            unsafe_format        a pickle, or an archive that tries to escape
    ├── CorruptFile             corrupt_file         bytes that are not what they claim to be
    ├── UnsupportedMethod       unsupported_method   a PEFT method other than HiRA and LoRA
    ├── UnsupportedOption       unsupported_option   an option that would change the answer
    ├── ShapeMismatch           shape_mismatch       a tensor that does not fit its layer
    ├── BaseMismatch            base_mismatch        made for another base model
    ├── UnmatchedTensors        unmatched_tensors    tensors that belong to no layer of this base
    ├── MissingTensors          missing_tensors      targets or heads without their tensors
    ├── NonFinite               non_finite           NaN or infinity
    ├── InvalidName             invalid_name         a name outside [a-z0-9][a-z0-9._-]{0,63}
    ├── AdapterNotFound         adapter_not_found
    ├── AdapterExists           adapter_exists
    ├── SourceForbidden         source_forbidden     a source outside what the operator allowed
    ├── SourceUnavailable       source_unavailable   an allowed source that could not be read
    ├── UploadTooLarge          upload_too_large
    ├── StoreFull               store_full
    │   └── CacheDiskFull       store_full           this machine's disk, not the object store
    ├── StoreUnavailable        store_unavailable    the object store with the bytes is away
    ├── RegistryUnavailable     registry_unavailable  its database is locked, damaged or away
    ├── SegmentMismatch         segment_mismatch     segments that do not cover the rows
    ├── SlotNotResident         slot_not_resident    a slot without factors
    └── AdapterFaults           (the code of the first)  several of the above, reported together
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar


class ExplainedError(Exception):
    """An error that says what was found, what was expected, and what to do.

    Args:
        message: One sentence, for a person.
        found: What was there, in a few words or numbers.
        expected: What should have been there.
        fix: What the user can do about it.
    """

    code: ClassVar[str] = "internal"
    limit_tokens: int | None = None  # of the context, where a text or a prompt exceeds it

    def __init__(
        self,
        message: str,
        *,
        found: str | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.found = found
        self.expected = expected
        self.fix = fix

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross processes.
        return (_rebuild, (type(self), self.message, self.found, self.expected, self.fix))

    def __str__(self) -> str:
        parts = [self.message]
        parts += [
            f"{label}: {text}"
            for label, text in (
                ("found", self.found),
                ("expected", self.expected),
                ("fix", self.fix),
            )
            if text
        ]
        return "; ".join(parts)


def _rebuild(
    kind: type[ExplainedError],
    message: str,
    found: str | None,
    expected: str | None,
    fix: str | None,
) -> ExplainedError:
    return kind(message, found=found, expected=expected, fix=fix)


class AdapterError(ExplainedError):
    """An adapter, or a request for one, that cannot be honoured."""

    code = "adapter_error"


class UnsafeFormat(AdapterError):
    code = "unsafe_format"


class CorruptFile(AdapterError):
    code = "corrupt_file"


class UnsupportedMethod(AdapterError):
    code = "unsupported_method"


class UnsupportedOption(AdapterError):
    code = "unsupported_option"


class ShapeMismatch(AdapterError):
    code = "shape_mismatch"


class BaseMismatch(AdapterError):
    code = "base_mismatch"


class UnmatchedTensors(AdapterError):
    code = "unmatched_tensors"


class MissingTensors(AdapterError):
    code = "missing_tensors"


class NonFinite(AdapterError):
    code = "non_finite"


class InvalidName(AdapterError):
    code = "invalid_name"


class AdapterNotFound(AdapterError):
    code = "adapter_not_found"


class AdapterExists(AdapterError):
    code = "adapter_exists"


class VersionNotFound(AdapterError):
    """A name was never on the version that is asked for."""

    code = "version_not_found"


class VersionGone(AdapterError):
    """A name was on a version whose bytes are not kept any more."""

    code = "version_gone"


class AlreadyCurrent(AdapterError):
    """A name shall move to the version that it is on."""

    code = "already_current"


class NameMoved(AdapterError):
    """A name went to another version while a change of it was prepared."""

    code = "name_moved"


class AliasToItself(AdapterError):
    """An alias shall point to its own name."""

    code = "alias_to_itself"


class AliasOfAlias(AdapterError):
    """An alias shall point to another alias."""

    code = "alias_of_alias"


class AdapterAliased(AdapterError):
    """A name that aliases point to shall go."""

    code = "adapter_aliased"


class InvalidShare(AdapterError):
    """A canary's share of the traffic that is none."""

    code = "invalid_share"


class CanaryNotFound(AdapterError):
    """A name has no canary."""

    code = "canary_not_found"


class OtherTask(AdapterError):
    """A version that does another task than the one whose requests it shall answer."""

    code = "task_mismatch"


class SourceForbidden(AdapterError):
    code = "source_forbidden"


class SourceUnavailable(AdapterError):
    code = "source_unavailable"


class UploadTooLarge(AdapterError):
    code = "upload_too_large"


class StoreFull(AdapterError):
    code = "store_full"


class CacheDiskFull(StoreFull):
    """The disk before an object store is full: to delete objects there would free nothing here."""


class StoreUnavailable(AdapterError):
    """The object store that holds the bytes of adapters does not answer, or refuses."""

    code = "store_unavailable"


class RegistryUnavailable(AdapterError):
    code = "registry_unavailable"


class SegmentMismatch(AdapterError):
    code = "segment_mismatch"


class SlotNotResident(AdapterError):
    code = "slot_not_resident"


class AdapterFaults(AdapterError):
    """Several faults of one adapter, found in one pass and reported together.

    Its code, found, expected and fix are those of the first fault; ``faults`` has them all.
    """

    def __init__(self, faults: Sequence[AdapterError]) -> None:
        if not faults:
            raise ValueError("AdapterFaults needs at least one fault")
        first = faults[0]
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        super().__init__(
            first.message + more, found=first.found, expected=first.expected, fix=first.fix
        )
        self.faults = tuple(faults)
        self.code = first.code  # type: ignore[misc]  # an instance speaks for its first fault

    def __reduce__(self) -> tuple[object, ...]:
        return (AdapterFaults, (self.faults,))


def in_a_line(error: BaseException) -> str:
    """Class and text of what was raised, in a line for the log or an operator.

    At most 300 characters: some errors of compilers and libraries have no text, and some a page.
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")[:300]


@contextmanager
def full_disk_refused(what: str, refusal: type[StoreFull] = StoreFull) -> Iterator[None]:
    """Turn an OSError of a disk without room, or of a quota that is used up, into ``StoreFull``.

    Args:
        what: The disk, as the message begins: "The disk of the adapter store".
        refusal: What is raised instead.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise refusal(
            f"{what} is full.",
            found=os.strerror(error.errno),
            fix="Free disk space, or remove adapters.",
        ) from error
