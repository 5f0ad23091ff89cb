"""The status of an instance and of its models: one shape from the node that measures it to what operators see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

SHOWN = 1_000
"""Characters of a reason that are kept."""


# The bounds of what arrives from another process.
Name = Annotated[str, Field(max_length=255)]
Reason = Annotated[str, AfterValidator(lambda text: text[:SHOWN])]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Total = Annotated[int, Field(ge=0, le=2**53)]
Measured = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
MOST_TROUBLES = 10

Status = Literal["starting", "available", "degraded", "unavailable", "drained", "away"]
"""`away`: the owner of the machine needs it. To an older router it is, as all that it does not know, not ready."""
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTrouble:
    """Why the prompt cache of a server helps less than it could: what `fleet-worker doctor` explains."""

    kind: Name
    """`changing`: prompts begin differently in each turn of a conversation. `unused`: nothing of what should be cached
    was. `small`: a larger cache would have held it. A newer node may know more kinds."""
    model: Name = ""
    """Of the last request that showed it."""
    count: Count = 0
    of: Count = 0
    """How many requests showed it, of those that could."""
    request_id: Name = ""
    """The last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStatus:
    """One MLX server and its node. Ages are seconds; `heard_at` and `expires_at` are time.monotonic() seconds of the
    router that received the status, and 0 elsewhere.
    """

    host: Name
    name: Name
    """The name of the instance, as in `local`."""
    node: Name = ""
    """The name of its node, as in `local@mini-7`."""
    status: Name
    """One of `Status`, or what a newer host may send."""
    reason: Reason = ""
    """Why it is not available; empty if it is."""
    server: Name = ""
    """The kind of MLX server, as in `mlx_lm`."""
    version: Name = ""
    """Of fleet-worker on that host."""
    pid: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """The process id of the node; None if no node reports."""
    process: Name = ""
    """A random name of that process: after a restart of its host, or of a container, the process id may be the same.
    Empty from an older version."""
    server_restarts: Total | None = None
    """How often its server was restarted, or replaced, since that process began; None from an older version."""
    server_stage: Name = ""
    """One of `host_messages.STAGES`, or what a newer host may send; empty if its host does not manage the server."""
    server_deaths: Total | None = None
    """How often the server has ended by itself since `fleet-worker up` began; None if that does not manage it."""
    server_memory: Total | None = None
    """Bytes of all processes of the server; None if that is not known."""
    slots: Count = 0
    running: Count = 0
    tokens_per_second: Measured = 0.0
    last_token_age: Measured | None = None
    """Since it delivered a token, when it was reported; None if it has delivered none yet."""
    lanes: tuple[Name, ...] = ()
    """The lanes that its node consumes now."""
    prompt_tokens: Total | None = None
    """Of all chats that its node has answered; None from an older version."""
    cached_tokens: Total | None = None
    """How many of these the server had in its prompt cache; None if it does not tell."""
    cache_troubles: Annotated[tuple[CacheTrouble, ...], Field(max_length=MOST_TROUBLES)] = ()
    status_age: float | None = field(default=None, compare=False)
    """Since it has this status, when it was reported; None from an older version."""
    clock_ahead: float | None = field(default=None, compare=False)
    """Seconds by which the clock of its host was ahead of that of the router that received this; None if unknown."""
    heard_at: float = field(default=0.0, compare=False)
    expires_at: float = field(default=0.0, compare=False)

    @property
    def ready(self) -> bool:
        return self.status == "available"

    @property
    def cached_share(self) -> float | None:
        """How much of all prompts came from the cache, from 0 to 1; None if that is not known."""
        if self.cached_tokens is None or not self.prompt_tokens:
            return None
        return min(1.0, self.cached_tokens / self.prompt_tokens)

    @property
    def free(self) -> int:
        """Free slots: never negative, though more may run for a while after the limit was lowered."""
        return max(0, self.slots - self.running)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model of one instance. Its `status` is that of the instance, or unavailable if the server lacks the model."""

    model: Name
    capabilities: tuple[Name, ...] = ()
    features: tuple[Name, ...] = ()
    limits: dict[Name, int | Measured | Name | None] = field(default_factory=dict)
    status: Name
    expires_at: float = field(default=0.0, compare=False)
