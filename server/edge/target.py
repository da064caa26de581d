"""Whom a call is for: from the name that it gives to an adapter in one version, or the bare base.

A name is resolved once, when a request is admitted, so that a replacement never changes an answer
half-way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from adapters.errors import AdapterError
from adapters.registry.names import Names
from adapters.tasks import BY_NAME, ROWS, Task, asked_at, tasks_at
from server.errors import Refusal
from server.inputs.images import Images
from server.inputs.text import Text
from server.metrics import BASE_LABEL

if TYPE_CHECKING:
    from adapters.intake.checkpoint import AdapterWeights
    from adapters.registry.registry import AdapterRecord
    from adapters.signature import BaseSignature


Arm = Literal["stable", "canary"]
DRAW_BYTES: Final = 8  # of a digest, which make a number from 0 to 1


@dataclass(frozen=True)
class Base:
    """The base model as the HTTP side knows it: no weights."""

    name: str
    task: Task  # what the bare base does
    signature: BaseSignature
    check_head: Callable[[AdapterWeights], None]  # raises what is wrong with a task head
    inputs: Text | Images  # tokenizer, limited to what one input may have; or image processor
    prompts: Text | None  # the tokenizer, limited to the base's context; None on a base of images
    created: float

    @property
    def texts(self) -> Text:
        """The tokenizer, limited to the base's context.

        Raises:
            Refusal: The base takes images.
        """
        if self.prompts is None:
            raise Refusal.because(
                "task_mismatch",
                "This base takes images, not texts.",
                found="a call for texts",
                expected="images for /predict or /embed",
            )
        return self.prompts

    def answers_to(self, name: str) -> bool:
        """Whether a name means the bare base."""
        return name in {self.name, BASE_LABEL}


@dataclass(frozen=True, slots=True)
class Target:
    """Whom a request is for: an adapter in one version, or the bare base; and what it asks for."""

    adapter: str | None
    version: str | None
    task: Task
    own_template: bool = False  # conversations are written with the adapter's own
    generation: Mapping[str, Any] = field(default_factory=dict)  # as ``AdapterRecord`` has it
    alias: str | None = None  # by which it was named, where that is not its own name
    arm: Arm | None = None  # which of the versions that share its requests; None: it has one

    @property
    def shown(self) -> str:
        return self.adapter or BASE_LABEL


def drawn_arm(name: str, version: str, share: float, key: str) -> Arm:
    """Which version of a name answers a request: the canary with probability ``share`` / 100.

    By the digest of the key alone, so that the same key always draws the same, in whatever process
    and beside whatever other requests, and a larger share keeps who had drawn the canary before.

    Args:
        name: Of the adapter.
        version: The canary's. With another one other keys draw it.
        share: Of the requests, in percent.
        key: What stays together: a user, or one request.
    """
    digest = hashlib.sha256(f"{name}\0{version}\0{key}".encode("utf-8", "replace")).digest()
    drawn = int.from_bytes(digest[:DRAW_BYTES], "big") / (1 << 8 * DRAW_BYTES)
    return "canary" if drawn * 100.0 < share else "stable"


def base_task(architecture: str) -> Task:
    """What a base of this class does without any adapter."""
    heads = (row for row in ROWS if row.head == "base" and architecture.endswith(row.class_ends))
    return next((row.name for row in heads), "feature-extraction")


class Targets:
    """Resolves names, from memory. On the event loop.

    Args:
        names: What the registry has.
        base: What is served.
        default: The adapter for calls that name none and that the bare base cannot answer.
        may_ask: Whether the present call may ask for an adapter of a name, be there one or not.
    """

    def __init__(
        self,
        names: Names,
        base: Base,
        default: str | None = None,
        may_ask: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.names = names
        self.base = base
        self.default = default
        self.may_ask = may_ask

    def check_scope(self, name: str, field: str | None = None) -> None:
        """Refuse a name that is not for the key of the present call.

        Before the name is looked up: what is answered, and how long it takes, does not depend on
        whether there is such an adapter.

        Raises:
            Refusal: adapter_forbidden.
        """
        if not self.may_ask(BASE_LABEL if self.base.answers_to(name) else name):
            raise Refusal.because(
                "adapter_forbidden",
                "This key is not for this adapter.",
                expected="a name that GET /v1/models lists with this key",
                fix="Ask the operator for a key that is.",
                field=field,
            )

    def record(self, name: str, field: str | None = None) -> AdapterRecord:
        """The registry's record of an adapter, from memory; of whatever base.

        Raises:
            Refusal: adapter_forbidden, adapter_not_found or registry_unavailable.
        """
        self.check_scope(name, field)
        try:
            return self.names.resolve(name)
        except AdapterError as error:
            raise Refusal.of(error, field) from None

    def served_record(self, name: str, field: str | None = None) -> AdapterRecord:
        """The record of an adapter that can be asked for answers on this base.

        Raises:
            Refusal: adapter_forbidden, adapter_not_found, registry_unavailable or base_mismatch.
        """
        record = self.record(name, field)
        try:
            self.names.check_fits(record)
        except AdapterError as error:
            raise Refusal.of(error, field) from None
        return record

    def resolve(
        self,
        names: Sequence[str | None],
        path: str,
        field: str = "adapter",
        *,
        call: str | None = None,
        key: str | None = None,
    ) -> Target:
        """Resolve the adapter that a call names, in its query or its body.

        Args:
            names: Everything that names one; at most one distinct name may be among them. The
                base's own name means the bare base.
            path: The native call, which the table of tasks has.
            field: Where it is named, for the error.
            call: What the client called, for the error, where that is another.
            key: Decides where versions share the requests of a name, as for ``drawn_arm``. None:
                the version that the name is on.

        Raises:
            Refusal: adapter_conflict, adapter_required, adapter_forbidden, adapter_not_found,
                registry_unavailable, base_mismatch or task_mismatch.
        """
        name = self._one_name(names, field)
        if name is not None:
            return self._adapter(name, path, field, key)
        if all(one is None for one in names) and (default := self._default(path, key)):
            return default
        return self._bare_base(path, field, call or path)

    def _one_name(self, names: Sequence[str | None], field: str) -> str | None:
        """The adapter that is named, None for the bare base.

        Raises:
            Refusal: adapter_conflict for two of them.
        """
        given = {name for name in names if name is not None}
        distinct = sorted(
            {self.base.name if self.base.answers_to(name) else name for name in given}
        )
        if len(distinct) > 1:
            raise Refusal.because(
                "adapter_conflict",
                "The request names two adapters.",
                found=" and ".join(distinct),
                expected="one adapter",
                fix="Name it once, in the query or in the body.",
                field=field,
            )
        return None if not distinct or self.base.answers_to(distinct[0]) else distinct[0]

    def named_record(
        self, names: Sequence[str | None], field: str = "adapter"
    ) -> AdapterRecord | None:
        """The record of the one adapter that is named, None for the bare base.

        Raises:
            Refusal: adapter_conflict, adapter_forbidden, adapter_not_found, registry_unavailable
                or base_mismatch.
        """
        name = self._one_name(names, field)
        if name is None and any(one is not None for one in names):
            self.check_scope(BASE_LABEL, field)
        return None if name is None else self.served_record(name, field)

    def own_path(self, names: Sequence[str | None]) -> str:
        """The native call for what the one adapter that is named is for, or else the base.

        Raises:
            Refusal: adapter_conflict, adapter_forbidden, adapter_not_found, registry_unavailable
                or base_mismatch.
        """
        record = self.named_record(names)
        row = BY_NAME.get(self.base.task if record is None else record.task)
        return "/predict" if row is None else row.path

    def arm_of(self, adapter: str | None, version: str | None) -> Arm | None:
        """Which arm of a name a version is now; None where it has no canary, or is neither."""
        record = self.names.records.get(adapter or "")
        if record is None or record.canary is None:
            return None
        if version == record.canary.record.version:
            return "canary"
        return "stable" if version == record.version else None

    def _adapter(self, name: str, path: str, field: str, key: str | None) -> Target:
        """Resolve one adapter for an endpoint.

        Raises:
            Refusal: adapter_forbidden, adapter_not_found, registry_unavailable, base_mismatch or
                task_mismatch.
        """
        record = named = self.served_record(name, field)
        canary = named.canary
        arm: Arm | None = None
        # One that was made for another base takes no part, as its record says.
        if key is not None and canary is not None and canary.record.fits(self.names.base_digest):
            arm = drawn_arm(named.name, canary.record.version, canary.share, key)
            record = canary.record if arm == "canary" else named
        # A record of another program's may hold a task that this one does not know.
        task = asked_at(cast(Task, record.task), path) if record.task in BY_NAME else None
        if task is None:
            own = BY_NAME.get(record.task)
            raise Refusal.because(
                "task_mismatch",
                f"The adapter {name} does {record.task}.",
                found=record.task,
                expected=" or ".join(sorted(tasks_at(path))),
                fix=f"Call {f'POST {own.path}' if own else 'another endpoint'} for this adapter.",
                field=field,
            )
        return Target(
            named.name,
            record.version,
            task,
            record.chat_template,
            record.generation,
            alias=None if name == named.name else name,
            arm=arm,
        )

    def _default(self, path: str, key: str | None) -> Target | None:
        """The adapter that the operator named, for a call that the bare base cannot answer."""
        if self.default is None or asked_at(self.base.task, path) is not None:
            return None
        if not self.may_ask(self.default):  # nor is anybody told of it
            return None
        record = self.served_record(self.default)
        task = asked_at(cast(Task, record.task), path) if record.task in BY_NAME else None
        return None if task is None else self._adapter(self.default, path, "adapter", key)

    def _bare_base(self, path: str, field: str, call: str) -> Target:
        task = asked_at(self.base.task, path)
        if task is None:
            raise Refusal.because(
                "adapter_required",
                f"{call} needs an adapter on this base.",
                found="no adapter",
                expected=(
                    "?adapter=NAME, or adapter in the body"
                    if field == "adapter"
                    else f"an adapter's name in {field}"
                ),
                fix="GET /v1/models lists the adapters.",
                field=field,
            )
        self.check_scope(BASE_LABEL, field)
        return Target(None, None, task)
