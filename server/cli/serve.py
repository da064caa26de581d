"""`hira serve`: a line at once, obvious mistakes before anything heavy is loaded, then the start.

The server itself is imported only when all that is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from server.cli.layout import FAILED, MISUSED, print_fault
from server.settings import SettingsFault, describe_fields, load_settings
from server.version import package_version

EXAMPLES = """

Examples:

  hira serve                                         the embedded demo

  hira serve --base ./llama --adapter a=./runs/a     a base and an adapter of yours

  hira serve --base org/name --device cuda --device-bytes 4GiB --port 8080
"""


def run_server(config: Path | None = None, **flags: Any) -> None:
    """Serve with these flags; ends the command with a status where that is not possible."""
    print(f"hira {package_version()} starts", flush=True)
    try:
        settings = load_settings(flags, config=config)
    except SettingsFault as fault:
        for one in fault.faults:
            print_fault(one.text, {"found": one.found, "expected": one.expected, "fix": one.fix})
        raise SystemExit(MISUSED) from None
    from server.cli.start_progress import StartProgress
    from server.edge.processes.failed_start import StartFailed
    from server.edge.processes.preflight import check_before_loading
    from server.stages import listen_to_stages, tell_stage

    progress = StartProgress()

    def ready(line: str) -> None:
        progress.end()
        print(line, flush=True)

    try:
        check_before_loading(settings)
        listen_to_stages(progress.show)
        tell_stage("loading torch and transformers")
        from server.edge.processes.serve import serve

        serve(settings, reload=lambda: load_settings(flags, config=config), say=ready)
    except StartFailed as failure:
        progress.give_up()
        for wrong in failure.faults:
            print_fault(wrong.message, vars(wrong))
        raise SystemExit(FAILED) from None


def setting_parameters() -> list[inspect.Parameter]:
    """What every command that serves takes: the file of the settings, and all of them."""
    config = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(
                "--config",
                metavar="FILE",
                help="Settings file (default: hira.toml, if there is one).",
            ),
        ],
    )
    return [config, *_flags()]


def serve_command() -> Callable[..., None]:
    """The command, with an option for every setting."""

    def serve(**flags: Any) -> None:
        run_server(**{name: value for name, value in flags.items() if value is not None})

    serve.__doc__ = f"""Serve a base model and its adapters; without --base, the embedded demo.

    Every option is also HIRA_... in the environment and a key in hira.toml. Sizes are bytes, or
    with a unit: 512MiB, 4GiB.
    {EXAMPLES}"""
    parameters = setting_parameters()
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {one.name: one.annotation for one in parameters}
    return serve


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
    default = _shown_default(field)
    option = f"--{name.replace('_', '-')}"
    if field.annotation is bool:
        option += f"/--no-{name.replace('_', '-')}"
    text = (field.description or "") + (f" (default: {default})" if default else "")
    # Values stay text: the settings check them, and say what is wrong for every source alike.
    kind: Any = list[str] if _is_repeatable(field) else str
    if field.annotation is bool:
        kind = bool
    found = typer.Option(
        option, help=text, rich_help_panel=panel, show_default=False, metavar=_metavar(name, field)
    )
    return Annotated[kind | None, found]


def _shown_default(field: FieldInfo) -> str:
    value = field.default
    if value is None or value in ((), {}):
        return ""
    if _holds(field.annotation, ByteSize) and isinstance(value, int):
        return ByteSize(value).human_readable(separator=" ")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metavar(name: str, field: FieldInfo) -> str | None:
    """What a value is, by its type: a unit where there is one."""
    annotation = field.annotation
    if annotation is bool:
        return None
    choices = [str(one) for one in get_args(annotation) if isinstance(one, str)]
    if choices:
        return "|".join(choices)
    if _holds(annotation, ByteSize):
        return "BYTES"
    if name == "adapter":
        return "NAME=SOURCE"
    if name.endswith("_s"):
        return "SECONDS"
    if _holds(annotation, Path):
        return "FILE" if name in {"chat_template", "keys_file"} else "DIR"
    if _holds(annotation, int):
        return "N"
    return {
        "base": "DIR|HUB_ID",
        "host": "ADDRESS",
        "registry_url": "URL",
        "otel_endpoint": "URL",
    }.get(name, "NAME")


def _holds(annotation: Any, kind: type) -> bool:
    """Whether an annotation is a type, or is made of it."""
    return annotation is kind or any(_holds(one, kind) for one in get_args(annotation))


def _is_repeatable(field: FieldInfo) -> bool:
    return get_origin(field.annotation) in {tuple, dict}
