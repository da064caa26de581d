"""Before anything listens, in the main process: the base's shape, the adapters of the start."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from adapters.errors import AdapterError, StoreUnavailable
from adapters.registry.adapter_bytes import AdapterBytes, open_store
from adapters.registry.registry import Registry
from adapters.registry.remote_store import RemoteStore
from adapters.registry.store import versions_of
from server.edge.endpoints.allowed_sources import sources_of
from server.edge.processes.failed_start import StartFailed
from server.edge.service import settle_on
from server.edge.target import Base, base_task
from server.inputs.rendering import RenderLimits, RenderProcess
from server.metrics import BASE_LABEL
from server.settings import AdapterSource, Settings
from server.stages import tell_stage

if TYPE_CHECKING:
    from server.inputs.images import Images
    from server.inputs.text import Text

DEMO_NAME: Final = "hira-demo-base"

logger = logging.getLogger(__name__)


def base_and_adapters(settings: Settings) -> tuple[str, str, tuple[AdapterSource, ...]]:
    """The base's place, its name, and the adapters of the start.

    Without a base that is the embedded demo, with all its adapters.

    Raises:
        StartFailed: No base was named and no demo is installed.
    """
    if settings.base is not None:
        name = settings.base_name or Path(settings.base).name
        return settings.base, name, settings.adapters
    from server import demo

    if not (demo.BASE_DIR / "config.json").exists():
        raise StartFailed("this installation has no embedded demo; name a base with --base")
    taken = {one.name for one in settings.adapters}
    folders = sorted(demo.ADAPTERS_DIR.glob("*/adapter_config.json"))
    own = (AdapterSource(one.parent.name, str(one.parent)) for one in folders)
    adapters = (*(one for one in own if one.name not in taken), *settings.adapters)
    return str(demo.BASE_DIR), settings.base_name or DEMO_NAME, adapters


def open_adapter_store(settings: Settings) -> AdapterBytes:
    """Where the bytes of adapters are; an object store is written to once, to see that it can be.

    Raises:
        StartFailed: It cannot; the fault says why.
    """
    limit = None if settings.store_bytes is None else int(settings.store_bytes)
    store = open_store(settings.store_dir, settings.remote_store, limit)
    if isinstance(store, RemoteStore):
        try:
            store.try_it()
        except StoreUnavailable as error:
            raise StartFailed(
                f"the adapter store {settings.store_url} cannot be used",
                found=error.found,
                expected="a bucket that is there, and keys that may write to it",
                fix="see store_url and store_endpoint, AWS_ACCESS_KEY_ID and AWS_REGION",
            ) from None
    return store


def describe_base(settings: Settings, place: str, name: str) -> Base:
    """What the HTTP side needs of a base: its layers' shapes and its tokenizer, no weights.

    The processes that are forked later must not inherit threads: those of torch and of the
    tokenizer stay unborn.

    Raises:
        StartFailed: The base cannot be served, in one line.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # For the worker, which is spawned with this environment: threads of OpenMP that spin while they
    # wait take the cores from the HTTP processes. Measured on 2 busy cores, a decoding step of the
    # demo base: 1,014 ms spinning, 7 ms sleeping.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from server.base.digest import checkpoint_digest
    from server.base.load import BaseModelError, signature_of
    from server.base.plan import plan_base
    from server.base.skeletons import Skeletons, beside_backbone
    from server.inputs.images import ImageProcessorError, Images
    from server.inputs.text import Text
    from server.inputs.tokenizer import TokenizerError

    torch.set_num_threads(1)
    options = settings.engine_options(place)
    try:
        plan = plan_base(options)
        signature = replace(signature_of(options), name=name, digest=checkpoint_digest(plan.folder))
        inputs: Text | Images
        prompts: Text | None = None
        if plan.takes_images:
            inputs = Images.load(
                plan.folder,
                plan.config,
                max_pixels=settings.max_image_pixels,
                max_request_pixels=settings.max_request_pixels,
            )
        else:
            limit = min(signature.max_length, settings.max_input_tokens or signature.max_length)
            vocabulary = signature.vocab_size or None
            inputs = Text.load(
                plan.folder, max_tokens=limit, vocab_size=vocabulary, source=settings.tokenizer
            )
            if inputs.note is not None:
                logger.warning(inputs.note)
        if settings.chat_template is not None:
            _use_template(settings.chat_template, inputs, settings)
        if isinstance(inputs, Text):
            prompts = inputs.limited(signature.max_length)
    except (BaseModelError, TokenizerError, ImageProcessorError) as error:
        raise StartFailed.of(error) from None
    return Base(
        name=name,
        task=base_task(signature.architecture),
        signature=signature,
        check_head=Skeletons(
            plan.config,
            signature.vocab_size,
            has_pooler=any("pooler" in path.split(".") for path in signature.layers),
            beside=beside_backbone(plan.skeleton(), signature.prefix),
        ).check,
        inputs=inputs,
        prompts=prompts,
        created=time.time(),
    )


