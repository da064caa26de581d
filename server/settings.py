"""Everything that an operator can set, and the only reader of the environment.

Each setting is one field here. It is a flag of ``hira serve`` (``--max-inputs``), a variable
(``HIRA_MAX_INPUTS``) and a key of ``hira.toml`` (``max_inputs``), in that order of precedence.
What nobody knows, or cannot be read, stops the start with one line that says where it came from.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from adapters.modulation.strategy import Strategy
from adapters.registry.remote_place import RemotePlace
from server.options import (
    MIB,
    DecodeSteps,
    Device,
    DType,
    EncodeBatches,
    EngineOptions,
    Quantization,
    TokenizerSource,
)

ENV_PREFIX: Final = "HIRA_"
SETTINGS_FILE: Final = Path("hira.toml")
# Variables with our prefix that name where the settings are, or belong to the client commands.
NOT_SETTINGS: Final = frozenset({"HIRA_CONFIG", "HIRA_URL", "HIRA_KEY"})
HOSTS: Final = ("127.0.0.1", "0.0.0.0", "::")
KEY_BYTES_MIN: Final = 8
GRACE_SPARE_S: Final = 60.0
BUCKET: Final = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/(?!\.\.?(/|$))[\w.-]+)*/?")
ENDPOINT: Final = re.compile(r"https?://[^\s/@?#]+/?")
ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")

LogLevel = Literal["critical", "error", "warning", "info", "debug"]


class SettingFault(NamedTuple):
    """What is wrong with one setting, for a person; ``text`` begins with where it was set."""

    text: str
    found: str | None = None
    expected: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        found = "" if self.found is None else f" (found {self.found})"
        fix = "" if self.fix is None else f"; {self.fix}"
        return self.text + found + fix


class SettingsFault(Exception):
    """The settings cannot be used; the text is one line per fault, for a person."""

    def __init__(self, *faults: SettingFault) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


class AdapterSource(NamedTuple):
    """One ``--adapter NAME=SOURCE``: registered under NAME when the server starts."""

    name: str
    source: str


def _listed(value: object) -> object:
    """``"a, b"`` → ``["a", "b"]``: how a variable holds several values."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _paired(value: object) -> object:
    """``"a=x, b=y"``, ``["a=x", "b=y"]`` or a table → ``{"a": "x", "b": "y"}``."""
    value = _listed(value)
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, list | tuple):
        return value
    pairs: dict[str, str] = {}
    for entry in value:
        name, equals, rest = str(entry).partition("=")
        if not equals or not name.strip() or not rest.strip():
            raise ValueError("expected NAME=VALUE, or several with commas between them")
        if name.strip() in pairs:
            raise ValueError(f"the name {name.strip()!r} is there twice")
        pairs[name.strip()] = rest.strip()
    return pairs


def _reachable_port(port: int) -> int:
    if not 1024 <= port <= 65535:
        raise ValueError("LitServe listens on ports 1024 to 65535 only; put a proxy before it")
    return port


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    for origin in origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin!r} is no origin; expected * or scheme://host[:port], without a path"
            )
    return origins


def _strong(keys: dict[str, SecretStr]) -> dict[str, SecretStr]:
    for name, key in keys.items():
        if len(key.get_secret_value()) < KEY_BYTES_MIN:
            raise ValueError(f"the key {name!r} is shorter than {KEY_BYTES_MIN} characters")
    return keys


def _strong_admin(key: SecretStr | None) -> SecretStr | None:
    if key is not None:
        _strong({"admin": key})
    return key


def _bucket_url(url: str | None) -> str | None:
    if url is not None and not BUCKET.fullmatch(url):
        raise ValueError("expected s3://BUCKET or s3://BUCKET/PREFIX")
    return url


def _plain_url(url: str | None) -> str | None:
    if url is not None and not ENDPOINT.fullmatch(url):
        raise ValueError("expected http(s)://HOST[:PORT], without keys: they are AWS_ACCESS_KEY_ID")
    return url


StringPairs = Annotated[dict[str, str], NoDecode, BeforeValidator(_paired)]
Keys = Annotated[dict[str, SecretStr], NoDecode, BeforeValidator(_paired), AfterValidator(_strong)]
Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_listed)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed), AfterValidator(_origins)]
Positive = Annotated[int, Field(ge=1)]
Bytes = Annotated[ByteSize, Field(ge=0)]


def setting(default: Any, description: str, panel: str) -> Any:
    """A field that every source can set; ``panel`` is its heading in ``hira serve --help``."""
    return Field(default, description=description, json_schema_extra={"panel": panel})


