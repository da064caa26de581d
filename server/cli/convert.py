"""`hira convert`: a checkpoint of the HiRA authors' own code, as PEFT saves adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.layout import fail


def add_convert_command(app: typer.Typer) -> None:
    app.command("convert", rich_help_panel="Adapters")(convert_checkpoint)


def convert_checkpoint(
    source: Annotated[Path, typer.Argument(help="The folder that the authors' code saved.")],
    dest: Annotated[Path, typer.Argument(help="The folder to make.")],
) -> None:
    """Turn a checkpoint of the HiRA authors' own code into an adapter of PEFT, without loss.

    Tensors of a pickle are read by torch's restricted unpickler, which runs no code.
    """
    from adapters.errors import AdapterError
    from adapters.intake.convert import convert

    try:
        made = convert(source, dest)
    except AdapterError as error:
        fail(f"{error.code}: {error}")
    except OSError as error:
        fail(f"{dest} cannot be written: {error.strerror or error}")
    ranks = "/".join(map(str, made.ranks))
    head = f", head {', '.join(made.head)}" if made.head else ""
    print(f"{dest}: {made.layers} layers, rank {ranks}{head}")
