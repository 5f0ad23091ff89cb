"""Why the broker cannot be used: what is wrong, in words that follow "the broker at HOST", and what to do.

No text of an error is shown, since it may quote anything: only the names of commands, queues and exchanges in it.
"""

from __future__ import annotations

import re
import socket
from typing import NamedTuple

from amqp.exceptions import (
    AccessRefused,
    AMQPError,
    Blocked,
    MessageNacked,
    NotAllowed,
    PreconditionFailed,
    RecoverableConnectionError,
)
from kombu.exceptions import KombuError, OperationalError
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from fleet_worker.certificates import OF_BROKER, chain, explain, is_lasting
from fleet_worker.errors import BrokerUnavailable

BROKER_ERRORS = (OSError, KombuError, RedisError, AMQPError, MessageNacked)
"""What kombu and the libraries below it raise if the broker is away or refuses."""
_AWAY = (OSError, RedisConnectionError, RedisTimeoutError, RecoverableConnectionError)
_REJECTED = (AuthenticationError, AuthorizationError, NoPermissionError, AccessRefused, NotAllowed)

_Texts = dict[tuple[type[BaseException], str], tuple[str, str]]
"""By a kind of error and a word of its text: what is wrong, and what to do. The first that fits counts."""
_NO_ROUTE = (
    "is on a host to which there is no route",
    "check the network; on a Mac allow Python in System Settings, Privacy & Security, Local Network, or run "
    "fleet-worker service install --system, which needs no permission",
)
_REFUSED_FOR_NOW: _Texts = {
    (OutOfMemoryError, ""): (
        "has no room for more: its maxmemory is reached",
        "raise it, or see by fleet-worker status what waits",
    ),
    (Blocked, ""): (
        "takes no messages: it is short of memory or of disk space",
        "free some; rabbitmqctl list_alarms says which",
    ),
    (ReadOnlyError, ""): ("takes nothing: it is the replica of another", "name that other one in broker_url"),
    (MasterDownError, ""): ("takes nothing: it is a replica, and its master is gone", "name another one in broker_url"),
    (BusyLoadingError, ""): ("is still loading its data", "wait until it has, or look at its log"),
    (ResponseError, "MISCONF"): (
        "takes nothing: it cannot save its data",
        "free space on its disk, and look at its log",
    ),
    (ResponseError, "NOREPLICAS"): (
        "takes nothing: it has too few replicas",
        "start them, or lower its min-replicas-to-write",
    ),
    (RedisConnectionError, "max number of clients"): (
        "has no room for one more connection",
        "raise its maxclients, or see what holds them",
    ),
    (NotAllowed, "limit"): (
        "has no room for one more connection",
        "raise the connection limit of its user or virtual host",
    ),
}
_REFUSED: _Texts = {
    (ResponseError, "WRONGTYPE"): (
        "has a key of another program under a name of ours",
        "delete the keys llm.fleet.* that are no lists, or name another database in broker_url",
    ),
    (RedisConnectionError, "protected mode"): (
        "is in protected mode, and serves its own host only",
        "set a password at it",
    ),
}
_OTHER_CAUSES: _Texts = {
    (AuthenticationError, ""): ("refuses the user or the password", "correct them in broker_url"),
    (AccessRefused, ""): ("refuses the user or the password", "correct them in broker_url"),
    (NotAllowed, ""): (
        "does not let this user into this virtual host",
        "correct the end of broker_url, or the user's rights",
    ),
    (ResponseError, ""): (
        "refuses what a node asks of it",
        "give the user its rights, and check the end of broker_url",
    ),
    (ConnectionRefusedError, ""): ("does not run: nothing listens there", "start it, or correct broker_url"),
    (socket.gaierror, ""): ("is on a host that cannot be found", "correct broker_url, or the DNS of this host"),
    (OSError, "No route to host"): _NO_ROUTE,
    (RedisConnectionError, "No route to host"): _NO_ROUTE,
    (TimeoutError, ""): (
        "does not answer in time",
        "see whether it is frozen, a firewall is between, or broker_url has the wrong scheme (with TLS: rediss, amqps)",
    ),
}
_RIGHTS = "give its user the rights that docker/README.md lists"
_ONE_OF_MANY = re.compile(r"\.[0-9a-f]{12}(\.\d+)?$")
"""The end of a name that is new for each subscription or router."""


