"""Who may call what: the admin key, and the keys of those who may infer.

Keys travel as ``Authorization: Bearer KEY``. Every comparison takes the same time whether a key is
wrong in its first or its last character, and looks at all keys. Nothing here is ever logged.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from pydantic import SecretStr

from server.errors import Refusal

ADMIN_KEY_FILE = "admin.key"


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
    """The keys of this moment; replaced as a whole when the settings are reloaded."""

    def __init__(self, admin: str, inference: Mapping[str, SecretStr]) -> None:
        self._admin = admin.encode()
        self._inference = {name: key.get_secret_value().encode() for name, key in inference.items()}

    def admit_admin(self, authorization: str | None) -> None:
        """Raises Refusal key_missing or key_wrong."""
        given = _bearer_token(authorization, "The admin calls need the admin key.")
        if not hmac.compare_digest(given, self._admin):
            raise Refusal.because("key_wrong", "This key is not the admin key.")

    def admit_inference(self, authorization: str | None) -> None:
        """Raises Refusal key_missing or key_wrong, unless inference is open to all."""
        if not self._inference:
            return
        given = _bearer_token(authorization, "This server answers holders of a key only.")
        # The admin may infer as well. Every key is compared: no early end.
        keys = [*self._inference.values(), self._admin]
        if sum([hmac.compare_digest(given, key) for key in keys]) == 0:
            raise Refusal.because("key_wrong", "This key is not accepted.")


def _bearer_token(authorization: str | None, why: str) -> bytes:
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Refusal.because("key_missing", why, expected="Authorization: Bearer KEY")
    return key.strip().encode("utf-8", "surrogateescape")
