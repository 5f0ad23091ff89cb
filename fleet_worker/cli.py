"""`fleet-worker`: parse, build settings, call one function of the library, return a named exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from fleet_worker.errors import BrokerUnavailable, ConfigurationError, Expired, FleetError, InvalidRequest
from fleet_worker.settings import Settings

__all__ = ["main"]

EXIT_FAILED = 1
EXIT_USAGE = 64
EXIT_UNAVAILABLE = 69
EXIT_CONFIGURATION = 78
EXIT_INTERRUPTED = 130

_EXAMPLES = """\b
Examples:
  fleet-worker demo                                   the whole thing on this machine
  FLEET_CONFIG=worker.toml fleet-worker worker --instance local
  fleet-worker chat qwen3-14b "Why is the sky blue?"
  git diff | fleet-worker chat qwen3-14b --system "Review this diff." -
  fleet-worker embed all-minilm-l6-v2 "a text" "another"
"""


@click.group(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fleet-worker")
def cli() -> None:
    """Mac minis that run MLX servers, as one inference service.

    The broker and everything else come from the file that FLEET_CONFIG names and from FLEET_* variables,
    as in FLEET_BROKER_URL=redis://broker:6379/0.
    """


@cli.command()
@click.option("--simulated", is_flag=True, help="Talk to a simulated MLX server: for machines without MLX.")
def demo(simulated: bool) -> None:
    """Start a broker, MLX servers with small models and their nodes here, and talk through them."""
    from fleet_worker.demo import run  # needs the extra `demo`

    sys.exit(run(simulated=simulated))


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option("--instance", help="The instance to serve; may be left out if only one has opted in.")
@click.option("--loglevel", default="INFO", show_default=True)
@click.argument("celery_options", nargs=-1, type=click.UNPROCESSED)
def worker(instance: str | None, loglevel: str, celery_options: tuple[str, ...]) -> None:
    """Serve one instance: the same as `celery -A fleet_worker worker -n INSTANCE@%h`.

    Further options are passed on to `celery worker`.
    """
    from fleet_worker.celery import create_app  # the worker's side is imported only where a worker runs
    from fleet_worker.worker import serve_with

    settings = Settings()
    app = create_app(settings)
    serve_with(app, settings)
    name = f"{instance or 'celery'}@{settings.host}"
    app.worker_main(["worker", "-n", name, "--loglevel", loglevel, *celery_options])


@cli.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--system", help="A system message to go first.")
@click.option("--stream/--no-stream", default=True, help="Print the answer as it comes, or when it is whole.")
@click.option("--max-tokens", type=click.IntRange(min=1))
@click.option("--temperature", type=click.FloatRange(0, 2))
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds in all.")
def chat(model: str, prompt: str, system: str | None, stream: bool, **options: Any) -> None:
    """Ask MODEL a PROMPT; `-` reads it from standard input."""
    from fleet_worker.router import Router

    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    given = {name: value for name, value in options.items() if value is not None}
    with Router(Settings()) as router:
        if stream:
            with router.stream_chat(model, messages, **given) as pieces:
                for delta in pieces:
                    click.echo(delta.content or "", nl=False)
            click.echo()
        else:
            click.echo(router.chat(model, messages, **given).content or "")


@cli.command()
@click.argument("model")
@click.argument("texts", nargs=-1, required=True)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds in all.")
def embed(model: str, texts: tuple[str, ...], timeout: float | None) -> None:
    """Embed TEXTS with MODEL: one JSON line each, in their order; `-` reads one text per line of standard input."""
    from fleet_worker.router import Router

    inputs = sys.stdin.read().splitlines() if texts == ("-",) else list(texts)
    with Router(Settings()) as router:
        vectors = router.embed(model, inputs, timeout=timeout).vectors
    for text, vector in zip(inputs, vectors, strict=True):
        click.echo(json.dumps({"input": text, "embedding": vector}, ensure_ascii=False))


def main() -> None:
    """The entry point: every error of ours becomes one line and an exit code."""
    with _errors_explained():
        cli()


@contextmanager
def _errors_explained() -> Iterator[None]:
    try:
        yield
    except FleetError as error:
        click.echo(f"fleet-worker: {error.message}", err=True)
        sys.exit(_exit_code(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _exit_code(error: FleetError) -> int:
    if isinstance(error, ConfigurationError):
        return EXIT_CONFIGURATION
    if isinstance(error, InvalidRequest):
        return EXIT_USAGE
    if isinstance(error, BrokerUnavailable | Expired):
        return EXIT_UNAVAILABLE
    return EXIT_FAILED