class Refusal(NamedTuple):
    found: str
    """What is wrong, as words that follow "the broker at HOST"."""
    advice: str
    passes: bool
    """Whether it may end by itself: the broker refuses everybody until it has room, or its data, or its disk again."""


def refusal(error: BaseException) -> Refusal | None:
    """Return what the broker refuses; None if that is nothing which is known here: it may be away."""
    for cause in chain(error):
        if texts := _find(_REFUSED_FOR_NOW, cause):
            return Refusal(*texts, passes=True)
        if texts := _find(_REFUSED, cause) or _missing_right(cause):
            return Refusal(*texts, passes=False)
    return None


def is_away(error: BaseException) -> bool:
    """Tell whether the same may succeed as soon as the broker is back."""
    return isinstance(_unwrapped(error), _AWAY) and not needs_operator(error)


def needs_operator(error: BaseException) -> bool:
    """Tell whether the broker rejects this user, or TLS fails: nothing will succeed before somebody corrects that."""
    return isinstance(_unwrapped(error), _REJECTED) or is_lasting(error)


def describe(error: BaseException) -> str:
    """Return why a connection failed, for a log: "is away (ConnectionResetError)", or what somebody may have to
    correct."""
    known = _explain(error)
    if known and (known == _NO_ROUTE or refusal(error) or not is_away(error)):
        return f"{known[0]}: {known[1]}"
    return f"is away ({type(_unwrapped(error)).__name__})"


def place_of(broker_url: str) -> str:
    """Return host and port of the broker for messages: no scheme, user, password, nor what follows the port."""
    return re.split("[/?#]", broker_url.partition("://")[2].rpartition("@")[2])[0]


def unavailable(
    broker_url: str, said: str, cause: BaseException | str, *, retryable: bool | None = None
) -> BrokerUnavailable:
    """Return the error for a failed use of this broker: `said`, and the type of its cause.

    If the cause is a known one, or waiting will not help, the error names what is wrong instead, and
    `metadata["advice"]` what to do.
    """
    place = place_of(broker_url)
    kind = cause if isinstance(cause, str) else type(cause.__cause__ or cause).__name__
    known = None if isinstance(cause, str) else _explain(cause)
    if not known and (retryable or isinstance(cause, str)):
        return BrokerUnavailable(f"the broker at {place} {said} ({kind})", retryable=retryable)
    found, advice = known or (
        f"{said} ({kind})",
        "look at its log, and check broker_url; with TLS it begins with rediss or amqps",
    )
    if retryable:
        found = f"{found} (it {said})"
    return BrokerUnavailable(f"the broker at {place} {found}", retryable=retryable, advice=advice)


def _explain(error: BaseException) -> tuple[str, str] | None:
    """Return what is wrong, and what to do."""
    if refused := refusal(error):
        return refused.found, refused.advice
    return explain(error, OF_BROKER) or _find(_OTHER_CAUSES, *chain(error))


def _find(texts: _Texts, *causes: BaseException) -> tuple[str, str] | None:
    for (kind, word), found in texts.items():
        if any(isinstance(cause, kind) and word in str(cause) for cause in causes):
            return found
    return None


def _missing_right(error: BaseException) -> tuple[str, str] | None:
    text = str(error)
    if isinstance(error, NoPermissionError):
        if command := re.search(r"run the '([a-z|_]{1,40})' command", text):
            return f"does not allow its user the command {command[1].upper().replace('|', ' ')}", _RIGHTS
        if things := re.search(r"access (?:a |the )?(?:'[^']*' )?(key|channel)", text):
            return f"does not allow its user {things[1]}s of our names", _RIGHTS
    if named := re.search(r"(queue|exchange) '([\w.@:-]{1,250})'", text):
        what = f"{named[1]} {_ONE_OF_MANY.sub('.*', named[2])}"
        if isinstance(error, AccessRefused):
            return f"does not allow its user {error.method_name} of {what}", _RIGHTS
        if isinstance(error, PreconditionFailed):
            advice = f"delete that {named[1]} when all nodes and routers of an older version have ended"
            return f"has the {what} with other properties", advice
    return None


def _unwrapped(error: BaseException) -> BaseException:
    """Return the error of the library below kombu, if kombu has wrapped it."""
    return error.__cause__ if isinstance(error, OperationalError) and error.__cause__ else error
