"""The two URLs of the configuration, checked: of the broker and of an MLX server. No error text shows more of one than
the name of a parameter."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import SplitResult, parse_qsl, urlsplit

IN_A_PASSWORD = "in a password write / as %2F, ? as %3F, # as %23, @ as %40"  # noqa: S105 - an advice
_SCHEMES = ("redis", "rediss", "valkey", "valkeys", "amqp", "amqps", "pyamqp")
_TLS_SCHEMES = ("rediss", "amqps")
_PARAMETERS = {
    "ssl_cert_reqs": ("checks_chain", {"required": True, "none": False, "cert_required": True, "cert_none": False}),
    "ssl_check_hostname": ("checks_host", {"true": True, "false": False}),
}
"""The parameters of a broker's URL: a field of `certificates.TLS`, and what each value means for it. Errors name the
first two values."""


def broker_url(url: str) -> str:
    """Return the URL with a scheme that kombu knows; raises `ValueError` with what is wrong."""
    url = url.strip()
    parts = _split(url)
    if parts.scheme not in _SCHEMES or url[len(parts.scheme) :][:3] != "://":
        raise ValueError("must begin with redis://, rediss://, valkey://, valkeys://, amqp:// or amqps://")
    if ";" in url:  # kombu's list of brokers for failover: its logs hide only the first password
        raise ValueError("must name one broker, without ';'")
    if re.search(
        r"^[^:]*%", parts.hostname or ""
    ):  # of socket%3A%2F%2F kombu would make a scheme; fe80::1%25en0 is fine
        raise ValueError("must name its host without %")
    # kombu would check the number only on connecting, again and again.
    if "amqp" not in parts.scheme and not re.fullmatch("/{0,2}[0-9]*", parts.path):
        raise ValueError(f"must end with the number of a database, as in redis://broker:6379/0; {IN_A_PASSWORD}")
    if parts.fragment or "@" in parts.path + parts.query:
        raise ValueError(f"has a part that is not understood; {IN_A_PASSWORD}")
    scheme = parts.scheme.replace("valkey", "redis")
    if tls_switches(url) and scheme not in _TLS_SCHEMES:
        raise ValueError(f"has parameters for TLS: begin it with {secure(scheme)}://, or leave them out")
    return scheme + url[len(parts.scheme) :]


def uses_tls(url: str) -> bool:
    return urlsplit(url).scheme in _TLS_SCHEMES


def with_account(broker_url: str, account: str) -> str:
    """Return the URL with this account, as in USER:PASSWORD, instead of its own; without any if it is empty."""
    scheme, authority, rest = _parts(broker_url)
    return f"{scheme}://{account and account + '@'}{authority.rpartition('@')[2]}{rest}"


def with_host(url: str, host: str) -> str:
    """Return the URL with the name or address of another host; its port stays."""
    scheme, authority, rest = _parts(url)
    account, at, _ = authority.rpartition("@")
    port = urlsplit(url).port
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{account}{at}{host}{f':{port}' if port else ''}{rest}"


def _parts(url: str) -> tuple[str, str, str]:
    """Return the scheme, the account with the host, and what follows."""
    found = re.fullmatch(r"([^:]*)://([^/?#]*)(.*)", url, re.DOTALL)
    if not found:
        raise ValueError("is not a URL")
    return found[1], found[2], found[3]


def host_name(host: str) -> str:
    """Return the name or the address of a host; raises `ValueError` if it is neither."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(r"[\w.-]+", host):
            raise ValueError("must be a name or an address, without a scheme and without a port") from None
    return host


def is_loopback(host: str) -> bool:
    """Tell whether a name or an address can be reached from its own host only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def secure(scheme: str) -> str:
    """Return the scheme of the same broker with TLS."""
    return "amqps" if "amqp" in scheme else "rediss"


def without_parameters(url: str) -> str:
    return url.partition("?")[0]


def tls_switches(url: str) -> dict[str, bool]:
    """Return what the parameters behind `?` turn on or off, by the names of the fields of `certificates.TLS`.

    Raises:
        ValueError: one of them is not known, is given twice, or has a value that is not allowed.
    """
    switches: dict[str, bool] = {}
    for name, value in parse_qsl(urlsplit(url).query, keep_blank_values=True):
        if name not in _PARAMETERS:
            shown = f"the parameter {name}" if re.fullmatch(r"\w{1,40}", name, re.ASCII) else "a parameter"
            files = "; files are set by broker_ca, broker_cert and broker_key"
            raise ValueError(f"{shown} is not known; known are {' and '.join(_PARAMETERS)}{files}")
        field, values = _PARAMETERS[name]
        if field in switches:
            raise ValueError(f"the parameter {name} is given twice")
        if value.lower() not in values:
            raise ValueError(f"the parameter {name} must be {' or '.join(list(values)[:2])}")
        switches[field] = values[value.lower()]
    return switches


def server_url(url: str) -> str:
    """Return the URL without `/v1` at its end; raises `ValueError` with what is wrong."""
    url = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    parts = _split(url)
    if parts.query or parts.fragment:
        raise ValueError("must not have a part behind ? or #")
    if parts.username or parts.password:
        raise ValueError("must not hold a user or a password: use api_key")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL")
    return url


def _split(url: str) -> SplitResult:
    if re.search(r"[\x00-\x1f\x7f]", url):  # urlsplit removes some of them
        raise ValueError("must not contain line ends or other control characters")
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:  # its text repeats the password
        raise ValueError(f"is not a URL, or its port is not a number; {IN_A_PASSWORD}") from None
    return parts
