"""Every failure of an HTTP request as one of our errors: an exception of httpx, a status, or an error inside a stream.

Texts of httpx may contain URLs and keys, and servers repeat prompts in their errors. So our texts are all written here,
and a body is only searched for known phrases.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from typing import Any

import httpx
from pydantic_core import from_json

from fleet_worker.certificates import OF_INSTANCE, explain
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
from fleet_worker.mlx.body import body_of
from fleet_worker.mlx.timeouts import RequestTimer
from fleet_worker.protocol.openai import ChatParams, EmbedParams

_ERRORS: dict[type[Exception], tuple[type[FleetError], str]] = {
    httpx.ConnectError: (InstanceUnavailable, "the MLX server does not accept connections"),
    httpx.ConnectTimeout: (InstanceUnavailable, "the MLX server does not accept connections"),
    httpx.TimeoutException: (RequestTimeout, "the MLX server did not answer in time"),
    httpx.LocalProtocolError: (ProviderError, "the request to the MLX server could not be made"),
    httpx.RemoteProtocolError: (ConnectionFailure, "the MLX server broke off, or its answer is not valid HTTP"),
    httpx.HTTPError: (ConnectionFailure, "the connection to the MLX server broke"),
}
"""Subclasses before their base classes: the first match counts. Other exceptions of httpx cannot happen here: a body is
read only once and not decoded, redirects are not followed, and no cookie is read."""
HTTPX_EXCEPTIONS = tuple(_ERRORS)


def error_of_exception(exception: Exception, timer: RequestTimer) -> FleetError:
    """Map one of `HTTPX_EXCEPTIONS`. If our own timer cut the connection, its reason is the error."""
    kind, text = next(ours for theirs, ours in _ERRORS.items() if isinstance(exception, theirs))
    if kind is InstanceUnavailable and (tls := explain(exception, OF_INSTANCE)):
        text = "the MLX server {}: {}".format(*tls)
    connecting = kind is InstanceUnavailable  # the server is to blame, however little time it had
    reason = timer.cancel_error if connecting else timer.error
    return reason or kind(text)


_BODY_BYTES = 64 * 1024
_BODY_SECONDS = 1.0
_LONGEST_PAUSE = 3600.0
"""Seconds; of what a server asks for in `retry-after`."""


def error_of_response(response: httpx.Response, timer: RequestTimer) -> FleetError:
    """Map a response whose status is not 2xx. Its body may be incomplete: a part of it is better than nothing."""
    if response.has_redirect_location:
        return ConfigurationError("base_url of this instance answers with a redirect: set it to the server itself")
    body = b""
    timer.limit_rest(_BODY_SECONDS)
    with contextlib.suppress(httpx.HTTPError, MalformedOutput):
        for part in body_of(response):
            body += part
            if len(body) > _BODY_BYTES:
                break
    retry_after = _seconds(response.headers.get("retry-after"))
    return timer.cancel_error or error_of_status(response.status_code, body, retry_after=retry_after)


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text or "")
    except ValueError:  # an HTTP date
        return None
    return min(seconds, _LONGEST_PAUSE) if math.isfinite(seconds) and seconds >= 0 else None


_STATUS_OF_CODE = {
    "context_length": 400,
    "invalid_request": 400,
    "badrequest": 400,
    "rate_limit": 429,
    "ratelimit": 429,
    "overloaded": 429,
    "unavailable": 503,
    "timeout": 504,
    "authentication": 401,
    "unauthorized": 401,
}
_CODES = ("code", "status", "status_code")
"""Where an error has its HTTP status."""


def error_in(answer: dict[str, Any]) -> FleetError | None:
    """Return the error that an object of status 200 is, in all its forms: `{"error": ...}`, `{"detail": ...}`,
    `{"object": "error", ...}`, `{"type": "error", ...}`, `{"code": ..., "message": ...}`."""
    if answer.get("error") is not None:
        error, codes = answer["error"], {name: answer[name] for name in _CODES if name in answer}
        if codes:
            error = {**codes, **error} if isinstance(error, dict) else {**codes, "error": error}
        return error_of_event(error)
    marks = (answer.get("object"), answer.get("type"), answer.get("status"))
    is_error = "error" in marks or ("code" in answer and "message" in answer)
    return error_of_event(answer) if is_error or answer.get("detail") or answer.get("errors") else None


def error_of_event(error: Any) -> FleetError:
    """Map the `error` of an event. Its `code` is an HTTP status (a number or a string) or a word, as its `type` is."""
    fields = _fields_of(error)
    codes = [str(fields[name]) for name in _CODES if name in fields]
    body = json.dumps(error).encode()
    if number := next((code for code in codes if re.fullmatch("[45][0-9][0-9]", code)), None):
        return error_of_status(int(number), body)
    if isinstance(fields.get("detail"), list):  # FastAPI's validation report, which belongs to status 422
        return error_of_status(422, body)
    words = f"{' '.join(codes)} {fields.get('type')}".lower()
    unknown = 400 if _CONTEXT.search(_error_text(body)) else 500
    status = next((status for word, status in _STATUS_OF_CODE.items() if word in words), unknown)
    return error_of_status(status, body)


def _fields_of(error: Any) -> dict[str, Any]:
    """Return the object that says what the error is: it may be JSON in a string, or in another `error` or `detail`."""
    for _ in range(3):
        if isinstance(error, str) and error.lstrip().startswith("{"):
            with contextlib.suppress(ValueError):
                error = from_json(error)
        inner = (error.get("error") or error.get("detail")) if isinstance(error, dict) else None
        if not isinstance(inner, dict | str) or (isinstance(inner, str) and not inner.lstrip().startswith("{")):
            break
        error = inner
    return error if isinstance(error, dict) else {}


_FIELDS = [*ChatParams.model_fields, *EmbedParams.model_fields]
_CONTEXT = re.compile(
    r"context.{0,20}(length|window)|maximum context|too many tokens|prompt is too long", re.IGNORECASE
)
_MISSING_MODEL = re.compile(
    r"cached snapshot|model_not_found|repository not found|repo[_ ]?id|model.{0,200}(does not exist|not found)",
    re.IGNORECASE | re.DOTALL,
)
_NOT_LOADED = re.compile(r"\W*detail\W*failed to load model", re.IGNORECASE)
"""What mlx-vlm's server answers with status 400."""
_THREAD_DIED = re.compile(r"\W*((error|detail|message)\W*)*generation thread died", re.IGNORECASE)
"""At the beginning only: further behind it may be quoted from a conversation."""
_TEMPLATE_REFUSALS: dict[str, str] = {
    r"system (role|message)s? (is |are )?not (supported|allowed)": (
        "takes no system message: put its text into the first user message"
    ),
    r"roles? must alternate|must alternate": "wants user and assistant messages to alternate",
    r"only user.{0,20}assistant roles are supported": "takes user and assistant messages only",
    r"single tool.calls? at once": "takes one tool call in a message",
    r"no user query|at least one user|must start with a user": "wants a user message before the answer",
    r"chat.?template|template ?error|jinja": "cannot make a prompt of these messages",
}
"""What chat templates say when they refuse a conversation, and our words for it."""
_MISSING_ROUTE = re.compile(
    r'\W*(detail\W*)?(404\W*)?(page )?not found\W*|\W*error\W*message\W*not found\.?".*', re.IGNORECASE | re.DOTALL
)


