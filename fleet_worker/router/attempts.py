"""The attempts of one request as a state machine. Pure: it has no clock, thread or connection.

                    a node accepts it
         waiting ───────────────────────> running ─────────────────┐
        ^       │                        │       │                 │
        │       │ its message is lost    │       │ its node is lost, or it failed in a way
        │       v                        │       v that another node may not
        └── pausing <────────────────────│───────┤
       next attempt                      │       │ no attempt or no time is left, or the request is to blame
                                         v       v
                       its last frame   ended <──┘ <──── given up, in any state

Frames of another attempt than the present one, or of another node than the one that accepted it, are dropped. So a lost
node that comes back, a message that the broker delivered twice and a reply that was published twice do no harm. If a
node accepts the same attempt a second time with another `Accepted` frame, it was killed and restarted and the broker
delivered the request again: the new answer is a different one, so the attempt has failed. If a frame is missing, its
node is asked to send it again; the attempt fails if it does not come within `GAP_CLOSES_WITHIN`.
"""

from __future__ import annotations

import math
import random
from typing import Any, Literal

from fleet_worker.errors import Expired, FleetError, NodeLost, PoisonSuspected, ReplyLost, StreamInterrupted
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.reply import (
    Accepted,
    Alive,
    Attempt,
    Delta,
    Deltas,
    Failure,
    Frame,
    LastFrame,
)
from fleet_worker.protocol.request import FleetRequest, Resume
from fleet_worker.router.blame import Blame
from fleet_worker.router.deaths import Deaths, Look, Silence
from fleet_worker.router.effects import AskAgain, CancelOrphan, Confirm, Deliver, Effect, End, RetryAfter, TellTime
from fleet_worker.router.progress import Progress
from fleet_worker.router.transcript import Transcript

OnInterrupt = Literal["resume", "fail"]
State = Literal["waiting", "running", "pausing", "ended"]

MOVED = "moved"
"""In the place of an error's code: the attempt waited in vain for the node that the router had chosen."""
RETRY_AFTER_MIN = 1.0
"""Seconds that a caller is told to wait at least, whatever a busy server has asked the router for."""
GAP_CLOSES_WITHIN = 1.5
"""Seconds to wait for a missing frame after a later one has arrived."""
ASK_AGAIN_EVERY = 0.5
"""Seconds in that time after which the node is asked once more: it may just have been cut off from the broker."""
_OF_ANY = {"accepted", "alive", "error"}
FRAMES = {
    "chat": frozenset({*_OF_ANY, "response"}),
    "stream_chat": frozenset({*_OF_ANY, "deltas", "response"}),
    "embed": frozenset({*_OF_ANY, "embedding"}),
}
"""By operation: the kinds of frames that its reply is made of."""
_WITHOUT_BODY = {"params": ChatParams.model_construct(messages=[]), "resume": None}
"""Of a request that has ended. An answer with an idempotency key is kept for a while; what was asked, perhaps with
images, is not."""
LONGEST_RETRY_AFTER = 24 * 3600.0
"""Seconds that a busy server may ask for at most: longer than any request lives."""


