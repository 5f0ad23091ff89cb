"""What the processes of one host say to `fleet-worker up`, and it to them: each message is one line of JSON.

`host/up_socket` carries them. Every message of `up` tells a state, not a step: it may be sent twice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter
from pydantic_core import to_json

from fleet_worker.protocol.status import Count, Name, Reason, Total

LONGEST_LINE = 64 * 1024
"""Bytes of a line, its end included. The reader of a longer one closes the connection."""
MOST_SERVERS = 64

Stage = Literal["starting", "serving", "stopping", "waiting", "quarantined", "blocked", "off"]
"""`starting`: it does not accept connections yet. `waiting`: for the next start, after a death. `quarantined`: it died
too often, and is started once in a while only. `blocked`: another program has its port. `off`: the owner uses the Mac.
"""
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True, slots=True)
class NodeNews:
    """A node tells what it does: at once after each order, and when `running` becomes or leaves 0, `idle` or `fault`
    change.
    """

    node: Name
    running: Count = 0
    idle: bool = False
    """The pause of `order` is complete: the node has left its lanes, and all of its requests have ended or been handed
    over. Never true without a pause."""
    fault: Reason = ""
    """Why its server must be restarted, or empty. A node forgets its fault when it takes an order."""
    order: Count = 0
    """The number of the last order that it has taken; 0 before the first one."""
    pid: Annotated[int, Field(ge=0, lt=2**31)] = field(default_factory=os.getpid, compare=False)
    """Of the node: one that an earlier `up` has started may still be ending."""
    kind: Literal["news"] = "news"


@dataclass(frozen=True, slots=True)
class Pause:
    """An order to a node: leave the lanes, let running requests end for `grace` seconds, hand over the rest, and tell
    then that you are idle. One that comes during a pause replaces it; only a shorter `grace` changes anything then.
    """

    status: Literal["away", "restarting"]
    reason: Reason
    grace: Annotated[float, Field(ge=0, le=86_400)]
    """Seconds from now."""
    order: Count
    kind: Literal["pause"] = "pause"


@dataclass(frozen=True, slots=True)
class Resume:
    """An order to a node: there is no pause, or no longer. Its server accepts connections."""

    order: Count
    kind: Literal["resume"] = "resume"


@dataclass(frozen=True, slots=True)
class Restart:
    """A wish of an operator: restart the server of an instance, or its node. `Done` follows at once, the restart then.

    A server that is quarantined or waits is tried now.
    """

    instance: Name
    server: bool
    kind: Literal["restart"] = "restart"


@dataclass(frozen=True, slots=True)
class Reload:
    """Read the configuration again. `Done` follows when all changes have begun."""

    kind: Literal["reload"] = "reload"


@dataclass(frozen=True, slots=True)
class Watch:
    """Send a `HostStatus` now, and after each change."""

    kind: Literal["watch"] = "watch"


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to `Restart` and `Reload`."""

    error: Reason = ""
    """Why it was refused; empty if it was not."""
    text: Reason = ""
    """What was changed."""
    kind: Literal["done"] = "done"


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """A managed server."""

    instance: Name
    stage: Name
    """One of `STAGES`, or what a newer version may send."""
    reason: Reason = ""
    """Why it does not serve; empty if it does."""
    pid: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    restarts: Count = 0
    """Since `up` began, for whatever reason."""
    memory: Total | None = None
    """Bytes of all its processes; None if that is not known."""
    deaths: Count = 0
    """How many of `restarts` nobody has asked for."""


@dataclass(frozen=True, slots=True)
class HostStatus:
    """What `up` tells a watcher. An instance whose server is not managed is not in it."""

    servers: Annotated[tuple[ServerStatus, ...], Field(max_length=MOST_SERVERS)] = ()
    away: Reason = ""
    """Why the nodes of this host take no work: its owner comes first. Empty if they do."""
    kind: Literal["status"] = "status"


Order = Pause | Resume
ToUp = NodeNews | Restart | Reload | Watch
FromUp = Pause | Resume | Done | HostStatus

TO_UP: TypeAdapter[ToUp] = TypeAdapter(Annotated[ToUp, Field(discriminator="kind")])
FROM_UP: TypeAdapter[FromUp] = TypeAdapter(Annotated[FromUp, Field(discriminator="kind")])
"""`validate_json` of both raises `pydantic.ValidationError`."""


def to_line(message: ToUp | FromUp) -> bytes:
    return to_json(message) + b"\n"
