"""The keys file: who may call, what each key may ask, how much, and until when.

TOML, a table for each key by its name. A key is there as the SHA-256 of its text and never as the
text itself, so whoever reads the file can call nothing. One round of a hash is enough: keys are
made by `new_key` out of 256 random bits, and nobody can try them all.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    model_validator,
)

from server.settings import SettingFault, SettingsFault

KEY_PREFIX: Final = "hira_"  # by which people and secret scanners know a key
MAX_KEYS: Final = 1024
KEY_FILE_BYTES: Final = 1 << 20
ALL_ADAPTERS: Final = ("*",)
KEY_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CLEAR_WORDS: Final = frozenset({"key", "secret", "token", "value"})

QuotaLimit = Annotated[int, Strict(), Field(ge=1, le=1 << 53)]
Pattern = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9._*?\[\]!-]+$", min_length=1, max_length=64)
]


@dataclass(frozen=True, slots=True)
class Quotas:
    """What a key may use of a minute and of a day; None: as much as the server has."""

    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None

    @property
    def any(self) -> bool:
        return self != Quotas()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key, without the key itself.

    Args:
        name: For people, logs and metrics.
        admin: Whether it may make the admin calls.
        adapters: Patterns of the names that it may ask for; the bare base's is ``base``.
        quotas: How much it may use.
        expires: Unix seconds from which it is refused.
        metrics: Whether it may read /metrics.
    """

    name: str
    admin: bool = False
    adapters: tuple[str, ...] = ALL_ADAPTERS
    quotas: Quotas = Quotas()
    expires: float | None = None
    metrics: bool = False

    def may_ask(self, adapter: str) -> bool:
        """Whether this key is for an adapter of this name, be there one or not."""
        return any(fnmatchcase(adapter, one) for one in self.adapters)

    def is_expired(self, now: float | None = None) -> bool:
        return self.expires is not None and (time.time() if now is None else now) >= self.expires


class KeyEntry(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    admin: Annotated[bool, Strict()] = False
    metrics: Annotated[bool, Strict()] = False
    adapters: tuple[Pattern, ...] = Field(default=ALL_ADAPTERS, min_length=1, max_length=1024)
    requests_per_minute: QuotaLimit | None = None
    requests_per_day: QuotaLimit | None = None
    tokens_per_minute: QuotaLimit | None = None
    tokens_per_day: QuotaLimit | None = None
    expires: datetime | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.admin and self.adapters != ALL_ADAPTERS:
            raise ValueError("an admin key may ask every adapter: leave adapters out")
        if self.expires is not None and self.expires.tzinfo is None:
            raise ValueError("expires has no zone; write 2027-01-31T00:00:00Z")
        if self.expires is not None:
            try:
                self.expires.astimezone(UTC)  # as reports show it
            except OverflowError:
                raise ValueError("expires is outside of the years 1 to 9999 of UTC") from None
        return self

    def named(self, name: str) -> ApiKey:
        return ApiKey(
            name=name,
            admin=self.admin,
            adapters=self.adapters,
            quotas=Quotas(
                self.requests_per_minute,
                self.requests_per_day,
                self.tokens_per_minute,
                self.tokens_per_day,
            ),
            expires=None if self.expires is None else self.expires.timestamp(),
            metrics=self.metrics or self.admin,
        )


def new_key() -> str:
    """A key that nobody can guess."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def digest_of(key: bytes) -> str:
    """What a keys file holds in the place of a key."""
    return hashlib.sha256(key).hexdigest()


def read_key_file(path: Path) -> dict[str, ApiKey]:
    """The keys of a file, by their digest.

    Raises:
        SettingsFault: With every fault of every entry.
    """
    try:
        with path.open("rb") as file:
            content = file.read(KEY_FILE_BYTES + 1)
    except OSError as error:
        raise _unusable_key_file(path, f"it cannot be read: {error.strerror}") from None
    if len(content) > KEY_FILE_BYTES:
        raise _unusable_key_file(path, f"it is larger than {KEY_FILE_BYTES} bytes")
    return parse_keys(content, path)


def parse_keys(content: bytes, path: Path) -> dict[str, ApiKey]:
    """`read_key_file`, of what was read.

    Args:
        path: Where it was, for the faults.
    """
    try:
        tables = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # as of numbers of too many digits, and nesting
        raise _unusable_key_file(path, f"it is not TOML: {error}") from None
    faults: list[SettingFault] = []
    if len(tables) > MAX_KEYS:
        faults.append(
            SettingFault(
                f"{path}: too many keys", found=str(len(tables)), expected=f"at most {MAX_KEYS}"
            )
        )
    found: dict[str, ApiKey] = {}
    for name, table in tables.items():
        wrong = _name_faults(path, name, table)
        if wrong:
            faults += wrong
            continue
        try:
            entry = KeyEntry.model_validate(table)
        except ValidationError as error:
            faults += [
                _entry_fault(path, name, dict(one)) for one in error.errors(include_url=False)
            ]
            continue
        if entry.sha256 in found:
            other = found[entry.sha256].name
            faults.append(
                SettingFault(
                    f"{path}: [{name}] has the key of [{other}]",
                    fix=f"make another: hira keys new {name}",
                )
            )
            continue
        found[entry.sha256] = entry.named(name)
    if faults:
        raise SettingsFault(*faults)
    return found


def _name_faults(path: Path, name: str, table: Any) -> list[SettingFault]:
    if not isinstance(table, Mapping):
        return [
            SettingFault(
                f"{path}: {name[:80]} stands outside of a table",
                expected="a table for each key: [NAME] with sha256 = ...",
                fix="hira keys new NAME prints one",
            )
        ]
    if not KEY_NAME.fullmatch(name):
        return [
            SettingFault(
                f"{path}: the name of a key is not allowed",
                found=repr(name[:80]),
                expected="letters, digits, dots, dashes and underscores, at most 64",
            )
        ]
    if CLEAR_WORDS & set(table):
        return [
            SettingFault(
                f"{path}: [{name}] may hold a key in clear",
                found=", ".join(sorted(CLEAR_WORDS & set(table))),
                expected="sha256 = the digest of the key",
                fix=f"take that key out of use; hira keys new {name} makes another and its entry",
            )
        ]
    return []


def _entry_fault(path: Path, name: str, fault: dict[str, Any]) -> SettingFault:
    """One fault of an entry; what stands in place of a digest is not shown."""
    place = ".".join(str(one) for one in fault["loc"])
    text = str(fault["msg"]).removeprefix("Value error, ")
    shown = place not in {"", "sha256"} and fault["type"] not in {"missing", "extra_forbidden"}
    return SettingFault(
        f"{path}: [{name}] {place}: {text}".replace("] : ", "] "),
        found=repr(fault["input"])[:120] if shown else None,
        fix=f"the fields are {', '.join(KeyEntry.model_fields)}"
        if fault["type"] == "extra_forbidden"
        else None,
    )


def _unusable_key_file(path: Path, why: str) -> SettingsFault:
    return SettingsFault(
        SettingFault(f"the keys file {path} cannot be used: {why}", expected="TOML, a table a key")
    )
