"""`fleet-worker demo`: a broker, MLX servers with small models, their nodes, and one conversation through all of it."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fleet_worker.demo_models import chat_model, embedding_model, platform_problem
from fleet_worker.errors import FleetError
from fleet_worker.messages import ChatResponse, EmbedResponse
from fleet_worker.processes import ChildFailed, child, python
from fleet_worker.router import Router
from fleet_worker.settings import Settings
from fleet_worker.testing import embedded_broker, running_node

__all__ = ["run"]

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 69
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

CHAT = "smollm2-135m"
EMBED = "all-minilm-l6-v2"
QUESTION = "What is the capital of France? Answer in one sentence."
SENTENCES = ["The cat sits on the sofa.", "A kitten rests on the couch.", "Interest rates rose again this quarter."]
READY_WITHIN = 120.0


@dataclass(frozen=True, slots=True)
class Server:
    """An MLX server to start: how, and what its instance is called and offers."""

    instance: str
    model: str
    backend: str
    command: list[str]
    port: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def run(*, simulated: bool) -> int:
    """Run the demo and return its exit code, 0 only if every part of it worked. Nothing is left running."""
    console = Console(highlight=False, soft_wrap=True)
    problem = None if simulated else platform_problem()
    if problem:
        console.print(problem)
        return EXIT_UNAVAILABLE
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        with _running_fleet(console, simulated=simulated) as router:
            _converse(console, router)
    except KeyboardInterrupt:
        console.print("\nInterrupted; everything was stopped.")
        return EXIT_INTERRUPTED
    except (FleetError, ChildFailed, OSError) as error:
        console.print(f"\nThe demo failed: {error}", markup=False)
        return EXIT_FAILED
    finally:
        signal.signal(signal.SIGTERM, previous)
    console.print("\nAll of it worked, and everything was stopped again.")
    return 0


def _terminated(*_: Any) -> NoReturn:
    raise SystemExit(EXIT_TERMINATED)


@contextmanager
def _running_fleet(console: Console, *, simulated: bool) -> Iterator[Router]:
    """Start broker, servers and nodes, in the order in which they need each other; stop them the other way round."""
    with ExitStack() as started:
        with _preparing(console) as show:
            show("broker", 0.0)
            broker_url = os.environ.get("FLEET_BROKER_URL") or started.enter_context(embedded_broker())
            servers = _simulated_servers() if simulated else _real_servers(show)
            for server in servers:
                show(f"server {server.model}", None)
                started.enter_context(child(f"the server of {server.model}", server.command, {"HF_HUB_OFFLINE": "1"}))
            for server in servers:
                show(f"node {server.instance}", None)
                started.enter_context(_node(broker_url, server))
        yield started.enter_context(Router(Settings(broker_url=broker_url)))


@contextmanager
def _preparing(console: Console) -> Iterator[Any]:
    """Yield a function that shows what is going on, as `show(text, share_done_or_None)`: bars, or lines in a log."""
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
    chat_port, embed_port = _free_port(), _free_port()
    return [
        Server(
            "chat",
            CHAT,
            "default_model",
            python("-m", "mlx_lm", "server", "--model", str(chat), "--host", "127.0.0.1", "--port", str(chat_port)),
            chat_port,
        ),
        Server(
            "embed",
            EMBED,
            EMBED,
            python(
                "-m", "fleet_worker.embedding_server", "--model", str(embed), "--name", EMBED, "--port", str(embed_port)
            ),
            embed_port,
        ),
    ]


def _simulated_servers() -> list[Server]:
    servers = []
    for instance, model, flavour in (("chat", CHAT, "mlx_lm"), ("embed", EMBED, "vllm_batched")):
        port = _free_port()
        arguments = ("--flavour", flavour, "--model", model, "--port", str(port), "--token-interval", "0.03")
        servers.append(Server(instance, model, model, python("-m", "fleet_worker.simulator", *arguments), port))
    return servers


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _node(broker_url: str, server: Server) -> Iterator[None]:
    capabilities = ["embed"] if server.model == EMBED else ["chat", "stream_chat"]
    with running_node(
        broker_url,
        f"{server.instance}@demo",
        ready_within=READY_WITHIN,
        base_url=server.base_url,
        limits={"concurrency": 2},
        fleet={"enabled": True, "respond_to_requests": True, "capabilities": capabilities},
        models={server.model: {"backend": server.backend}},
    ):
        yield


def _converse(console: Console, router: Router) -> None:
    console.print(f"\n[bold]Stream[/] ({CHAT}): {QUESTION}")
    with router.stream_chat(CHAT, [{"role": "user", "content": QUESTION}], **_SURE) as stream:
        for delta in stream:
            sys.stdout.write(delta.content or "")
            sys.stdout.flush()
    console.print()
    _print_timings(console, stream.response)

    question = "Name one animal that lives in the sea."
    console.print(f"\n[bold]Chat[/] ({CHAT}): {question}")
    reply = router.chat(CHAT, [{"role": "user", "content": question}], **_SURE)
    console.print(reply.content, markup=False)
    _print_timings(console, reply)

    console.print(f"\n[bold]Embed[/] ({EMBED}): {len(SENTENCES)} sentences, cosine similarity of each pair")
    embedding = router.embed(EMBED, SENTENCES, timeout=60)
    vectors = dict(zip(SENTENCES, embedding.vectors, strict=True))
    for one, other in combinations(SENTENCES, 2):
        similarity = sum(a * b for a, b in zip(vectors[one], vectors[other], strict=True))
        console.print(f"  {similarity:+.2f}  {one} | {other}", markup=False)
    _print_timings(console, embedding)


_SURE: dict[str, Any] = {"max_tokens": 48, "temperature": 0.0, "timeout": 120}


def _print_timings(console: Console, reply: ChatResponse | EmbedResponse) -> None:
    timings = reply.timings
    parts = [f"queue wait {timings.queue_wait * 1000:.0f} ms"]
    if timings.ttft is not None:
        parts.append(f"first token {timings.ttft * 1000:.0f} ms")
    if timings.tokens_per_second is not None:
        parts.append(f"{timings.tokens_per_second:.1f} tokens/s")
    parts += [f"{timings.duration:.2f} s in all", f"node {reply.node}"]
    console.print(f"[dim]  {', '.join(parts)}[/]")
