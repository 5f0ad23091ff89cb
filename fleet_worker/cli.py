"""`fleet-worker`: each command builds settings, imports and calls one function, and returns a named exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from fleet_worker import exit_codes
from fleet_worker.config_file import config_path
from fleet_worker.errors import BrokerUnavailable, ConfigurationError, Expired, FleetError, InvalidRequest
from fleet_worker.gateway.commands import COMMANDS as OF_GATEWAY
from fleet_worker.ops.commands import COMMANDS as OF_OPERATOR
from fleet_worker.seconds import Seconds
from fleet_worker.setup import config_option
from fleet_worker.setup.commands import COMMANDS as OF_SETUP

if TYPE_CHECKING:
    from fleet_worker.ops.waiting_notice import WaitingNotice
    from fleet_worker.protocol.reply import Delta
    from fleet_worker.settings import Settings

_EXAMPLES = """\b
Examples:
  fleet-worker demo                         a whole fleet on this machine
  fleet-worker quickstart                   a fleet on this Mac, to be joined
  fleet-worker init                         write ~/fleet/worker.toml
  fleet-worker up                           all nodes of this host
  fleet-worker service install              the same, whenever you log in
  fleet-worker worker --config worker.toml --instance local
  fleet-worker chat qwen3-14b "Why is the sky blue?"
  git diff | fleet-worker chat qwen3-14b --system "Review this diff." -
  fleet-worker embed all-minilm-l6-v2 "a text" "another"
  fleet-worker doctor                       what is wrong, and what to do
  fleet-worker status --watch               instances, models, waiting work
  fleet-worker drain local@mini-7 --wait    no new work there, until undrain
