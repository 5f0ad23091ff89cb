"""Digests: what nodes tell all routers about the prompt caches of their MLX servers, and how routers ask for that.

The registry node of a host publishes them, best effort, and only while a router wants them. They show no text: a prefix
is known by a keyed hash only.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from fleet_worker.protocol.prompt_prefixes import ID
from fleet_worker.protocol.status import Count, Measured, Name
from fleet_worker.protocol.wire import BrokerMessage, ExtensibleModel

MOST_HELD: Final = 1_000
"""Prefixes in the digest of one node."""
MOST_DIGESTS: Final = 100
"""Nodes in one message."""
LEASE: Final = 90.0
"""Seconds for which a router wants digests. It says so again long before they are over."""
USUAL_PREFILL_SPEED: Final = 400.0
"""Tokens per second that nodes and routers assume until it was measured: a model of 8B in 4 bits on an M4 Pro."""

PrefixId = Annotated[str, Field(pattern=rf"^{ID}$")]
"""A keyed hash of the beginning of a prompt: 64 bits in base64url (`prompt_prefixes`)."""


class CacheDigest(ExtensibleModel):
    """What one node knows about the load and the prompt cache of its MLX server. Speeds are tokens per second, and None
    until they were measured.
    """

    node: Name
    """As in `local@mini-7`."""
    slots: Count
    running: Count
    """Requests that it has begun and not ended."""
    prefill_left: Measured = 0.0
    """Seconds of prefill that a new request has to wait for: what is under way or before it."""
    prefill_speed: Measured | None = None
    decode_speed: Measured | None = None
    """Of a stream that runs alone."""
    epoch: int = Field(default=0, ge=0, lt=2**63)
    """Grows whenever the server was restarted, which has emptied the cache. Not when it loads another model: to warm
    the cache again for that would swap the model back."""
    held: list[PrefixId] = Field(default=[], max_length=MOST_HELD)
    """Prefixes that the cache is believed to hold."""
    room: Count | None = None
    """Prompts that it takes before one of those that it holds has to go; None if that is not known."""


class DigestMessage(BrokerMessage):
    """The digests of all nodes of one host. While one of them runs something, the next message follows within
    `interval` seconds."""

    v: Literal[1]
    host: Name
    interval: float = Field(gt=0)
    digests: list[CacheDigest] = Field(max_length=MOST_DIGESTS)


class DigestsWanted(BrokerMessage):
    """A router wants digests for the next `seconds`, on the exchange on which it asks for the status of all hosts."""

    v: Literal[1]
    hosts: Count
    """How many the router knows: with more of them, each publishes less often."""
    seconds: float = Field(gt=0)
    at_once: bool = False
    """The router knows no digests: each host publishes them soon, also without a change."""
