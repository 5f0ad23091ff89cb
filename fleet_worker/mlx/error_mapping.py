"""Whatever goes wrong in HTTP, as one of our errors: what httpx raises, and what an MLX server answers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import httpx
from pydantic_core import to_json

from fleet_worker.errors import (
    ConfigurationError,
    ConnectionFailure,
    FleetError,
    InstanceUnavailable,
    MalformedOutput,
    Overloaded,
    ProviderError,
    RequestTimeout,
)
from fleet_worker.mlx.profiles import error_for
from fleet_worker.mlx.request_timer import Clock

__all__ = ["HTTPX_ERRORS", "error_event", "foreign_errors_mapped", "raise_for_status", "raw"]

_ERROR_BYTES = 64 * 1024
_ERROR_SECONDS = 1.0

HTTPX_ERRORS: dict[type[Exception], type[FleetError]] = {
    httpx.ConnectError: InstanceUnavailable,
    httpx.ConnectTimeout: InstanceUnavailable,
    httpx.PoolTimeout: Overloaded,
    httpx.TimeoutException: RequestTimeout,
    httpx.DecodingError: MalformedOutput,
    httpx.TooManyRedirects: MalformedOutput,
    httpx.UnsupportedProtocol: ConfigurationError,
    httpx.InvalidURL: ConfigurationError,
    httpx.LocalProtocolError: ProviderError,
    httpx.HTTPError: ConnectionFailure,
    httpx.StreamError: ProviderError,
    httpx.CookieConflict: ProviderError,
}
"""From the particular to the general: the first that fits decides."""

_TEXTS: dict[type[FleetError], str] = {
    InstanceUnavailable: "the MLX server does not accept connections",
    Overloaded: "all connections to the MLX server are in use",
    RequestTimeout: "the MLX server did not answer in time",
    MalformedOutput: "the MLX server answered something that is not HTTP",
    ConfigurationError: "base_url of this instance cannot be used",
    ConnectionFailure: "the connection to the MLX server broke",
    ProviderError: "the request to the MLX server could not be made",
}


@contextmanager
def foreign_errors_mapped(clock: Clock | None = None) -> Iterator[None]:
    """Turn what httpx raises into our errors. Its texts are left behind: they may name URLs and keys."""
    try:
        yield
    except tuple(HTTPX_ERRORS) as error:
        raise _ours(error, clock) from None


def _ours(error: Exception, clock: Clock | None) -> FleetError:
    """A connection that our own clock cut looks broken; it is the clock that has something to say."""
    kind = next(ours for theirs, ours in HTTPX_ERRORS.items() if isinstance(error, theirs))
    connecting = kind is InstanceUnavailable  # for which a server is to blame, however little time it had
    reason = clock and (clock.stopped if connecting else clock.over)
    return reason or kind(_TEXTS[kind])


def raise_for_status(response: httpx.Response, clock: Clock) -> None:
    """Raise what a status other than 2xx means, as far as its body tells; half a body is better than none."""
    if response.is_success:
        return
    if response.is_redirect:
        raise ConfigurationError("base_url of this instance answers with a redirect: name the server itself")
    body = b""
    clock.ending(_ERROR_SECONDS)
    with contextlib.suppress(httpx.HTTPError):
        for part in raw(response):
            body += part
            if len(body) > _ERROR_BYTES:
                break
    raise clock.stopped or error_for(
        response.status_code, body, retry_after=_seconds(response.headers.get("retry-after"))
    )


def raw(response: httpx.Response) -> httpx.SyncByteStream:
    """The body as it arrives: one generator less a read than `iter_raw`."""
    return cast("httpx.SyncByteStream", response.stream)


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text or "")
    except ValueError:  # an HTTP date
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


_WORDS = {"context_length": 400, "invalid_request": 400, "rate_limit": 429, "overloaded": 429}


def error_event(error: Any) -> FleetError:
    """An error inside a 200: `code` is an HTTP status, as a number or a string, or a word, as `type` is."""
    said = error if isinstance(error, dict) else {}
    code = str(said.get("code"))
    if len(code) == 3 and code.isdecimal():
        return error_for(int(code), to_json(error))
    words = f"{code} {said.get('type')}"
    status = next((status for word, status in _WORDS.items() if word in words), 500)
    return error_for(status, to_json(error))