def error_of_status(status: int, body: bytes, *, retry_after: float | None = None) -> FleetError:
    """Map an HTTP status and the body that came with it, whatever its shape. `retry_after` is in seconds."""
    text = _error_text(body)
    if _THREAD_DIED.match(text):
        # mlx_lm.server 0.32 answers every request with this 404 until it is restarted. Which request killed the thread
        # is unknown, so each of them counts as one during which a server died.
        return InstanceUnavailable(
            "the MLX server's generation thread has died: restart the server", instance_died=True
        )
    if status in (400, 404, 413, 422) and _CONTEXT.search(text):
        return ContextLengthExceeded()
    if status in (400, 404, 422, 500) and (refusal := _template_refusal(text)):
        return InvalidRequest(f"the model's chat template {refusal}", param="messages", status=status)
    match status:
        case 401 | 403:
            return Unauthorized(f"the MLX server answered {status}: check api_key of this instance")
        case 404:
            return _not_found(text)
        case 400 | 411 | 413 | 422:
            return _refusal(status, text, body)
        case 408 | 504:
            return RequestTimeout(f"the MLX server gave up ({status})", retryable=True)
        case 429 | 503 | 529:
            return _unready_or_busy(status, text, retry_after)
        case 502:
            return InstanceUnavailable("the proxy in front of the MLX server does not reach it (502)", status=502)
    return ProviderError(f"the MLX server answered {status}", retryable=status >= 500, status=status)


def _refusal(status: int, text: str, body: bytes) -> FleetError:
    """Name the field that the server names, if it is one of ours: FastAPI does in `loc`, OpenAI in `param`."""
    if _NOT_LOADED.match(text):
        return ModelNotServed("the MLX server cannot load the model that `backend` names")
    report: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        report = json.loads(body)
    detail = report.get("detail") if isinstance(report, dict) else None
    first = detail[0] if isinstance(detail, list) and detail else None
    place = first.get("loc") if isinstance(first, dict) else [_fields_of(report).get("param")]
    named = next((part for part in place if part in _FIELDS), None) if isinstance(place, list) else None
    where: dict[str, Any] = {"param": named} if named else {}
    return InvalidRequest(f"the MLX server refused {named or 'the request'} ({status})", status=status, **where)


def _template_refusal(text: str) -> str | None:
    """Return why the chat template refuses the messages; None if the error is about something else.

    vllm-mlx, mlx-openai-server and mlx-vlm answer 500 then, mlx_lm.server 404.
    """
    if _MISSING_MODEL.search(text):
        return None
    return next((ours for theirs, ours in _TEMPLATE_REFUSALS.items() if re.search(theirs, text, re.IGNORECASE)), None)


def _not_found(text: str) -> FleetError:
    if _MISSING_MODEL.search(text):
        return ModelNotServed("the MLX server does not have the model that `backend` names")
    if _MISSING_ROUTE.fullmatch(text) or text.lstrip().startswith("<"):  # a web page
        return UnsupportedCapability("the MLX server has no such endpoint")
    # mlx_lm.server answers 404 to everything that its chat template or tokenizer cannot process
    return InvalidRequest("the MLX server could not make a prompt of these messages (404)", param="messages")


def _unready_or_busy(status: int, text: str, retry_after: float | None) -> FleetError:
    if status == 503 and "busy" not in text and retry_after is None:
        return InstanceUnavailable("the MLX server is not ready (503)", status=503)
    error = Overloaded(f"the MLX server is busy ({status})")
    if retry_after is not None:
        error.metadata["retry_after"] = retry_after
    return error


def _error_text(body: bytes) -> str:
    """Return the text to search in an error: `{"error": str|object}`, `{"detail": str|object}`, or plain text.

    Empty for validation reports (`{"detail": [...]}`), which repeat the request, and for JSON that is cut off: only
    these reports are that long.
    """
    text = body.decode("utf-8", "replace")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return "" if text.lstrip().startswith(("{", "[")) else text[:4096]
    if isinstance(parsed, dict) and isinstance(parsed.get("detail"), list):
        return ""
    return json.dumps(parsed, ensure_ascii=False)[:4096]
