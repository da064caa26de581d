"""What can be wrong with the registry's database, in one line and without its password."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, quote_plus

import sqlalchemy as sa

from adapters.errors import AdapterError
from adapters.migrations import SchemaTooNew


class RegistryUnusable(RuntimeError):
    """The registry cannot be opened; the message says why, for an operator."""


@contextmanager
def database_faults(database: str) -> Iterator[None]:
    """Turn whatever the database raises inside the block into ``RegistryUnusable``.

    Args:
        database: A SQLAlchemy URL or the path of an SQLite file; its password never shows.
    """
    try:
        url = sa.make_url(database if "://" in database else f"sqlite:///{database}")
    except (sa.exc.ArgumentError, ValueError):
        raise RegistryUnusable("registry_url is not a URL as SQLAlchemy has them") from None
    try:
        yield
    except (sa.exc.SQLAlchemyError, ImportError, SchemaTooNew, AdapterError, OSError) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        secrets = [url.password, *(one for value in url.query.values() for one in _each(value))]
        for secret in (str(one) for one in secrets if one):
            for written in (secret, quote(secret, safe=""), quote_plus(secret)):
                reason = reason.replace(written, "***")
        shown = url.set(query={}).render_as_string(hide_password=True)
        raise RegistryUnusable(f"the registry {shown} cannot be used: {reason[:500]}") from None


def _each(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
