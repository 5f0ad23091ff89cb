"""Settings of the gateway, which serves clients of OpenAI and Anthropic over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from fleet_worker.certificates import check_file
from fleet_worker.instance_settings import Group
from fleet_worker.urls import is_loopback

UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
PemFile = Annotated[Path, AfterValidator(check_file)]


class GatewaySettings(Group):
    """`gateway`."""

    host: str = "127.0.0.1"
    """Address to listen on. Without `keys` it must be one of this host only."""
    port: int = Field(4000, ge=0, le=65535)
    """Port to listen on; 0: any free one."""
    socket: UserPath | None = None
    """Path of a Unix socket to listen on instead."""
    cert: PemFile | None = None
    """PEM file of the certificate, for HTTPS."""
    key: PemFile | None = None
    """PEM file of the private key of `cert`, not encrypted."""
    keys: UserPath | None = None
    """TOML file of the keys of all callers. Without it everybody on this host may call."""
    ledger: UserPath | None = None
    """SQLite file with a row for each request. Default: `ledger.sqlite` in `state_dir`."""
    ledger_days: int = Field(400, ge=1)
    """Number of days for which the ledger keeps a row."""
    reasoning_field: Literal["reasoning_content", "reasoning", "both"] = "reasoning_content"
    """Field of a chat completion that has the thoughts of a model."""
    heartbeat: float = Field(10.0, gt=0)
    """Seconds of silence after which a stream gets a comment, so that no proxy takes it for dead."""
    body_timeout: float = Field(60.0, gt=0)
    """Seconds that a client has to send its request."""
    write_timeout: float = Field(60.0, gt=0)
    """Seconds after which a client that reads nothing of its answer is disconnected."""
    keep_alive: float = Field(75.0, ge=1)
    """Seconds for which an idle connection is kept open."""
    max_connections: int = Field(10_000, ge=1)
    """Number of open connections. More are closed at once."""
    drain_grace: float = Field(30.0, ge=0)
    """Seconds that running requests have to end when the gateway is stopped."""

    @model_validator(mode="after")
    def _usable(self) -> GatewaySettings:
        if (self.cert is None) != (self.key is None):
            raise ValueError("gateway.cert and gateway.key belong together: set both, or none")
        if "/" in self.host:
            raise ValueError("gateway.host must be a name or an address, without http:// and without a port")
        if self.keys is None and self.socket is None and not is_loopback(self.host):
            raise ValueError(
                f"gateway.host {self.host} can be reached from other hosts, and gateway.keys is not set, so everybody "
                "there could use the fleet: make a key with fleet-worker keys new NAME"
            )
        return self
