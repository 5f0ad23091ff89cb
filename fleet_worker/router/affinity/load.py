"""What one node has to do: what it told last, and what this router has sent there since."""

from __future__ import annotations

from dataclasses import dataclass

from fleet_worker.protocol.cache_digest import CacheDigest

BELIEVED_FOR = 30.0
"""Seconds for which the number of running requests counts that a node told."""
INTERVALS = 2.5
"""A node is silent if no digest has come for so many times the seconds that it takes between two."""


@dataclass(slots=True)
class Sent:
    """One request of this router at a node."""

    prefill: float
    """Seconds of prefill that it takes there; 0 after its first token."""
    accepted: bool = False
    told: bool = False
    """Whether the node's last word counts it."""


class NodeLoad:
    """The load of one node. Not thread-safe. Times are those of one monotonic clock."""

    __slots__ = (
        "_at",
        "_own",
        "_prefill",
        "_prefill_left",
        "_running",
        "_untold",
        "_untold_prefill",
        "decode_speed",
        "epoch",
        "heard_at",
        "interval",
        "name",
        "prefill_speed",
        "slots",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.slots = 1
        self.heard_at: float | None = None
        """When its last digest came; None from a node that sends none."""
        self.interval = 0.0
        self.epoch: int | None = None
        self.prefill_speed: float | None = None
        self.decode_speed: float | None = None
        self._at = float("-inf")
        self._running, self._prefill_left = 0, 0.0
        self._own: dict[str, Sent] = {}
        self._prefill = self._untold_prefill = 0.0
        self._untold = 0

    def busy(self, now: float) -> int:
        """Return how many requests it has: those of this router, or all that it told and what was sent since."""
        told = self._running if now - self._at < BELIEVED_FOR else 0
        return max(len(self._own), told + self._untold)

    def prefill_before(self, now: float) -> float:
        """Return the seconds of prefill that a new request has to wait for."""
        told = max(0.0, self._prefill_left - (now - self._at))
        return max(self._prefill, told + self._untold_prefill)

    def is_silent(self, now: float, seconds: float) -> bool:
        """Return whether no digest has come for `seconds`, and for longer than there are between two. Nodes that run
        nothing may have nothing to tell."""
        return self.heard_at is not None and now - self.heard_at > max(seconds, INTERVALS * self.interval)

    @property
    def is_running(self) -> bool:
        """Return whether it ran something when it told so last."""
        return self._running > 0

    @property
    def told_free(self) -> bool:
        """Return whether it had a free slot when it told so last."""
        return self._running < self.slots

    def tell(self, digest: CacheDigest, interval: float, now: float) -> None:
        """Learn a digest, which came `now`."""
        self.heard_at, self.interval, self.epoch = now, interval, digest.epoch
        self.prefill_speed, self.decode_speed = digest.prefill_speed, digest.decode_speed
        self._learn(digest.slots, digest.running, digest.prefill_left, now)

    def tell_of_registry(self, slots: int, running: int, heard_at: float) -> None:
        """Learn what the registry knows, if the node sends no digests."""
        if self.heard_at is None and heard_at > self._at:
            self._learn(slots, running, 0.0, heard_at)

    def send(self, request_id: str, prefill: float, *, accepted: bool) -> None:
        self.end(request_id)
        self._own[request_id] = Sent(prefill, accepted)
        self._count()

    def accept(self, request_id: str) -> None:
        if sent := self._own.get(request_id):
            sent.accepted = True

    def first_token(self, request_id: str) -> None:
        if sent := self._own.get(request_id):
            sent.prefill = 0.0
            self._correct(sent)
            self._count()

    def end(self, request_id: str) -> None:
        sent = self._own.pop(request_id, None)
        if sent is not None:
            self._running = max(0, self._running - sent.told)
            self._correct(sent)
            self._count()

    def _learn(self, slots: int, running: int, prefill_left: float, now: float) -> None:
        self.slots = slots or 1
        self._running, self._prefill_left, self._at = running, prefill_left, now
        for sent in self._own.values():
            sent.told = sent.accepted
        self._count()

    def _correct(self, done: Sent) -> None:
        """Take what is done from what the node told, if all that it runs is of this router. The next turn of an agent
        comes at once: until another digest comes, it must not find its node busy with the turn before."""
        told = [sent.prefill for sent in self._own.values() if sent.told]
        if done.told and self._running <= len(told):
            self._prefill_left = min(self._prefill_left, sum(told))

    def _count(self) -> None:
        """Count again what this router has there: there are few, and this is read more often."""
        self._prefill = sum(sent.prefill for sent in self._own.values())
        self._untold = sum(not sent.told for sent in self._own.values())
        self._untold_prefill = sum(sent.prefill for sent in self._own.values() if not sent.told)