class Attempts:
    """The state of one request. Times are time.monotonic() seconds.

    Every method that changes the state returns the effects that its caller has to carry out, in their order.
    `request` is the present attempt, `node` the node that accepted it, `failed` the nodes on which earlier ones failed.
    """

    def __init__(
        self, request: FleetRequest, *, deadline: float, max_attempts: int, on_interrupt: OnInterrupt = "resume"
    ) -> None:
        self.request = request
        self._frames = FRAMES[request.operation]
        self.state: State = "waiting"
        self.node: str | None = None
        self.failed: set[str] = set()
        self.history: list[Attempt] = []
        """The attempts that are over."""
        self.delivered = Transcript()
        """What the readers got of a stream, from all attempts."""
        self._tokens = 0
        self.last: LastFrame | None = None
        """The frame with which it ended."""
        self._deadline = deadline
        self._began = deadline - request.timeout_seconds
        self._max_attempts = max_attempts
        self._on_interrupt = on_interrupt
        self.deaths = Deaths()
        self._blame = Blame()
        self._next_seq = 0
        self._gap_since: float | None = None
        self._asked_at = -math.inf
        """When the node was last asked for the missing frame."""
        self._accepted: Accepted | None = None
        self.waits_since = self._began
        """Since when it waits for a node, while none has it."""
        self._queue_wait = 0.0
        """Seconds from the submission of the request until a node accepted the present attempt."""
        self._resumes = False
        self._resumed = 0
        """How many times an answer of which a part was delivered has been continued."""
        self._uncounted = 0
        """Attempts that do not count: a node dropped them as expired by a wrong clock, or handed them over."""

    def wants(self, node: str, frame: Frame) -> bool:
        """Return whether this frame belongs to the present attempt, comes from the node that has it, and is of a kind
        that its operation has."""
        active = self.state == "running" or self.state == "waiting"
        is_of_attempt = active and frame.attempt == self.request.attempt and self.node in (None, node)
        return is_of_attempt and frame.kind in self._frames

    def take(self, node: str, frame: Frame, now: float) -> list[Effect]:
        """Take a frame that a node sent; ignore it if it is not wanted."""
        if not self.wants(node, frame):
            return []
        if isinstance(frame, Accepted) and self._accepted not in (None, frame):
            self.deaths.certain += 1
            return self.fail(NodeLost(f"{node} was restarted while it worked on the request"), now)
        if frame.seq < self._next_seq:
            return []
        if frame.seq > self._next_seq:
            self.node = node
            return self._gap(node, now)
        self._gap_since = None
        if isinstance(frame, Alive):
            return []
        self.node, self.state = node, "running"
        self._next_seq += 1
        if isinstance(frame, Deltas):
            return [self._deliver(frame)]
        if isinstance(frame, Failure):
            return self._take_failure(node, frame.error(), now)
        if isinstance(frame, Accepted):
            self._accepted, self._queue_wait = frame, max(0.0, now - self._began)
            return [Confirm(node, self.request.attempt)] if frame.asks else []
        timings = frame.timings.model_copy(update={"queue_wait": round(self._queue_wait, 6)})
        return [self._end(frame.model_copy(update={"timings": timings}))]

    def node_lost(self, now: float, silence: Silence | None = None) -> list[Effect]:
        """The node sent nothing for too long; with its whole host, if there is a `silence`."""
        if silence:
            self.deaths.fell_silent(silence, now, self._deadline)
        else:
            self.deaths.certain += 1
        return self.fail(NodeLost(f"{self.node} fell silent while it worked on the request"), now)

    def look_at_silent(self, look: Look, now: float) -> list[Effect]:
        """Decide about nodes that fell silent with their hosts: now it may be known whether they died."""
        self.deaths.look_at_silent(look, now)
        return self.give_up(self._poison()) if self.deaths.are_enough else []

    def message_lost(self, now: float) -> list[Effect]:
        """No node accepted the request in time and it is not in the lane any more: the message was lost, its consumer
        died, or its target node is gone."""
        return self.fail(NodeLost("no node took the request: its message, or the node that it was for, is gone"), now)

    def move(self) -> list[Effect]:
        """The node that it was sent to does not take it: send it elsewhere at once. That costs no attempt."""
        self._uncounted += 1
        effects = self._close_attempt(MOVED, orphaned=True)
        self.state = "pausing"
        return [*effects, RetryAfter(0.0)]

    @property
    def blamed(self) -> bool:
        """Return whether an instance died, or may have died, while it had this request."""
        return bool(self.deaths)

    @property
    def is_last(self) -> bool:
        """Return whether the present attempt is the last one that may be made."""
        return self.request.attempt - self._uncounted >= self._max_attempts

    def fail(
        self, error: FleetError, now: float, *, orphaned: bool = True, retryable: bool | None = None
    ) -> list[Effect]:
        """End this attempt. If `orphaned`, a node may still work on it. `retryable` overrules the error."""
        effects = self._close_attempt(error.code, orphaned=orphaned)
        self.deaths.certain += error.metadata.get("instance_died") is True
        if self.node:
            self.failed.add(self.node)
        if self._accepted:
            self.waits_since = now
        pause = _pause_before(self.request.attempt + 1, error)
        retryable = error.retryable if retryable is None else retryable
        to_blame = None if self.delivered else self._blame.verdict(self.node, error)
        if final := to_blame or self._final(error, now + pause, retryable):
            return [*effects, self._end(self._failure(final))]
        self.state = "pausing"
        return [*effects, RetryAfter(pause)]

    def next_attempt(self) -> FleetRequest:
        """End the pause and return the next attempt, which continues where the last one broke off."""
        self.request = self.request.model_copy(
            update={"attempt": self.request.attempt + 1, "resume": self._resume() if self.delivered else None}
        )
        self.state, self.node, self._next_seq, self._gap_since, self._accepted = "waiting", None, 0, None, None
        self._resumes = bool(self.delivered)
        return self.request

    def give_up(self, error: FleetError) -> list[Effect]:
        """End the request with this error, unless it has ended already."""
        if self.state == "ended":
            return []
        effects = [] if self.state == "pausing" else self._close_attempt(error.code, orphaned=True)
        return [*effects, self._end(self._failure(error))]

    def past(self) -> Deltas | None:
        """Return what was delivered as one frame, for a reader that comes later."""
        if not self.delivered:
            return None
        return Deltas(
            id=self.request.request_id,
            attempt=self.request.attempt,
            seq=max(0, self._next_seq - 1),
            deltas=self.delivered.deltas(),
            tokens=self._tokens,
        )

    def pack(self) -> int:
        """Keep what was delivered in one piece; return how many characters of JSON the whole answer has."""
        self.delivered.pack()
        return sum(len(frame.model_dump_json()) for frame in (self.past(), self.last) if frame)

    @property
    def progress(self) -> Progress:
        accepted = self._accepted
        return Progress(
            attempt=self.request.attempt,
            node=self.node,
            instance=accepted.instance if accepted else None,
            queue_wait=round(self._queue_wait, 6) if accepted else None,
            resumed=self._resumed,
            past=tuple(self.history),
        )

    def report(self, code: str) -> list[dict[str, Any]]:
        """Return all attempts, for the metadata of an error with this code; it counts as the end of the present one."""
        present = [self._present(code)] if self.state in ("waiting", "running") else []
        return [attempt.model_dump() for attempt in [*self.history, *present]]

    def _take_failure(self, node: str, error: FleetError, now: float) -> list[Effect]:
        """If a node says that the request has expired, and our clock that it has not, or if it hands the request over,
        the next attempt costs none."""
        self._uncounted += error.metadata.get("handed_over") is True
        if not isinstance(error, Expired) or now >= self._deadline:
            return self.fail(error, now, orphaned=False)
        self._uncounted += 1
        return [TellTime(node), *self.fail(error, now, orphaned=False, retryable=True)]

    def _gap(self, node: str, now: float) -> list[Effect]:
        """Frames after a missing one are dropped: the node sends all of them again when it is asked to."""
        if self._gap_since is None:
            self._gap_since, self._asked_at = now, -math.inf
        if now - self._gap_since >= GAP_CLOSES_WITHIN:
            return self.fail(ReplyLost(f"frame {self._next_seq} of the reply never arrived", retryable=True), now)
        if now - self._asked_at < ASK_AGAIN_EVERY:
            return []
        self._asked_at = now
        return [AskAgain(node)]

    def _deliver(self, frame: Deltas) -> Deliver:
        if self._resumes:
            self._resumes = False
            self._resumed += 1
            frame = frame.model_copy(update={"deltas": [Delta(resumed=True), *frame.deltas]})
        self.delivered.add(frame.deltas)
        self._tokens = frame.tokens
        return Deliver(frame)

    def _end(self, frame: LastFrame) -> End:
        if isinstance(frame, Failure):
            metadata = {**frame.metadata, "attempts": [each.model_dump() for each in self.history]}
            if "retry_after" in metadata:
                metadata["retry_after"] = max(_asked_pause(metadata), RETRY_AFTER_MIN)
            frame = frame.model_copy(update={"metadata": metadata})
        else:
            self._close_attempt(None, orphaned=False)
            frame = frame.model_copy(update={"attempts": self.history})
        self.state, self.last = "ended", frame
        self.request = self.request.model_copy(update=_WITHOUT_BODY)
        return End(frame)

    def _failure(self, error: FleetError) -> Failure:
        return Failure.of(error, self.request.request_id, self.request.attempt, self._next_seq)

    def _close_attempt(self, code: str | None, *, orphaned: bool) -> list[Effect]:
        self.history.append(self._present(code))
        return [CancelOrphan(self.node, self.request.attempt)] if orphaned else []

    def _present(self, code: str | None) -> Attempt:
        return Attempt(attempt=self.request.attempt, node=self.node, error=code, delivered=self.delivered.characters)

    def _final(self, error: FleetError, next_at: float, retryable: bool) -> FleetError | None:
        """Return the error that ends the request, or None if there is another attempt, at that time."""
        if self.deaths.are_enough:
            return self._poison()
        if not retryable or self.is_last or next_at >= self._deadline:
            return error
        if self.delivered and self._on_interrupt == "fail":
            return error
        if self.delivered and not self._can_be_continued():
            return StreamInterrupted(f"the stream broke off in what cannot be continued: {error.message}")
        return None

    def _poison(self) -> PoisonSuspected:
        died = f"{self.deaths.certain} instances died, or fell silent, with this request"
        return PoisonSuspected(f"{died}: it is not tried on another one")

    def _can_be_continued(self) -> bool:
        """A model can continue text, but not half a tool call or half a JSON document."""
        params = self.request.params
        free_text = isinstance(params, ChatParams) and (params.response_format or {}).get("type", "text") == "text"
        return free_text and not self.delivered.has_tool_calls

    def _resume(self) -> Resume:
        whole = self.delivered.whole()
        return Resume(content=whole["content"] or "", reasoning=whole["reasoning"] or "", tokens=self._tokens)


def _pause_before(attempt: int, error: FleetError) -> float:
    """Return the seconds to wait: exponential with jitter, or as long as a busy server asks for."""
    return max(_back_off(attempt), _asked_pause(error.metadata))


def _asked_pause(metadata: dict[str, Any]) -> float:
    """Return how many seconds a busy server wants to be left alone. It comes from a node, which may be any program."""
    asked = metadata.get("retry_after")
    return float(min(asked, LONGEST_RETRY_AFTER)) if isinstance(asked, int | float) and asked >= 0 else 0.0


def _back_off(attempt: int) -> float:
    return min(0.1 * 2.0 ** (attempt - 2), 5.0) + random.uniform(0.0, 0.1)  # noqa: S311 - not a secret
