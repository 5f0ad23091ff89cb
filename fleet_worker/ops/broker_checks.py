"""Checks of the broker: it answers, is configured not to lose work, is protected, and its clock agrees with ours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from redis.exceptions import ResponseError

from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import ANSWER_WITHIN, connect
from fleet_worker.broker.faults import BROKER_ERRORS, place_of, unavailable
from fleet_worker.broker.topology import transport_of
from fleet_worker.errors import BrokerUnavailable
from fleet_worker.host.embedded_broker import folder
from fleet_worker.ops.findings import Finding, Severity
from fleet_worker.ops.rights_checks import rights
from fleet_worker.ops.tls_checks import encryption
from fleet_worker.settings import Settings
from fleet_worker.urls import is_loopback, secure, uses_tls

SLOW = 0.05
"""Seconds; a longer round trip is a warning."""


def broker(settings: Settings) -> list[Finding]:
    transport = transport_of(settings.broker_url)
    ask = {"redis": _ask_redis, "amqp": _ask_rabbitmq}[transport]
    try:
        with connected(settings) as connection:
            found = [*ask(connection, place_of(settings.broker_url)), *rights(connection, transport)]
            return [*found, *exposure(settings), *encryption(settings, connection)]
    except BrokerUnavailable as error:
        advice = of_embedded_broker(settings) if settings.up.broker else error.metadata["advice"]
        return [Finding("error", error.message, advice)]


def of_embedded_broker(settings: Settings) -> str:
    """Return what to do if the broker that `up` runs cannot be used."""
    data = folder(settings) / "appendonlydir"
    return (
        "look at the log of fleet-worker up, which must run; if it says that the broker cannot read its file (a bad "
        f"format), stop it, move {data} away, and start it: what waited is lost then, all else is not"
    )


@contextmanager
def connected(settings: Settings) -> Iterator[Any]:
    """Connect as routers and nodes do, but with a short timeout.

    Raises:
        BrokerUnavailable: the broker cannot be reached, or was lost in the block; `metadata["advice"]` says what to do.
    """
    with create_app(settings).connection_for_write() as connection:
        try:
            yield connect(connection, ANSWER_WITHIN)
        except BROKER_ERRORS as error:
            raise unavailable(settings.broker_url, "cannot be used", error) from None


def _ask_redis(connection: Any, place: str) -> Iterator[Finding]:
    client = connection.default_channel.client
    seconds = _round_trip(client.ping)
    info = _unless_refused(client.info)
    if not info:
        yield reached("Redis or Valkey", place, seconds)
        advice = "allow this user INFO, or check by hand that maxmemory-policy is noeviction and appendonly is yes"
        yield Finding("warning", "its settings cannot be read by this user", advice)
        return
    valkey = info.get("valkey_version")
    yield reached(f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version')}", place, seconds)
    save = _unless_refused(partial(client.config_get, "save")) or {}
    yield from redis_settings(info, save.get("save"))


def _unless_refused(ask: Callable[[], Any]) -> Any:
    """Return None if this user may not use the command, or a hosting provider has disabled it."""
    try:
        return ask()
    except ResponseError:
        return None


def _ask_rabbitmq(connection: Any, place: str) -> Iterator[Finding]:
    seconds = _round_trip(partial(connection.default_channel.basic_qos, 0, 1, False))
    server = connection.connection.server_properties
    yield reached(f"{server.get('product')} {server.get('version')}", place, seconds)


def _round_trip(ask: Callable[[], object]) -> float:
    """Return the median of 5, in seconds."""
    times = []
    for _ in range(5):
        started = time.monotonic()
        ask()
        times.append(time.monotonic() - started)
    return statistics.median(times)


def reached(name: str, place: str, seconds: float) -> Finding:
    found = f"{name} at {place}, round trip {seconds * 1000:.1f} ms"
    if seconds <= SLOW:
        return Finding("ok", found)
    advice = "every request waits for several round trips: move the broker closer, and use cables instead of Wi-Fi"
    return Finding("warning", found, advice)


def redis_settings(info: Mapping[str, Any], save: str | None) -> Iterator[Finding]:
    """Check the settings of Redis or Valkey: `info` is its INFO; `save` is that setting, None if it is unknown."""
    policy = info.get("maxmemory_policy")
    if policy != "noeviction":
        found = f"maxmemory-policy is {policy}: when memory is short, the broker drops waiting work"
        yield Finding("error", found, "CONFIG SET maxmemory-policy noeviction, and set it in its file")
    limit, used = info.get("maxmemory", 0), info.get("used_memory", 0)
    if limit and used > 0.9 * limit:
        found = f"{used / limit:.0%} of its memory is used; when it is full, no request can be sent"
        yield Finding("warning", found, "raise maxmemory, and see fleet-worker status for unserved lanes")
    if not info.get("aof_enabled") and save == "":
        found = "persistence is off: a restart of the broker loses all waiting requests"
        yield Finding("warning", found, "CONFIG SET appendonly yes, and set it in its file")
    if "err" in (info.get("rdb_last_bgsave_status"), info.get("aof_last_write_status")):
        found = "it could not write to its disk, and may refuse all requests because of that"
        yield Finding("error", found, "free space on its disk, and read its log")


def exposure(settings: Settings) -> Iterator[Finding]:
    """Check the protection of a broker that other hosts reach."""
    broker_url = settings.broker_url
    url = urlsplit(broker_url)
    if settings.up.broker and settings.up.address:
        found = "the embedded broker has no TLS: everyone on the network can read requests and replies"
        advice = "run it in a network that you trust; otherwise use a broker of your own, with TLS (docker/README.md)"
        yield Finding("warning", found, advice)
    if is_loopback(url.hostname or "localhost"):
        return
    if not url.password:
        found = "broker_url has no password: everyone on the network can read and send requests"
        advice = "set a password at the broker, and in broker_url: scheme://USER:PASSWORD@..."
        yield Finding("warning", found, advice)
    if not uses_tls(broker_url):
        found = "no TLS: everyone on the network can read requests and replies"
        advice = (
            f"set up TLS at the broker, and start broker_url with {secure(url.scheme)}://; the broker of quickstart "
            "has none: keep it in a network that you trust, or move to a broker of your own (docker/README.md)"
        )
        yield Finding("warning", found, advice)


def clock(settings: Settings, *, now: Callable[[], float] = time.time) -> list[Finding]:
    """Compare the clock of this host with that of the broker. Those of hosts are compared by `doctor.fleet`."""
    if transport_of(settings.broker_url) == "amqp":
        advice = "turn on NTP on every host"
        return [Finding("ok", "not compared: RabbitMQ does not tell the time", advice)]
    with connected(settings) as connection:
        client = connection.default_channel.client
        _, ahead = min(_compare(client, now) for _ in range(5))
    return [agreement(ahead)]


def _compare(client: Any, now: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds of a round trip, and by how many seconds this host was ahead in its middle."""
    before = now()
    seconds, microseconds = client.time()
    after = now()
    return after - before, (before + after) / 2 - (seconds + microseconds / 1_000_000)


def agreement(ahead: float) -> Finding:
    """Judge a clock that is ahead of the broker's by so many seconds."""
    severity: Severity = "error" if abs(ahead) > 2 else "warning" if abs(ahead) > 0.5 else "ok"
    found = f"{abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} the broker"
    if severity == "ok":
        return Finding(severity, found)
    advice = "turn on NTP here and at the broker: if clocks differ, logs cannot be compared, and certificates may fail"
    return Finding(severity, found, advice)
