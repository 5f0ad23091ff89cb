"""Whatever goes wrong in HTTP, as one of our errors: what httpx raises, and what an MLX server answers."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import httpx
from pydantic_core import to_json

from fleet_worker.errors import (
    ConfigurationError,
    ConnectionFailure,
    ContextLengthExceeded,
    FleetError,
    InstanceUnavailable,
    InvalidRequest,
    MalformedOutput,
    ModelNotServed,
    Overloaded,
    ProviderError,
    RequestTimeout,
    Unauthorized,
    UnsupportedCapability,
)
from fleet_worker.mlx.timeouts import RequestTimer

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
def foreign_errors_mapped(clock: RequestTimer | None = None) -> Iterator[None]:
    """Turn what httpx raises into our errors. Its texts are left behind: they may name URLs and keys."""
    try:
        yield
    except tuple(HTTPX_ERRORS) as error:
        raise _ours(error, clock) from None


def _ours(error: Exception, clock: RequestTimer | None) -> FleetError:
    """A connection that our own clock cut looks broken; it is the clock that has something to say."""
    kind = next(ours for theirs, ours in HTTPX_ERRORS.items() if isinstance(error, theirs))
    connecting = kind is InstanceUnavailable  # for which a server is to blame, however little time it had
    reason = clock and (clock.stopped if connecting else clock.over)
    return reason or kind(_TEXTS[kind])


def raise_for_status(response: httpx.Response, clock: RequestTimer) -> None:
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


_CONTEXT = re.compile(
    r"context.{0,20}(length|window)|maximum context|too many tokens|prompt is too long", re.IGNORECASE
)


_MISSING_MODEL = re.compile(
    r"cached snapshot|model_not_found|repository not found|repo[_ ]?id|model.{0,200}(does not exist|not found)",
    re.IGNORECASE | re.DOTALL,
)


_MISSING_ROUTE = re.compile(
    r'\W*(detail\W*)?(404\W*)?(page )?not found\W*|\W*error\W*message\W*not found\.?".*', re.IGNORECASE | re.DOTALL
)


def error_for(status: int, body: bytes, *, retry_after: float | None = None) -> FleetError:
    """Map an HTTP status and whatever body came with it to our error.

    The body is only searched for marks: servers repeat prompts in it, so no word of it reaches our text.
    """
    text = _error_text(body)
    if "generation thread died" in text:
        # mlx_lm.server 0.32: a 404 for every request until it is restarted. Which of them killed it cannot be told, so
        # each counts as one during which a server died.
        return InstanceUnavailable(
            "the MLX server's generation thread has died: restart the server", instance_died=True
        )
    if status in (400, 404, 413, 422) and _CONTEXT.search(text):
        return ContextLengthExceeded()
    match status:
        case 401 | 403:
            return Unauthorized(f"the MLX server answered {status}: check api_key of this instance")
        case 404:
            return _not_found(text)
        case 400 | 411 | 413 | 422:
            return InvalidRequest(f"the MLX server refused the request ({status})")
        case 408 | 504:
            return RequestTimeout(f"the MLX server gave up ({status})", retryable=True)
        case 429 | 529:
            return _overloaded(status, retry_after)
        case 503:
            busy = "busy" in text or retry_after is not None
            return (
                _overloaded(status, retry_after) if busy else InstanceUnavailable("the MLX server is not ready (503)")
            )
        case 502:
            return InstanceUnavailable("the proxy before the MLX server does not reach it (502)")
    return ProviderError(f"the MLX server answered {status}", retryable=status >= 500)


def _not_found(text: str) -> FleetError:
    if _MISSING_MODEL.search(text):
        return ModelNotServed("the MLX server does not have the model that `backend` names")
    if _MISSING_ROUTE.fullmatch(text):
        return UnsupportedCapability("the MLX server has no such endpoint")
    # mlx_lm.server answers 404 to whatever its chat template or tokenizer could not take
    return InvalidRequest("the MLX server could not make a prompt of these messages (404)")


def _overloaded(status: int, retry_after: float | None) -> Overloaded:
    error = Overloaded(f"the MLX server is busy ({status})")
    if retry_after is not None:
        error.metadata["retry_after"] = retry_after
    return error


def _error_text(body: bytes) -> str:
    """The words of an error in any of the shapes seen: `{"error": str|object}`, `{"detail": str|list|object}`, text.

    None of a validation report, which repeats the input, nor of JSON that is too long to be more than that.
    """
    text = body.decode("utf-8", "replace")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return "" if text.lstrip().startswith(("{", "[")) else text[:4096]
    if isinstance(parsed, dict) and isinstance(parsed.get("detail"), list):
        return ""
    return json.dumps(parsed, ensure_ascii=False)[:4096]
