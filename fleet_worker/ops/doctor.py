"""`fleet-worker doctor`: checks the configuration, this host, the broker, the MLX servers and the fleet."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from urllib.parse import urlsplit

from fleet_worker.broker.app import create_app
from fleet_worker.config_file import config_path
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.variables import mistyped
from fleet_worker.ops.availability_checks import availability
from fleet_worker.ops.broker_checks import broker, clock, connected
from fleet_worker.ops.cache_checks import prompt_caches
from fleet_worker.ops.clocks import ADVICE, clocks_of, described, wrong_clocks
from fleet_worker.ops.findings import Finding, at_once
from fleet_worker.ops.host_checks import boot, open_files, sleep
from fleet_worker.ops.quarantine_checks import unstarted_servers
from fleet_worker.ops.server_checks import WITHIN as INSTANCES_WITHIN
from fleet_worker.ops.server_checks import instances
from fleet_worker.router.router import Router
from fleet_worker.settings import Settings

WITHIN = INSTANCES_WITHIN + 1
"""Seconds for everything."""
SHOWN_NODES = 20  # names; of more nodes, only the number is told


def examine(*, fleet: bool = True) -> list[Finding]:
    """Return all findings in the order of `CHECKS`. If the configuration cannot be used, that is the first one.

    `fleet`: look also for the nodes that should run now.
    """
    try:
        settings = Settings()
    except ConfigurationError as error:
        found = error.message.removeprefix("configuration: ")
        unusable = Finding("error", found, "correct it: nothing starts before", check="configuration")
        return [unusable, *_examined(ALWAYS, None)]
    return _examined(CHECKS if fleet else CHECKS[:-1], settings)


def _examined(checks: Sequence[Callable[..., Iterable[Finding]]], settings: Settings | None) -> list[Finding]:
    return at_once({check.__name__.replace("_", " "): partial(check, settings) for check in checks}, WITHIN)


def configuration(settings: Settings) -> Iterator[Finding]:
    path = config_path()
    serving = [name for name, instance in settings.instances.items() if instance.opted_in]
    source = f"read from {path}" if path else "FLEET_CONFIG is not set: from variables and defaults"
    yield Finding("ok", f"{source}; instances: {', '.join(serving) or 'none'}")
    if not serving:
        advice = (
            "fine for a router; on a mini, set an instance's fleet = { enabled = true, respond_to_requests = true }"
        )
        yield Finding("warning", "no instance has opted in: no node can start", advice)
    yield from (Finding("warning", found, "correct its name, or remove it") for found in mistyped(settings))
    if (
        path
        and path.stat().st_mode & 0o004
        and any(secret in path.read_text("utf-8-sig") for secret in _secrets(settings))
    ):
        found = f"{path} contains a key or a password, and every user of this host can read it"
        yield Finding("warning", found, f"chmod 600 {path}")
    key = settings.broker_key
    if key and key.stat().st_mode & 0o004:
        found = f"{key} is the private key of broker_cert, and every user of this host can read it"
        yield Finding("warning", found, f"chmod 600 {key}")


def _secrets(settings: Settings) -> list[str]:
    keys = [*(instance.api_key for instance in settings.instances.values()), settings.router.affinity_secret]
    shown = [key.get_secret_value() for key in keys if key]
    return [secret for secret in (*shown, urlsplit(settings.broker_url).password) if secret]


def versions(_: object) -> list[Finding]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("fleet-worker", "celery", "kombu", "redis", "httpx"))
    return [Finding("ok", f"Python {platform.python_version()}, {packages}")]


def fleet(settings: Settings) -> list[Finding]:
    with connected(settings) as connection, Router(settings) as router:
        registry = router.registry
        replies = create_app(settings).control.ping(timeout=2.0, connection=connection)
        known = registry.instances()
    expected = [f"{name}@{settings.host}" for name, instance in settings.instances.items() if instance.opted_in]
    found = compare_nodes([name for reply in replies for name in reply], expected)
    wrong = described(wrong_clocks(clocks_of(known)))
    return [
        *found,
        *(Finding("warning", each, ADVICE) for each in wrong),
        *unstarted_servers(known),
        *prompt_caches(known),
    ]


def compare_nodes(answers: Sequence[str], expected: Sequence[str] = ()) -> list[Finding]:
    """Compare the names of all nodes that answered with those that this host should have."""
    if not answers:
        advice = (
            "on a mini, start its nodes: fleet-worker up; if nodes run, compare their broker_url with that of this host"
        )
        return [Finding("warning", "no node answers", advice)]
    counts = Counter(answers)
    names = sorted(counts)
    shown = ", ".join(names[:SHOWN_NODES]) + (", ..." if len(names) > SHOWN_NODES else "")
    missing = [name for name in expected if name not in names]
    see = "read the log of fleet-worker up: it may wait for its MLX server, have ended, be frozen, or have another name"
    advice = "stop all but one, or give each host its own name (host, or -n NAME@HOST)"
    return [
        Finding("ok", f"nodes that answer: {len(names)} ({shown})"),
        *([Finding("warning", f"no answer from this host's {', '.join(missing)}", see)] if missing else ()),
        # Only on Redis: on RabbitMQ a second one cannot start.
        *(Finding("error", f"{n} nodes are called {name}", advice) for name, n in counts.items() if n > 1),
    ]


Check = Callable[[Settings], Iterable[Finding]]
CHECKS: tuple[Check, ...] = (
    configuration,
    broker,
    clock,
    instances,
    availability,
    versions,
    open_files,
    sleep,
    boot,
    fleet,
)
"""In the order of the report. They run in parallel."""
ALWAYS = (versions, open_files, sleep, boot)
"""The checks that need no configuration."""
