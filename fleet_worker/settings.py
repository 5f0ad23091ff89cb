"""What can be configured, and the one place that reads the environment and the configuration file.

Sources, strongest first: arguments of `Settings(...)`, `FLEET_*` environment variables (nested names joined by
`__`, as in `FLEET_ROUTER__TIMEOUT=60`), the TOML file that `FLEET_CONFIG` names, the defaults below.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import SplitResult, urlsplit

import platformdirs
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from fleet_worker.errors import ConfigurationError

REGISTRY = "registry"
"""What the registry node of every host is called, as in `registry@mini-7`, and so no instance may be."""

Capability = Literal["chat", "stream_chat", "embed"]
Server = Literal["auto", "mlx_lm", "vllm_mlx", "mlx_openai", "omni", "openai"]
Features = Annotated[
    dict[str, bool], BeforeValidator(lambda value: dict.fromkeys(value, True) if isinstance(value, list) else value)
]
"""`{tools = true, vision = false}`, or a list of what is there."""


class _Group(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, populate_by_name=True, allow_inf_nan=False
    )


class Model(_Group):
    """One model that an instance serves, under the public name that callers ask for."""

    backend: str | None = None
    """The one string ever sent to this server as `model`; the public name if not set."""
    context_window: int | None = Field(None, gt=0)
    max_output_tokens: int = Field(4096, gt=0)
    """What `max_tokens` becomes when the caller does not say: servers default to anything from 512 to 1,000,000."""
    temperature: float = Field(0.7, ge=0, le=2)
    """What `temperature` becomes when the caller does not say: servers default to anything from 0.0 to 1.0."""
    dimensions: int | None = Field(None, gt=0)
    """Length of an embedding, checked in every reply if set."""
    starts_in_reasoning: bool = False
    """True if the chat template itself opens `<think>`, so that the output begins inside of it."""
    chat_template: str | None = Field(None, min_length=1)
    """What the server was started with: the folder of the model, or its name in the local Hugging Face cache; or a file
    with its Jinja template. mlx_lm.server needs it to go on with an answer that another server began; it is found by
    itself where `backend` names the same, or the server a folder."""
    features: Features = {}


class Limits(_Group):
    concurrency: int = Field(1, ge=1, le=256)
    """Slots: how many requests this instance runs at the same time."""
    embed_batch: int = Field(64, ge=1)
    """Inputs per request to the server; a larger embedding is split."""


class Usage(_Group):
    inference: bool = True
    embedding: bool = True
    image: bool = False


class Fleet(_Group):
    """A host opts in explicitly; all three are enforced."""

    enabled: bool = False
    respond_to_requests: bool = False
    capabilities: tuple[Capability, ...] = ("chat", "stream_chat", "embed")


class Clocks(_Group):
    """Seconds. Three clocks for one request, because each detects another fault."""

    connect: float = Field(5.0, gt=0)
    first_content: float = Field(240.0, gt=0)
    """Queueing and prefill at the server. A long prompt on a cold cache takes minutes."""
    gap: float = Field(60.0, gt=0)
    """Silence between two events once content flows; must tolerate the prefill of a neighbour."""

    @model_validator(mode="after")
    def _ordered(self) -> Clocks:
        if self.gap > self.first_content:
            raise ValueError("clocks.gap must not exceed clocks.first_content")
        return self


class Instance(_Group):
    """One MLX server."""

    base_url: str | None = Field(
        None, validation_alias=AliasChoices("base_url", "api_base", "endpoint", "mlx_api_base")
    )
    """Without it, the worker looks at ports 8000 and 8080 of this machine."""
    api_key: SecretStr | None = Field(None, validation_alias=AliasChoices("api_key", "mlx_api_key"))
    server: Server = "auto"
    usage: Usage = Usage()
    limits: Limits = Limits()
    fleet: Fleet = Fleet()
    clocks: Clocks = Clocks()
    models: dict[str, Model] = {}
    """Listed models win. With none listed, the worker serves what the server reports and the lists below let pass."""
    model_whitelist: tuple[str, ...] = ()
    model_blacklist: tuple[str, ...] = ()
    features: Features = {}

    @field_validator("base_url")
    @classmethod
    def _without_v1(cls, url: str | None) -> str | None:
        if url is None:
            return None
        url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        parts = _split(url)
        if parts.username or parts.password:
            raise ValueError("must not hold a user or a password: use api_key")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http:// or https:// URL")
        return url

    @property
    def opted_in(self) -> bool:
        return self.fleet.enabled and self.fleet.respond_to_requests

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What its lanes may carry: what it opted in for, as far as its usage allows."""
        allowed = {"chat": self.usage.inference, "stream_chat": self.usage.inference, "embed": self.usage.embedding}
        return tuple(capability for capability in self.fleet.capabilities if allowed[capability])

    def lets_pass(self, model: str) -> bool:
        """Tell whether the whitelist and the blacklist (case-insensitive substrings) let this model be served."""
        name = model.lower()
        if self.model_whitelist and not any(part.lower() in name for part in self.model_whitelist):
            return False
        return not any(part.lower() in name for part in self.model_blacklist)


