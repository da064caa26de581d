"""A report as markdown, from what it is as JSON: the machine, what was asked, all figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_HEAD = ("| case | what | value | goal | |", "| --- | --- | --- | --- | --- |")


def as_page(told: Mapping[str, Any]) -> str:
    """All of a report, as ``Report.as_json`` gives it."""
    figures = told["figures"]
    asked = [one for one in figures if one["reached"] is not None]
    lines = [*machine_lines(told["machine"]), ""]
    if asked:
        reached = sum(one["reached"] for one in asked)
        lines += [f"Goals reached: {reached} of {len(asked)}.", "", *goal_table(told), ""]
    lines += ["All figures:", "", *_HEAD, *map(_row, figures)]
    if told["left out"]:
        lines += ["", "Left out:", *(f"- {one}" for one in told["left out"])]
    return "\n".join(lines) + "\n"


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """One line for each thing that is known of the machine, as a list."""
    return [f"- {name}: {_told(value)}" for name, value in machine.items()]


def goal_table(told: Mapping[str, Any]) -> list[str]:
    """The figures that something is asked of."""
    return [*_HEAD, *(_row(one) for one in told["figures"] if one["reached"] is not None)]


def _row(figure: Mapping[str, Any]) -> str:
    goal = ""
    for sign, wanted in (("≥", figure["at_least"]), ("≤", figure["at_most"])):
        if wanted is not None:
            verdict = "reached" if figure["reached"] else "missed"
            goal = f"{sign} {wanted:.3g}: {verdict}"
    cells = (figure["case"], figure["what"], _number(figure), goal, figure["note"])
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _number(figure: Mapping[str, Any]) -> str:
    value = figure["value"]
    if isinstance(value, Mapping):
        spread = f" ({value['low']:.3g} to {value['high']:.3g})"
        return f"{value['median']:.4g} {figure['unit']}{spread}"
    return f"{value:.4g} {figure['unit']}"


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(one)}" for name, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_told, value))
    return str(value)
