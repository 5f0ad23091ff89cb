"""`fleet-worker`: parse, build settings, call one function of the library, return a named exit code."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from fleet_worker import exit_codes
from fleet_worker.errors import BrokerUnavailable, ConfigurationError, Expired, FleetError, InvalidRequest
from fleet_worker.protocol.reply import Delta
from fleet_worker.settings import Settings

_EXAMPLES = """\b
Examples:
  fleet-worker demo                                   the whole thing on this machine
  FLEET_CONFIG=worker.toml fleet-worker up            all nodes of this host
  FLEET_CONFIG=worker.toml fleet-worker worker --instance local
  FLEET_CONFIG=worker.toml fleet-worker service install
  fleet-worker chat qwen3-14b "Why is the sky blue?"
  git diff | fleet-worker chat qwen3-14b --system "Review this diff." -
  fleet-worker embed all-minilm-l6-v2 "a text" "another"
  FLEET_CONFIG=worker.toml fleet-worker doctor        what may be wrong here, and what to do
  fleet-worker status --watch                         what there is, and what waits
  fleet-worker drain local@mini-7 --wait              no more work for this one, until undrain
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
    try:
        from fleet_worker.demo.run import run

        sys.exit(run(simulated=simulated))
    except ModuleNotFoundError as error:
        message = f"the demo needs more packages ({error.name}): pip install 'fleet-worker[demo]'"
        raise ConfigurationError(message) from None


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option("--instance", help="The instance to serve; may be left out if only one has opted in.")
@click.option("--loglevel", default="INFO", show_default=True)
@click.argument("celery_options", nargs=-1, type=click.UNPROCESSED)
def worker(instance: str | None, loglevel: str, celery_options: tuple[str, ...]) -> None:
    """Serve one instance: the same as `celery -A fleet_worker worker -n INSTANCE@%h`.

    Further options are passed on to `celery worker`.
    """
    from celery.bin.celery import celery

    name = f"{instance or 'celery'}@{Settings().host}"
    arguments = ["-A", "fleet_worker", "worker", "-n", name, "--loglevel", loglevel, *celery_options]
    sys.exit(celery.main(arguments, prog_name="celery", standalone_mode=False))


@cli.group("service")
def service_commands() -> None:
    """Keep `fleet-worker up` running, as a service of this user: of launchd on macOS, of systemd on Linux."""


@service_commands.command("install")
@click.option("--print", "only_print", is_flag=True, help="Print the file that would be written, and do no more.")
def install_service(only_print: bool) -> None:
    """Write the service's file and start it; do it again to restart it.

    The file that FLEET_CONFIG names has to say everything: the service gets no other variable of this shell.
    """
    from fleet_worker.host.service import configuration, service_manager

    config, left_out, ends_within = configuration()
    manager = service_manager(ends_within)
    text = manager.text(config)
    if left_out:
        advice = f"say it in {config} instead, and chmod 600 that file"
        click.echo(f"fleet-worker: the service does not get {', '.join(left_out)}: {advice}", err=True)
    problem = None if only_print else manager.problem()
    if only_print or problem:
        click.echo(text, nl=False)
        if problem:
            click.echo(f"fleet-worker: nothing was installed: {problem}", err=True)
        click.echo(f"fleet-worker: the text above belongs in {manager.file}", err=True)
        sys.exit(exit_codes.UNAVAILABLE if problem else 0)
    manager.install(text)
    click.echo("\n".join([f"Installed and started: {manager.file}", *manager.hints]))


@service_commands.command("uninstall")
def uninstall_service() -> None:
    """End the service, as by SIGTERM, and remove its file."""
    from fleet_worker.host.service import service_manager

    manager = service_manager()
    problem = manager.problem()
    if problem and manager.file.exists():
        click.echo(f"fleet-worker: {manager.file} is still there: {problem}", err=True)
        sys.exit(exit_codes.UNAVAILABLE)
    removed = not problem and manager.uninstall()
    click.echo(f"Ended and removed: {manager.file}" if removed else "The service is not installed.")


@service_commands.command("status")
def service_status() -> None:
    """Say whether the service runs: exit code 0 if it does, 3 if not, 69 if that cannot be known."""
    from fleet_worker.host.service import service_manager

    manager = service_manager()
    if problem := manager.problem():
        click.echo(f"fleet-worker: {problem}", err=True)
        sys.exit(exit_codes.UNAVAILABLE)
    running, words = manager.status()
    click.echo(words)
    sys.exit(0 if running else exit_codes.NOT_RUNNING)


@cli.command()
def up() -> None:
    """Run a node for every instance of this host that has opted in, and keep them running.

    SIGTERM and Ctrl-C let running requests end, a second one does not. SIGHUP reads the configuration again.
    """
    from fleet_worker.host.file_lock import Held
    from fleet_worker.host.supervisor import Supervisor

    settings = Settings()
    form = "[%(asctime)s: %(levelname)s/up] %(message)s"  # as that of the nodes, whose lines are between ours
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=form)
    try:
        sys.exit(Supervisor(settings).run())
    except Held as error:
        click.echo(f"fleet-worker: fleet-worker up runs already on this host, pid {error.pid or 'unknown'}", err=True)
        sys.exit(exit_codes.AGAIN)  # whoever starts us, launchd or systemd, is right to try later


@cli.command()
def reload() -> None:
    """Have the `fleet-worker up` of this host read its configuration again."""
    from fleet_worker.host.supervisor import reload_running

    pid = reload_running(Settings())  # a wrong configuration is said here, and disturbs nobody
    if not pid:
        click.echo("fleet-worker: no fleet-worker up runs on this host", err=True)
        sys.exit(exit_codes.UNAVAILABLE)
    click.echo(f"fleet-worker up, pid {pid}, reads its configuration again; its log says what becomes of it")


