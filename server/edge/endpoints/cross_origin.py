"""Which pages of other origins may call the server, and what they may read of its answers."""

from __future__ import annotations

from typing import Any, Final

from server.settings import Settings

CORS_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CORS_EXPOSED: Final = (  # headers of answers that a page may read
    *("X-Request-Id", "X-Adapter", "X-Adapter-Version", "X-Queue-Ms", "X-Compute-Ms"),
    *("X-Adapter-Alias", "X-Adapter-Arm"),
    *("X-Ignored-Fields", "Retry-After", "X-Audit"),
    *(
        f"X-RateLimit-{word}-{kind}"
        for kind in ("Requests", "Tokens")
        for word in ("Limit", "Remaining", "Reset")
    ),
)


def cors_options(settings: Settings) -> dict[str, Any] | None:
    """For Starlette's ``CORSMiddleware``, which is to stand outside of everything else, so that
    errors and streams have its headers too; None unless the operator names origins. Keys travel in
    a header, so no browser is asked for credentials.
    """
    if not settings.cors_origins:
        return None
    return {
        "allow_origins": settings.cors_origins,
        "allow_methods": CORS_METHODS,
        "allow_headers": ("*",),
        "expose_headers": CORS_EXPOSED,
    }
