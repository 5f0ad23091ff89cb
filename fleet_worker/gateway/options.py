"""The router's options of a request: from its headers, and what its body says of its conversation, as far as the key of
the caller allows."""

from __future__ import annotations

import hashlib
import math
import re
from typing import cast, get_args

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway.accounts.key import Key
from fleet_worker.gateway.dialects.dialect import ChatAsked
from fleet_worker.gateway.http.request import Request
from fleet_worker.gateway.problems import refuse
from fleet_worker.gateway.session_key import session_key
from fleet_worker.protocol.request import Priority
from fleet_worker.router.options import RequestOptions

_TAG = re.compile(r"[A-Za-z0-9_.:=/@-]{1,64}")
MOST_TAGS = 8
LONGEST_IDEMPOTENCY_KEY = 255


def router_options(request: Request, key: Key, default_max_wait: float | None) -> RequestOptions:
    """Return what the headers ask the router for. `default_max_wait` is `router.max_wait`.

    Raises:
        InvalidRequest: a header has no such value.
        Refused: the key may not ask for that.
    """
    headers = request.headers
    options = RequestOptions(caller={"key": key.name}, request_id=request.id)
    options["priority"] = key.priority(_priority(headers.get("x-fleet-priority")))
    if node := headers.get("x-fleet-node"):
        if not key.may_choose_node:
            raise refuse(403, "not_allowed", "x-fleet-node: this key may not choose a node", param="x-fleet-node")
        options["node"] = node
    for name, option in (("x-fleet-timeout", "timeout"), ("x-fleet-queue-timeout", "queue_timeout")):
        if (text := headers.get(name)) is not None:
            if not key.may_set_timeout:
                raise refuse(403, "not_allowed", f"{name}: this key may not set its timeouts", param=name)
            options[option] = _seconds(name, text)  # type: ignore[literal-required]
    if "queue_timeout" not in options:  # its user would look at nothing; who sets a time wants to wait
        options["if_absent"] = "refuse"
    if (max_wait := _max_wait(headers.get("x-fleet-max-wait"), key, default_max_wait)) is not None:
        options["max_wait"] = max_wait
    if idempotency_key := headers.get("idempotency-key"):
        options["idempotency_key"] = _of_this_key(idempotency_key, key)
    return options


def prompt_options(asked: ChatAsked, request: Request, key: Key) -> RequestOptions:
    """Return what the router is told of a prompt: to which conversation it belongs, and what its key says about caches.

    Raises:
        InvalidRequest: a header has no such value.
    """
    options = RequestOptions()
    if session := session_key(asked, request.headers, key):
        options["session"] = session
    if key.cache_scope:
        options["cache_scope"] = key.name
    if not key.keep_warm:
        options["keep_warm"] = False
    return options


def tags(request: Request) -> tuple[str, ...]:
    """Return the caller's tags for the ledger, from `X-Fleet-Tags`: words with commas between them."""
    given = [word.strip() for word in request.headers.get("x-fleet-tags", "").split(",") if word.strip()]
    if len(given) > MOST_TAGS or not all(map(_TAG.fullmatch, given)):
        text = f"x-fleet-tags: at most {MOST_TAGS} words of up to 64 letters, digits and _.:=/@- with commas between"
        raise InvalidRequest(text, param="x-fleet-tags")
    return tuple(dict.fromkeys(given))


def _priority(text: str | None) -> Priority | None:
    if text is not None and text not in get_args(Priority):
        known = ", ".join(get_args(Priority))
        raise InvalidRequest(f"x-fleet-priority: must be one of {known}", param="x-fleet-priority")
    return cast(Priority | None, text)


def _max_wait(text: str | None, key: Key, default: float | None) -> float | None:
    """Return what the request asks for, or the default, but no more than its key allows."""
    asked = default if text is None else _seconds("x-fleet-max-wait", text, may_be_0=True)
    return min((each for each in (asked, key.max_wait) if each is not None), default=None)


def _seconds(name: str, text: str, *, may_be_0: bool = False) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf or (seconds == 0 and not may_be_0):
        least = "0 or more" if may_be_0 else "more than 0"
        raise InvalidRequest(f"{name}: must be a number of seconds, {least}", param=name)
    return seconds


def _of_this_key(idempotency_key: str, key: Key) -> str:
    """Return a key that no caller with another key can use."""
    if len(idempotency_key) > LONGEST_IDEMPOTENCY_KEY:
        text = f"idempotency-key: must have at most {LONGEST_IDEMPOTENCY_KEY} characters"
        raise InvalidRequest(text, param="idempotency-key")
    return f"{key.name} {hashlib.sha256(idempotency_key.encode()).hexdigest()}"
