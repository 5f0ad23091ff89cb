"""What a broker refuses, as opposed to a broker that is away: what is missing, in one line, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from amqp.exceptions import AccessRefused, Blocked, NotAllowed, PreconditionFailed
from redis.exceptions import BusyLoadingError, MasterDownError, NoPermissionError, OutOfMemoryError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError as RedisResponseError


class Refusal(NamedTuple):
    found: str
    """What is wrong, as words that follow "the broker at HOST"."""
    advice: str
    passes: bool = True
    """Whether it may end by itself: the broker refuses everybody until it has room, or its data, or its disk again."""


_RIGHTS = "give its user the rights that docker/README.md lists"
_NO_ROOM = "has no room for one more connection"
_KNOWN: tuple[tuple[type[BaseException], str, Refusal], ...] = (
    (
        OutOfMemoryError,
        "",
        Refusal("has no room for more: its maxmemory is reached", "raise it, or see by fleet-worker status what waits"),
    ),
    (
        Blocked,
        "",
        Refusal(
            "takes no messages: it is short of memory or of disk space", "free some; rabbitmqctl list_alarms says which"
        ),
    ),
    (
        ReadOnlyError,
        "",
        Refusal("takes nothing: it is the replica of another", "name that other one in broker_url"),
    ),
    (
        MasterDownError,
        "",
        Refusal("takes nothing: it is a replica, and its master is gone", "name another one in broker_url"),
    ),
    (BusyLoadingError, "", Refusal("is still loading its data", "wait until it has, or look at its log")),
    (
        RedisResponseError,
        "MISCONF",
        Refusal("takes nothing: it cannot save its data", "free space on its disk, and look at its log"),
    ),
    (
        RedisResponseError,
        "NOREPLICAS",
        Refusal("takes nothing: it has too few replicas", "start them, or lower its min-replicas-to-write"),
    ),
    (
        RedisResponseError,
        "WRONGTYPE",
        Refusal(
            "has a key of another program under a name of ours",
            "delete the keys llm.fleet.* that are no lists, or name another database in broker_url",
            passes=False,
        ),
    ),
    (RedisConnectionError, "max number of clients", Refusal(_NO_ROOM, "raise its maxclients, or see what holds them")),
    (
        RedisConnectionError,
        "protected mode",
        Refusal("is in protected mode, and serves its own host only", "set a password at it", passes=False),
    ),
    (NotAllowed, "limit", Refusal(_NO_ROOM, "raise the connection limit of its user or virtual host")),
)
"""Kinds of errors, a word of their text, and what they mean. The first that fits counts."""
_ONE_OF_MANY = re.compile(r"\.[0-9a-f]{12}(\.\d+)?$")
"""The end of a name that is new for each subscription or router."""


def refusal(error: BaseException) -> Refusal | None:
    """Return what the broker refuses; None if that is nothing which is known here: it may be away.

    Of the text of an error, only the names of commands, queues and exchanges are returned.
    """
    return next((found for cause in _causes(error) if (found := _known(cause) or _missing_right(cause))), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """kombu and redis raise their own errors from the original one."""
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__


def _known(error: BaseException) -> Refusal | None:
    found = (refusal for kind, word, refusal in _KNOWN if isinstance(error, kind) and word in str(error))
    return next(found, None)


def _missing_right(error: BaseException) -> Refusal | None:
    text = str(error)
    if isinstance(error, NoPermissionError):
        command = re.search(r"run the '([a-z|_]{1,40})' command", text)
        things = re.search(r"access (?:a |the )?(?:'[^']*' )?(key|channel)", text)
        if command:
            what = f"the command {command[1].upper().replace('|', ' ')}"
            return Refusal(f"does not allow its user {what}", _RIGHTS, passes=False)
        if things:
            return Refusal(f"does not allow its user {things[1]}s of our names", _RIGHTS, passes=False)
    named = re.search(r"(queue|exchange) '([\w.@:-]{1,250})'", text)
    name = _ONE_OF_MANY.sub(".*", named[2]) if named else ""
    if isinstance(error, AccessRefused) and named:
        return Refusal(f"does not allow its user {error.method_name} of {named[1]} {name}", _RIGHTS, passes=False)
    if isinstance(error, PreconditionFailed) and named:
        advice = f"delete that {named[1]} when all nodes and routers of an older version have ended"
        return Refusal(f"has the {named[1]} {name} with other properties", advice, passes=False)
    return None
