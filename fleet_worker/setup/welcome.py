"""What `quickstart` prints when the fleet answers: its URL, a key, lines to paste, and how the next Mac joins."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import click
import httpx
import psutil

from fleet_worker import config_file
from fleet_worker.demo.lines_to_paste import line_to_embed, lines_to_paste
from fleet_worker.errors import FleetError
from fleet_worker.host.file_lock import holder
from fleet_worker.host.up_socket import lock_path
from fleet_worker.mlx.offering import embeds
from fleet_worker.settings import Settings
from fleet_worker.setup.invite import invite, join_line, validity
from fleet_worker.setup.next_steps import command
from fleet_worker.urls import with_host

POLL = 0.5
"""Seconds between two looks at a gateway that is not ready yet."""
PATIENCE = 30.0
"""Seconds after which it is said what is missing."""
OWN_WITHIN = 5.0
"""Seconds to wait for the other models of this host when one of the fleet is ready: what their nodes log at their start
would push the greeting out of sight."""


class Welcome:
    """Waits in a thread beside `up` until the gateway knows a model that is ready, and prints."""

    def __init__(self, settings: Settings, key: str | None) -> None:
        self._settings = settings
        self._key = key
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="welcome", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(5)

    def _run(self) -> None:
        if models := self._wait_for_models():
            _print(self.text(models))

    def _wait_for_models(self) -> list[str]:
        """Return the models that are ready; none if this ended first."""
        own = {model for each in self._settings.instances.values() if each.opted_in for model in each.models}
        waited = since_first = 0.0
        while not (models := ready_models(self._settings)) or (own - set(models) and since_first < OWN_WITHIN):
            if self._ended.wait(POLL):
                return []
            waited += POLL
            since_first += POLL if models else 0.0
            if not models and PATIENCE <= waited < PATIENCE + POLL:
                _print(
                    "fleet-worker: no model is ready yet. A large one takes minutes to load; if it does not come, the "
                    "lines above may say why, or fleet-worker doctor does.\n"
                )
        return models

    def text(self, models: Sequence[str]) -> str:
        url = gateway_url(self._settings)
        parts = [f"The fleet answers, with {', '.join(models[:5])}{' ...' if len(models) > 5 else ''}."]
        parts.append(f"URL   {url}/v1 for OpenAI clients, {url} for Anthropic and Ollama clients")
        if self._key:
            chats = [model for model in models if not embeds(model)]
            lines = lines_to_paste(url, chats[0], self._key) if chats else [line_to_embed(url, models[0], self._key)]
            tried = "In another terminal, try one of these (Python: pip install openai):"
            parts += [f"Key   {self._key}", tried, *lines]
            parts.append(f"Another key: {new_key_line(self._settings)}")
        else:
            parts.append(f"Key   each is shown only when it is made. Another one: {new_key_line(self._settings)}")
        parts += [*self._next_host(), _service_line(), _again_line()]
        return "\n" + "".join(f"{part}\n\n" for part in parts)

    def _next_host(self) -> list[str]:
        """Return the line for the next Mac; nothing if other hosts do not reach this one."""
        if not is_reachable(self._settings):
            return ["This fleet is for this Mac only."]
        try:
            invitation = invite(self._settings)
        except FleetError as error:
            return [f"No other Mac can join now: {error.message}"]
        return [
            f"On the next Mac, after fleet-worker is installed there {validity(invitation)}:",
            join_line(invitation),
        ]


def ready_models(settings: Settings) -> list[str]:
    """Return the models that the gateway of this host has ready; none if it does not answer, or has none."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    try:
        answer = httpx.get(f"{local_url(settings)}/health/readiness", timeout=2, verify=False, trust_env=False)  # noqa: S501
        found = answer.json().get("models", []) if answer.status_code == httpx.codes.OK else []
    except (httpx.HTTPError, ValueError, AttributeError):
        return []
    return [] if not found or _is_of_another(settings) else [str(model) for model in found]


def _is_of_another(settings: Settings) -> bool:
    """Return whether what answers is surely not the gateway of this host's `up`: another fleet may have its port."""
    known = False
    with suppress(psutil.Error, FleetError):
        up = psutil.Process(holder(lock_path(settings.state_dir, settings.host)) or os.getpid())
        for process in (up, *up.children(recursive=True)):
            with suppress(psutil.Error, OSError):
                ports = {each.laddr.port for each in process.net_connections("tcp") if each.laddr}
                if settings.gateway.port in ports:
                    return False
                known = True
    return known


def local_url(settings: Settings) -> str:
    """Return the URL of the gateway for this host."""
    mine = settings.gateway
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(mine.host, mine.host)  # noqa: S104
    return f"http{'s' if mine.cert else ''}://{host}:{mine.port}"


def gateway_url(settings: Settings) -> str:
    """Return the URL of the gateway for its clients, on other hosts, too, if they reach it."""
    url = local_url(settings)
    return with_host(url, settings.up.address) if settings.up.address else url


def is_reachable(settings: Settings) -> bool:
    """Tell whether other hosts can join."""
    return bool(settings.up.address) or not settings.up.broker


def new_key_line(settings: Settings) -> str:
    keys = shlex.quote(str(settings.gateway.keys or "keys.toml"))
    return f"fleet-worker keys new NAME >> {keys} && fleet-worker reload"


def _service_line() -> str:
    install = command("service install", config_file.config_path() or config_file.DEFAULT)
    return f"To have it start by itself when you log in: {install}; at each boot, also without a login: with --system"


def _again_line() -> str:
    again = command("quickstart", config_file.config_path() or config_file.DEFAULT)
    return f"To read this again, without the key, in another terminal: {again}"


def _print(text: str) -> None:
    """Write it in one piece: nodes write to the same output."""
    click.echo(text, nl=False)
    sys.stdout.flush()
