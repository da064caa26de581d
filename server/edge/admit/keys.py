"""Who may call what: the keys of the settings, and those of the keys file.

Keys travel as ``Authorization: Bearer KEY``. A key is looked up by its SHA-256: how long that takes
says nothing of a key, since nobody can choose how a digest begins. Nothing here is ever logged.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from server.edge.admit.key_file import ApiKey, digest_of
from server.errors import Refusal
from server.settings import SettingFault, Settings, SettingsFault

ADMIN_KEY_FILE: Final = "admin.key"
ADMIN_NAME: Final = "admin"  # of the one admin key that the settings have


def resolve_admin_key(given: SecretStr | None, data_dir: Path) -> tuple[str, Path | None]:
    """The admin key and, when none was given, the file that holds the generated one."""
    if given is not None:
        return given.get_secret_value(), None
    path = data_dir / ADMIN_KEY_FILE
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        os.chmod(path, 0o600)
        found = path.read_text(encoding="ascii").strip()
        if found:
            return found, path
        handle = os.open(path, os.O_WRONLY | os.O_TRUNC)
    key = secrets.token_urlsafe(32)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(key + "\n")
    return key, path


class Keyring:
    """The keys of this moment; replaced as a whole when they change.

    Args:
        keys: By digest.
        open_to_all: Whether inference needs no key.
        open_metrics: Whether /metrics needs none.
    """

    def __init__(
        self, keys: Mapping[str, ApiKey], *, open_to_all: bool, open_metrics: bool = True
    ) -> None:
        self._keys = dict(keys)
        self._open = open_to_all
        self._open_metrics = open_metrics

    @property
    def open_to_all(self) -> bool:
        """Whether inference needs no key."""
        return self._open

    def closed(self) -> Keyring:
        """The same keys, and nothing without one."""
        return Keyring(self._keys, open_to_all=False, open_metrics=False)

    def named(self) -> list[ApiKey]:
        """All keys, in the order of their names."""
        return sorted(self._keys.values(), key=lambda one: one.name)

    def admit_admin(self, authorization: str | None) -> ApiKey:
        """The key of an admin call.

        Raises:
            Refusal: key_missing, key_wrong or key_expired.
        """
        key = self._find(authorization, "The admin calls need an admin key.")
        if key is None or not key.admin:
            raise Refusal.because("key_wrong", "This key is not an admin key.")
        return key

    def admit_inference(self, authorization: str | None) -> ApiKey | None:
        """The key of an inference call; None where inference is open to all.

        Raises:
            Refusal: key_missing, key_wrong or key_expired.
        """
        if self._open:
            return None
        key = self._find(authorization, "This server answers holders of a key only.")
        if key is None:
            raise Refusal.because("key_wrong", "This key is not accepted.")
        return key

    def admit_metrics(self, authorization: str | None) -> None:
        """Raises Refusal key_missing, key_wrong or key_expired where /metrics needs a key."""
        if self._open_metrics:
            return
        key = self._find(authorization, "With a keys file, /metrics needs a key.")
        if key is None or not key.metrics:
            raise Refusal.because(
                "key_wrong",
                "This key may not read /metrics.",
                expected="an admin key, or one with metrics = true",
            )

    def _find(self, authorization: str | None, why: str) -> ApiKey | None:
        key = self._keys.get(digest_of(_bearer_token(authorization, why)))
        if key is not None and key.is_expired():
            raise Refusal.because(
                "key_expired", "This key has expired.", fix="Ask the operator for another one."
            )
        return key


def keyring_of(settings: Settings, from_file: Mapping[str, ApiKey] | None) -> Keyring:
    """The keys of the settings and of the keys file together.

    Args:
        from_file: By digest; None without a keys file.

    Raises:
        SettingsFault: Two have one name or are the same key, or there is no admin key.
    """
    keys = _keys_of(settings, generated=from_file is None)
    names = {one.name for one in keys.values()}
    faults = [
        SettingFault(
            f"keys_file: [{one.name}] is a key of the settings as well",
            expected="each name and each key once",
            fix="take it out of the file, or out of admin_key and api_keys",
        )
        for digest, one in (from_file or {}).items()
        if digest in keys or one.name in names
    ]
    keys.update(from_file or {})
    if not any(one.admin for one in keys.values()):
        faults.append(
            SettingFault(
                "keys_file: there is no admin key",
                expected="an entry with admin = true, or the setting admin_key",
                fix="hira keys new NAME --admin",
            )
        )
    if faults:
        raise SettingsFault(*faults)
    closed = from_file is not None or bool(settings.api_keys)
    return Keyring(keys, open_to_all=not closed, open_metrics=from_file is None)


def settings_keyring(settings: Settings, *, generated: bool = False) -> Keyring:
    """The keys of the settings alone, for where those of the keys file are not known; nothing is
    open.

    Args:
        generated: Whether a generated admin key counts, where the settings name none.
    """
    return Keyring(_keys_of(settings, generated=generated), open_to_all=False, open_metrics=False)


def _keys_of(settings: Settings, *, generated: bool) -> dict[str, ApiKey]:
    """The keys that the settings name, by digest; with the generated admin key where none is."""
    keys: dict[str, ApiKey] = {}
    if generated or settings.admin_key is not None:
        admin, _ = resolve_admin_key(settings.admin_key, settings.data_dir)
        keys[digest_of(admin.encode())] = ApiKey(ADMIN_NAME, admin=True, metrics=True)
    # An api_keys entry may be the admin key once more: that one may do more.
    for name, key in settings.api_keys.items():
        keys.setdefault(digest_of(key.get_secret_value().encode()), ApiKey(name))
    return keys


def _bearer_token(authorization: str | None, why: str) -> bytes:
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Refusal.because("key_missing", why, expected="Authorization: Bearer KEY")
    return key.strip().encode("utf-8", "surrogateescape")