class Settings(BaseSettings):
    """The operator's choices, checked. Frozen; made by `load_settings`."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    # Base model
    base: str | None = setting(None, "Folder or hub id of the base model.", "Base")
    revision: str | None = setting(None, "Revision of a base from the hub.", "Base")
    base_name: str | None = setting(None, "Name of the base under /v1 (default: its own).", "Base")
    quantization: Quantization = setting("nf4", "Storage of the linear layers.", "Base")
    double_quant: bool = setting(True, "Quantize the quantization constants too.", "Base")
    quantize_embeddings: bool = setting(
        False, "Store the token embedding (and a head tied to it) in 4 bits too.", "Base"
    )
    tokenizer: TokenizerSource = setting(
        "file",
        "Whose ids, where tokenizer.json and the class that the configuration names differ.",
        "Base",
    )
    tool_format: Literal["auto", "hermes", "mistral", "llama3_json"] = setting(
        "auto", "How answers write calls of tools; auto: as the chat template shows.", "Base"
    )
    chat_template: Path | None = setting(
        None, "File with a chat template for the base, in place of its own.", "Base"
    )
    dtype: DType = setting("auto", "Compute type.", "Base")
    device: Device = setting("auto", "Where the base runs.", "Base")
    threads: Positive | None = setting(None, "CPU threads of the worker.", "Base")
    modulation: Strategy = setting("auto", "Strategy of the adapted layers.", "Base")

    decode_steps: DecodeSteps = setting(
        "dynamic",
        "How a step of decoding runs: over fixed buffers or not, and launched ahead or not.",
        "Base",
    )
    encode_batches: EncodeBatches = setting(
        "dynamic", "How a batch of texts that are encoded runs: over fixed buffers or not.", "Base"
    )

    deterministic: bool = setting(
        False, "Answer the same in any batch, bit for bit; slower, on a GPU by far.", "Base"
    )

    # Where it listens and keeps its state
    host: str = setting("127.0.0.1", "Address to listen on.", "Server")
    port: Annotated[int, AfterValidator(_reachable_port)] = setting(8000, "Port.", "Server")
    data_dir: Path = setting(Path("hira-data"), "Registry, store and keys.", "Server")
    api_processes: Annotated[int, Field(ge=1, le=64)] = setting(1, "HTTP processes.", "Server")
    http_niceness: Annotated[int, Field(ge=0, le=19)] = setting(
        5, "By how much HTTP processes give way to the worker.", "Server"
    )
    log_level: LogLevel = setting("warning", "Least severity that is logged.", "Server")
    access_log: bool = setting(False, "Log a line for each request.", "Server")
    cors_origins: Origins = setting(
        (), "Origin whose pages may call this server from a browser, or *; repeatable.", "Server"
    )
    log_format: Literal["text", "json"] = setting("text", "A line of the log.", "Server")
    otel_endpoint: str | None = setting(
        None, "URL that takes traces by OTLP over HTTP: http://HOST:4318/v1/traces.", "Server"
    )
    otel_ratio: Annotated[float, Field(ge=0, le=1)] = setting(
        1.0, "Part of the calls that is traced, where they do not say themselves.", "Server"
    )
    audit_log: str | None = setting(
        None, "File of the audit log, stdout, or off (default: DATA_DIR/audit.jsonl).", "Server"
    )
    audit_bytes: Annotated[ByteSize, Field(ge=64 * 1024)] = setting(
        64 * MIB, "Size limit of the audit log with its older files.", "Server"
    )
    drain_s: Annotated[float, Field(ge=0, le=3600)] = setting(
        30.0, "Seconds that running requests get when the server stops.", "Server"
    )

    # Adapters
    adapter: StringPairs = setting(
        {}, "NAME=SOURCE to register at the start; repeatable.", "Adapters"
    )
    default_adapter: str | None = setting(
        None,
        "Adapter that answers under /v1 where no model is named (default: the base).",
        "Adapters",
    )
    source_root: Paths = setting(
        (), "Folder below which admins may name adapters; repeatable.", "Adapters"
    )
    allow_hub: bool = setting(False, "Accept hf:// sources.", "Adapters")
    allow_s3: bool = setting(False, "Accept s3:// sources.", "Adapters")
    registry_url: str | None = setting(None, "SQLAlchemy URL of the registry.", "Adapters")
    kept_versions: Annotated[int, Field(ge=0, le=50)] = setting(
        3, "Old versions of each name whose bytes are kept, to roll back to.", "Adapters"
    )
    store_bytes: Bytes | None = setting(None, "Size limit of the adapter store.", "Adapters")
    store_url: Annotated[str | None, AfterValidator(_bucket_url)] = setting(
        None, "s3://BUCKET/PREFIX of the adapter store (default: a folder).", "Adapters"
    )
    store_endpoint: Annotated[str | None, AfterValidator(_plain_url)] = setting(
        None, "URL of an S3-compatible store that is not Amazon's.", "Adapters"
    )
    store_cache_dir: Path | None = setting(
        None, "Folder of what is used of store_url (default: DATA_DIR/store-cache).", "Adapters"
    )
    store_cache_bytes: Annotated[ByteSize, Field(ge=1 * MIB)] = setting(
        10 * 1024 * MIB, "Size limit of that folder.", "Adapters"
    )
    max_upload_bytes: Bytes = setting(2048 * MIB, "Size limit of one upload.", "Adapters")

    # Budgets of the worker
    slots: Positive = setting(256, "Adapters on the device at once.", "Budgets")
    device_bytes: Bytes = setting(1024 * MIB, "Adapter factors on the device.", "Budgets")
    host_bytes: Bytes = setting(2048 * MIB, "Adapter factors in host memory.", "Budgets")
    folded_bytes: Bytes = setting(256 * MIB, "Cached folded weights.", "Budgets")
    packed_bytes: Bytes = setting(
        16384 * MIB, "Packed files of adapters on disk; 0 makes none.", "Budgets"
    )
    head_bytes: Bytes = setting(256 * MIB, "Task heads on the device, in float32.", "Budgets")
    kv_bytes: Bytes = setting(256 * MIB, "KV cache.", "Budgets")
    grammar_bytes: Bytes = setting(64 * MIB, "Grammars kept compiled.", "Budgets")
    max_batch_tokens: Positive = setting(8192, "Padded tokens of an encode batch.", "Budgets")
    max_batch_rows: Positive = setting(64, "Inputs of an encode batch.", "Budgets")
    max_sequences: Positive = setting(64, "Sequences decoding together.", "Budgets")
    prefill_tokens: Positive | None = setting(None, "Tokens of one generate step.", "Budgets")
    token_ms: Annotated[float, Field(ge=1, le=60000)] | None = setting(
        None, "Milliseconds from token to token beside busier adapters, on average.", "Budgets"
    )
    max_input_tokens: Positive | None = setting(
        None, "Tokens of one input (default: the context of the base).", "Budgets"
    )
    max_image_pixels: Positive = setting(1 << 24, "Pixels of one image as it arrives.", "Budgets")
    max_request_pixels: Positive = setting(
        1 << 26, "Pixels of all images of one request as they arrive.", "Budgets"
    )
    prefix_sharing: bool = setting(False, "Share KV between equal prompt prefixes.", "Budgets")

    # Admission
    max_queue_requests: Positive = setting(2048, "Requests admitted at once.", "Admission")
    max_queue_tokens: Positive = setting(1 << 20, "Tokens admitted at once.", "Admission")
    max_queue_pixel_bytes: Bytes = setting(
        512 * MIB, "Pixels of the images admitted at once, as the base takes them.", "Admission"
    )
    max_adapter_requests: Positive = setting(
        1024, "Requests admitted at once for one adapter.", "Admission"
    )
    max_adapter_tokens: Positive = setting(
        1 << 19, "Tokens admitted at once for one adapter.", "Admission"
    )
    max_inputs: Positive = setting(256, "Inputs of one request.", "Admission")
    max_new_tokens: Positive = setting(4096, "Tokens that one request may generate.", "Admission")
    max_body_bytes: Bytes = setting(8 * MIB, "Size limit of a request body.", "Admission")
    max_pending_body_bytes: Bytes = setting(
        256 * MIB, "Bodies of unanswered requests, in one HTTP process.", "Admission"
    )
    max_header_bytes: Annotated[int, Field(ge=1024, le=1 << 20)] = setting(
        32768, "Size limit of a request's line and headers.", "Admission"
    )
    max_connections: Positive = setting(2048, "Connections held open at once.", "Admission")
    client_timeout_s: Annotated[float, Field(gt=0, le=3600)] = setting(
        30.0,
        "Seconds a client gets to send a head or a body, to read on, or to be idle.",
        "Admission",
    )
    timeout_s: Annotated[float, Field(gt=0, le=86400)] = setting(
        60.0, "Seconds a request may take if it does not say.", "Admission"
    )
    max_timeout_s: Annotated[float, Field(gt=0, le=86400)] = setting(
        600.0, "Most seconds that a request may ask for.", "Admission"
    )

    template_s: Annotated[float, Field(gt=0, le=60)] = setting(
        1.0, "Seconds of processor time that a chat template may take.", "Admission"
    )

    grammar_s: Annotated[float, Field(gt=0, le=60)] = setting(
        2.0, "Seconds of processor time that it may take to check a grammar.", "Admission"
    )
    max_grammar_bytes: Annotated[ByteSize, Field(ge=1, le=16 * MIB)] = setting(
        256 * 1024, "Size limit of a schema, a pattern or a grammar.", "Admission"
    )

    # Faults
    hang_s: Annotated[float, Field(ge=6, le=3600)] = setting(
        30.0, "Seconds without a sign of life after which a process is killed.", "Faults"
    )
    max_step_s: Annotated[float, Field(gt=0, le=86400)] = setting(
        300.0, "Seconds that one step of the engine may take before its worker is killed.", "Faults"
    )
    max_setup_s: Annotated[float, Field(gt=0, le=86400)] = setting(
        900.0, "Seconds that a worker may take to load the base before it is killed.", "Faults"
    )
    quarantine_failures: Positive = setting(
        5, "Failures in a row within a minute that quarantine an adapter.", "Faults"
    )
    quarantine_s: Annotated[float, Field(gt=0, le=86400)] = setting(
        60.0, "Seconds that a quarantine lasts; twice as long each time it is due again.", "Faults"
    )

    # Keys
    admin_key: Annotated[SecretStr | None, AfterValidator(_strong_admin)] = setting(
        None, "Key of the admin calls (default: written to DATA_DIR/admin.key).", "Keys"
    )
    api_keys: Keys = setting(
        {}, "NAME=KEY of those who may infer (default: everybody); repeatable.", "Keys"
    )
    keys_file: Path | None = setting(
        None, "TOML file with keys as hashes, what each may ask, how much and how long.", "Keys"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.host not in HOSTS:
            raise ValueError(
                f"host: LitServe listens on {', '.join(HOSTS)} only, not {self.host!r}; "
                "choose 0.0.0.0 and filter by a firewall or a proxy"
            )
        static = self.decode_steps != "dynamic" or self.encode_batches != "dynamic"
        if self.deterministic and (self.prefix_sharing or static):
            raise ValueError(
                "deterministic: not together with prefix_sharing or other decode_steps or "
                "encode_batches, by which bits depend on what is beside or was before; leave them "
                "off"
            )
        if self.token_ms is not None and self.decode_steps == "ahead":
            raise ValueError(
                "token_ms: not together with decode_steps ahead, whose steps nobody waits for, so "
                "that none can be given to some adapters; leave one of them off"
            )
        if self.store_url is None and (self.store_endpoint or self.store_cache_dir):
            raise ValueError(
                "store_endpoint and store_cache_dir are of store_url, which is not set"
            )
        if self.timeout_s > self.max_timeout_s:
            raise ValueError(
                f"timeout_s: {self.timeout_s:g} exceeds max_timeout_s {self.max_timeout_s:g}"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load_settings` hands over the flags and the file as one init value.
        init = cast(InitSettingsSource, init_settings).init_kwargs
        return (
            InitSettingsSource(settings_cls, dict(init.get("flags", {}))),
            env_settings,
            InitSettingsSource(settings_cls, dict(init.get("file", {}))),
        )

    @property
    def adapters(self) -> tuple[AdapterSource, ...]:
        return tuple(AdapterSource(name, source) for name, source in self.adapter.items())

    @property
    def run_dir(self) -> Path:
        """State of the running processes; made new at every start."""
        return self.data_dir / "run"

    @property
    def store_dir(self) -> Path:
        """Of the bytes of adapters; of those in use, where they are in an object store."""
        if self.store_url is None:
            return self.data_dir / "store"
        return self.store_cache_dir or self.data_dir / "store-cache"

    @property
    def remote_store(self) -> RemotePlace | None:
        """The object store that holds the bytes of adapters; None where a folder does."""
        if self.store_url is None:
            return None
        return RemotePlace(
            url=self.store_url,
            endpoint=self.store_endpoint,
            cache_bytes=int(self.store_cache_bytes),
            least_idle_s=self.grace_s,
        )

    @property
    def grace_s(self) -> float:
        """Seconds after which no request can need the bytes of a version that a name has left."""
        return self.max_timeout_s + GRACE_SPARE_S

    @property
    def metrics_dir(self) -> Path:
        return self.run_dir / "metrics"

    @property
    def database(self) -> str:
        """Where the registry is, as SQLAlchemy names it."""
        return self.registry_url or f"sqlite:///{(self.data_dir / 'registry.sqlite').absolute()}"

    def engine_options(self, base: str) -> EngineOptions:
        """The part that the worker needs, for the base that was chosen."""
        return EngineOptions(
            base=base,
            store_dir=self.store_dir,
            remote_store=self.remote_store,
            cache_dir=self.data_dir / "cache",
            revision=self.revision,
            quantization=self.quantization,
            double_quant=self.double_quant,
            quantize_embeddings=self.quantize_embeddings,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            device=self.device,
            threads=self.threads,
            modulation=self.modulation,
            decode_steps=self.decode_steps,
            encode_batches=self.encode_batches,
            deterministic=self.deterministic,
            slots=self.slots,
            device_bytes=int(self.device_bytes),
            host_bytes=int(self.host_bytes),
            folded_bytes=int(self.folded_bytes),
            packed_bytes=int(self.packed_bytes),
            head_bytes=int(self.head_bytes),
            max_batch_tokens=self.max_batch_tokens,
            max_batch_rows=self.max_batch_rows,
            max_sequences=self.max_sequences,
            prefill_tokens=self.prefill_tokens,
            token_ms=self.token_ms,
            kv_bytes=int(self.kv_bytes),
            grammar_bytes=int(self.grammar_bytes),
            max_input_tokens=self.max_input_tokens,
            max_image_pixels=self.max_image_pixels,
            max_request_pixels=self.max_request_pixels,
            allow_prefix_sharing=self.prefix_sharing,
            quarantine_failures=self.quarantine_failures,
            quarantine_s=self.quarantine_s,
        )


def load_settings(
    flags: Mapping[str, object] | None = None, *, config: Path | None = None
) -> Settings:
    """Read every source and check the whole.

    Args:
        flags: What the command line gave, by field name; None means not given.
        config: The file to read. Without one: HIRA_CONFIG, else hira.toml here if it exists.

    Raises:
        SettingsFault: One line per fault, each with its source and what was expected.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    path, file = _read_file(config)
    unknown = sorted(
        name
        for name in os.environ
        if name.startswith(ENV_PREFIX)
        and name not in NOT_SETTINGS
        and name.removeprefix(ENV_PREFIX).lower() not in Settings.model_fields
    )
    faults = [
        SettingFault(f"{name}: no such setting", fix=_closest(name.removeprefix(ENV_PREFIX)))
        for name in unknown
    ]
    faults += [
        SettingFault(f"{path}: {name}: no such setting", fix=_closest(name))
        for name in file
        if name not in Settings.model_fields
    ]
    if faults:
        raise SettingsFault(*faults)
    try:
        # Not fields: settings_customise_sources takes them apart.
        return Settings(**{"flags": given, "file": file})  # type: ignore[arg-type]
    except ValidationError as error:
        found = [
            _explain_fault(dict(fault), given, path) for fault in error.errors(include_url=False)
        ]
        raise SettingsFault(*found) from None
    except SettingsError as error:
        raise SettingsFault(SettingFault(f"environment: {error}")) from None


