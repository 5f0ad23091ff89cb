"""The gateway of the demo: it serves the demo's fleet over HTTP until Ctrl-C."""

from __future__ import annotations

import importlib.util
import signal
import socket
from pathlib import Path

from rich.console import Console

from fleet_worker.demo.children import Children
from fleet_worker.demo.lines_to_paste import lines_to_paste
from fleet_worker.host.child_process import free_port, python
from fleet_worker.host.up.programs import node_command

USUAL_PORT = 4000
READY_WITHIN = 30.0
NEEDS = ("uvicorn", "httptools", "uvloop", "zstandard")


def missing() -> str | None:
    """Return the name of a package that the gateway needs, and that is not installed."""
    return next((name for name in NEEDS if importlib.util.find_spec(name) is None), None)


def start(children: Children, broker_url: str, folder: Path, state_dir: Path) -> str:
    """Start a registry node, which tells what the nodes serve, and a gateway; return the URL of the gateway.

    `folder` has the configuration of each node.
    """
    whole = "\n".join(file.read_text("utf-8") for file in sorted(folder.glob("*.toml")))
    config = folder / "registry.toml"
    config.write_text(whole, "utf-8")
    environment = {"FLEET_BROKER_URL": broker_url, "FLEET_STATE_DIR": str(state_dir)}
    command = node_command("registry@demo")
    registry = children.start("the registry node", command, {**environment, "FLEET_CONFIG": str(config)})
    registry.wait_for("is ready", READY_WITHIN)
    environment["FLEET_GATEWAY__PORT"] = str(_port())
    gateway = children.start("the gateway", python("-P", "-m", "fleet_worker", "gateway"), environment)
    gateway.wait_for("knows the models", READY_WITHIN)
    return f"http://127.0.0.1:{environment['FLEET_GATEWAY__PORT']}"


def serve_until_interrupted(console: Console, url: str, model: str) -> None:
    """Print what can be pasted into another terminal, and wait for a signal, which `Children` raises."""
    console.print(f"\n[bold]The gateway[/] serves OpenAI and Anthropic clients at {url}. In another terminal:\n")
    for line in lines_to_paste(url, model):
        console.print(f"{line}\n", markup=False)
    console.print("Ctrl-C stops everything.")
    while True:
        signal.pause()


def _port() -> int:
    """Return the usual port, or a free one if something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", USUAL_PORT))
        except OSError:
            return free_port()
    return USUAL_PORT
