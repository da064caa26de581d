"""The learning curve of a run as a picture: losses over steps, and which state was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

CURVE_FILE: Final = "learning_curve.svg"
_WIDTH: Final = 640
_HEIGHT: Final = 320
_MARGIN: Final = 48
# Of the history: its field, its name in the picture, its colour.
_LINES: Final = (
    ("train_loss", "loss on what was learned", "#0b57a4"),
    ("loss", "loss on rows set aside", "#b3400a"),
)


def write_curve(folder: Path, history: Sequence[Mapping[str, float]], best_step: int) -> str:
    """Write the picture as SVG and return it.

    Args:
        folder: Where ``CURVE_FILE`` is put.
        history: Of the evaluations, each with ``step``, ``train_loss`` and ``loss``.
        best_step: Whose state was kept.
    """
    steps = [one["step"] for one in history]
    values = [one[name] for name, _, _ in _LINES for one in history]
    low, high = min(values), max(values)
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return _MARGIN + (step - first) / ((last - first) or 1.0) * (_WIDTH - 2 * _MARGIN)

    def y(value: float) -> float:
        return _HEIGHT - _MARGIN - (value - low) / ((high - low) or 1.0) * (_HEIGHT - 2 * _MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12">',
        "<title>Learning curve</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(4, y(high) + 4, f"{high:.3f}"),
        _text(4, y(low) + 4, f"{low:.3f}"),
        _text(_MARGIN, _HEIGHT - 24, f"step {first:.0f}"),
        _text(_WIDTH - _MARGIN - 30, _HEIGHT - 24, f"{last:.0f}"),
        f'<line x1="{x(best_step):.1f}" x2="{x(best_step):.1f}" y1="{_MARGIN}" '
        f'y2="{_HEIGHT - _MARGIN}" stroke="#777" stroke-dasharray="4 3"/>',
        _text(min(x(best_step) + 4, _WIDTH - 110), _MARGIN - 4, f"kept: step {best_step}"),
    ]
    for place, (name, label, colour) in enumerate(_LINES):
        points = " ".join(f"{x(one['step']):.1f},{y(one[name]):.1f}" for one in history)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{x(one["step"]):.1f}" cy="{y(one[name]):.1f}" r="3" fill="{colour}"/>'
            for one in history
        ]
        parts.append(_text(_MARGIN + place * 220, 16, label, colour))
    text = "\n".join([*parts, "</svg>", ""])
    (folder / CURVE_FILE).write_text(text, encoding="utf-8")
    return text


def _text(x: float, y: float, text: str, colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{text}</text>'
