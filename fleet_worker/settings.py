"""All settings, and the one place that reads the environment and the configuration file.

Sources, strongest first: arguments of `Settings(...)`, `FLEET_*` environment variables (nested names joined by `__`,
as in `FLEET_ROUTER__TIMEOUT=60`), the TOML file that `FLEET_CONFIG` names, the defaults below.

The text under a field is its description (`RouterSettings.model_fields["timeout"].description`), with the unit.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import (
    AfterValidator,
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

from fleet_worker import config_file, urls
from fleet_worker.errors import ConfigurationError

REGISTRY = "registry"
"""The name of the registry node of every host, as in `registry@mini-7`; no instance may have it."""

Capability = Literal["chat", "stream_chat", "embed"]
Server = Literal["auto", "mlx_lm", "vllm_mlx", "mlx_openai", "omni", "openai"]
Features = Annotated[
    dict[str, bool], BeforeValidator(lambda value: dict.fromkeys(value, True) if isinstance(value, list) else value)
]
"""`{tools = true, vision = false}`, or a list of those that are there."""


class _Group(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        populate_by_name=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Model(_Group):
    """One model that an instance serves, under the public name that callers ask for."""

    backend: str | None = None
    """The only string that is ever sent to this server as `model`. Without it, the public name."""
    context_window: int | None = Field(None, gt=0)
    """Tokens of a prompt and its answer together. Published in the registry; the server enforces it."""
    max_output_tokens: int = Field(4096, gt=0)
    """Tokens: the `max_tokens` of a request that names none. Servers default to anything from 512 to 1,000,000."""
    temperature: float = Field(0.7, ge=0, le=2)
    """The `temperature` of a request that names none, without a unit. Servers default to anything from 0.0 to 1.0."""
    dimensions: int | None = Field(None, gt=0)
    """Numbers in an embedding, checked in every reply. A model that has it is an embedding model, whatever its name."""
    starts_in_reasoning: bool = False
    """True if the chat template itself opens `<think>`, so that the output begins with reasoning."""
    chat_template: str | None = Field(None, min_length=1)
    """What mlx_lm.server was started with (a folder, or a name in the local Hugging Face cache), or a Jinja file.

    A server needs it to continue an answer that another server began. It is found without this setting if `backend`
    names the same, or if the server reports a folder.
    """
    features: Features = {}
    """Features of this model, as in `{ tools = true, vision = false }`. They replace what its name suggests."""


class InstanceLimits(_Group):
    """`limits` of an instance."""

    concurrency: int = Field(1, ge=1, le=256)
    """Slots: the number of requests that this instance runs at the same time."""
    embed_batch: int = Field(64, ge=1)
    """Number of texts in one embedding request to the server. A larger one is split."""


class AllowedUse(_Group):
    """`usage` of an instance."""

    inference: bool = True
    """Allow `chat` and `stream_chat`."""
    embedding: bool = True
    """Allow `embed`."""
    image: bool = False
    """Reserved for image generation: nothing reads it yet."""


class OptIn(_Group):
    """`fleet` of an instance. An instance is served only if both switches are on."""

    enabled: bool = False
    """The instance is part of the fleet."""
    respond_to_requests: bool = False
    """The instance takes requests."""
    capabilities: tuple[Capability, ...] = ("chat", "stream_chat", "embed")
    """What it takes requests for, as far as `usage` allows."""


class ServerTimeouts(_Group):
    """`clocks` of an instance: three timeouts for one request, because each detects another fault."""

    connect: float = Field(5.0, gt=0)
    """Seconds for connecting to the server."""
    first_content: float = Field(240.0, gt=0)
    """Seconds until the first token: queueing and prefill. A long prompt on a cold cache takes minutes."""
    gap: float = Field(60.0, gt=0)
    """Seconds between two events after the first token. Must be longer than the prefill of a concurrent request."""

    @model_validator(mode="after")
    def _ordered(self) -> ServerTimeouts:
        if self.gap > self.first_content:
            raise ValueError("clocks.gap must not exceed clocks.first_content")
        return self


class Instance(_Group):
    """One MLX server."""

    base_url: Annotated[str, AfterValidator(urls.server_url)] | None = Field(
        None, validation_alias=AliasChoices("base_url", "api_base", "endpoint", "mlx_api_base")
    )
    """URL of the server. Without it, ports 8000 and 8080 of this host are tried."""
    api_key: SecretStr | None = Field(None, validation_alias=AliasChoices("api_key", "mlx_api_key"))
    """Bearer token for the server. Better set by a variable, as in FLEET_INSTANCES__LOCAL__API_KEY."""
    server: Server = "auto"
    """The software of the server; `auto` asks it."""
    usage: AllowedUse = AllowedUse()
    """What the instance may be used for."""
    limits: InstanceLimits = InstanceLimits()
    """How much it does at the same time."""
    fleet: OptIn = OptIn()
    """Whether it is served, and with what capabilities."""
    clocks: ServerTimeouts = ServerTimeouts()
    """Timeouts of its requests, in seconds."""
    models: dict[str, Model] = {}
    """Its models by public name. Without any, those that the server reports and the two lists below allow."""
    model_whitelist: tuple[str, ...] = ()
    """If not empty, a reported model must contain one of these texts in its name, in any case."""
    model_blacklist: tuple[str, ...] = ()
    """A reported model must contain none of these texts in its name, in any case."""
    features: Features = {}
    """Features of all its models that do not set their own."""

    @property
    def opted_in(self) -> bool:
        return self.fleet.enabled and self.fleet.respond_to_requests

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """The capabilities that its lanes may have: those it opted in for, as far as `usage` allows them."""
        allowed = {"chat": self.usage.inference, "stream_chat": self.usage.inference, "embed": self.usage.embedding}
        return tuple(capability for capability in self.fleet.capabilities if allowed[capability])

    def allows(self, model: str) -> bool:
        """Tell whether the whitelist and the blacklist (substrings, in any case) allow this model to be served."""
        name = model.lower()
        if self.model_whitelist and not any(part.lower() in name for part in self.model_whitelist):
            return False
        return not any(part.lower() in name for part in self.model_blacklist)


class RouterSettings(_Group):
    """`router`."""

    timeout: float = Field(300.0, gt=0)
    """Seconds for a whole request that names no timeout."""
    max_timeout: float = Field(3600.0, gt=0, le=3600)
    """Seconds that a caller may ask for at most."""
    queue_timeout: float = Field(3600.0, gt=0)
    """Seconds that a request may wait for a node, at first and after each interruption. Its `timeout` counts, too."""
    max_attempts: int = Field(3, ge=1, le=10)
    """Number of attempts for one request, if it fails in a way that another node may not."""
    lost_after: float = Field(5.0, ge=2)
    """Seconds without a heartbeat after which a node that runs a request counts as lost. It sends one every second."""
    accept_timeout: float = Field(5.0, ge=1)
    """Seconds after which the router checks a request that no node has accepted, and sends it again if it was lost."""
    max_waiting: int = Field(1000, ge=1)
    """Number of requests that may wait in one lane. The router refuses more."""
    idempotency_ttl: float = Field(300.0, ge=0)
    """Seconds for which the answer to a request with an `idempotency_key` is kept."""
    connect_timeout: float = Field(10.0, gt=0)
    """Seconds to wait for the broker when a request is submitted."""
    reply_expires: float = Field(120.0, ge=1)
    """Seconds after which the broker deletes the reply queue of a router that has gone."""
    max_buffered: int = Field(20_000, ge=1)
    """Number of deltas of one stream that may wait for its reader. Beyond it the stream fails."""

    @model_validator(mode="after")
    def _bounded(self) -> RouterSettings:
        if self.timeout > self.max_timeout:
            raise ValueError("router.timeout must not exceed router.max_timeout")
        return self


class WorkerSettings(_Group):
    """`worker`: the inference nodes of a host."""

    start_timeout: float = Field(60.0, gt=0)
    """Seconds to wait at start for the MLX server to answer."""
    probe_interval: float = Field(0.5, gt=0, le=60)
    """Seconds between two health checks of the MLX server."""
    probe_timeout: float = Field(0.5, gt=0, le=60)
    """Seconds after which an answer is late. The node then takes no new work until there is one."""
    stall_after: float = Field(20.0, gt=0)
    """Seconds without a token, while requests run, after which the node takes no new work."""
    canary: bool = True
    """Send a request for one token, at start and after a failure, to prove that the server works."""
    canary_interval: float = Field(60.0, ge=1)
    """Seconds between two such requests to a server that has failed."""
    models_interval: float = Field(300.0, ge=1)
    """Seconds between two requests for the server's list of models."""
    max_pending: int = Field(10_000, ge=1)
    """Number of reply frames that may wait for the broker. Beyond it the tasks wait, and so do the MLX servers."""
    old_lanes: bool = False
    """Serve also the lanes of version 0.1.0, of models with other characters than a-z, 0-9 and `-` in their names."""
    drain_grace: float = Field(30.0, ge=0)
    """Seconds that running requests have to end when a node is stopped. Then other nodes continue them."""
    abandoned_after: float = Field(18.0, ge=5)
    """Seconds after which a node cancels the requests of a router that is connected and silent, as a frozen one is."""

    @property
    def killed_after(self) -> float:
        """Seconds after which a stopped node is killed: `drain_grace`, and 15 s to publish its last frames."""
        return self.drain_grace + 15.0


