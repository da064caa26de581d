"""`hira inspect`: what an adapter's tensors prove, against what its files claim."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.intake.file_names import CARD_FILE
from server.cli.client import JsonOption, print_json, show_table
from server.cli.layout import fail

if TYPE_CHECKING:
    from adapters.inspection.audit import AuditReport
    from adapters.signature import BaseSignature


def add_inspect_command(app: typer.Typer) -> None:
    app.command(rich_help_panel="Adapters")(inspect)


def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter's folder or archive, or a card (.md).")],
    *,
    base: Annotated[
        str | None, typer.Option(help="A base that it should fit: a folder, or a hub id.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="A model card (default: README.md beside the adapter).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare an adapter with what its configuration and its model card claim.

    Ends with status 1 when something claimed is contradicted.
    """
    from adapters.errors import AdapterError
    from adapters.inspection.audit import audit, audit_card

    if path.suffix == ".md":
        report = audit_card(_card_text(path))
    else:
        with adapter_folder(path) as folder:
            beside = folder / CARD_FILE
            text = _card_text(card) if card else _card_text(beside) if beside.is_file() else None
            try:
                report = audit(folder, None if base is None else _signature(base), text)
            except AdapterError as error:
                fail(f"{error.code}: {error}")
    if as_json:
        print_json(report.to_json_dict())
    else:
        _print_report(report)
    if report.contradictions:
        raise SystemExit(1)


@contextmanager
def adapter_folder(path: Path) -> Iterator[Path]:
    """The folder itself, or what an archive holds, unpacked for as long as it is needed."""
    from adapters.errors import AdapterError
    from adapters.intake.archive import is_archive, unpack

    if path.is_dir():
        yield path
        return
    if not path.is_file() or not is_archive(path.name):
        fail(f"{path} is neither a folder nor an archive nor a card (.md)")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            yield unpack(path, Path(scratch), max_bytes=1 << 40)
        except AdapterError as error:
            fail(f"{error.code}: {error}")


def _card_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")


def _signature(base: str) -> BaseSignature:
    from server.base.load import BaseModelError, signature_of
    from server.options import EngineOptions

    nowhere = Path(tempfile.gettempdir())
    try:
        return signature_of(EngineOptions(base=base, store_dir=nowhere, cache_dir=nowhere))
    except BaseModelError as error:
        fail(str(error))


def _print_report(report: AuditReport) -> None:
    rows: list[list[str]] = []
    proof = report.tensors
    if proof is not None:
        ranks = ", ".join(f"{name} {'/'.join(map(str, r))}" for name, r in proof.ranks.items())
        rows += [
            ["method", str(proof.method)],
            ["layers", str(proof.layers)],
            ["rank by target", ranks],
            ["trained", f"{proof.parameters:,}"],
            ["  in factors", f"{proof.factor_parameters:,}"],
            ["  in heads", f"{proof.head_parameters:,}"],
            ["zeros in factors", f"{proof.sparsity:.1%}"],
            ["types", ", ".join(f"{name} x {count}" for name, count in proof.dtypes.items())],
            ["bytes", f"{proof.tensor_bytes:,}"],
            ["head", ", ".join(proof.head) or "none"],
            ["fits", ", ".join(proof.fits) or "no model known here"],
        ]
    if report.labels is not None:
        rows.append(["labels", ", ".join(report.labels)])
    fit = report.fit
    if fit is not None:
        head = f", head {' and '.join(fit.head)}" if fit.head else ""
        rows.append(
            [
                "the card's counts prove",
                f"{fit.model.names[0]}, r = {fit.rank} on {', '.join(fit.targets)}{head}",
            ]
        )
    if rows:
        show_table(("proven", "value"), rows)
        print()
    if not report.findings:
        print("Nothing is contradicted.")
        return
    show_table(
        ("", "about", "claimed", "proven"),
        [[one.severity, one.subject, one.claim, one.proof] for one in report.findings],
    )
