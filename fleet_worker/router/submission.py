"""What a caller asks the router for: the arguments of a public method, checked, as one request and how to treat it."""

from __future__ import annotations

import difflib
import math
import re
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from fleet_worker.broker.topology import is_node_name, reply_name
from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol import clock, json_values
from fleet_worker.protocol.request import REQUEST_ID, FleetRequest, Operation, Priority, params_of_client
from fleet_worker.protocol.wire import field_names
from fleet_worker.router.attempts import OnInterrupt
from fleet_worker.router.options import IfAbsent, RequestOptions
from fleet_worker.settings import Settings

LONGEST_OWN_ID = 128
"""Characters of the id that a caller gives a request."""
LONGEST_SESSION = 1_000
"""Characters of the name of a session or of a cache scope."""
OPTIONS = frozenset(RequestOptions.__optional_keys__)


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What a caller says about the prompt cache of the servers."""

    session: str | None = field(default=None, repr=False)
    """A name of the conversation: its requests go to one node while that is no worse."""
    scope: str | None = field(default=None, repr=False)
    """Only prompts of the same scope count as equal."""
    keep_warm: bool = True
    """The router may keep the prompt, to run it again on a server that lost its cache."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A request without its reply queue, and the router's part of its options."""

    request: FleetRequest
    node: str | None
    """The only node that may have it."""
    on_interrupt: OnInterrupt
    queue_timeout: float
    max_wait: float | None = None
    cache: CacheUse = CacheUse()
    absent_timeout: float = math.inf
    """Seconds that it may wait while no node that could take it is ready."""
    if_absent: IfAbsent = "wait"

    @classmethod
    def of(
        cls,
        settings: Settings,
        operation: Operation,
        model: str | None,
        arguments: dict[str, Any],
        body: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> Submission:
        """Return what these arguments of a public method ask for; raises `InvalidRequest`.

        `arguments` are those fields of the body that are arguments of their own. With a `body`, all fields are in it,
        so that none of them can be taken for an option; without one, they are among the options.
        """
        own = {name: value for name, value in options.items() if name in OPTIONS}
        params = {**arguments, **{name: value for name, value in options.items() if name not in OPTIONS}}
        own.setdefault("session", _session_of(params if body is None else body))
        if body is not None:
            model, params = _read_body(operation, model, params, body)
        try:
            return cls._checked(settings, operation, model, params, **own)
        except InvalidRequest as error:
            if error.param in params and (meant := _option_meant(error.param)):
                text = f"{error.param}: unknown option, the nearest that exists is {meant}"
                raise InvalidRequest(text, param=error.param) from None
            raise

    @classmethod
    def _checked(
        cls,
        settings: Settings,
        operation: Operation,
        model: str | None,
        params: dict[str, Any],
        *,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        max_wait: float | None = None,
        if_absent: IfAbsent = "wait",
        priority: Priority = "normal",
        instance: str = "any",
        node: str | None = None,
        request_id: str | None = None,
        idempotency_key: str | None = None,
        on_interrupt: OnInterrupt = "resume",
        session: str | None = None,
        cache_scope: str | None = None,
        keep_warm: bool = True,
        caller: dict[str, Any] | None = None,
        message_context: dict[str, Any] | None = None,
        trace_context: dict[str, Any] | None = None,
    ) -> Submission:
        limits = settings.router
        if not isinstance(keep_warm, bool):  # "false" would count as true
            raise InvalidRequest("keep_warm: must be True or False", param="keep_warm")
        if on_interrupt not in get_args(OnInterrupt):
            raise InvalidRequest('on_interrupt: must be "resume" or "fail"', param="on_interrupt")
        if if_absent not in get_args(IfAbsent):
            raise InvalidRequest('if_absent: must be "wait" or "refuse"', param="if_absent")
        absent_timeout = limits.absent_timeout if queue_timeout is None else math.inf
        queue_timeout = _seconds("queue_timeout", queue_timeout, limits.queue_timeout)
        max_wait = limits.max_wait if max_wait is None else _seconds("max_wait", max_wait, 0.0, or_none=True)
        seconds = _seconds("timeout", timeout, limits.timeout, limits.max_timeout)
        if node is not None and not is_node_name(node):
            raise InvalidRequest('node: must be the name of a node, as in "local@mini-7"', param="node")
        if not isinstance(instance, str) or not instance:
            raise InvalidRequest('instance: must be the name of an instance, or "any"', param="instance")
        request = _request(
            operation=operation,
            provider_instance=instance,
            model=model,
            params=params,
            timeout_seconds=seconds,
            priority=priority,
            **_ids(request_id, idempotency_key),
            message_context=message_context or {},
            caller=caller or {},
            trace_context=trace_context or {},
        )
        request.check_size(settings.max_body_bytes)
        cache = CacheUse(_name("session", session), _name("cache_scope", cache_scope), keep_warm)
        return cls(request, node, on_interrupt, queue_timeout, max_wait, cache, absent_timeout, if_absent)


def _request(*, timeout_seconds: float, **fields: Any) -> FleetRequest:
    """Return the first attempt of a request; raises `InvalidRequest`. `Session.start` gives it its reply queue."""
    constant = {"protocol_version": 2, "provider": "mlx", "signed_token": None}
    sent = {"attempt": 1, "reply_to": reply_name("unsent", 1), "expires_at": clock.now() + timeout_seconds}
    return FleetRequest.build({**constant, **fields, **sent, "timeout_seconds": timeout_seconds})


def _ids(request_id: str | None, idempotency_key: str | None) -> dict[str, str]:
    """Return the ids of a request, from what the caller has given."""
    own_id = _unique_id(request_id)
    return {
        "request_id": own_id,
        "correlation_id": request_id or own_id,
        "idempotency_key": idempotency_key or own_id,
    }


def _session_of(body: Mapping[str, Any]) -> str | None:
    """Return the name that an OpenAI client gives the conversation. One that is too long counts as none."""
    name = body.get("prompt_cache_key") if isinstance(body, Mapping) else None
    return name if isinstance(name, str) and 0 < len(name) <= LONGEST_SESSION else None


def _option_meant(name: str) -> str | None:
    """Return the option that is most like a name, if no field of a body is more like it."""
    known = field_names() | OPTIONS
    nearest = [] if name in known else difflib.get_close_matches(name, known, n=1)
    return next((each for each in nearest if each in OPTIONS), None)


def _name(option: str, asked: str | None) -> str | None:
    if asked is not None and not (isinstance(asked, str) and 0 < len(asked) <= LONGEST_SESSION):
        raise InvalidRequest(f"{option}: must be a text of 1 to {LONGEST_SESSION:,} characters", param=option)
    json_values.check(asked, field_names, option)  # its text is hashed
    return asked


def _unique_id(asked: str | None) -> str:
    """Return an id that no other request has; it begins with the one that the caller has given. Callers may use one
    twice, and a node takes a second request with the same id for the first one."""
    if asked is None:
        return str(uuid.uuid4())
    if not isinstance(asked, str) or not re.fullmatch(REQUEST_ID, asked) or len(asked) > LONGEST_OWN_ID:
        needed = f"must be a string of at most {LONGEST_OWN_ID} visible ASCII characters"
        raise InvalidRequest(f"request_id: {needed}", param="request_id")
    return f"{asked}.{uuid.uuid4().hex[:12]}"


def _read_body(
    operation: Operation, model: str | None, beside: dict[str, Any], body: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the model and the params. The model that the caller names beside the body counts."""
    if not isinstance(body, Mapping):
        raise InvalidRequest("body: must be an object with the fields of an OpenAI request", param="body")
    if given := [name for name, value in beside.items() if value is not None]:
        name = given[0]
        meant = _option_meant(name)
        instead = f"the nearest that exists is {meant}" if meant else "with a body, it belongs into that"
        raise InvalidRequest(f"{name}: is no option of the router: {instead}", param=name)
    return body.get("model") if model is None else model, params_of_client(operation, body)


def _seconds(
    option: str, asked: float | None, default: float, limit: float = math.inf, *, or_none: bool = False
) -> float:
    """Return what the caller asked for, or the default; raises `InvalidRequest` if that is no such time. With `or_none`
    it may be 0."""
    seconds = default if asked is None else asked
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not (0 < seconds <= limit or (or_none and seconds == 0)):
        most = "" if math.isinf(limit) else f" and at most {limit:g} (router.max_timeout)"
        least = "0 or more" if or_none else "more than 0"
        raise InvalidRequest(f"{option}: must be a number of seconds, {least}{most}", param=option)
    return float(min(seconds, sys.float_info.max))  # an int may be larger than any float
