"""What a client is told when something goes wrong: the same facts for all dialects."""

from __future__ import annotations

from dataclasses import dataclass

from fleet_worker.errors import BrokerUnavailable, FleetError

MOST_RETRY_AFTER = 120.0
"""Seconds. SDKs do not try again at all if they are told a longer time."""

_STATUS_AND_CODE: dict[str, tuple[int, str]] = {
    "invalid_request": (400, "invalid_request"),
    "context_length_exceeded": (400, "context_length_exceeded"),
    "unsupported_capability": (400, "unsupported_capability"),
    "unsupported_parameter": (400, "unsupported_parameter"),
    "model_unavailable": (404, "model_not_found"),
    "model_not_served": (404, "model_not_found"),
    "policy_error": (403, "not_allowed"),
    "unauthorized": (502, "server_unauthorized"),
    "cancelled": (503, "cancelled"),
    "expired": (504, "timeout"),
    "queue_timeout": (503, "no_capacity"),
    "fleet_saturated": (429, "rate_limit_exceeded"),
    "broker_unavailable": (503, "broker_unavailable"),
    "poison_suspected": (422, "poison_suspected"),
    "overloaded": (503, "overloaded"),
    "timeout": (504, "timeout"),
    "configuration_error": (500, "configuration_error"),
}
"""Status and code of an error of the fleet by its own code. All others are 502: the fleet has tried."""
_HEADERS = {
    "timeout": "x-fleet-timeout",
    "queue_timeout": "x-fleet-queue-timeout",
    "max_wait": "x-fleet-max-wait",
    "node": "x-fleet-node",
    "idempotency_key": "idempotency-key",
}
"""The headers that clients set, by the argument of the router that each one becomes."""
_WORTH_ANOTHER_TRY = {"fleet_saturated", "broker_unavailable", "queue_timeout", "overloaded"}
_RETRY_AFTER = {"broker_unavailable": 2.0, "queue_timeout": 5.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a request has no answer. Dialects put it into their own words."""

    status: int
    code: str
    """A code of OpenAI's where it has one, as in `model_not_found`; else that of the fleet's error."""
    message: str
    param: str | None = None
    retry_after: float | None = None
    """Seconds."""
    may_retry: bool | None = None
    """Whether the client may send it again; None if the status says so already."""
    more_headers: tuple[tuple[bytes, bytes], ...] = ()
    """What else the client is told, as how much of its limits is left."""

    @classmethod
    def of(cls, error: FleetError) -> Problem:
        own = str(error.metadata.get("code", error.code))
        status, code = _STATUS_AND_CODE.get(own, (502, own))
        retry_after = _retry_after(error)
        is_worth_it = own in _WORTH_ANOTHER_TRY or retry_after is not None
        may_retry = is_worth_it and error.metadata.get("by_owner") is not True  # SDKs would try again all too soon
        return cls(
            status=status,
            code=code,
            message=_in_words_of_clients(error),
            param=_HEADERS.get(error.param or "", error.param),
            retry_after=retry_after,
            may_retry=may_retry if may_retry or status >= 429 else None,
        )

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """When to try again, as the SDKs of OpenAI and Anthropic read it, and `more_headers`."""
        headers = list(self.more_headers)
        if self.retry_after is not None:
            seconds = min(self.retry_after, MOST_RETRY_AFTER)
            headers.append((b"retry-after", b"%d" % max(1, round(seconds + 0.499))))
            headers.append((b"retry-after-ms", b"%d" % (1000 * seconds)))
        if self.may_retry is not None:
            headers.append((b"x-should-retry", b"true" if self.may_retry else b"false"))
        return headers


class Refused(Exception):
    """A request that is refused before it reaches the router."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refuse(status: int, code: str, message: str, *, param: str | None = None) -> Refused:
    """Return the exception, for its caller to raise."""
    return Refused(Problem(status=status, code=code, message=message, param=param))


def only(*methods: str) -> Refused:
    """Return the exception for a method that a path does not have."""
    text = f"only {' and '.join(methods)} {'is' if len(methods) == 1 else 'are'} answered here"
    allow = (b"allow", ", ".join(methods).encode("ascii"))
    return Refused(Problem(status=405, code="method_not_allowed", message=text, more_headers=(allow,)))


def _in_words_of_clients(error: FleetError) -> str:
    """Return its message with the name of the header where the router names its argument, and without the address of
    the broker, which the log of the gateway has."""
    if isinstance(error, BrokerUnavailable):
        return "the fleet cannot be reached at the moment: its broker is away"
    argument = error.param or ""
    if argument not in _HEADERS or not (error.message.startswith(f"{argument}:") or "_" in argument):
        return error.message
    return error.message.replace(argument, _HEADERS[argument], 1)


def _retry_after(error: FleetError) -> float | None:
    told = error.metadata.get("retry_after", _RETRY_AFTER.get(error.code))
    return float(told) if isinstance(told, int | float) and not isinstance(told, bool) and told >= 0 else None