@cli.command()
@click.argument("nodes", metavar="NODE...", nargs=-1, required=True)
@click.option(
    "--wait",
    "seconds",
    type=click.FloatRange(min=0),
    is_flag=False,
    flag_value=math.inf,  # a word of our own for: as long as the node says
    metavar="[SECONDS]",
    help="Return when nothing runs there any more. What runs has so many seconds, or worker.drain_grace of the node; "
    "then it is handed over to other nodes.",
)
def drain(nodes: tuple[str, ...], seconds: float | None) -> None:
    """Let nodes take no more work until `undrain`, or until they are started again. What runs there goes on.

    NODE is a node, as in local@mini-7, or a host, as in mini-7: all inference nodes there.
    The exit code is 69 if a node does not answer, and 1 if it was waited for and still has work.
    """
    from fleet_worker.ops.drain import drain

    if seconds is not None and math.isnan(seconds):
        raise click.BadParameter("nan is not in the range", param_hint="'--wait'")
    sys.exit(drain(Settings(), nodes, wait=seconds))


@cli.command()
@click.argument("nodes", metavar="NODE...", nargs=-1, required=True)
def undrain(nodes: tuple[str, ...]) -> None:
    """Let drained nodes take work again, as soon as their MLX servers have proved that they work.

    NODE is a node, as in local@mini-7, or a host, as in mini-7. The exit code is 69 if a node does not answer, and 1
    if it is ending.
    """
    from fleet_worker.ops.drain import undrain

    sys.exit(undrain(Settings(), nodes))


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
    from fleet_worker.router.router import Router

    text = _standard_input() if prompt == "-" else prompt
    if not text.strip():
        raise InvalidRequest("the prompt is empty")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    given = {name: value for name, value in options.items() if value is not None}
    with Router(Settings()) as router:
        if stream:
            with router.stream_chat(model, messages, **given) as deltas:
                _print_as_it_comes(deltas)
        else:
            click.echo(router.chat(model, messages, **given).content or "")


def _print_as_it_comes(deltas: Iterable[Delta]) -> None:
    """End the line also when the stream breaks off, so that the error begins a new one."""
    started = False
    try:
        for delta in deltas:
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
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds in all.")
def embed(model: str, texts: tuple[str, ...], timeout: float | None) -> None:
    """Embed TEXTS with MODEL: one JSON line each, in their order; `-` reads one text per line of standard input."""
    from fleet_worker.router.router import Router

    inputs = _lines(_standard_input()) if texts == ("-",) else list(texts)
    with Router(Settings()) as router:
        vectors = router.embed(model, inputs, timeout=timeout).vectors
    for text, vector in zip(inputs, vectors, strict=True):
        click.echo(json.dumps({"input": text, "embedding": vector}, ensure_ascii=False))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print every finding as a line of JSON.")
def doctor(as_json: bool) -> None:
    """Find out what may be wrong here, and say what to do.

    Looks at the configuration, the broker and its clock, the MLX servers, this machine, and the nodes of the fleet.
    The exit code is 0 if all is well, 1 after warnings, 2 after errors, 78 if the configuration cannot be used.
    """
    from fleet_worker.ops.doctor import examine
    from fleet_worker.ops.findings import exit_code, show

    findings = examine()
    show(findings, as_json=as_json)
    sys.exit(exit_code(findings))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: its keys are instances, models, lanes.")
@click.option(
    "--watch",
    "every",
    type=click.FloatRange(min=0.1, max=86_400),
    is_flag=False,
    flag_value=2.0,
    metavar="[SECONDS]",
    help="Go on until Ctrl-C, with a new look every 2 seconds, or as many as you say.",
)
def status(as_json: bool, every: float | None) -> None:
    """Show all instances of the fleet, whether they work, and what waits in which lane.

    The hosts say it themselves: each needs a registry node. A lane in which requests wait that no node takes is
    marked as NOBODY SERVES THIS. The lanes of single nodes are shown if something waits in them.
    """
    from fleet_worker.ops.status import show

    if every is not None and math.isnan(every):
        raise click.BadParameter("nan is not in the range", param_hint="'--watch'")
    show(Settings(), as_json=as_json, every=every)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise InvalidRequest("standard input is not UTF-8 text") from None


def _lines(text: str) -> list[str]:
    """Only at line ends: `str.splitlines` cuts at U+2028 and others too, which are part of a text."""
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def main() -> None:
    """The entry point: whatever ends a command becomes an exit code, and an error one line."""
    with _errors_explained():
        sys.exit(cli(standalone_mode=False))


@contextmanager
def _errors_explained() -> Iterator[None]:
    try:
        yield
    except FleetError as error:
        click.echo(f"fleet-worker: {error.message}{_hint(error)}", err=True)
        sys.exit(_exit_code(error))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(exit_codes.INTERRUPTED)


def _hint(error: FleetError) -> str:
    if not isinstance(error, BrokerUnavailable):
        return ""
    advice = str(error.metadata.get("advice", "is it running? If it is, correct broker_url"))
    return f": {advice.replace('broker_url', 'broker_url (FLEET_BROKER_URL, or in the file that FLEET_CONFIG names)')}"


def _exit_code(error: FleetError) -> int:
    if isinstance(error, ConfigurationError):
        return exit_codes.CONFIGURATION
    if isinstance(error, InvalidRequest):
        return exit_codes.USAGE
    if isinstance(error, BrokerUnavailable | Expired):
        return exit_codes.UNAVAILABLE
    return exit_codes.FAILED
