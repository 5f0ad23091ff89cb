"""What becomes known of a request: for headers of its answer, access log, ledger and metrics. It holds no text of
the request or the answer."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fleet_worker.gateway.accounts.ledger_file import Row
from fleet_worker.gateway.http.response import Header
from fleet_worker.protocol.reply import CacheOutcome, ChatResponse, EmbedResponse, Usage
from fleet_worker.router.progress import Progress

_NOT_PRINTABLE = re.compile(r"[^ -~]")


@dataclass(slots=True)
class Facts:
    """Of one request. Times are seconds; what is not known is None."""

    began: float = field(default_factory=time.monotonic)
    """time.monotonic() seconds."""
    at: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    key: str | None = None
    tags: tuple[str, ...] = ()
    operation: str | None = None
    model_asked: str | None = None
    """As the client names it."""
    model: str | None = None
    """Of the fleet, that was tried last."""
    node: str | None = None
    attempts: int = 0
    resumed: bool = False
    queue_wait: float | None = None
    ttft: float | None = None
    """From the arrival of the request to the first delta."""
    usage: Usage = field(default_factory=Usage)
    """As the server counted. If the answer has no end: about how many tokens were delivered."""
    cache: CacheOutcome | None = None
    """Whether the prompt met its cache. None without an answer, or if its server does not tell what was cached."""
    prompt_estimate: int = 0
    """Tokens of the prompt, before anybody has counted them."""
    limits: Sequence[Header] = ()
    """Headers that tell what is left of the limits of the key."""
    error: str | None = None
    """The code of the problem."""

    @property
    def duration(self) -> float:
        return time.monotonic() - self.began

    @property
    def prompt_tokens(self) -> int:
        """As the server counted; about as many if it has not, though a node had the request."""
        counted = self.usage.prompt_tokens or (self.usage.total_tokens or 0) - self.completion_tokens
        return counted if counted > 0 else self.prompt_estimate if self.node else 0

    @property
    def completion_tokens(self) -> int:
        return self.usage.completion_tokens or 0

    def note_first_token(self, progress: Progress | None) -> None:
        self.ttft = self.duration
        self._note_progress(progress)

    def note_cut_off(self, progress: Progress | None, tokens: int) -> None:
        """Note how far an answer came that its client left, or that failed."""
        self._note_progress(progress)
        self.usage = Usage(completion_tokens=tokens)

    def _note_progress(self, progress: Progress | None) -> None:
        if progress:
            self.node = progress.node or self.node  # none, if the answer was cut off while it waited for another one
            self.attempts, self.queue_wait = progress.attempt, progress.queue_wait
            self.resumed = progress.resumed > 0

    def note_answer(self, response: ChatResponse | EmbedResponse) -> None:
        self.node, self.attempts = response.node, len(response.attempts)
        self.queue_wait, self.usage = response.timings.queue_wait, response.usage
        self.resumed = any(attempt.delivered for attempt in response.attempts[:-1])
        self.cache = response.cache if isinstance(response, ChatResponse) else None

    def headers(self) -> list[Header]:
        """What was asked, what answers, and what is left."""
        fields = {
            b"x-fleet-requested-model": self.model_asked,
            b"x-fleet-model": self.model,
            b"x-fleet-node": self.node,
            b"x-fleet-attempts": str(self.attempts) if self.attempts else None,
            b"x-fleet-resumed": str(self.resumed).lower() if self.attempts else None,
            b"x-fleet-cache": self.cache,
            b"server-timing": self._timing() or None,
        }
        own = [(name, _printable(value).encode("ascii")) for name, value in fields.items() if value is not None]
        return [*own, *self.limits]

    def line(self, request_id: str) -> str:
        """Return a line for the log."""
        fields: dict[str, object] = {
            "key": self.key,
            "model": self.model,  # not what was asked: that may be any text
            "node": self.node,
            "attempts": self.attempts or None,
            "in": self.prompt_tokens or None,
            "out": self.completion_tokens or None,
            "cached": self.usage.cached_tokens or None,
            "cache": self.cache,
            "wait": _rounded(self.queue_wait),
            "ttft": _rounded(self.ttft),
            "total": _rounded(self.duration),
            "error": self.error,
            "id": request_id,
        }
        return " ".join(f"{name}={_word(value)}" for name, value in fields.items() if value is not None)

    def row(self, request_id: str, key: str, operation: str, status: int) -> Row:
        """Return the row of the ledger."""
        return Row(
            at=self.at,
            request_id=request_id,
            key=key,
            tags=self.tags,
            operation=operation,
            model_asked=self.model_asked if self.model else None,  # a name that is not known may be any text
            model=self.model,
            node=self.node,
            attempts=self.attempts,
            resumed=self.resumed,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.usage.cached_tokens or 0,
            cache=self.cache,
            queue_wait=self.queue_wait,
            ttft=self.ttft,
            duration=self.duration,
            status=status,
            error=self.error,
        )

    def _timing(self) -> str:
        seconds = {"queue": self.queue_wait, "ttft": self.ttft, "total": self.duration}
        return ", ".join(f"{name};dur={1000 * each:.1f}" for name, each in seconds.items() if each is not None)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _word(value: object) -> str:
    return _printable(str(value)).replace(" ", "_")


def _printable(text: str) -> str:
    """Return what can be a header value. A model may have any name."""
    return _NOT_PRINTABLE.sub("?", text[:255])
