"""One settings tree: a YAML file, `OPENLORA_…` environment variables and command-line flags, the later ones winning.

`Settings` is what an operator writes. `RunConfig` is what the launcher makes of it for one run of the server; every
process of that run (the three stubs, engine, gateway) reads it from the run directory, whose path is all they get.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from .access_rule import AccessRule, canonical_adapter, canonical_caller, chain_address
from .adapters.merge_plan import MergeLimits
from .adapters.sources import SourceLimits
from .engine.one_adapter.options import OneAdapterOptions
from .engine.tensorrt_llm_options import TensorrtLlmOptions
from .engine.vllm_options import VllmOptions
from .errors import InvalidArgument
from .validation import first_fault

RUN_DIR_VARIABLE = "OPENLORA_RUN_DIR"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# Of engines that take one adapter per request: what they have in common with the embedded one is set for all of them.
_SHARED = ("dtype", "quantization", "max_model_len", "max_batch", "max_waiting", "max_step_tokens", "max_adapters",
           "max_rank", "prefix_cache", "threads", "staging_dir")  # fmt: skip
# They reserve `max_adapters` times `max_rank` on the device, whatever the adapters' ranks are.
_ONE_ADAPTER_DEFAULTS = {"max_adapters": 8, "max_rank": 64, "max_step_tokens": 8192}


def _options(kind: type[OneAdapterOptions]) -> AfterValidator:
    def check(given: dict[str, Any]) -> dict[str, Any]:
        for name in _SHARED:
            if name in given:
                raise ValueError(f"{name} is set with all engines' settings, as engine.{name}")
        TypeAdapter(kind).validate_python(given)
        return given

    return AfterValidator(check)


class EngineSettings(_Section):
    """Which engine computes, and how much it may take; None = what the engine takes by itself."""

    kind: Literal["torch", "vllm", "tensorrt_llm"] = "torch"
    python: Path | None = None  # interpreter of the engine process; default: this one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto = the checkpoint's
    quantization: Literal["none", "int8", "int8-weight-only"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    max_model_len: int | None = Field(default=None, ge=16)  # tokens of prompt and answer; default: the model's own
    max_batch: int = Field(default=64, ge=1, le=4096)  # requests in one step
    max_step_tokens: int = Field(default=512, ge=16)  # of prompts and decoding together
    kv_cache_tokens: int | None = Field(default=None, ge=64)  # of all requests, and of prefixes that are kept
    max_adapters: int = Field(default=64, ge=1)  # device slots: distinct adapters in one step
    host_adapter_bytes: int | None = Field(default=None, ge=1)  # adapters in host memory; default: a share of it
    max_rank: int = Field(default=128, ge=1)  # of one adapter
    max_waiting: int = Field(default=1024, ge=1)  # requests without a row; one more is refused as OVERLOADED
    prefix_cache: Literal["per_caller", "shared", "off"] = "per_caller"  # shared: timing tells of others' prompts
    prefill_stretch: float = Field(default=1.9, gt=1.0, le=100.0)  # how much longer prompts may make a decoding step
    hang_seconds: float = Field(default=30.0, gt=0)  # no step for so long with work queued: killed and restarted
    vllm: Annotated[dict[str, Any], _options(VllmOptions)] = {}
    tensorrt_llm: Annotated[dict[str, Any], _options(TensorrtLlmOptions)] = {}

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_kind(cls, given: Any) -> Any:
        one_adapter = isinstance(given, dict) and given.get("kind", "torch") != "torch"
        return {**_ONE_ADAPTER_DEFAULTS, **given} if one_adapter else given

    @property
    def one_adapter(self) -> bool:
        """Whether the engine takes one adapter per request, so that ranks of several add up."""
        return self.kind != "torch"


class Limits(_Section):
    """What one request may ask for, and how tokens of many streams travel."""

    timeout_ms: int = Field(default=120_000, ge=1)  # of a request that names none
    max_timeout_ms: int = Field(default=600_000, ge=1)
    max_tokens: int = Field(default=65_536, ge=1)  # that a request may ask for
    max_prompt_bytes: int = Field(default=1 << 20, ge=1)  # a second of tokenizing; long contexts may need more
    highest_priority: int = 0  # priorities below are raised to this: lower runs earlier
    coalesce_above: int = Field(default=16, ge=0)  # live streams; with more, tokens of a stream travel together …
    coalesce_ms: int = Field(default=100, ge=0)  # … but never wait longer than this, and the first one not at all


class UsageLimits(_Section):
    """What may be used; None = no limit. 0 = nothing."""

    requests_per_minute: int | None = Field(default=None, ge=0, le=1_000_000)
    tokens_per_day: int | None = Field(default=None, ge=0, lt=2**53)  # of prompts and answers, a UTC day


class AdapterAccess(UsageLimits):
    """The operator's word on one adapter: all of its versions, all of its callers together."""

    access: AccessRule | None = None  # None = what its card says


