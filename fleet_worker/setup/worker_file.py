"""Writes worker.toml: the configuration of a mini, with comments as a person would write them."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import Item, Table

from fleet_worker.config_file import DEFAULT, config_path
from fleet_worker.errors import ConfigurationError
from fleet_worker.host import private_file
from fleet_worker.settings import Capability, Settings

_OPTED_IN = "{{ enabled = true, respond_to_requests = true, capabilities = {} }}"


@dataclass(frozen=True, slots=True)
class WorkerInstance:
    """One instance: `base_url` of a server that runs, or `serve`, the command line of one that `up` runs."""

    base_url: str | None = None
    serve: str | None = field(default=None, repr=False)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The settings of each model by public name, as in {"qwen3-14b": {"backend": "default_model"}}."""
    concurrency: int = 4
    capabilities: tuple[Capability, ...] = ("chat", "stream_chat")


@dataclass(frozen=True, slots=True)
class WorkerFile:
    """What stands in the file. `more` is the text of other sections, for its end."""

    broker_url: str = field(repr=False)
    host: str | None = None
    broker_ca: Path | None = None
    broker_cert: Path | None = None
    broker_key: Path | None = None
    max_body_bytes: int | None = None
    instances: Mapping[str, WorkerInstance] = field(default_factory=dict)
    more: str = field(default="", repr=False)
    made_by: str = "fleet-worker init"

    def text(self) -> str:
        """Return the TOML, which is read back as these values."""
        file = tomlkit.document()
        file.add(tomlkit.comment(f"This host in its fleet; made by {self.made_by}. Change it as you like."))
        file.add(tomlkit.comment("All settings, with explanations: fleet-worker config example"))
        file.add(tomlkit.nl())
        file.add(tomlkit.comment("The broker of the fleet. The URL may hold a password: keep this file to yourself."))
        file["broker_url"] = _text(self.broker_url)
        if self.broker_ca:
            file["broker_ca"] = _text(str(self.broker_ca))
            file["broker_ca"].comment("the CA that issued the broker's certificate")
        if self.broker_cert:
            file["broker_cert"] = _text(str(self.broker_cert))
        if self.broker_key:
            file["broker_key"] = _text(str(self.broker_key))
        if self.host:
            file["host"] = self.host
            file["host"].comment("name of this host in the fleet, as in local@mini-7")
        if self.max_body_bytes:
            file["max_body_bytes"] = self.max_body_bytes
            file["max_body_bytes"].comment("the same on all hosts of the fleet")
        if self.instances:
            file.add(tomlkit.nl())
            file["instances"] = _instances(self.instances)
        return tomlkit.dumps(file) + (f"\n{self.more.strip()}\n" if self.more else "")


def _table(values: Mapping[str, Any]) -> Table:
    table = tomlkit.table()
    for name, value in values.items():
        table[name] = _text(value) if isinstance(value, str) else value
    return table


def _instances(instances: Mapping[str, WorkerInstance]) -> Table:
    tables = tomlkit.table(is_super_table=True)
    for name, instance in instances.items():
        tables[name] = _instance(instance)
    return tables


def _instance(instance: WorkerInstance) -> Table:
    table = tomlkit.table()
    if instance.serve:
        table.add(tomlkit.comment("The MLX server: fleet-worker up starts it, and again when it ends."))
        table["serve"] = _text(instance.serve)
    if instance.base_url and instance.serve:
        table["base_url"] = _text(instance.base_url)
        table["base_url"].comment("its address")
    elif instance.base_url:
        table.add(tomlkit.comment("The MLX server, which runs already: fleet-worker up does not start it."))
        table["base_url"] = _text(instance.base_url)
    table["limits"] = tomlkit.value(f"{{ concurrency = {instance.concurrency:d} }}")
    table["limits"].comment("requests at the same time")
    table["fleet"] = tomlkit.value(_OPTED_IN.format(json.dumps(instance.capabilities)))
    if instance.models:
        models = tomlkit.table(is_super_table=True)
        for name, settings in instance.models.items():
            models[name] = _table(settings)
        table["models"] = models
    return table


def _text(value: str) -> Item:
    """Return a text as a person would quote it: 'serve "a model"', without a backslash before each quote."""
    as_it_is = re.search(r'["\\]', value) and value.isprintable() and "'" not in value
    return tomlkit.string(value, literal=bool(as_it_is))


def add_instances(path: Path, instances: Mapping[str, WorkerInstance]) -> None:
    """Write these at the end of a file that has none. Raises `ConfigurationError` if that cannot be."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    section = tomlkit.document()
    section["instances"] = _instances(instances)
    write(path, f"{text.rstrip()}\n\n{tomlkit.dumps(section)}", force=True)


def place(output: str | None) -> Path:
    """Return where to write: `output`, else what `--config` or FLEET_CONFIG names, else `DEFAULT`."""
    chosen = Path(output) if output else config_path() or DEFAULT
    return Path(os.path.expanduser(chosen)).absolute()


def check_free(path: Path, *, force: bool = False) -> None:
    """Raise `ConfigurationError` if a file is there already, unless it may be replaced."""
    if os.path.lexists(path) and not force:
        raise ConfigurationError(f"{path} exists already: --force replaces it, --output FILE writes another one")


def check_text(text: str) -> None:
    """Raise `ConfigurationError` if what would be written is no configuration, as by a name with a space."""
    ExplicitSettings(**tomllib.loads(text))


class ExplicitSettings(Settings):
    """Settings from arguments alone: neither the variables of this shell nor its configuration file count."""

    @classmethod
    def settings_customise_sources(cls, *_: Any, **sources: Any) -> Any:
        return (sources["init_settings"],)


def write(path: Path, text: str, *, force: bool = False) -> None:
    """Write a file that only its owner may read, all of it or nothing, and create its folder as one of this
    user only: whoever could write there could put another file in its place.

    Raises:
        ConfigurationError: it exists, unless `force` is given, or it cannot be written.
    """
    check_free(path, force=force)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with private_file.draft(path, text.encode()) as written:
            _put(written, path, force=force)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from None


def _put(written: Path, path: Path, *, force: bool) -> None:
    """Give it its name: by a link, which, unlike a rename, never replaces what another has just put there."""
    if force:
        written.replace(path)
        return
    try:
        os.link(written, path)
    except FileExistsError:
        check_free(path)
    except OSError:  # a file system without links
        written.replace(path)
