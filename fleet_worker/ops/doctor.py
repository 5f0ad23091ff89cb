"""`fleet-worker doctor`: what may be wrong with this host, its broker, its MLX servers and its fleet, and a remedy."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from urllib.parse import urlsplit

from fleet_worker.broker.app import create_app
from fleet_worker.config_file import config_path, nearest
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.parent_pipe import NODE_LOCK, PARENT_PIPE
from fleet_worker.ops.broker_checks import broker, clock, connected
from fleet_worker.ops.findings import Finding, at_once
from fleet_worker.ops.server_checks import WITHIN as INSTANCES_WITHIN
from fleet_worker.ops.server_checks import instances
from fleet_worker.settings import Settings

WITHIN = INSTANCES_WITHIN + 1
"""Seconds for everything."""
OPEN_FILES = 1024
READ_ELSEWHERE = {"FLEET_CONFIG", PARENT_PIPE, NODE_LOCK, "FLEET_BROKER_PASSWORD", "FLEET_BROKER_ADDRESS"}
"""Variables that are no settings; the last two are those of docker/compose.yaml."""
SHOWN_NODES = 20


def examine() -> list[Finding]:
    """Return all findings, in the order of `CHECKS`. If the configuration cannot be used, that is the first of them."""
    try:
        settings = Settings()
    except ConfigurationError as error:
        unusable = Finding("error", "configuration", error.message, "correct it: nothing starts with it")
        return [unusable, *_examined(ALWAYS, None)]
    return _examined(CHECKS, settings)


def _examined(checks: Sequence[Callable[..., Sequence[Finding]]], settings: Settings | None) -> list[Finding]:
    return at_once({check.__name__.replace("_", " "): partial(check, settings) for check in checks}, WITHIN)


def configuration(settings: Settings) -> list[Finding]:
    path = config_path()
    serving = [name for name, instance in settings.instances.items() if instance.opted_in]
    source = f"read from {path}" if path else "FLEET_CONFIG is not set: from variables and defaults"
    findings = [Finding("ok", "configuration", f"{source}; instances: {', '.join(serving) or 'none'}")]
    if not serving:
        advice = (
            "fine for a router; on a mini set fleet = { enabled = true, respond_to_requests = true } for an instance"
        )
        findings.append(Finding("warning", "configuration", "no instance has opted in: no node can start", advice))
    findings.extend(_unread(name) for name in sorted(os.environ) if _is_unread(name))
    if path and path.stat().st_mode & 0o004 and any(secret in path.read_text("utf-8") for secret in _secrets(settings)):
        found = f"{path} holds a key or a password, and everybody on this host may read it"
        findings.append(Finding("warning", "configuration", found, f"chmod o-r {path}"))
    return findings


def _is_unread(name: str) -> bool:
    """Is it a FLEET_* variable that nothing reads? (What is wrong behind a __ has been refused as any unknown key.)"""
    group = name.upper().partition("__")[0]
    return group.startswith("FLEET_") and group not in {*_variables(), *READ_ELSEWHERE}


def _unread(name: str) -> Finding:
    found = f"the variable {name} is not read{nearest(name.upper(), _variables())}"
    return Finding("warning", "configuration", found, "correct its name, or leave it out")


def _variables() -> list[str]:
    return [f"FLEET_{field.upper()}" for field in Settings.model_fields]


def _secrets(settings: Settings) -> list[str]:
    keys = [instance.api_key.get_secret_value() for instance in settings.instances.values() if instance.api_key]
    return [secret for secret in (*keys, urlsplit(settings.broker_url).password) if secret]


def versions(_: object) -> list[Finding]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("fleet-worker", "celery", "kombu", "redis", "httpx"))
    return [Finding("ok", "versions", f"Python {platform.python_version()}, {packages}")]


def open_files(_: object) -> list[Finding]:
    limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return [Finding("ok", "open files", "without a limit")]
    found = f"a process that is started here may have {limit} of them"
    if limit >= OPEN_FILES:
        return [Finding("ok", "open files", found)]
    advice = (
        "ulimit -n 4096 where a node is started; launchd: NumberOfFiles of SoftResourceLimits; systemd: LimitNOFILE"
    )
    return [Finding("warning", "open files", found, advice)]


def sleep(_: object) -> list[Finding]:
    """Macs only: it is they who fall asleep, and have `pmset`."""
    pmset = shutil.which("pmset")
    if not pmset:
        return []
    said = subprocess.run([pmset, "-g"], capture_output=True, timeout=5, check=False)  # noqa: S603 - no input in it
    minutes = sleep_minutes(said.stdout.decode(errors="replace"))
    if minutes == 0:
        return [Finding("ok", "sleep", "this machine does not go to sleep")]
    found = "cannot be told from pmset -g" if minutes is None else f"this machine goes to sleep after {minutes} min"
    return [Finding("warning", "sleep", found, "sudo pmset -a sleep 0: a mini that sleeps loses its requests")]


def sleep_minutes(pmset: str) -> int | None:
    """Return after how many idle minutes a Mac sleeps by the output of `pmset -g`: 0 for never, None if it is not said.

    What prevents it now, `1 (sleep prevented by caffeinate)`, does not count: it may end.
    """
    if re.search(r"^\s*SleepDisabled\s+1\s*$", pmset, re.MULTILINE):
        return 0
    settings = re.findall(r"^\s*sleep\s+(\d+)\b", pmset, re.MULTILINE)
    return max(map(int, settings), default=None)


def fleet(settings: Settings) -> list[Finding]:
    with connected(settings) as connection:
        replies = create_app(settings).control.ping(timeout=2.0, connection=connection)
    expected = [f"{name}@{settings.host}" for name, instance in settings.instances.items() if instance.opted_in]
    return census([name for reply in replies for name in reply], expected)


def census(answers: Sequence[str], expected: Sequence[str] = ()) -> list[Finding]:
    """Judge by the names of all nodes that have answered, and of those that this host is to have."""
    if not answers:
        advice = "start one: fleet-worker worker; if some run, compare their broker_url with the one of this host"
        return [Finding("warning", "fleet", "no node answers", advice)]
    names = sorted(set(answers))
    shown = ", ".join(names[:SHOWN_NODES]) + (", ..." if len(names) > SHOWN_NODES else "")
    missing = [name for name in expected if name not in names]
    see = "see the log of fleet-worker up: it may wait for its MLX server, have ended, be frozen, or have another name"
    advice = "stop all but one, or give each host a name of its own (host, or -n NAME@HOST)"
    return [
        Finding("ok", "fleet", f"nodes that answer: {len(names)} ({shown})"),
        *([Finding("warning", "fleet", f"no answer from this host's {', '.join(missing)}", see)] if missing else ()),
        # Only on Redis: RabbitMQ lets no second one start.
        *(
            Finding("error", "fleet", f"{count} nodes are called {name}", advice)
            for name, count in Counter(answers).items()
            if count > 1
        ),
    ]


CHECKS: tuple[Callable[[Settings], Sequence[Finding]], ...] = (
    configuration,
    broker,
    clock,
    instances,
    versions,
    open_files,
    sleep,
    fleet,
)
"""In reading order; all of them run at the same time."""
ALWAYS = (versions, open_files, sleep)
"""Those that need no configuration."""
