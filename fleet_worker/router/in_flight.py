"""One request in flight: what `attempts.py` decides is done here, with threads, times and a broker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fleet_worker.broker.topology import direct_lane, lane
from fleet_worker.errors import BrokerUnavailable, Cancelled, Expired, FleetError, ReplyOverflow, RequestTimeout
from fleet_worker.protocol.reply import Accepted, Failure, Frame
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router.attempts import (
    AskAgain,
    Attempts,
    CancelOrphan,
    Deliver,
    Effect,
    End,
    OnInterrupt,
    RetryAfter,
)
from fleet_worker.router.reply_buffer import ReplyBuffer

if TYPE_CHECKING:
    from fleet_worker.router.session import Session

LOOKS_AGAIN = 1.0
"""Seconds between two looks for a request that is not in its lane, as an acceptance may be on its way; or between two
tries to reach a broker that is away."""

PATIENCE = 0.5
"""Seconds that the thread of the agenda waits for a broker: others have something due too."""


class InFlightRequest:
    """From the submission of a request to its end. It may have several readers, each of whom gets the whole answer.

    Frames come in the thread of the inbox, what is due in that of the agenda, readers in theirs.
    """

    def __init__(
        self, request: FleetRequest, node: str | None, session: Session, *, on_interrupt: OnInterrupt = "resume"
    ) -> None:
        self._node = node
        self._session = session
        self._deadline = time.monotonic() + request.remaining
        self._attempts = Attempts(
            request, deadline=self._deadline, max_attempts=session.settings.max_attempts, on_interrupt=on_interrupt
        )
        self._lock = threading.RLock()
        self._readers: list[ReplyBuffer] = []
        self._chosen = None if node else session.nodes.node_for(request)
        """Whom the attempt of the moment is for by the router's choice, not by its caller's."""
        self._submitted = 0.0
        """When the attempt of the moment was submitted."""
        self._heard = 0.0
        """When the node that has it was last heard, on the clock of the inbox."""
        self._missing_since: float | None = None
        """Since when it is not in its lane any more, on the same clock."""
        self.ended_at: float | None = None
        """Monotonic seconds."""

    @property
    def request(self) -> FleetRequest:
        """The present attempt; without its body once it has ended."""
        return self._attempts.request

    @property
    def lane(self) -> str:
        """Where the attempt of the moment waits, or waited."""
        node = self._node or self._chosen
        return direct_lane(node) if node else lane(self.request.operation, self.request.model)

    @property
    def answered(self) -> bool:
        """Has it ended, and well?"""
        last = self._attempts.last
        return last is not None and last.kind != "error"

    def pack(self) -> int:
        """Once it has been answered: keep the whole as one piece. Return how many characters that is, about."""
        with self._lock:
            return self._attempts.pack()

    # --- Its readers ---

    def join(self, timeout: float) -> ReplyBuffer | None:
        """Return where the whole answer arrives, from its beginning, for `timeout` seconds; None if it has failed."""
        deadline, room = time.monotonic() + timeout, self._session.settings.max_buffered
        with self._lock:
            past = self._attempts.delivered
            mailbox = ReplyBuffer(deadline=deadline, max_buffered=room + sum(len(frame.deltas) for frame in past))
            for frame in past:
                mailbox.put(frame)
            if self.answered and self._attempts.last:
                mailbox.put(self._attempts.last)
            elif self._attempts.last:
                return None
            else:
                self._readers.append(mailbox)
        return mailbox

    def leave(self, mailbox: ReplyBuffer) -> None:
        """A reader goes. When the last one has gone, nobody wants the answer."""
        mailbox.close()
        with self._lock:
            if mailbox in self._readers:
                self._readers.remove(mailbox)
                if not self._readers:
                    self.give_up(Cancelled("nobody waits for the answer any more"))

    def late(self, seconds: float) -> FleetError:
        """What a reader is told at its deadline, when its timeout of so many seconds is over."""
        with self._lock:
            if self._attempts.node or self._attempts.delivered:
                text = f"the answer was not complete within its timeout of {seconds:g} s"
                return RequestTimeout(text, attempts=self._attempts.report(RequestTimeout.code))
            if self._node:
                why = f"{self._node} did not take the request within its timeout of {seconds:g} s: it is busy or away"
            else:
                why = (
                    f"no node took the request within its timeout of {seconds:g} s: none serves "
                    f"{self.request.operation} of that model, or all are busy or cut off"
                )
            return Expired(why, attempts=self._attempts.report(Expired.code))

    # --- Its way ---

    def submit(self) -> None:
        """Send the first attempt; raises what the broker has against it, unless it was answered all the same."""
        try:
            self._send(self.request, self._session.settings.connect_timeout)
        except FleetError as error:
            self.give_up(error)
            if isinstance(self._attempts.last, Failure):
                raise self._attempts.last.error() from None
        except BaseException:  # a KeyboardInterrupt, too: others may have joined
            self.give_up(Cancelled("the request was not sent"))
            raise
        self._look_again(self._submitted + self._session.settings.accept_timeout)

    def receive(self, node: str, frame: Frame) -> bool:
        """Take a frame of this request; False if it is of an attempt that nobody wants any more."""
        with self._lock:
            if not self._attempts.wants(node, frame):
                return False
            self._heard = self._session.replies.clock
            if isinstance(frame, Accepted) and frame.seq == 0:
                self._session.admission.accepted(self.lane, frame.queue_wait, self.request.priority, self._submitted)
            self._carry_out(self._attempts.take(node, frame, time.monotonic()))
            return True

    def give_up(self, error: FleetError) -> None:
        """End it for all of its readers, who get this error."""
        with self._lock:
            self._carry_out(self._attempts.give_up(error))

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        """With the lock held: do what the state machine has decided."""
        for effect in effects:
            match effect:
                case Deliver(frame):
                    self._deliver(frame)
                case End(frame):
                    self._deliver(frame)
                    self._close()
                case RetryAfter(seconds):
                    self._session.scheduler.at(time.monotonic() + seconds, self._try_again)
                case CancelOrphan():
                    self._session.cancels.cancel(self.request.request_id, effect)
                case AskAgain(node):
                    self._session.cancels.missed(self._session.replies.name, node)

    def _send(self, request: FleetRequest, patience: float) -> None:
        self._missing_since = None
        try:
            self._session.submitter.submit(request, self.lane, patience=patience)
        finally:
            self._submitted = time.monotonic()

    def _deliver(self, frame: Frame) -> None:
        for mailbox in tuple(self._readers):
            if not mailbox.put(frame):
                self._overflow(mailbox)

    def _overflow(self, mailbox: ReplyBuffer) -> None:
        waiting = self._session.settings.max_buffered
        text = f"{waiting} deltas and more wait for a reader: read faster, or raise router.max_buffered"
        error = ReplyOverflow(text, attempts=self._attempts.report(ReplyOverflow.code))
        mailbox.put(Failure.of(error, self.request.request_id, self.request.attempt, 0))
        self.leave(mailbox)

    def _close(self) -> None:
        self.ended_at = time.monotonic()
        self._readers.clear()
        self._session.ended(self.request.request_id)

    # --- In the thread of the agenda ---

    def _try_again(self) -> None:
        with self._lock:
            if self._attempts.state != "pausing":
                return
            request, failed = self._attempts.next_attempt(), set(self._attempts.failed)
        self._chosen = None if self._node else self._session.nodes.node_for(request, failed)
        self._send_in_time(request)

    def _send_in_time(self, request: FleetRequest) -> None:
        """A broker that is away is tried until the deadline: nothing of the request is lost by that."""
        if self._attempts.state != "waiting" or self._attempts.request is not request:
            return
        try:
            self._send(request, PATIENCE)
        except FleetError as error:
            if not isinstance(error, BrokerUnavailable) or not error.retryable:
                self.give_up(error)
                return
            self._session.scheduler.at(time.monotonic() + LOOKS_AGAIN, lambda: self._send_in_time(request))

    def _look(self) -> None:
        """Look whether something is wrong, and come back."""
        now, state = time.monotonic(), self._attempts.state
        if state == "ended":
            return
        if now >= self._deadline:
            self.give_up(self.late(self.request.timeout_seconds))
            return
        looks = {"waiting": self._look_for_it, "running": self._listen_for_life}
        again = now + LOOKS_AGAIN
        try:
            again = looks[state](now) if state in looks else again
        finally:
            self._look_again(again)

    def _look_again(self, moment: float) -> None:
        self._session.scheduler.at(min(moment, self._deadline), self._look)

    def _look_for_it(self, now: float) -> float:
        """Is it still in its lane? Return when to look again."""
        settings, inbox = self._session.settings, self._session.replies
        request, due = self._attempts.request, self._submitted + settings.accept_timeout
        if now < due:
            return due
        waits = self._session.admission.waits(self.lane, request.priority, self._submitted, PATIENCE)
        if waits and self._is_stranded(request):
            self._untaken(request, now)
        elif waits is not False:
            self._missing_since = None
            return now + (settings.accept_timeout if waits else LOOKS_AGAIN)
        elif self._missing_since is None:
            self._missing_since = inbox.clock
        elif inbox.silence(self._missing_since) >= LOOKS_AGAIN:
            self._untaken(request, now)
        return now + LOOKS_AGAIN

    def _is_stranded(self, request: FleetRequest) -> bool:
        """Does it wait for one node only, which is not there? The last attempt waits until that comes back."""
        chosen, last = self._chosen, self._session.settings.max_attempts
        return chosen is not None and request.attempt < last and self._session.nodes.waits_in_vain(request, chosen)

    def _untaken(self, request: FleetRequest, now: float) -> None:
        with self._lock:
            if self._attempts.state == "waiting" and self._attempts.request is request:
                self._carry_out(self._attempts.message_lost(now))

    def _listen_for_life(self, now: float) -> float:
        """Is the node that has it still there? Return when to listen again."""
        lost_after = self._session.settings.lost_after
        with self._lock:
            left = lost_after - self._session.replies.silence(self._heard)
            if left <= 0 and self._attempts.state == "running":
                self._carry_out(self._attempts.node_lost(now))
        return now + max(left, 0.1)
