"""`hira train`: the recipe of `python -m server.training`, with the same options."""

from __future__ import annotations

import typer

from server.cli.layout import fail


def add_train_command(app: typer.Typer) -> None:
    app.command(
        "train",
        rich_help_panel="Adapters",
        add_help_option=False,  # the recipe has its own
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(train_adapter)


def train_adapter(context: typer.Context) -> None:
    """Train one adapter with PEFT and write its folder; `hira train --help` has its options.

    Example:

      hira train --base ./llama --train reviews.tsv --out my-adapter
    """
    try:
        from server.training.__main__ import main
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        fail("training needs peft, which is not installed", fix="pip install 'hira-server[train]'")
    main(context.args, program="hira train")