def _names(canonical: Callable[[str], str]) -> AfterValidator:
    """Of names with an address in them there is one spelling, whichever was written: they are looked up by it."""

    def respelled(given: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in given.items():
            if canonical(name) in found:
                raise ValueError(f"{canonical(name)!r} is there twice: an address is the same in any case")
            found[canonical(name)] = value
        return found

    return AfterValidator(respelled)


class Access(_Section):
    """Who may use what. Keys are given as SHA-256 hex digests, so the file holds no secret."""

    # caller name -> sha256(api key)
    callers: Annotated[dict[str, Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]], _names(canonical_caller)] = {}
    require_key: bool = False  # refuse callers without a known key altogether
    # adapter name -> callers that may use it: a short form of `adapters`
    private: Annotated[dict[str, tuple[str, ...]], _names(canonical_adapter)] = {}
    # adapter name -> who may use it (wins over its card), and how much
    adapters: Annotated[dict[str, AdapterAccess], _names(canonical_adapter)] = {}
    signed_requests: Literal["off", "known", "any"] = "known"  # known: addresses of `openlora keys add` alone
    # caller name -> limits; wins over `openlora keys limit`
    caller_limits: Annotated[dict[str, UsageLimits], _names(canonical_caller)] = {}
    default_limits: UsageLimits = UsageLimits()  # of each caller, `anonymous` included, that has none of its own

    @model_validator(mode="after")
    def _one_rule_each(self) -> Access:
        for name, callers in self.private.items():
            AccessRule(policy="allow-list", callers=callers)  # says so here if it can't be one
            if name in self.adapters and self.adapters[name].access is not None:
                raise ValueError(f"adapter {name!r} is in `private` and has an `access` as well: keep one of them")
        return self


class RestartPolicy(_Section):
    """When a process that died is started again, and when that is given up."""

    attempts: int = Field(default=5, ge=1)  # within `window_seconds`; one more ends the server, loudly
    window_seconds: float = Field(default=300.0, gt=0)
    longest_wait_seconds: float = Field(default=30.0, gt=0)


class AttributionSettings(_Section):
    origin: str = Field(default="localhost/openlora", min_length=1, max_length=128)  # of the receipt log
    witnesses: tuple[str, ...] = ()  # each "URL vkey"; asked for cosignatures, and about a log that was restored


class MetricsSettings(_Section):
    # Adapters with a label of their own on the metrics port, first come, first served; the others share one.
    adapter_labels: int = Field(default=100, ge=0, le=10_000)


class NetworkSettings(_Section):
    """The chain that adapters, terms and parameters come from; without a deployment, none."""

    deployment: Annotated[Path, AfterValidator(Path.absolute)] | None = None  # the deployment file
    allowed_owners: tuple[Annotated[str, AfterValidator(chain_address)], ...] = ()  # whose adapters this node serves
    max_view_age_seconds: float = Field(default=600.0, ge=1.0)  # access by an older view of the chain is refused


