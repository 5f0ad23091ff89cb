"""Checks of the broker: that it can be used, is set up not to lose work, is protected, and has the same time."""

from __future__ import annotations

import ipaddress
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from redis.exceptions import ResponseError

from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import ANSWER_WITHIN, BROKER_ERRORS, connect, place_of, unavailable
from fleet_worker.broker.topology import transport_of
from fleet_worker.errors import BrokerUnavailable
from fleet_worker.ops.findings import Finding, Severity
from fleet_worker.settings import Settings

SLOW = 0.05
"""Seconds of a round trip."""


def broker(settings: Settings) -> list[Finding]:
    ask = {"redis": _ask_redis, "amqp": _ask_rabbitmq}[transport_of(settings.broker_url)]
    try:
        with connected(settings) as connection:
            return [*ask(connection, place_of(settings.broker_url)), *exposure(settings.broker_url)]
    except BrokerUnavailable as error:
        return [Finding("error", "broker", error.message, error.metadata["advice"])]


@contextmanager
def connected(settings: Settings) -> Iterator[Any]:
    """A connection as routers and nodes have it, but one that gives up soon.

    Raises:
        BrokerUnavailable: there is none, or it broke in the block; `metadata["advice"]` says what to do.
    """
    with create_app(settings).connection_for_write() as connection:
        try:
            yield connect(connection, ANSWER_WITHIN)
        except BROKER_ERRORS as error:
            raise unavailable(settings.broker_url, "cannot be used", error) from None


def _ask_redis(connection: Any, place: str) -> Iterator[Finding]:
    client = connection.default_channel.client
    seconds = _round_trip(client.ping)
    info = _told(client.info)
    if not info:
        yield reached("Redis or Valkey", place, seconds)
        advice = "allow it INFO, or see for yourself that maxmemory-policy is noeviction, and appendonly yes"
        yield Finding("warning", "broker", "it does not tell this user how it is set up", advice)
        return
    valkey = info.get("valkey_version")
    yield reached(f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version')}", place, seconds)
    save = _told(partial(client.config_get, "save")) or {}
    yield from redis_settings(info, save.get("save"))


def _told(ask: Callable[[], Any]) -> Any:
    """None if this user may not ask, or a hosting company has taken the command away."""
    try:
        return ask()
    except ResponseError:
        return None


def _ask_rabbitmq(connection: Any, place: str) -> Iterator[Finding]:
    seconds = _round_trip(partial(connection.default_channel.basic_qos, 0, 1, False))
    server = connection.connection.server_properties
    yield reached(f"{server.get('product')} {server.get('version')}", place, seconds)


def _round_trip(ask: Callable[[], object]) -> float:
    """The median of 5, in seconds."""

    def once() -> float:
        started = time.monotonic()
        ask()
        return time.monotonic() - started

    return statistics.median(once() for _ in range(5))


def reached(name: str, place: str, seconds: float) -> Finding:
    """The broker answers, in so many seconds."""
    found = f"{name} at {place}, round trip {seconds * 1000:.1f} ms"
    if seconds <= SLOW:
        return Finding("ok", "broker", found)
    advice = "every request waits for several of them: bring the broker nearer, and use cables rather than Wi-Fi"
    return Finding("warning", "broker", found, advice)


def redis_settings(info: Mapping[str, Any], save: str | None) -> Iterator[Finding]:
    """What is wrong with how Redis or Valkey is set up: by its INFO, and its setting `save` as far as it is known."""
    policy = info.get("maxmemory_policy")
    if policy != "noeviction":
        found = f"maxmemory-policy is {policy}: when memory is short, the broker drops waiting work"
        yield Finding("error", "broker", found, "CONFIG SET maxmemory-policy noeviction, and the same in its file")
    limit, used = info.get("maxmemory", 0), info.get("used_memory", 0)
    if limit and used > 0.9 * limit:
        found = f"{used / limit:.0%} of its memory is in use; when it is full, nothing can be sent"
        yield Finding("warning", "broker", found, "raise maxmemory, and look for lanes that no node serves")
    if not info.get("aof_enabled") and save == "":
        found = "persistence is off: a restart of the broker loses all work that waits"
        yield Finding("warning", "broker", found, "CONFIG SET appendonly yes, and the same in its file")
    if "err" in (info.get("rdb_last_bgsave_status"), info.get("aof_last_write_status")):
        found = "it failed to write to its disk, and may refuse all work because of that"
        yield Finding("error", "broker", found, "make room on its disk, and look at its log")


def exposure(broker_url: str) -> Iterator[Finding]:
    """What strangers could do to a broker that is not on this host."""
    url = urlsplit(broker_url)
    if _is_loopback(url.hostname or "localhost"):
        return
    if not url.password:
        found = "broker_url has no password: whoever reaches the broker can read and send requests"
        yield Finding(
            "warning", "broker", found, "give the broker a password, and broker_url: scheme://USER:PASSWORD@..."
        )
    if url.scheme not in ("rediss", "amqps"):
        found = "no TLS: whoever listens on the network can read requests and answers"
        secure = "amqps" if "amqp" in url.scheme else "rediss"
        yield Finding("warning", "broker", found, f"set TLS up at the broker, and begin broker_url with {secure}://")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def clock(settings: Settings, *, now: Callable[[], float] = time.time) -> list[Finding]:
    """Deadlines are moments that hosts compare."""
    if transport_of(settings.broker_url) == "amqp":
        advice = "see that every host keeps its time by NTP"
        return [Finding("ok", "clock", "not compared: RabbitMQ does not tell the time", advice)]
    with connected(settings) as connection:
        client = connection.default_channel.client
        _, ahead = min(_compared(client, now) for _ in range(5))
    return [agreement(ahead)]


def _compared(client: Any, now: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds that asking took, and the seconds that this host was ahead in the middle of them."""
    before = now()
    seconds, microseconds = client.time()
    after = now()
    return after - before, (before + after) / 2 - (seconds + microseconds / 1_000_000)


def agreement(ahead: float) -> Finding:
    """This host's clock is ahead of the broker's by so many seconds."""
    severity: Severity = "error" if abs(ahead) > 2 else "warning" if abs(ahead) > 0.5 else "ok"
    found = f"{abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} the broker"
    if severity == "ok":
        return Finding(severity, "clock", found)
    advice = "turn on NTP here and at the broker: where clocks differ, requests expire too early or too late"
    return Finding(severity, "clock", found, advice)
