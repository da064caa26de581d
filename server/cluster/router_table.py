"""The routers that Ray Serve has made in this process, for the link that asks through them."""

from __future__ import annotations

from typing import Any

ROUTERS: dict[str, Any] = {}  # an AffinityRouter by the name of its deployment
