"""Runs a service: builds LitServe's server around it, starts it, supervises it to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from adapters.registry.records import AdapterRecord
from adapters.tasks import BY_NAME
from server.edge.endpoints.health import HealthEndpoints, observe_routes
from server.edge.endpoints.openai import OpenAI
from server.edge.endpoints.ranking import Ranking
from server.edge.endpoints.routes import Endpoint
from server.edge.endpoints.tei_tgi import TeiTgi
from server.edge.link.dispatcher import Dispatcher
from server.edge.link.worker_state import read_state
from server.edge.litserve.api import HiraAPI
from server.edge.litserve.loop import EngineLoop
from server.edge.litserve.parent_death import bind_forked_children
from server.edge.litserve.server import HiraServer
from server.edge.litserve.spec import HiraSpec
from server.edge.processes.supervise import Supervisor
from server.edge.service import Service
from server.version import package_version

BACKLOG: Final = 2048
ADAPTERS_SHOWN: Final = 8  # names in a line


def run_service(
    service: Service,
    routes: Sequence[Endpoint],
    *,
    base: str,
    engine: str,
    on_ready: Callable[[], None],
    upkeep: Callable[[], None],
    chore: Callable[[], None],
) -> None:
    """Start all processes, and return when the server has been told to stop and has drained.

    Args:
        service: What the endpoints use; opened anew in every HTTP process.
        routes: Endpoints beside those of inference and health.
        base: Folder or hub id that the worker loads.
        engine: ``module:attribute`` of what builds the engine in the worker.
        on_ready: Called once, when the first worker answers.
        upkeep: Called about once a second in the main process.
        chore: Called about once a second in a thread of the first HTTP process; may take long.

    Raises:
        StartFailed: One line that says why the server cannot run.
    """
    settings, dispatcher = service.settings, service.dispatcher
    assert isinstance(dispatcher, Dispatcher)  # the link of a service with one worker
    version = package_version()
    api = HiraAPI(
        settings.engine_options(base),
        settings.run_dir,
        spec=HiraSpec(TeiTgi(service), Ranking(service), OpenAI(service), dispatcher),
        loop=EngineLoop(settings.api_processes),
        engine=engine,
        log_level=settings.log_level,
        log_format=settings.log_format,
    )
    server = HiraServer(
        api, service, [*observe_routes(HealthEndpoints(service, version)), *routes], version
    )
    supervisor = Supervisor(server, on_ready=on_ready, upkeep=upkeep)
    supervisor.install()
    bind_forked_children()
    server.supervise = supervisor.run
    server.chore = chore
    server.run(
        host=settings.host,
        port=settings.port,
        num_api_servers=settings.api_processes,
        log_level="warning",
        generate_client_file=False,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
    )


def banner(service: Service, key_file: Path | None) -> Iterator[str]:
    """What a person sees when the server is ready."""
    settings, base = service.settings, service.base
    records, fitting = service.names.listed(), service.names.listed(fitting=True)
    kept = [one for one in records if one not in fitting]
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host
    url = f"http://{host}:{settings.port}"
    # As the worker has it: a checkpoint that is quantized already is served as it is.
    state = read_state(settings.run_dir)
    loaded = {} if state is None else state.snapshot
    told = [str(loaded[part]) for part in ("storage", "dtype", "device") if part in loaded]
    told += [f"{loaded['kernel']} kernel"] if "kernel" in loaded else []
    yield f"hira-server {package_version()} is ready at {url}"
    yield f"  base       {base.name}" + (f" ({', '.join(told)})" if told else "")
    if loaded.get("weights_digest"):
        yield f"  weights    {loaded['weights_digest']}"
    if settings.base is None:
        yield "  demo       a toy of six layers, 256 wide, to try the server; serve yours: --base"
    yield (
        f"  adapters   {len(fitting)}: {_first_adapters(fitting)}"
        if records
        else "  adapters   none yet"
    )
    if kept:
        yield f"  not served {len(kept)}, made for another base: {_first_adapters(kept)}"
    yield f"  admin key  {key_file or 'as set by HIRA_ADMIN_KEY or hira.toml'}"
    yield f"  console    {url}/console"
    yield f"  docs       {url}/docs"
    yield "  try"
    for line in first_call(service, fitting, url):
        yield f"    {line}"


def first_call(service: Service, served: Sequence[AdapterRecord], url: str) -> tuple[str, ...]:
    """A call for a shell that a person who has just started the server gets an answer from; in
    lines that a terminal of 100 columns does not break."""
    keyed = ' -H "Authorization: Bearer $HIRA_KEY"' if service.is_keyed else ""
    base = service.base
    if base.prompts is None:
        return (f"curl -s{keyed} {url}/v1/models",)
    known = [one for one in served if one.task in BY_NAME]
    known.sort(key=lambda one: one.task != "text-classification")
    task = BY_NAME[known[0].task if known else base.task]
    asked = f"?adapter={known[0].name}" if known else ""
    text = "A film that is warm and well played."
    body: dict[str, object] = {"inputs": text}
    if task.path == "/rerank":
        body = {"query": "a warm comedy", "texts": [text, "A sad song."]}
    elif task.needs_pair:
        body = {"inputs": {"question": "How is the film?", "context": text}}
    elif task.needs_mask:
        body = {"inputs": f"The film was {base.prompts.tokenizer.mask_token}."}
    return (
        f"curl -s{keyed} '{url}{task.path}{asked}' \\",
        f"  -H 'Content-Type: application/json' -d '{json.dumps(body)}'",
    )


def _first_adapters(records: Sequence[AdapterRecord]) -> str:
    """The first few names, and how many more there are."""
    more = f", and {len(records) - ADAPTERS_SHOWN} more" if len(records) > ADAPTERS_SHOWN else ""
    return ", ".join(record.name for record in records[:ADAPTERS_SHOWN]) + more
