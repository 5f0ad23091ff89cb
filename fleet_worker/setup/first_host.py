"""The files of the first host of a fleet: `worker.toml`, and `keys.toml` beside it with a first key."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fleet_worker.config_file import read_toml
from fleet_worker.errors import ConfigurationError
from fleet_worker.gateway.accounts.keys import MOST_BYTES, new_key
from fleet_worker.host.servers.port_owner import is_taken
from fleet_worker.setup import worker_file
from fleet_worker.setup.worker_file import WorkerFile, WorkerInstance

BROKER_PORT, GATEWAY_PORT = 6379, 4000
TRIED_PORTS = 100
SIMULATED = "simulated"
"""The model of the simulated MLX server."""


@dataclass(frozen=True, slots=True)
class FirstHost:
    """What the first host of a fleet runs, and who reaches it."""

    host: str
    address: str = ""
    """Of this host for other hosts; empty: they do not reach it."""
    broker_url: str | None = field(default=None, repr=False)
    """Of a broker of one's own; None: the embedded one."""
    broker_ca: Path | None = None
    instances: Mapping[str, WorkerInstance] = field(default_factory=dict)

    def write(self, path: Path) -> str:
        """Write both files, and return the first key, which is stored nowhere else.

        Raises:
            ConfigurationError: the file exists, or cannot be written, or what would stand in it is not allowed.
        """
        worker_file.check_free(path)
        keys = path.with_name("keys.toml")
        text = self._text(keys)
        worker_file.check_text(text)
        key = _add_key(keys)
        worker_file.write(path, text)
        return key

    def _text(self, keys: Path) -> str:
        port = free_port(BROKER_PORT, everywhere=bool(self.address))
        embedded = f"redis://:{secrets.token_hex(24)}@127.0.0.1:{port}/0"
        return WorkerFile(
            broker_url=self.broker_url or embedded,
            host=self.host,
            broker_ca=self.broker_ca,
            instances=self.instances,
            more=self._sections(keys),
            made_by="fleet-worker quickstart",
        ).text()

    def _sections(self, keys: Path) -> str:
        port = free_port(GATEWAY_PORT, everywhere=bool(self.address))
        broker = "true   # a Valkey server, with its data in the state folder" if not self.broker_url else "false"
        address = f"address = {_quoted(self.address)}   # of this host for others\n" if self.address else ""
        return (
            "# What fleet-worker up runs here besides the nodes.\n"
            f"[up]\nbroker = {broker}\ngateway = true\n{address}\n"
            f"[gateway]\nhost = {_quoted('0.0.0.0' if self.address else '127.0.0.1')}\nport = {port}\n"  # noqa: S104
            f"keys = {_quoted(str(keys))}   # another key: fleet-worker keys new NAME >> {shlex.quote(str(keys))}\n"
        )


def simulated() -> dict[str, WorkerInstance]:
    """Return an instance with a simulated MLX server, which `fleet-worker up` runs."""
    program = [sys.executable, "-P", "-m", "fleet_worker.simulator"]
    options = ["--flavour", "vllm_batched", "--model", SIMULATED, "--token-interval", "0.03"]
    line = f"{shlex.join([*program, *options])} --port {{port}}"
    return {"local": WorkerInstance(serve=line, models={SIMULATED: {"backend": SIMULATED}})}


def free_port(usual: int, *, everywhere: bool) -> int:
    """Return the usual port, or the next one on which nobody listens."""
    ports = range(usual, usual + TRIED_PORTS)
    for port in ports:
        if not is_taken("0.0.0.0" if everywhere else "127.0.0.1", port):  # noqa: S104
            return port
    raise ConfigurationError(f"all ports from {ports[0]} to {ports[-1]} are taken")


def _add_key(path: Path) -> str:
    """Add a key to the file of keys, which only this user may read, and return it."""
    known: Mapping[str, object] = {}
    if path.exists():
        known = read_toml(path, MOST_BYTES, of="gateway.keys").get("keys", {})
    names = ("first", *(f"first-{number}" for number in range(2, len(known) + 3)))
    made = new_key(next(name for name in names if name not in known))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8") as file:
            file.write("\n" * bool(known) + made.table)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from None
    return made.secret


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
