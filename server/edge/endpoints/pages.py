"""Pages for people: the reference of the calls and the console, with all that they are made of.

Everything comes from this server: nothing is asked of another machine, and the content policy says
so to the browser. The reference is drawn by Swagger UI, whose files the package fastapi-offline
carries.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from fastapi import Request, Response
from starlette.responses import RedirectResponse

from server.edge.endpoints.routes import Endpoint
from server.errors import Refusal

EDGE_DIR: Final = Path(__file__).resolve().parents[1]
CARRIER: Final = "fastapi_offline"
KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
OWN_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI writes styles into its elements.
REFERENCE_POLICY: Final = OWN_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file that a browser may ask for.

    Args:
        file: Where it lies; None: the package that carries it is not installed.
        policy: The content policy that goes with it.
    """

    file: Path | None
    policy: str = OWN_POLICY

    async def answer(self, request: Request) -> Response:
        """The file as it is."""
        if self.file is None:
            raise Refusal.because(
                "not_found",
                "The files of the reference are not installed.",
                expected=f"the package {CARRIER.replace('_', '-')}",
                fix="Install it, or read /openapi.json.",
            )
        kind = KINDS[self.file.suffix]
        headers = {"Content-Security-Policy": self.policy, "Content-Type": kind}
        return Response(_page_content(self.file), headers=headers)


def page_routes() -> list[Endpoint]:
    """The routes of the pages; none of them is in the OpenAPI document."""
    reference, console = EDGE_DIR / "reference", EDGE_DIR / "console"
    files = {
        "/docs": PageFile(reference / "index.html", REFERENCE_POLICY),
        "/docs/start.js": PageFile(reference / "start.js"),
        "/docs/style.css": PageFile(reference / "style.css"),
        "/docs/swagger-ui-bundle.js": PageFile(_carried("swagger-ui-bundle.js")),
        "/docs/swagger-ui.css": PageFile(_carried("swagger-ui.css")),
        "/console": PageFile(console / "index.html"),
        "/console/app.js": PageFile(console / "app.js"),
        "/console/style.css": PageFile(console / "style.css"),
    }
    hidden: dict[str, Any] = {"include_in_schema": False}
    get, tag = ("GET",), "Pages"
    routes = [
        Endpoint(path, one.answer, get, tag, statuses=(), extra=hidden)
        for path, one in files.items()
    ]
    return [*routes, Endpoint("/redoc", _to_reference, get, tag, statuses=(), extra=hidden)]


async def _to_reference(request: Request) -> Response:
    """Where the reference was to be found as well."""
    return RedirectResponse("/docs", 308)


@cache
def _page_content(file: Path) -> bytes:
    return file.read_bytes()


def _carried(name: str) -> Path | None:
    """A file of the carrying package, which is not imported for it."""
    spec = importlib.util.find_spec(CARRIER)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "static" / name