def _use_template(path: Path, inputs: Text | Images, settings: Settings) -> None:
    """Give the base the chat template that the operator names.

    Raises:
        StartFailed: It is of no use on this base.
    """
    from server.inputs.conversation import read_template
    from server.inputs.text import Text

    if not isinstance(inputs, Text):
        raise StartFailed("chat_template: this base takes images, and no conversation")
    try:
        with render_process(settings) as process:
            inputs.tokenizer.chat_template = read_template(path, inputs, process)
    except ValueError as error:
        raise StartFailed(f"chat_template {path}: {error}") from None


def check_default(registry: Registry, settings: Settings) -> None:
    """Raises StartFailed where the adapter that answers by default is not registered."""
    name = settings.default_adapter
    if name is not None and name not in {*registry.records(), *registry.aliases.all()}:
        raise StartFailed(
            f"default_adapter {name}: there is no such adapter; register it first, "
            f"or with --adapter {name}=SOURCE"
        )


def render_process(settings: Settings) -> RenderProcess:
    """What renders chat templates while nothing listens yet; to be closed before any fork."""
    return RenderProcess(RenderLimits(cpu_s=settings.template_s))


def register(
    registry: Registry, base: Base, adapters: tuple[AdapterSource, ...], settings: Settings
) -> None:
    """Register what the operator named at the start; what is registered already costs a look.

    Raises:
        StartFailed: An adapter cannot be registered; the line names it.
    """
    sources = sources_of(settings)
    process = render_process(settings)
    for place, one in enumerate(adapters):
        tell_stage("registering adapters", place, len(adapters))
        if one.name in {base.name, BASE_LABEL}:
            raise StartFailed(
                f"adapter {one.name}: this name means the base model; choose another, "
                "or another --base-name"
            )
        try:
            with process, sources.fetch(one.source, trusted=True) as folder:
                record, _ = registry.register(
                    one.name,
                    folder,
                    base.signature,
                    source=one.source,
                    replace=True,
                    spare_rollback=True,
                    check=base.check_head,
                    settle=lambda one: settle_on(base, one, process),
                )
                if record.version not in versions_of(folder):
                    logger.warning(
                        "adapter %s stays on version %s: it was rolled back from what %s holds; "
                        "register that again to have it",
                        *(one.name, record.version, one.source),
                    )
        except AdapterError as error:
            raise StartFailed.of(error, f"adapter {one.name}: {error.code}: ") from None


def check_base(registry: Registry, base: Base) -> None:
    """Say how many of the registered adapters fit the base, and which do not: those are refused.

    Raises:
        StartFailed: The registry cannot be used.
    """
    try:
        others = registry.check_base(base.signature, base.check_head)
        total = len(registry.records())
    except AdapterError as error:
        raise StartFailed(f"the registry cannot be used: {error}") from None
    if others:
        logger.warning(
            "%d of %d adapters fit the base %s; not served, because they were registered for "
            "another base: %s",
            total - len(others),
            total,
            base.name,
            ", ".join(one.name for one in others),
        )