class _FromFileAndEnvironment(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="OPENLORA_", env_nested_delimiter="__", extra="forbid", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


class Settings(_FromFileAndEnvironment):
    """What an operator may set. `model` and `adapters` are directories on this machine."""

    model: Path
    adapters: Path | None = None
    state_dir: Path = Path("var")
    host: str = "127.0.0.1"
    http_port: int = Field(default=8000, ge=1, le=65535)
    grpc_port: int = Field(default=8001, ge=1, le=65535)
    metrics_port: int = Field(default=8002, ge=1, le=65535)
    health_port: int = Field(default=8003, ge=1, le=65535)
    gateway_port: int = Field(default=9000, ge=1, le=65535)
    engine: EngineSettings = EngineSettings()
    limits: Limits = Limits()
    access: Access = Access()
    restart: RestartPolicy = RestartPolicy()
    attribution: AttributionSettings = AttributionSettings()
    metrics: MetricsSettings = MetricsSettings()
    network: NetworkSettings = NetworkSettings()
    sources: SourceLimits = SourceLimits()
    merge: MergeLimits = MergeLimits()

    @model_validator(mode="after")
    def _ports_differ(self) -> Settings:
        ports = [self.http_port, self.grpc_port, self.metrics_port, self.health_port, self.gateway_port]
        if len(set(ports)) != len(ports):
            raise ValueError(f"the five ports must differ, got {ports}")
        return self


Section = TypeVar("Section")
Kind = TypeVar("Kind", bound=_FromFileAndEnvironment)


def load_settings(config_file: Path | None = None, **flags: Any) -> Settings:
    """Settings from `config_file` (YAML), the environment and `flags` (None = not given).

    Raises:
        InvalidArgument: naming the setting and what is wrong with it.
    """
    given = _nested({name: value for name, value in flags.items() if value is not None})
    return Settings.model_validate(_read(Settings, config_file, given).model_dump())


def load_section(kind: type[Section], config_file: Path | None = None) -> Section:
    """The one section of `Settings` that is a `kind`, for a command that needs no more; the rest is not looked at.

    Raises:
        InvalidArgument: as `load_settings`.
    """
    name = next(name for name, field in Settings.model_fields.items() if field.annotation is kind)
    body = {"__annotations__": {name: kind}, name: kind(), "model_config": SettingsConfigDict(extra="ignore")}
    return getattr(_read(type("Settings", (_FromFileAndEnvironment,), body), config_file, {}), name)


def _read(kind: type[Kind], config_file: Path | None, given: dict[str, Any]) -> Kind:
    if config_file is not None:
        _check_yaml(config_file)
    source = type("Settings", (kind,), {"model_config": SettingsConfigDict(yaml_file=config_file)})
    try:
        return source(**given)
    except ValidationError as error:
        (place, words), first = first_fault(error), error.errors()[0]
        # A key that was written where its digest belongs is not for logs.
        told = place and first["loc"][0] != "access" and first["type"] != "missing"
        message = words + (f", got {first['input']!r:.80}" if told else "")
        raise InvalidArgument(message, field=place or "settings") from error
    except SettingsError as error:
        raise InvalidArgument(f"{error}: JSON is wanted in this variable", field="settings") from error


def _check_yaml(file: Path) -> None:
    if not file.is_file():
        raise InvalidArgument(f"no such file: {file}", field="config")
    try:
        tree = yaml.safe_load(file.read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidArgument(f"{file} is not YAML: {' '.join(str(error).split())}", field="config") from error
    if tree is not None and not isinstance(tree, dict):
        raise InvalidArgument(f"{file} holds a {type(tree).__name__}, names and values are wanted", field="config")


def _nested(flags: dict[str, Any]) -> dict[str, Any]:
    """`{"engine.dtype": "float32"}` → `{"engine": {"dtype": "float32"}}`."""
    tree: dict[str, Any] = {}
    for name, value in flags.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


class BaseModelFacts(_Section):
    """What the steps before the engine need to know of the base model, read once by the launcher."""

    name: str
    path: Path
    digest: str  # manifest digest, 64 hex digits
    card: dict[str, Any] | None  # openlora.json beside the weights
    eos_token_ids: tuple[int, ...]
    max_model_len: int


class RunConfig(_Section):
    """One run of the server: settings resolved, paths absolute. No secrets: the run key is a file of its own."""

    settings: Settings
    base: BaseModelFacts
    state_dir: Path
    socket_dir: Path
    shm_prefix: str
    launcher_pid: int

    @property
    def catalog_path(self) -> Path:
        return self.state_dir / "catalog.sqlite"

    @property
    def callers_path(self) -> Path:
        return self.state_dir / "callers.sqlite"

    @property
    def quota_path(self) -> Path:
        return self.state_dir / "quota.sqlite"

    @property
    def log_key_path(self) -> Path:
        return self.state_dir / "log.pub"

    @property
    def network_dir(self) -> Path:
        return self.state_dir / "network"

    @property
    def holdings_path(self) -> Path:
        return self.network_dir / "holdings.sqlite"

    @property
    def adapter_cache(self) -> Path:
        return self.state_dir / "adapters"

    @property
    def journal_dir(self) -> Path:
        return self.state_dir / "journal"

    @property
    def run_dir(self) -> Path:
        return self.state_dir / "run"

    @property
    def run_key_path(self) -> Path:
        return self.run_dir / "run.key"

    def socket(self, name: Literal["engine", "fetcher", "control", "status", "holdings"]) -> str:
        return f"ipc://{self.socket_dir / name}"

    @property
    def log_dir(self) -> Path:
        return self.state_dir / "logs"

    def save(self) -> None:
        target = self.run_dir / "run.json"
        target.write_text(self.model_dump_json(indent=1))
        target.chmod(0o600)

    @classmethod
    def load(cls, run_dir: Path | None = None) -> RunConfig:
        """The run that this process belongs to: `run_dir`, or what the launcher put in the environment."""
        given = run_dir or os.environ.get(RUN_DIR_VARIABLE)
        if not given:
            raise InvalidArgument(f"{RUN_DIR_VARIABLE} is not set: start the server with `openlora serve`")
        return cls.model_validate_json((Path(given) / "run.json").read_text())
