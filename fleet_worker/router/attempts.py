"""The attempts of one request, as a state machine: pure, without a clock, a thread or a connection of its own.

                    a node accepts it
         waiting ───────────────────────> running ─────────────────┐
        ^       │                        │       │                 │
        │       │ nobody took it         │       │ its node is lost, or it failed as
        │       v                        │       v another node may not
        └── pausing <────────────────────│───────┤
       next attempt                      │       │ no attempt, no time, or no instance to risk is left
                                         v       v
                       its last frame   ended <──┘ <──── given up, from any state

What arrives for another attempt than the present one, or from another node than the one that accepted it, is dropped:
so a node that was lost and comes back, a message that the broker delivered twice and a reply that was published twice
are all the same, and harmless. But a node that accepts its attempt a second time, and not in the same words, was killed
and restarted, and the broker has delivered it again: that is another answer. A frame that is missing is asked for; if
it does not come within `GAP_CLOSES_WITHIN`, the attempt has failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tenacity import RetryCallState, wait_exponential, wait_random

from fleet_worker.errors import FleetError, NodeLost, PoisonSuspected, ReplyLost, StreamInterrupted
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.reply import (
    Accepted,
    Alive,
    Attempt,
    ChatResponse,
    Delta,
    Deltas,
    EmbedResponse,
    Failure,
    Frame,
    join,
)
from fleet_worker.protocol.request import FleetRequest, Resume

OnInterrupt = Literal["resume", "fail"]
State = Literal["waiting", "running", "pausing", "ended"]

MOST_DEATHS = 2
"""So many instances may die of a request, or just while they have it, until it is taken for the reason."""
GAP_CLOSES_WITHIN = 1.5
"""Seconds that a missing frame is waited for, once one is there that comes after it."""
_BACK_OFF = wait_exponential(multiplier=0.1, max=5.0) + wait_random(max=0.1)


@dataclass(frozen=True, slots=True)
class OrphanedAttempt:
    """An attempt that may still run somewhere, and that nobody wants any more."""

    node: str | None
    """None if it is not known who has it."""
    attempt: int


class Attempts:
    """One request on its way through any number of nodes. Moments are monotonic seconds.

    `request` is the attempt of the moment, `node` who accepted it, `failed` the nodes on which earlier ones failed.
    Whoever calls a method looks at `state`, `leftovers` and `misses` afterwards.
    """

    def __init__(
        self, request: FleetRequest, *, deadline: float, max_attempts: int, on_interrupt: OnInterrupt = "resume"
    ) -> None:
        self.request = request
        self.state: State = "waiting"
        self.node: str | None = None
        self.failed: set[str] = set()
        self.history: list[Attempt] = []
        self.leftovers: list[OrphanedAttempt] = []
        self.pause = 0.0
        """Seconds until the next attempt, while pausing."""
        self.delivered: list[Deltas] = []
        """What was delivered of a stream, by all attempts."""
        self.last: ChatResponse | EmbedResponse | Failure | None = None
        """How it ended."""
        self._deadline = deadline
        self._max_attempts = max_attempts
        self._on_interrupt = on_interrupt
        self._deaths = 0
        self._next_seq = 0
        self._gap_since: float | None = None
        self.misses: str | None = None
        """Which node has sent a frame that never arrived; for whoever asks it for that."""
        self._accepted: Accepted | None = None
        self._resumes = False

    def wants(self, node: str, frame: Frame) -> bool:
        """Is this a frame of the present attempt, from the node that has it?"""
        active = self.state == "running" or self.state == "waiting"
        return active and frame.attempt == self.request.attempt and self.node in (None, node)

    def take(self, node: str, frame: Frame, now: float) -> Frame | None:
        """Take what a node sent. Return what the reader gets of it: deltas, or how the request ended."""
        if not self.wants(node, frame):
            return None
        if isinstance(frame, Accepted) and self._accepted not in (None, frame):
            return self.fail(NodeLost(f"{node} was restarted while it worked on the request"), now)
        if frame.seq < self._next_seq:
            return None
        if frame.seq > self._next_seq:
            self.node = node
            return self._gap(now)
        self._gap_since = None
        if isinstance(frame, Alive):
            return None
        self.node, self.state = node, "running"
        self._next_seq += 1
        if isinstance(frame, Deltas):
            return self._deliver(frame)
        if isinstance(frame, Failure):
            return self.fail(frame.error(), now, left_over=False)
        if isinstance(frame, Accepted):
            self._accepted = frame
            return None
        return self._end(frame)

    def lost(self, now: float) -> Frame | None:
        """Nothing was heard of the node for too long."""
        return self.fail(NodeLost(f"{self.node} fell silent while it worked on the request"), now)

    def untaken(self, now: float) -> Frame | None:
        """Nobody took it, and nobody will: its message is lost, died with whoever had just taken it, or is for a node
        that is not there any more."""
        return self.fail(NodeLost("no node took the request: its message, or the node that it was for, is gone"), now)

    def fail(self, error: FleetError, now: float, *, left_over: bool = True) -> Frame | None:
        """This attempt is over: pause before the next one, or end. Return the failure if that is the end."""
        self._close_attempt(error.code, left_over=left_over)
        self._deaths += error.metadata.get("instance_died") is True or (
            isinstance(error, NodeLost) and self.node is not None
        )
        if self.node:
            self.failed.add(self.node)
        self.pause = _pause_before(self.request.attempt + 1, error)
        if final := self._final(error, now):
            return self._end(self._failure(final))
        self.state = "pausing"
        return None

    def again(self) -> FleetRequest:
        """The pause is over: return the next attempt, which goes on where the last one broke off."""
        self.request = self.request.model_copy(
            update={"attempt": self.request.attempt + 1, "resume": self._resume() if self.delivered else None}
        )
        self.state, self.node, self._next_seq, self._gap_since, self._accepted = "waiting", None, 0, None, None
        self._resumes = bool(self.delivered)
        return self.request

    def give_up(self, error: FleetError) -> Frame | None:
        """Nobody waits for it any more, or its time is over. Return the failure if it had not ended before."""
        if self.state == "ended":
            return None
        if self.state != "pausing":
            self._close_attempt(error.code, left_over=True)
        return self._end(self._failure(error))

    def pack(self) -> int:
        """Make one piece of what was delivered; return the characters of the whole answer, about."""
        if len(self.delivered) > 1:
            whole = Delta.model_validate(join(self._deltas()))
            self.delivered = [self.delivered[-1].model_copy(update={"deltas": [whole]})]
        if isinstance(self.last, EmbedResponse):
            return sum(map(len, self.last.data))
        pieces: list[Delta | ChatResponse] = list(self._deltas())
        if isinstance(self.last, ChatResponse):
            pieces.append(self.last)
        return sum(len(f"{each.content}{each.reasoning}{each.tool_calls}") for each in pieces)

    def told(self, code: str | None = None) -> list[dict[str, Any]]:
        """All attempts, for an error; with a code also the present one, as if that had ended it."""
        present = [self._present(code)] if code and self.state in ("waiting", "running") else []
        return [attempt.model_dump() for attempt in [*self.history, *present]]

    def _gap(self, now: float) -> Frame | None:
        """A frame is missing, and until it comes those after it are of no use. Its node can send all of them again."""
        if self._gap_since is None:
            self._gap_since, self.misses = now, self.node
        if now - self._gap_since < GAP_CLOSES_WITHIN:
            return None
        return self.fail(ReplyLost(f"frame {self._next_seq} of the reply never arrived", retryable=True), now)

    def _deliver(self, frame: Deltas) -> Deltas:
        if self._resumes:
            self._resumes = False
            frame = frame.model_copy(update={"deltas": [Delta(resumed=True), *frame.deltas]})
        self.delivered.append(frame)
        return frame

    def _end(self, frame: ChatResponse | EmbedResponse | Failure) -> Frame:
        if not isinstance(frame, Failure):
            self._close_attempt(None, left_over=False)
            frame = frame.model_copy(update={"attempts": self.history})
        else:
            frame = frame.model_copy(update={"metadata": {**frame.metadata, "attempts": self.told()}})
        self.state, self.last = "ended", frame
        return frame

    def _failure(self, error: FleetError) -> Failure:
        return Failure.of(error, self.request.request_id, self.request.attempt, self._next_seq)

    def _close_attempt(self, code: str | None, *, left_over: bool) -> None:
        self.history.append(self._present(code))
        if left_over:
            self.leftovers.append(OrphanedAttempt(self.node, self.request.attempt))

    def _present(self, code: str | None) -> Attempt:
        said = sum(len(delta.content or "") for delta in self._deltas())
        return Attempt(attempt=self.request.attempt, node=self.node, error=code, delivered=said)

    def _final(self, error: FleetError, now: float) -> FleetError | None:
        """What the request ends with if there is to be no further attempt."""
        if self._deaths >= MOST_DEATHS:
            return PoisonSuspected(
                f"{self._deaths} instances died, or fell silent, with this request: it is not tried on another one"
            )
        if not error.retryable or self.request.attempt >= self._max_attempts or now + self.pause >= self._deadline:
            return error
        if self.delivered and self._on_interrupt == "fail":
            return error
        if self.delivered and not self._can_be_continued():
            return StreamInterrupted(f"the stream broke off in what cannot be continued: {error.message}")
        return None

    def _can_be_continued(self) -> bool:
        """Half a tool call, or half a JSON document, has no text that a model could go on with."""
        params = self.request.params
        free_text = isinstance(params, ChatParams) and (params.response_format or {}).get("type", "text") == "text"
        return free_text and not any(delta.tool_calls for delta in self._deltas())

    def _resume(self) -> Resume:
        whole = join(self._deltas())
        return Resume(
            content=whole["content"] or "", reasoning=whole["reasoning"] or "", tokens=self.delivered[-1].tokens
        )

    def _deltas(self) -> Iterable[Delta]:
        return (delta for frame in self.delivered for delta in frame.deltas)


def _pause_before(attempt: int, error: FleetError) -> float:
    """Back off with jitter, or for as long as a busy server asks for."""
    state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]
    state.attempt_number = attempt - 1
    asked = error.metadata.get("retry_after")
    return max(float(_BACK_OFF(state)), float(asked) if isinstance(asked, int | float) else 0.0)
