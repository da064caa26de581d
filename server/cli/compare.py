"""`hira compare`: what a quantized base changes for one adapter, before it is served."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from server.cli.client import JsonOption, print_json, show_table
from server.cli.inspect import adapter_folder
from server.cli.layout import MISUSED, fail

if TYPE_CHECKING:
    from server.comparison.storages import StorageComparison
    from server.stages import Stage

TEXTS_HELP = "Texts in UTF-8, one in each line; - for standard input."


def add_compare_command(app: typer.Typer) -> None:
    app.command("compare", rich_help_panel="Adapters")(compare_adapter)


def compare_adapter(
    path: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder or archive.")
    ],
    *,
    texts: Annotated[Path, typer.Option(metavar="FILE", help=TEXTS_HELP)],
    base: Annotated[
        str | None, typer.Option(help="A folder, or a hub id (default: the embedded demo).")
    ] = None,
    quantization: Annotated[
        Literal["nf4", "fp4", "int8"], typer.Option(help="What to compare with no quantization.")
    ] = "nf4",
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Of both bases.")
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Of both bases.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="On a CPU (default: its cores).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what quantizing the base changes for an adapter: labels, divergence, perplexity.

    Asks the same texts on the unquantized base and on the quantized one. The two are loaded one
    after the other, so there must be memory for the unquantized one. No server is needed.

    Example:

      hira compare ./runs/imdb --base ./llama --texts reviews.txt
    """
    lines = _lines_of(texts)
    with adapter_folder(path) as folder:
        found = _compare_on_base(
            folder,
            lines,
            base=base,
            quantization=quantization,
            dtype=dtype,
            device=device,
            threads=threads,
        )
    if as_json:
        print_json(found.to_json_dict())
    else:
        _print_comparison(found)


def _compare_on_base(
    folder: Path,
    lines: list[str],
    *,
    base: str | None,
    quantization: Literal["nf4", "fp4", "int8"],
    dtype: Literal["auto", "bf16", "fp16", "fp32"],
    device: Literal["auto", "cpu", "cuda"],
    threads: int | None,
) -> StorageComparison:
    print(f"comparing {folder.name} with {len(lines)} texts", file=sys.stderr, flush=True)
    from adapters.errors import ExplainedError
    from server.comparison.storages import compare_storages
    from server.demo import BASE_DIR
    from server.options import EngineOptions
    from server.stages import listen_to_stages

    options = EngineOptions(
        base=str(BASE_DIR) if base is None else base,
        store_dir=folder,  # of neither base: each comparison has folders of its own
        cache_dir=folder,
        quantization=quantization,
        dtype=dtype,
        device=device,
        threads=threads,
    )
    listen_to_stages(_StageLines().show)
    try:
        return compare_storages(options, folder, lines)
    except ExplainedError as error:
        fail(error.message, found=error.found, expected=error.expected, fix=error.fix)
    finally:
        listen_to_stages(None)


class _StageLines:
    """Says on standard error what is being done; standard output is for the result alone."""

    def __init__(self) -> None:
        self._name = ""

    def show(self, stage: Stage) -> None:
        if stage.name != self._name:
            self._name = stage.name
            print(f"  {stage.name} ...", file=sys.stderr, flush=True)


def _lines_of(texts: Path) -> list[str]:
    try:
        told = sys.stdin.buffer.read() if str(texts) == "-" else texts.read_bytes()
    except OSError as error:
        fail(
            f"{texts} cannot be read",
            MISUSED,
            found=error.strerror,
            expected="a file with a text in each line",
            fix="check the path given to --texts",
        )
    try:
        lines = [line.strip() for line in told.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        fail(
            f"{texts} is no text in UTF-8",
            MISUSED,
            found=f"byte {error.object[error.start]:#04x} at {error.start}",
            expected="UTF-8",
        )
    kept = [line for line in lines if line]
    if not kept:
        fail(f"{texts} holds no text", MISUSED, expected="a text in each line")
    return kept


def _print_comparison(found: StorageComparison) -> None:
    plain, stored = found.base_bytes
    unit = "tokens" if found.perplexity else "texts"
    flips = f"{found.flips:,} of {found.answers:,} {unit} ({found.flips / found.answers:.2%})"
    rows = [
        ["task, method", f"{found.task}, {found.method}"],
        ["base", f"{found.storage}, against not quantized, both {found.dtype} on {found.device}"],
        ["texts", f"{found.texts:,}" + (f", {found.cut:,} of them cut" if found.cut else "")],
    ]
    if found.largest_change is None:
        rows.append(["likeliest token differs" if found.perplexity else "label flips", flips])
    else:
        rows.append(["largest change of a value", f"{found.largest_change:.4g}"])
    if found.kl_mean_nats is not None and found.kl_max_nats is not None:
        least = "at least " if found.perplexity else ""
        values = f"{least}{found.kl_mean_nats:.3g} nats, largest {found.kl_max_nats:.3g}"
        rows.append([f"KL divergence for each of the {unit}", values])
    if found.perplexity is not None:
        before, after = found.perplexity
        rows.append(["perplexity", f"{before:.3f} -> {after:.3f} ({after / before - 1:+.2%})"])
    rows.append(["bytes of the base", f"{plain:,} -> {stored:,}"])
    rows.append(["most memory of this process", f"{found.peak_bytes:,}"])
    show_table(("", "value"), rows)
    print()
    show_table(
        ("changed most", "not quantized", "quantized", "KL"),
        [[one.text, one.before, one.after, f"{one.kl_nats:.3g}"] for one in found.worst],
    )
