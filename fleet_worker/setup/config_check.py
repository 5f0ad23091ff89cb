"""`fleet-worker config check`: all faults of a configuration, or what would run with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from fleet_worker import config_file
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.unserved import unserved
from fleet_worker.host.variables import PREFIX, mistyped
from fleet_worker.redaction import redacted_command, redacted_url
from fleet_worker.settings import Instance, Settings
from fleet_worker.setup.config_faults import all_faults
from fleet_worker.setup.config_sources import names_of_variables, values, variable_of, variables


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
    except ConfigurationError:
        return _check_faulty()
    return CheckResult([], _warnings(settings), list(_would_run(settings)))


def _check_faulty() -> CheckResult:
    try:
        given, not_json = values()
    except ConfigurationError as error:  # the file cannot be read: nothing else is known
        return CheckResult(faults=[error.message])
    unread = [f"{PREFIX}{name.upper()}" for name in not_json]
    names = {name: own for name, own in names_of_variables().items() if name not in unread}
    faults = [f"the variable {name}, or one whose name begins so, is not JSON" for name in unread]
    faults += [_with_variable(text, variable_of(place, names)) for place, text in all_faults(given)]
    return CheckResult(faults, _warnings(_opt_ins(given)))


def _with_variable(text: str, variable: str | None) -> str:
    """Return the text of a fault, with the variable that it is in; all others are in the file."""
    return f"{text} (in the variable {variable})" if variable else text


def _warnings(settings: Settings) -> list[str]:
    return [*mistyped(settings), *unserved(settings)]


def _opt_ins(given: dict[str, Any]) -> Settings:
    """Return settings that know nothing but which instances are served; those with a fault in that are not in it."""
    tables = given.get("instances")
    instances: dict[str, Instance] = {}
    for name, table in tables.items() if isinstance(tables, dict) else ():
        with suppress(ValidationError, TypeError):  # of what is no table
            instances[name] = Instance.model_validate({key: table[key] for key in ("fleet", "usage") if key in table})
    return Settings.model_construct(instances=instances)


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
