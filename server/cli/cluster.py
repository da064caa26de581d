"""`hira cluster`: the engine and the HTTP surface as deployments of Ray Serve."""

from __future__ import annotations

import inspect
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from server.cli.layout import FAILED, MISUSED, fail, print_fault
from server.settings import Settings, SettingsFault, load_settings

DOWN_WITHIN_S: Final = 120.0
DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="HIRA_DATA_DIR", help="Of the cluster.")
]
PANEL: Final = "Cluster"


def add_cluster_commands(app: typer.Typer, settings: Sequence[inspect.Parameter]) -> None:
    """Add `hira cluster up|status|down|config`.

    Args:
        settings: The parameters of a command that serves.
    """
    cluster = typer.Typer(help="Several engine replicas, on Ray Serve.", no_args_is_help=True)
    cluster.command("up")(_with_settings(_up, settings))
    cluster.command("config")(_with_settings(_print_config, settings))
    cluster.command("status")(_show_status)
    cluster.command("down")(_down)
    app.add_typer(cluster, name="cluster", rich_help_panel="Server")


def _with_settings(
    command: Callable[..., None], settings: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """The command with a flag for every setting beside its own."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]

    def run(**flags: Any) -> None:
        command(**{name: value for name, value in flags.items() if value is not None})

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__.strip("_")
    parameters = [*own, *settings]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _sized(text: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=PANEL, **more)


Replicas = Annotated[int, _sized("Engine replicas, each with the base on a device.", min=1)]
MaxReplicas = Annotated[
    int | None, _sized("As many as traffic needs, up to this (default: no more).", min=1)
]
TargetRequests = Annotated[
    float,
    _sized("Requests a replica that are aimed at when their number follows traffic."),
]
HttpReplicas = Annotated[int, _sized("Replicas of the HTTP surface.", min=1)]
Cpus = Annotated[float, _sized("Processors of a node that an engine replica takes.", min=0)]
Gpus = Annotated[float, _sized("GPUs of a node that an engine replica takes.", min=0)]
SpillRequests = Annotated[
    int, _sized("Requests that a replica may have and never counts as busy.", min=1)
]
SpillFactor = Annotated[
    float, _sized("Times the mean of all replicas, above which one counts as busy.", min=1)
]


def _up(
    *,
    replicas: Replicas = 2,
    max_replicas: MaxReplicas = None,
    target_requests: TargetRequests = 32.0,
    http_replicas: HttpReplicas = 1,
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    spill_requests: SpillRequests = 8,
    spill_factor: SpillFactor = 1.25,
    **flags: Any,
) -> None:
    """Serve on this machine with several engine replicas, until Ctrl-C or `hira cluster down`."""
    settings = _settings_of(flags)
    _need_ray()
    from server.cluster.local import prepare_environment

    prepare_environment(settings)  # before Ray is imported
    from server.cluster.application import ClusterOptions
    from server.cluster.local import run_here
    from server.edge.processes.failed_start import StartFailed

    options = ClusterOptions(
        replicas=replicas,
        max_replicas=max_replicas,
        target_requests=target_requests,
        http_replicas=http_replicas,
        cpus=cpus,
        gpus=gpus,
        spill_requests=spill_requests,
        spill_factor=spill_factor,
    )
    try:
        run_here(settings, options, say=lambda line: print(line, flush=True))
    except StartFailed as failure:
        for wrong in failure.faults:
            print_fault(wrong.message, vars(wrong))
        raise SystemExit(FAILED) from None


def _print_config(
    *,
    replicas: Replicas = 2,
    max_replicas: MaxReplicas = None,
    target_requests: TargetRequests = 32.0,
    http_replicas: HttpReplicas = 1,
    cpus: Cpus = 1.0,
    gpus: Gpus = 1.0,
    spill_requests: SpillRequests = 8,
    spill_factor: SpillFactor = 1.25,
    **flags: Any,
) -> None:
    """Print a configuration for `serve deploy`, with the settings that are given."""
    settings = _settings_of(dict(flags))
    flags.pop("config", None)
    cluster = {
        "replicas": replicas,
        "http_replicas": http_replicas,
        "cpus": cpus,
        "gpus": gpus,
        "spill_requests": spill_requests,
        "spill_factor": spill_factor,
    }
    if max_replicas is not None:
        cluster |= {"max_replicas": max_replicas, "target_requests": target_requests}
    # JSON is YAML, and needs no library.
    print(
        json.dumps(
            {
                "proxy_location": "EveryNode",
                "http_options": {"host": settings.host, "port": settings.port},
                "applications": [
                    {
                        "name": "hira",
                        "route_prefix": "/",
                        "import_path": "server.cluster.application:build_application",
                        "args": {"settings": flags, "cluster": cluster},
                    }
                ],
            },
            indent=2,
        )
    )


def _show_status(data_dir: DataDir = Path("hira-data")) -> None:
    """Say how the cluster of this machine is; status 1 where none runs."""
    found = _known(data_dir)
    _need_ray()
    from server.cluster.local import status_lines

    for line in status_lines(found):
        print(line)


def _down(data_dir: DataDir = Path("hira-data")) -> None:
    """End the cluster of this machine: running requests finish first."""
    pid = int(_known(data_dir)["pid"])
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + DOWN_WITHIN_S
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    fail(
        "the cluster has not ended",
        found=f"process {pid} after {DOWN_WITHIN_S:.0f} s",
        fix="its requests may need longer: see drain_s; or end the process",
    )


def _known(data_dir: Path) -> dict[str, Any]:
    """What the running cluster wrote of itself."""
    path = data_dir / "cluster.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        os.kill(int(found["pid"]), 0)
    except (OSError, ValueError, KeyError):
        fail(
            "no cluster runs here",
            found=f"--data-dir {data_dir}",
            expected="the data folder of a cluster that runs",
            fix="start one with `hira cluster up`",
        )
    return found


def _settings_of(flags: dict[str, Any]) -> Settings:
    config = flags.pop("config", None)
    try:
        return load_settings(flags, config=config)
    except SettingsFault as fault:
        for one in fault.faults:
            print_fault(one.text, {"found": one.found, "expected": one.expected, "fix": one.fix})
        raise SystemExit(MISUSED) from None


def _need_ray() -> None:
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        fail("Ray Serve is not installed", MISUSED, fix="pip install 'hira-server[cluster]'")
