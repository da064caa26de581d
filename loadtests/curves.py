"""A page with one curve per process and quantity, in plain SVG: nothing to install or to fetch."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from loadtests.watch import KINDS, Watch

WIDTH, HEIGHT, LEFT, MARGIN = 860, 170, 80, 24
TITLES = {
    "resident_bytes": ("Resident memory, MiB", 2**20),
    "descriptors": ("File descriptors", 1),
    "threads": ("Threads", 1),
}
STYLE = "body{font:14px sans-serif;margin:2em}svg{display:block}pre{background:#f4f4f4;padding:1em}"


def page(title: str, watch: Watch, report: Mapping[str, Any], faults: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: Of the run.
        watch: With its samples.
        report: Shown below the curves, as JSON.
        faults: Shown above them.
    """
    verdict = "no fault" if not faults else "<br>".join(map(html.escape, faults))
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{verdict}</p>",
    ]
    for kind in KINDS:
        name, unit = TITLES[kind]
        parts.append(f"<h2>{name}</h2>")
        for role in watch.roles():
            at, values = watch.series(role, kind)
            parts.append(f"<h3>{html.escape(role)}</h3>")
            parts.append(curve(at, [value / unit for value in values]))
    parts.append(f"<pre>{html.escape(json.dumps(dict(report), indent=1))}</pre>")
    return "\n".join(parts)


def curve(at_s: Sequence[float], values: Sequence[float]) -> str:
    """One quantity over time, its axis from the least to the most."""
    if not values:
        return "<p>no samples</p>"
    least, most = min(values), max(values)
    room, span = (most - least) or 1.0, (at_s[-1] - at_s[0]) or 1.0
    points = " ".join(
        f"{LEFT + (moment - at_s[0]) / span * (WIDTH - LEFT - MARGIN):.1f},"
        f"{HEIGHT - MARGIN - (value - least) / room * (HEIGHT - 2 * MARGIN):.1f}"
        for moment, value in zip(at_s, values, strict=True)
    )
    low, right = HEIGHT - MARGIN, WIDTH - MARGIN
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<path d="M{LEFT} {MARGIN}V{low}H{right}" fill="none" stroke="#999"/>'
        f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="1.5"/>'
        f'<text x="{LEFT - 6}" y="{MARGIN + 4}" text-anchor="end">{most:.6g}</text>'
        f'<text x="{LEFT - 6}" y="{low}" text-anchor="end">{least:.6g}</text>'
        f'<text x="{right}" y="{HEIGHT - 6}" text-anchor="end">{at_s[-1] / 60:.1f} min</text>'
        "</svg>"
    )