"""


_TIMEOUT = click.option("--timeout", type=Seconds(min=0, min_open=True), help="Seconds for the whole request.")
_QUEUE_TIMEOUT = click.option(
    "--queue-timeout", type=Seconds(min=0, min_open=True), help="Seconds that it may wait until a node takes it."
)


def _settings() -> Settings:  # imported here, so that --help loads no pydantic
    from fleet_worker.settings import Settings

    return Settings()


@click.group(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fleet-worker")
def cli() -> None:
    """Mac minis that run MLX servers, as one inference service.

    All settings come from the file that --config or FLEET_CONFIG names, or else from ~/fleet/worker.toml, and from
    FLEET_* variables, as in FLEET_BROKER_URL=redis://broker:6379/0.
    """


for each in (*OF_SETUP, *OF_GATEWAY, *OF_OPERATOR):
    cli.add_command(each)


@cli.command(short_help="Try a whole fleet on this machine.")
@click.option("--simulated", is_flag=True, help="Use simulated MLX servers, on a machine without MLX.")
@click.option("--gateway", "with_gateway", is_flag=True, help="Serve the fleet over HTTP at the end, until Ctrl-C.")
def demo(simulated: bool, with_gateway: bool) -> None:
    """Start a broker, two MLX servers with small models and their nodes here, and use them once."""
    try:
        from fleet_worker.demo.run import run

        sys.exit(run(simulated=simulated, with_gateway=with_gateway))
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"the demo needs {error.name}: in a checkout, pip install '.[demo]'") from None


@cli.command(short_help="Serve one instance.", context_settings={"ignore_unknown_options": True})
@click.option("--instance", help="The instance to serve. Not needed if only one has opted in.")
@click.option("--loglevel", default="INFO", show_default=True)
@click.argument("celery_options", nargs=-1, type=click.UNPROCESSED)
def worker(instance: str | None, loglevel: str, celery_options: tuple[str, ...]) -> None:
    """Serve one instance: the same as `celery -A fleet_worker worker -n INSTANCE@%h`.

    All other options are passed to `celery worker`.
    """
    from celery.bin.celery import celery

    name = f"{instance or 'celery'}@{_settings().host}"
    arguments = ["-A", "fleet_worker", "worker", "-n", name, "--loglevel", loglevel, *celery_options]
    sys.exit(celery.main(arguments, prog_name="celery", standalone_mode=False))


@cli.command(short_help="Run all nodes of this host.")
def up() -> None:
    """Run a node for every instance of this host that has opted in, and its registry node; restart what ends.

    SIGTERM and Ctrl-C let running requests end. A second one kills the nodes. SIGHUP reads the configuration again.
    """
    from fleet_worker.host.file_lock import Held
    from fleet_worker.setup.foreground import run_up

    try:
        sys.exit(run_up(_settings()))
    except Held as error:
        running = f"fleet-worker: fleet-worker up runs already on this host, pid {error.pid or 'unknown'}"
        click.echo(f"{running}: fleet-worker reload makes it read the configuration again", err=True)
        sys.exit(exit_codes.RESTART)  # launchd and systemd then try again later


@cli.command(short_help="Read the configuration again.")
def reload() -> None:
    """Make the `fleet-worker up` of this host read its configuration again, and tell what that changed.

    The exit code is 69 if no `up` runs on this host, and 78 if the configuration is wrong: then it stays as it was.
    """
    from fleet_worker.host.up_socket import NoUp, ask
    from fleet_worker.protocol.host_messages import Reload

    try:
        done = ask(_settings(), Reload(), within=30.0)  # which refuses a wrong configuration before up reads it
    except NoUp as error:
        click.echo(f"fleet-worker: {error}", err=True)
        sys.exit(exit_codes.UNAVAILABLE)
    if done.error:
        raise ConfigurationError(done.error)
    click.echo(f"The configuration was read again: {done.text or 'nothing has changed'}")


@cli.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--system", help="A system message before the prompt.")
@click.option("--stream/--no-stream", default=True, help="Print the answer as it is generated, or at its end.")
@click.option("--max-tokens", type=click.IntRange(min=1))
@click.option("--temperature", type=click.FloatRange(0, 2))
@_TIMEOUT
@_QUEUE_TIMEOUT
def chat(model: str, prompt: str, system: str | None, stream: bool, **options: Any) -> None:
    """Send PROMPT to MODEL and print the answer. `-` reads the prompt from standard input."""
    from fleet_worker.ops.waiting_notice import WaitingNotice
    from fleet_worker.router.router import Router
    from fleet_worker.terminal import standard_input

    if not (text := standard_input() if prompt == "-" else prompt).strip():
        raise InvalidRequest("the prompt is empty")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    with Router(_settings(), patient=False) as router, WaitingNotice(router, model) as notice:
        if stream:
            with router.stream_chat(model, messages, **options) as deltas:
                _print_stream(deltas, notice)
        else:
            click.echo(router.chat(model, messages, **options).content or "")


def _print_stream(deltas: Iterable[Delta], notice: WaitingNotice) -> None:
    """End the line also if the stream fails, so that the error begins on a new one."""
    started = False
    try:
        for delta in deltas:
            notice.cancel()
            if delta.content:
                click.echo(delta.content, nl=False)
                started = True
    except FleetError:
        if started:
            click.echo()
        raise
    click.echo()


@cli.command()
@click.argument("model")
@click.argument("texts", nargs=-1, required=True)
@_TIMEOUT
@_QUEUE_TIMEOUT
def embed(model: str, texts: tuple[str, ...], **options: Any) -> None:
    """Embed TEXTS with MODEL: one line of JSON for each. `-` reads one text from each line of standard input."""
    from fleet_worker.ops.waiting_notice import WaitingNotice
    from fleet_worker.router.router import Router
    from fleet_worker.terminal import lines, standard_input

    inputs = lines(standard_input()) if texts == ("-",) else list(texts)
    with Router(_settings(), patient=False) as router, WaitingNotice(router, model):
        vectors = router.embed(model, inputs, **options).vectors
    for text, vector in zip(inputs, vectors, strict=True):
        click.echo(json.dumps({"input": text, "embedding": vector}, ensure_ascii=False))


config_option.add_to(cli)


def main() -> None:
    """The entry point: every end of a command becomes an exit code, and every error one line."""
    try:
        sys.exit(cli(standalone_mode=False))
    except FleetError as error:
        click.echo(f"fleet-worker: {error.message}{_hint(error)}", err=True)
        sys.exit(next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), exit_codes.FAILED))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(exit_codes.INTERRUPTED)


_EXIT_CODES = {
    ConfigurationError: exit_codes.CONFIGURATION,
    InvalidRequest: exit_codes.USAGE,
    BrokerUnavailable: exit_codes.UNAVAILABLE,
    Expired: exit_codes.UNAVAILABLE,
}


def _hint(error: FleetError) -> str:
    if not isinstance(error, BrokerUnavailable):
        return ""
    if _up_runs_broker():
        return ": fleet-worker up runs it on this host: start that, or look at its log"
    advice = str(error.metadata.get("advice", "is it running? If it is, correct broker_url"))
    file = config_path() or "the file that --config or FLEET_CONFIG names, which is not set"
    return f": {advice.replace('broker_url', f'broker_url (FLEET_BROKER_URL, or in {file})')}"


def _up_runs_broker() -> bool:
    with suppress(ConfigurationError):
        return _settings().up.broker
    return False