class RegistrySettings(_Group):
    """`registry`: the registry node of a host."""

    readiness_interval: float = Field(15.0, gt=0)
    """Seconds between two events about each instance. A router forgets a host after three missing ones."""
    models_interval: float = Field(60.0, gt=0)
    """Seconds between two events about each model. A change is published at once."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Port of 127.0.0.1 for Prometheus metrics. Without it there are none."""


class Settings(_Group, BaseSettings):
    """All settings of a process. Raises `ConfigurationError`, which never shows a value, if one is wrong."""

    model_config = SettingsConfigDict(env_prefix="FLEET_", env_nested_delimiter="__")

    broker_url: Annotated[str, AfterValidator(urls.broker_url)] = Field("redis://127.0.0.1:6379/0", repr=False)
    """URL of the broker. Valkey, Redis: `redis[s]://` or `valkey[s]://`. RabbitMQ: `amqp[s]://`."""
    host: str = Field(default_factory=lambda: as_host(socket.gethostname().split(".")[0]))
    """Name of this host in node names and file names: letters, digits, `-`, `.`, `_`. Default: its host name."""
    state_dir: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        default_factory=lambda: platformdirs.user_state_path("fleet-worker")
    )
    """Folder for lock files and sockets, the same for all processes of a host. Default: the user's state folder."""
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024)
    """Bytes of the largest request, as JSON, images included. The same for nodes and routers."""
    features: Features = {}
    """Features of all models of all instances that do not set their own."""
    router: RouterSettings = RouterSettings()
    """Settings of a router."""
    worker: WorkerSettings = WorkerSettings()
    """Settings of the inference nodes of this host."""
    registry: RegistrySettings = RegistrySettings()
    """Settings of the registry node of this host."""
    instances: dict[str, Instance] = {}
    """The MLX servers of this host by name: letters, digits, `-`, `_`."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(config_file.explain(error, type(self))) from None
        except SettingsError as error:
            raise ConfigurationError(f"configuration: a FLEET_ variable is not JSON: {error}") from None

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *_: Any, **sources: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = InitSettingsSource(settings_cls, config_file.read())
        return sources["init_settings"], sources["env_settings"], file

    @field_validator("host")
    @classmethod
    def _valid_host(cls, host: str) -> str:
        if host != as_host(host):
            raise ValueError("a host is named with letters, digits, '-', '.' and '_' only")
        return host

    @field_validator("instances")
    @classmethod
    def _valid_names(cls, instances: dict[str, Instance]) -> dict[str, Instance]:
        for name in instances:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError("an instance is named with letters, digits, '-' and '_' only")
            if name == REGISTRY:
                raise ValueError(f"'{REGISTRY}' is the name of the registry node: give the instance another name")
        return instances

    def serving(self) -> dict[str, Instance]:
        """Return the instances that have opted in, by name; raises `ConfigurationError` if there is none."""
        serving = {name: instance for name, instance in self.instances.items() if instance.opted_in}
        if not serving:
            path = config_file.config_path()
            unset = "FLEET_CONFIG is not set, so no file was read: export FLEET_CONFIG=~/fleet/worker.toml"
            raise ConfigurationError(
                "no instance has opted in: set fleet = { enabled = true, respond_to_requests = true } for an instance "
                + (f"in {path}" if path else f"in the configuration file; {unset}")
            )
        return serving


def as_host(name: str) -> str:
    """Return a machine's name, which may hold any character, as a valid `host`."""
    valid = re.sub(r"[^\w.-]", "-", name)
    return valid if any(map(str.isalnum, valid)) else "host"
