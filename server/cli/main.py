"""`hira`: serve, look into adapters, and talk to a running server.

Only the command line is here: what a command does is in the module it calls, imported when it runs,
so that `hira --help` is quick and needs no torch.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any

import typer

from server.cli import adapters as cli_adapters
from server.cli import apply as cli_apply
from server.cli import client as cli_client
from server.cli import cluster as cli_cluster
from server.cli import compare as cli_compare
from server.cli import convert as cli_convert
from server.cli import inspect as cli_inspect
from server.cli import keys as cli_keys
from server.cli import status as cli_status
from server.cli import train as cli_train
from server.cli.layout import print_fault
from server.cli.serve import serve_command, setting_parameters
from server.version import package_version

app = typer.Typer(
    name="hira",
    help="Serve many HiRA and LoRA adapters on one 4-bit base model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("serve", rich_help_panel="Server")(serve_command())
cli_status.add_status_command(app)
cli_client.add_client_commands(app)
app.add_typer(cli_adapters.adapters_app, name="adapters", rich_help_panel="Adapters")
cli_apply.add_apply_command(app)
app.add_typer(cli_keys.keys_app, name="keys", rich_help_panel="Server")
cli_inspect.add_inspect_command(app)
cli_compare.add_compare_command(app)
cli_convert.add_convert_command(app)
cli_train.add_train_command(app)
cli_cluster.add_cluster_commands(app, setting_parameters())


def _show_version(wanted: bool) -> None:
    if wanted:
        print(package_version())
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Serve many HiRA and LoRA adapters on one 4-bit base model."""


@app.command(rich_help_panel="Server")
def version() -> None:
    """Print the version."""
    print(package_version())


def main() -> None:
    """The entry point of the `hira` script."""
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        raise SystemExit(130) from None
    except Exception as error:
        # Typer's own errors of usage are told as all others are; they have no public base class.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        _tell_misuse(error)
    raise SystemExit(status if isinstance(status, int) else 0)


def _tell_misuse(error: Any) -> None:
    """A flag or an argument that no command takes.

    Raises:
        SystemExit: Always, with the status of a misuse.
    """
    context = getattr(error, "ctx", None)
    path = "hira" if context is None else context.command_path
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        raise SystemExit(error.exit_code)
    text = error.format_message()
    possible = getattr(error, "possibilities", None)
    if possible is not None:
        text = f"no such option: {error.option_name}"
        near = difflib.get_close_matches(error.option_name, list(possible), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
    else:
        meant = ""
    print_fault(text, {"fix": f"{meant}{path} --help lists all"})
    raise SystemExit(error.exit_code)


if __name__ == "__main__":
    main()
