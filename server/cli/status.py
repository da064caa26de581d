"""`hira status`: a running server at a glance, anew every second on a terminal."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from server.cli.client import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    UrlOption,
    every_adapter,
    key_or_local_admin_key,
    print_json,
    reach,
)
from server.options import MIB

if TYPE_CHECKING:
    import httpx2
    from rich.console import RenderableType

ROWS_SHOWN: Final = 30


def add_status_command(app: typer.Typer) -> None:
    app.command("status", rich_help_panel="Ask a running server")(status)


@dataclass
class Sample:
    """What a server said at one moment: sums of its metrics by name and label values."""

    at: float
    ready: str
    detail: str = ""
    sums: dict[tuple[str, ...], float] = field(default_factory=lambda: defaultdict(float))
    records: list[dict[str, Any]] = field(default_factory=list)

    def of(self, name: str, *labels: str) -> float:
        return self.sums.get((name, *labels), 0.0)

    def labels(self, name: str) -> list[str]:
        """The first label's values of a metric."""
        return sorted({key[1] for key in self.sums if key[0] == name and len(key) == 2})


# Of each metric, the label that its samples are summed over.
SUMMED: Final[Mapping[str, str]] = {
    "hira_requests_total": "adapter",
    "hira_tokens_total": "adapter",
    "hira_failures_total": "adapter",
    "hira_refusals_total": "code",
    "hira_queue_depth": "lane",
    "hira_admitted": "kind",
    "hira_adapters": "state",
    "hira_adapter_bytes": "tier",
    "hira_base_bytes": "part",
    "hira_batch_rows_sum": "lane",
    "hira_batch_rows_count": "lane",
    "hira_batch_adapters_sum": "lane",
    "hira_batch_adapters_count": "lane",
}


def status(
    *,
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.2, help="Between two looks.")
    ] = 1.0,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a running server: its state, queue, batches, memory, and its adapters with their rates.

    Adapters are shown to the admin key; without it, those that were asked for.
    """
    with reach(url, key_or_local_admin_key(key)) as client:
        before, now = None, look(client)
        if as_json:
            print_json(as_values(now))
            return
        if once or not sys.stdout.isatty():
            time.sleep(every)
            before, now = now, look(client)
            print_plainly(now, before)
            return
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(), screen=False, auto_refresh=False) as live:
            try:
                while True:
                    live.update(status_drawn(url, now, before), refresh=True)
                    time.sleep(every)
                    before, now = now, look(client)
            except KeyboardInterrupt:
                return


def look(client: httpx2.Client) -> Sample:
    """Ask the server how it is."""
    from prometheus_client.parser import text_string_to_metric_families

    health = client.get("/health/ready").json()
    sample = Sample(time.monotonic(), str(health.get("status")), str(health.get("detail") or ""))
    answer = client.get("/metrics")
    for family in text_string_to_metric_families(answer.text if answer.is_success else ""):
        for one in family.samples:
            label = SUMMED.get(one.name)
            if label is not None:
                sample.sums[one.name, one.labels.get(label, "")] += one.value
            if one.name == "hira_requests_total" and one.labels["status"] >= "400":
                sample.sums["errors", one.labels["adapter"]] += one.value
    if "authorization" in client.headers:
        sample.records = every_adapter(client)
    return sample


def rows_of(now: Sample, before: Sample | None) -> list[tuple[str, ...]]:
    """A row for each adapter: name, task, where it is, rates and errors."""
    records = {one["name"]: one for one in now.records}
    names = list(records) or [one for one in now.labels("hira_requests_total") if one]
    rows: list[tuple[str, ...]] = []
    for name in sorted(
        names, key=lambda one: -_per_second("hira_requests_total", one, now, before)
    ):
        record = records.get(name, {})
        where = record.get("residency", "")
        if record.get("quarantined_until"):
            where = "quarantined"
        elif record and not record["served"]:
            where = "other base"
        rows.append(
            (
                name,
                str(record.get("task", "")),
                where + (" pinned" if record.get("pinned") else ""),
                f"{_per_second('hira_requests_total', name, now, before):.1f}",
                f"{_per_second('hira_tokens_total', name, now, before):.0f}",
                f"{now.of('hira_requests_total', name):.0f}",
                f"{now.of('errors', name) + now.of('hira_failures_total', name):.0f}",
            )
        )
    return rows


STATUS_COLUMNS: Final = ("adapter", "task", "where", "req/s", "tok/s", "requests", "errors")


def facts_of(now: Sample, before: Sample | None) -> list[tuple[str, str]]:
    """What is told of the server as a whole."""

    def parts(name: str, unit: float = 1, form: str = ".0f") -> str:
        told = [f"{one} {now.of(name, one) / unit:{form}}" for one in now.labels(name)]
        return ", ".join(told) or "-"

    means = []
    for lane in now.labels("hira_batch_rows_count"):
        steps = _gain("hira_batch_rows_count", lane, now, before)
        if steps:
            rows = _gain("hira_batch_rows_sum", lane, now, before) / steps
            adapters = _gain("hira_batch_adapters_sum", lane, now, before) / steps
            means.append(f"{lane} {rows:.1f} rows of {adapters:.1f} adapters")
    return [
        ("state", now.ready + (f": {now.detail}" if now.detail else "")),
        ("admitted", parts("hira_admitted")),
        ("in the engine", parts("hira_queue_depth")),
        ("batches", "; ".join(means) or "-"),
        ("adapters", parts("hira_adapters")),
        ("memory, MiB", f"base: {parts('hira_base_bytes', MIB)}; "
         f"adapters: {parts('hira_adapter_bytes', MIB, '.1f')}"),
    ]  # fmt: skip


def as_values(now: Sample) -> dict[str, Any]:
    """The same for other programs."""
    metrics = {" ".join(key): value for key, value in sorted(now.sums.items())}
    return {"status": now.ready, "detail": now.detail, "metrics": metrics, "adapters": now.records}


def print_plainly(now: Sample, before: Sample | None) -> None:
    for name, value in facts_of(now, before):
        print(f"{name}\t{value}")
    print("\t".join(STATUS_COLUMNS))
    for row in rows_of(now, before):
        print("\t".join(row))


def status_drawn(url: str, now: Sample, before: Sample | None) -> RenderableType:
    """What a terminal shows."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for name, value in facts_of(now, before):
        good = "green" if now.ready == "ready" else "red"
        facts.add_row(Text(name, "bold"), Text(value, good if name == "state" else ""))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for place, column in enumerate(STATUS_COLUMNS):
        table.add_column(column, justify="right" if place > 2 else "left")
    rows = rows_of(now, before)
    for row in rows[:ROWS_SHOWN]:
        table.add_row(*row, style="red" if row[2].startswith("quarantined") else "")
    more = f"and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
    return Group(Text(f"{url}   Ctrl-C ends", "dim"), facts, "", table, Text(more, "dim"))


def _gain(name: str, label: str, now: Sample, before: Sample | None) -> float:
    """How much a counter grew between two looks; all of it where there was none before."""
    earlier = 0.0 if before is None else before.of(name, label)
    return max(0.0, now.of(name, label) - earlier)


def _per_second(name: str, label: str, now: Sample, before: Sample | None) -> float:
    if before is None or now.at <= before.at:
        return 0.0
    return _gain(name, label, now, before) / (now.at - before.at)
