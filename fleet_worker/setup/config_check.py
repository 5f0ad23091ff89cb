"""`fleet-worker config check`: all faults of a configuration, or what would run with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fleet_worker import config_file
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.unserved import unserved
from fleet_worker.host.variables import mistyped
from fleet_worker.redaction import redacted_command, redacted_url
from fleet_worker.settings import Instance, Settings
from fleet_worker.setup.config_sources import variable_of, variables


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What was found: what has to be corrected, what is odd, and what would run. Without secrets."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    would_run: list[tuple[str, str]] = field(default_factory=list)
    """Names and descriptions."""


def check() -> CheckResult:
    """Check the configuration that this process has. Nothing is asked over the network: `doctor` does that."""
    try:
        settings = Settings()
    except ConfigurationError as error:
        return CheckResult(faults=list(_faults(error)))
    return CheckResult([], [*mistyped(settings), *unserved(settings)], list(_would_run(settings)))


def _faults(error: ConfigurationError) -> Iterator[str]:
    """Yield each fault, with the variable that it is in; all others are in the file."""
    message = error.message.removeprefix("configuration: ")
    for place, text in error.metadata.get("faults", [((), message)]):
        variable = variable_of(place)
        yield f"{text} (in the variable {variable})" if variable else text


def _would_run(settings: Settings) -> Iterator[tuple[str, str]]:
    path = config_file.config_path()
    yield "file", str(path.absolute()) if path else "none: --config or FLEET_CONFIG names one"
    if names := variables():
        yield "variables", ", ".join(names)
    yield "broker", redacted_url(settings.broker_url) + (", run by fleet-worker up" if settings.up.broker else "")
    yield "host", settings.host
    serving = {name: each for name, each in settings.instances.items() if each.opted_in}
    for name, instance in serving.items():
        yield f"node {name}@{settings.host}", _described(instance)
    if not serving:
        yield "nodes", "none: fine for a router"
    if settings.up.gateway:
        yield "gateway", f"port {settings.gateway.port} of {settings.gateway.host}, run by fleet-worker up"


def _described(instance: Instance) -> str:
    url = instance.base_url or "the server on port 8000 or 8080"
    server = f"{redacted_command(instance.serve)} at {url}" if instance.serve else url
    models = ", ".join(instance.models) or "the models that it lists"
    slots = instance.limits.concurrency
    return f"{server}; {models}; {', '.join(instance.capabilities) or 'nothing'}; {slots} at the same time"