class RouterSettings(_Group):
    timeout: float = Field(300.0, gt=0)
    """Seconds a request may take in all when the caller does not say."""
    max_timeout: float = Field(3600.0, gt=0, le=3600)
    max_attempts: int = Field(3, ge=1, le=10)
    """How often a request is tried, if it failed in a way that another node may not."""
    lost_after: float = Field(5.0, ge=2)
    """Seconds of silence after which the node that works on a request counts as lost. It says a word every second."""
    accept_timeout: float = Field(5.0, ge=1)
    """Seconds after which a request that no node has taken is looked for, and sent again if its lane is empty."""
    max_waiting: int = Field(1000, ge=1)
    """Requests that may wait in one lane; beyond it new ones are refused."""
    idempotency_ttl: float = Field(300.0, ge=0)
    """Seconds for which the answer to a request with an `idempotency_key` is kept."""
    connect_timeout: float = Field(10.0, gt=0)
    """Seconds to wait for the broker when a request is submitted."""
    reply_expires: float = Field(120.0, ge=1)
    """Seconds after which the broker forgets the reply queue of a router that is gone."""
    max_buffered: int = Field(20_000, ge=1)
    """Deltas that one stream may have waiting for its reader."""

    @model_validator(mode="after")
    def _bounded(self) -> RouterSettings:
        if self.timeout > self.max_timeout:
            raise ValueError("router.timeout must not exceed router.max_timeout")
        return self


class WorkerSettings(_Group):
    start_timeout: float = Field(60.0, gt=0)
    """Seconds to wait at start for the MLX server to answer."""
    probe_interval: float = Field(0.5, gt=0, le=60)
    """Seconds between two looks at the health of the MLX server."""
    probe_timeout: float = Field(0.5, gt=0, le=60)
    """Seconds after which an answer counts as late, and the node takes no new work until there is one."""
    stall_after: float = Field(20.0, gt=0)
    """Seconds without a token, while work is in progress, after which the node takes no more of it."""
    canary: bool = True
    """Prove by a request for one token that the server works, at start and when it had failed."""
    canary_interval: float = Field(60.0, ge=1)
    """Seconds between two requests for one token, by which a server that had failed proves that it works again."""
    models_interval: float = Field(300.0, ge=1)
    """Seconds between two looks at the server's list of models."""
    max_pending: int = Field(10_000, ge=1)
    """Reply frames that may wait for the broker; beyond it the tasks, and so the MLX servers, wait."""
    drain_grace: float = Field(30.0, ge=0)
    """Seconds that running requests have to end when a node is stopped; then other nodes go on with them."""
    abandoned_after: float = Field(18.0, ge=5)
    """Seconds after which the work for a router that no longer listens is stopped."""

    @property
    def killed_after(self) -> float:
        """Seconds after which a stopped node is killed: its requests' grace, and 15 s for its last words."""
        return self.drain_grace + 15.0


class RegistrySettings(_Group):
    """The registry node of a host; intervals are seconds."""

    readiness_interval: float = Field(15.0, gt=0)
    """Between two events about each instance. A router forgets a host that was silent for three of them."""
    models_interval: float = Field(60.0, gt=0)
    """Between two events about each model. What changes is told at once."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Serve Prometheus metrics on this port of 127.0.0.1; not at all if not set."""


