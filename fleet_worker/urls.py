"""The two URLs of the configuration, checked: of the broker and of an MLX server. No error text shows a part of one."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

IN_A_PASSWORD = "in a password write / as %2F, ? as %3F, # as %23, @ as %40"  # noqa: S105 - an advice


def broker_url(url: str) -> str:
    """Return the URL with a scheme that kombu knows; raises `ValueError` with what is wrong."""
    parts = _split(url)
    if parts.scheme not in ("redis", "rediss", "valkey", "valkeys", "amqp", "amqps", "pyamqp"):
        raise ValueError("must begin with redis://, rediss://, valkey://, valkeys://, amqp:// or amqps://")
    if ";" in url:  # kombu's list of brokers for failover: its logs hide only the first password
        raise ValueError("must name one broker, without ';'")
    # kombu would check the number only on connecting, again and again.
    if "amqp" not in parts.scheme and not re.fullmatch("/{0,2}[0-9]*", parts.path):
        raise ValueError(f"must end with the number of a database, as in redis://broker:6379/0; {IN_A_PASSWORD}")
    return url.replace("valkey", "redis", 1) if url.startswith("valkey") else url


def server_url(url: str) -> str:
    """Return the URL without `/v1` at its end; raises `ValueError` with what is wrong."""
    url = url.rstrip("/").removesuffix("/v1").rstrip("/")
    parts = _split(url)
    if parts.username or parts.password:
        raise ValueError("must not hold a user or a password: use api_key")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL")
    return url


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:  # its text repeats the password
        raise ValueError(f"is not a URL, or its port is not a number; {IN_A_PASSWORD}") from None
    return parts
