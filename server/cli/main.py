"""`hira`: serve, look into adapters, and talk to a running server.

Only the command line is here: what a command does is in the module it calls, imported when it runs,
so that `hira --help` is quick and needs no torch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from server.cli import adapters as cli_adapters
from server.cli import client as cli_client
from server.cli import cluster as cli_cluster
from server.cli import convert as cli_convert
from server.cli import inspect as cli_inspect
from server.settings import SettingsFault, describe_fields, load_settings
from server.version import package_version

FAILED: Final = 1
MISUSED: Final = 2

app = typer.Typer(
    name="hira",
    help="Serve many HiRA and LoRA adapters on one 4-bit base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(cli_adapters.adapters_app, name="adapters")
cli_client.add_client_commands(app)
cli_inspect.add_inspect_command(app)
cli_convert.add_convert_command(app)


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


@app.command()
def version() -> None:
    """Print the version."""
    print(package_version())


def _serve_settings(config: Path | None = None, **flags: Any) -> None:
    try:
        settings = load_settings(flags, config=config)
    except SettingsFault as fault:
        raise SystemExit(_complain(str(fault), MISUSED)) from None
    from server.edge.processes.serve import serve
    from server.edge.processes.supervise import StartFailed

    try:
        serve(settings, reload=lambda: load_settings(flags, config=config), say=_say)
    except StartFailed as failure:
        raise SystemExit(_complain(str(failure), FAILED)) from None


def _say(line: str) -> None:
    print(line, flush=True)


def _complain(text: str, status: int) -> int:
    for line in text.splitlines():
        print(f"hira: {line}", file=sys.stderr)
    return status


def _flags() -> list[inspect.Parameter]:
    """A flag for every setting: one list of them, in `server.settings`."""
    return [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag_option(name, field)
        )
        for name, field in describe_fields().items()
        if name not in {"admin_key", "api_keys"}  # secrets would show in the list of processes
    ]


def _flag_option(name: str, field: FieldInfo) -> Any:
    extra = field.json_schema_extra
    panel = str(extra["panel"]) if isinstance(extra, dict) else "Settings"
    empty = field.default is None or field.default in ((), {})
    default = "" if empty else f" (default: {field.default})"
    option = f"--{name.replace('_', '-')}"
    if field.annotation is bool:
        option += f"/--no-{name.replace('_', '-')}"
    text = (field.description or "") + default
    # Values stay text: the settings check them, and say what is wrong for every source alike.
    kind: Any = list[str] if _is_repeatable(field) else str
    if field.annotation is bool:
        kind = bool
    choices = _choices(field.annotation)
    metavar = None if field.annotation is bool else "|".join(choices) if choices else "VALUE"
    found = typer.Option(
        option, help=text, rich_help_panel=panel, show_default=False, metavar=metavar
    )
    return Annotated[kind | None, found]


def _choices(annotation: Any) -> list[str]:
    return [str(one) for one in get_args(annotation) if isinstance(one, str)]


def _is_repeatable(field: FieldInfo) -> bool:
    return get_origin(field.annotation) in {tuple, dict}


def _setting_parameters() -> list[inspect.Parameter]:
    """What every command that serves takes: the file of the settings, and all of them."""
    config = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option("--config", help="Settings file (default: hira.toml, if there is one)."),
        ],
    )

    return [config, *_flags()]


def _command() -> Callable[..., None]:
    def serve(**flags: Any) -> None:
        _serve_settings(**{name: value for name, value in flags.items() if value is not None})

    serve.__doc__ = """Serve a base model and its adapters; without --base, the embedded demo.

    Every option is also HIRA_... in the environment and a key in hira.toml.
    """
    parameters = _setting_parameters()
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {one.name: one.annotation for one in parameters}
    return serve


app.command("serve")(_command())
cli_cluster.add_cluster_commands(app, _setting_parameters())


def main() -> None:
    """The entry point of the `hira` script."""
    app()


if __name__ == "__main__":
    main()