class Settings(BaseSettings):
    """All of it. Raises `ConfigurationError`, never showing a value, when something is wrong."""

    model_config = SettingsConfigDict(
        env_prefix="FLEET_", env_nested_delimiter="__", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    broker_url: str = Field("redis://127.0.0.1:6379/0", repr=False)
    host: str = Field(default_factory=lambda: fitting(socket.gethostname().split(".")[0]))
    """It is a part of node names, and of the names of files."""
    state_dir: Path = Field(default_factory=lambda: platformdirs.user_state_path("fleet-worker"))
    """Where the processes of this host find each other; all of them need the same."""
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024)
    """Largest request in bytes of JSON, images included."""
    features: Features = {}
    router: RouterSettings = RouterSettings()
    worker: WorkerSettings = WorkerSettings()
    registry: RegistrySettings = RegistrySettings()
    instances: dict[str, Instance] = {}

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(_explain(error)) from None
        except SettingsError as error:
            raise ConfigurationError(f"configuration: a FLEET_ variable is not JSON: {error}") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, InitSettingsSource(settings_cls, _config_file())

    @field_validator("broker_url")
    @classmethod
    def _known_broker(cls, url: str) -> str:
        if _split(url).scheme not in ("redis", "rediss", "valkey", "valkeys", "amqp", "amqps", "pyamqp"):
            raise ValueError("must begin with redis://, rediss://, valkey://, amqp:// or amqps://")
        if ";" in url:  # kombu's list of brokers to fail over to: it hides only the first password in its logs
            raise ValueError("must name one broker, without ';'")
        _check_database(url)
        return url.replace("valkey", "redis", 1) if url.startswith("valkey") else url

    @field_validator("host")
    @classmethod
    def _usable_host(cls, host: str) -> str:
        if host != fitting(host):
            raise ValueError("a host is named with letters, digits, '-', '.' and '_' only")
        return host

    @field_validator("instances")
    @classmethod
    def _usable_names(cls, instances: dict[str, Instance]) -> dict[str, Instance]:
        for name in instances:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError("an instance is named with letters, digits, '-' and '_' only")
            if name == REGISTRY:
                raise ValueError(f"'{REGISTRY}' is the name of the registry node: call the instance otherwise")
        return instances

    @field_validator("state_dir")
    @classmethod
    def _from_home(cls, folder: Path) -> Path:
        return folder.expanduser()

    def serving(self) -> dict[str, Instance]:
        """Return the instances that this host serves, by name; raises `ConfigurationError` if there is none."""
        serving = {name: instance for name, instance in self.instances.items() if instance.opted_in}
        if not serving:
            raise ConfigurationError(
                "no instance has opted in: set fleet = { enabled = true, respond_to_requests = true } for an instance "
                "in the file that FLEET_CONFIG names"
            )
        return serving


def fitting(host: str) -> str:
    """What the machine calls itself may be anything; this much of it can be a host in node names."""
    name = re.sub(r"[^\w.-]", "-", host)
    return name if any(map(str.isalnum, name)) else "host"


def _check_database(url: str) -> None:
    """Of Redis, as kombu reads it; it would look at it only when it connects, again and again."""
    parts = _split(url)
    if "amqp" not in parts.scheme and not re.fullmatch("/{0,2}[0-9]*", parts.path):
        raise ValueError(
            "must end with the number of a database, as in redis://broker:6379/0 "
            "(in a password / is written %2F, ? is %3F and # is %23)"
        )


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - it is checked when it is read
    except ValueError:  # whose text repeats the password
        raise ValueError("is not a URL, or its port is not a number") from None
    return parts


def config_path() -> Path | None:
    """The configuration file that FLEET_CONFIG names, if it names one."""
    name = os.environ.get("FLEET_CONFIG")
    return Path(name).expanduser() if name else None


def _config_file() -> dict[str, Any]:
    path = config_path()
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"FLEET_CONFIG names {path}, which cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"FLEET_CONFIG names {path}, which is not valid TOML: {error}") from None


def _explain(error: ValidationError) -> str:
    """Say where and why, without the value: it may be a key."""
    faults = [
        f"{'.'.join(map(str, fault['loc'])) or 'settings'}: "
        f"{_unknown(fault['loc']) if fault['type'] == 'extra_forbidden' else fault['msg']}"
        for fault in error.errors(include_input=False, include_url=False, include_context=False)
    ]
    return "configuration: " + "; ".join(faults)


def _unknown(place: tuple[int | str, ...]) -> str:
    """Of a key that is not there, say which it may be meant for."""
    group: Any = Settings
    for part in place[:-1]:
        fields = getattr(group, "model_fields", None)  # otherwise it is a dictionary of groups
        group = fields[part].annotation if fields else get_args(group)[1]
    return f"unknown key{nearest(str(place[-1]), group.model_fields)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Words about what a wrong name may be meant for, if there is anything like it."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f", the nearest that exists is {found[0]}" if found else ""
