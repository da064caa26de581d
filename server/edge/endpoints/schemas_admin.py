"""Bodies of the administration: what is asked of adapters, their versions, canaries and aliases,
and what is answered; and what is told of keys."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from server.edge.endpoints.schemas import Answer, Body, Flag, Number


class RegisterRequest(Body):
    name: str
    source: str = Field(description="Folder below a source root, hf://org/repo@rev, or s3://…")
    replace: Flag = False
    pinned: Flag = False
    preload: Flag = False

    stage: Flag = Field(
        False,
        description="Check it and store its bytes without putting the name on them; POST "
        "/admin/apply names the version that is answered. Bytes without a name are deleted "
        "after a while.",
    )


class AppliedAdapter(Body):
    name: str
    version: str = Field(description="As a registration with stage has answered it.")
    source: str = Field("", description="For the record.", max_length=4096)
    pinned: Flag | None = Field(None, description="Left out: as it is.")


class ApplyRequest(Body):
    """Names and their versions, applied as a whole."""

    adapters: list[AppliedAdapter] = Field(default_factory=list, max_length=10_000)
    remove: list[str] = Field(default_factory=list, max_length=10_000, description="Names that go.")
    aliases: dict[str, str] | None = Field(
        None,
        max_length=10_000,
        description="All aliases that there shall be, and the name that each points to; left out: "
        "as they are.",
    )
    dry_run: Flag = Field(False, description="Say what would change, and change nothing.")


class PatchRequest(Body):
    pinned: Flag | None = None
    preload: Flag | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.pinned is None and self.preload is None:
            raise ValueError("nothing to change: send pinned or preload")
        return self


class RollbackRequest(Body):
    version: str | None = Field(
        None,
        max_length=64,
        description="That the name was on, or its first six digits or more; left out: the one "
        "before, and after a rollback the one before what came back.",
    )


class CanaryRequest(Body):
    version: str | None = Field(
        None,
        max_length=64,
        description="As a registration with stage has answered it, or one that the name was on; "
        "left out: the present canary's.",
    )
    share: Number = Field(description="Percent of the requests for the name, 0 to 100.")


class AliasRequest(Body):
    adapter: str = Field(max_length=128, description="The name that the alias points to.")


class AliasAnswer(Answer):
    alias: str
    adapter: str
    before: str | None = Field(description="Where it pointed; null: there was no such alias.")


class AliasList(Answer):
    aliases: dict[str, str] = Field(description="The name that each alias points to.")


class CanaryAnswer(Answer):
    """The version that answers a share of a name's requests."""

    version: str
    share: float = Field(description="Percent of the requests.")
    started: str
    source: str
    served: bool = Field(description="Whether it was checked on the base that is served.")
    residency: str = Field(description="As of an adapter.")
    quarantined_until: str | None


class AdapterAnswer(Answer):
    """What the registry knows of an adapter, and where its factors are now."""

    name: str
    version: str
    method: str
    task: str
    labels: list[str] | None
    ranks: list[int]
    targets: list[str]
    parameters: int
    bytes: int
    sparsity: float | None
    base: str | None
    source: str
    pinned: bool
    served: bool = Field(description="Whether it was checked on the base that is served.")
    created: str
    residency: str = Field(
        description="device, host or disk (also while the object store does not answer); lost: its "
        "bytes are gone, it must be registered again."
    )
    requests: int
    last_used: str | None
    quarantined_until: str | None
    quarantine_reason: str | None
    chat_template: bool = Field(description="Whether conversations are written with its own.")
    generation: dict[str, Any] = Field(
        description="Its own end tokens (end_ids) and defaults for what a request leaves out."
    )
    notes: list[str]
    aliases: list[str] = Field(description="Other names for it.")
    canary: CanaryAnswer | None


class MoveAnswer(AdapterAnswer):
    """The record of a name that has moved."""

    before: str = Field(description="The version that it was on.")


class VersionAnswer(Answer):
    """One time that a name was put on a version."""

    number: int = Field(description="Counts from 1, for each name.")
    version: str
    act: Literal["registered", "replaced", "applied", "rolled_back", "promoted"]
    at: str
    source: str
    bytes: int
    current: bool = Field(description="Whether the name is on this version now.")
    kept: bool = Field(description="Whether the bytes are there, so that it can be gone back to.")
    restores: int | None = Field(description="Of a rollback: the number of what came back.")


class VersionsAnswer(Answer):
    """The history of a name, the newest first."""

    name: str
    kept_versions: int = Field(description="Old versions whose bytes are kept, of each name.")
    versions: list[VersionAnswer]


class AuditAnswer(Answer):
    """What the tensors of an adapter prove, against what its files claim."""

    method: str | None
    parameters: int
    ranks: dict[str, int] = Field(description="By the path of the layer.")
    findings: list[dict[str, str]] = Field(
        description="Each with its severity, subject, claim and proof."
    )
    contradictions: int


class NameChangeAnswer(Answer):
    """What applying does to one name."""

    name: str
    change: Literal["created", "replaced", "pinned", "unpinned", "removed", "unchanged"]
    version: str
    before: str | None = Field(description="The version that the name was on.")
    pinned: bool


class AliasChangeAnswer(Answer):
    """What applying does to one alias."""

    alias: str
    change: Literal["created", "replaced", "removed", "unchanged"]
    adapter: str | None = Field(description="Where it points; null: it goes.")
    before: str | None = Field(description="Where it pointed.")


class ApplyAnswer(Answer):
    applied: bool = Field(description="False: it was a dry run.")
    changes: list[NameChangeAnswer]
    aliases: list[AliasChangeAnswer]


class AdapterList(Answer):
    adapters: list[AdapterAnswer]
    total: int
    offset: int
    limit: int


class KeyLimits(Answer):
    """Quotas of a key, or what it has used of them; of quotas null where there is none."""

    requests_per_minute: int | None
    requests_per_day: int | None
    tokens_per_minute: int | None
    tokens_per_day: int | None


class KeyAnswer(Answer):
    """A key, without the key itself."""

    name: str
    admin: bool
    metrics: bool
    adapters: list[str] = Field(description="Patterns of the names that it may ask for.")
    expires: str | None
    expired: bool
    limits: KeyLimits
    used: KeyLimits = Field(description="Of this minute and of this day, in UTC.")
    prompt_tokens: int = Field(description="Of this day, as they were read.")
    generated_tokens: int
    last_used: str | None


class KeyDay(Answer):
    """What a key used on one day."""

    day: str
    key: str
    requests: int
    prompt_tokens: int
    generated_tokens: int


class KeyList(Answer):
    """The keys, what they used, and why the keys file is not used as it is now."""

    keys: list[KeyAnswer]
    days: list[KeyDay]
    fault: str | None