def _read_file(config: Path | None) -> tuple[Path, dict[str, Any]]:
    named = config or (Path(os.environ["HIRA_CONFIG"]) if "HIRA_CONFIG" in os.environ else None)
    path = named or SETTINGS_FILE
    if named is None and not path.exists():
        return path, {}
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fault = SettingFault(f"{path}: cannot be read: {error.strerror}")
        raise SettingsFault(fault) from None
    except (ValueError, RecursionError) as error:  # as of numbers of too many digits, and nesting
        raise SettingsFault(SettingFault(f"{path}: not TOML: {error}")) from None


def _explain_fault(fault: dict[str, Any], given: Mapping[str, object], path: Path) -> SettingFault:
    location = fault["loc"]
    text = re.sub(r"^Value error, ", "", str(fault["msg"]))
    if not location:
        return SettingFault(text)
    name = str(location[0])
    if name in given:
        source = f"--{name.replace('_', '-')}"
    elif ENV_PREFIX + name.upper() in {variable.upper() for variable in os.environ}:
        source = ENV_PREFIX + name.upper()
    else:
        source = f"{path}: {name}"
    # A URL may have a password in it.
    secret = "key" in name or fault["type"] == "missing" or "@" in repr(fault["input"])
    return SettingFault(f"{source}: {text}", found=None if secret else repr(fault["input"]))


def _closest(name: str) -> str | None:
    import difflib

    close = difflib.get_close_matches(name.lower(), list(Settings.model_fields), n=1)
    return f"did you mean {close[0]}?" if close else None


def describe_fields() -> Mapping[str, FieldInfo]:
    """Every setting by name: what `hira serve --help` and the documentation list."""
    return Settings.model_fields
