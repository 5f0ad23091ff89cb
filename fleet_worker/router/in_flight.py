"""One request in flight: carries out what `attempts` decides, with threads, time and a broker."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from typing import Protocol

from fleet_worker.errors import (
    BrokerUnavailable,
    Cancelled,
    Expired,
    FleetError,
    QueueTimeout,
    ReplyOverflow,
    RequestTimeout,
)
from fleet_worker.protocol.reply import Accepted, Failure, Frame, LastFrame
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.router.absence_watch import AbsenceWatch
from fleet_worker.router.admission import Admission
from fleet_worker.router.attempts import Attempts, OnInterrupt
from fleet_worker.router.control_publisher import ControlPublisher
from fleet_worker.router.deaths import Silence
from fleet_worker.router.effects import Deliver, Effect, End, RetryAfter
from fleet_worker.router.node_selection import NodeSelection
from fleet_worker.router.progress import Progress
from fleet_worker.router.queue_wait import Place
from fleet_worker.router.queue_watch import QueueWatch
from fleet_worker.router.readers import Readers
from fleet_worker.router.reply_buffer import ReplyBuffer
from fleet_worker.router.reply_consumer import ReplyConsumer
from fleet_worker.router.route import Route
from fleet_worker.router.scheduler import BROKER_PATIENCE, Scheduler
from fleet_worker.router.submitter import Submitter
from fleet_worker.settings import RouterSettings

TRY_EVERY = 1.0
"""Seconds between two tries to send a further attempt while the broker is away; and between two looks at a request that
is neither in a lane nor at a node."""


class OpenSession(Protocol):
    """What a request in flight uses of its `Session`."""

    settings: RouterSettings
    nodes: NodeSelection
    submitter: Submitter
    admission: Admission
    replies: ReplyConsumer
    control: ControlPublisher
    scheduler: Scheduler

    def ended(self, request_id: str, last: LastFrame) -> None: ...


class InFlightRequest:
    """From its submission to its end. It may have several readers, each of whom gets the whole answer.

    `receive` runs in the thread of the reply consumer, `_check` and `_retry` in that of the scheduler, the rest in
    those of the readers.
    """

    def __init__(
        self,
        request: FleetRequest,
        route: Route,
        session: OpenSession,
        *,
        on_interrupt: OnInterrupt = "resume",
        queue_timeout: float = math.inf,
        absent_timeout: float = math.inf,
    ) -> None:
        self._session = session
        self._queue_timeout = queue_timeout
        self.route = route
        self._deadline = time.monotonic() + request.remaining
        self._attempts = Attempts(
            request, deadline=self._deadline, max_attempts=session.settings.max_attempts, on_interrupt=on_interrupt
        )
        self._lock = threading.RLock()
        self._readers = Readers(session.replies.wakeups, session.settings.max_buffered)
        self.place: Place | None = None
        """Counts the present attempt in its lane; None until it is admitted."""
        absence = AbsenceWatch(absent_timeout, session.nodes, session.replies)
        self._queue_watch = QueueWatch(session.settings, session.admission, session.replies, absence)
        self._heard_at = 0.0
        """When its node was last heard, on the clock of the reply consumer."""
        self._accepted: InstanceStatus | None = None
        """What was known of its node when that accepted it."""
        self.ended_at: float | None = None
        """time.monotonic() seconds."""

    @property
    def request(self) -> FleetRequest:
        """The present attempt; without its body once the request has ended."""
        return self._attempts.request

    @property
    def lane(self) -> str:
        """The lane of the present attempt."""
        return self.route.lane(self.request)

    @property
    def answered(self) -> bool:
        """Return whether it has ended without an error."""
        last = self._attempts.last
        return last is not None and last.kind != "error"

    @property
    def progress(self) -> Progress:
        with self._lock:
            return self._attempts.progress

    def pack(self) -> int:
        """Keep the whole answer in one piece; return how many characters of JSON it has."""
        with self._lock:
            return self._attempts.pack()

    # Readers

    def join(self, timeout: float) -> ReplyBuffer | None:
        """Add a reader that waits at most `timeout` seconds. Return its buffer, which gets the whole answer from its
        beginning; None if the request has failed."""
        with self._lock:
            self._drop_left()
            if self._attempts.last and not self.answered:
                return None
            return self._readers.join(timeout, self._attempts.past(), self._attempts.last)

    def leave(self, buffer: ReplyBuffer) -> None:
        """Remove a reader. When the last one has left, the scheduler thread cancels the request.

        The garbage collector calls this for a forgotten stream, in any thread and in the middle of anything, perhaps of
        a change of this request. So it takes no lock but the scheduler's, inside which no other one is taken.
        """
        buffer.close()
        if self._readers.any_left:
            self._session.scheduler.soon(self._drop_left)

    def _drop_left(self) -> None:
        with self._lock:
            if self._readers.drop_closed():
                self.give_up(Cancelled("nobody waits for the answer any more"))

    def timed_out(self, seconds: float) -> FleetError:
        """Return the error for a reader whose timeout of so many seconds is over."""
        with self._lock:
            if self._attempts.node:
                text = f"the answer was not complete within its timeout of {seconds:g} s"
                return RequestTimeout(text, attempts=self._attempts.report(RequestTimeout.code))
            kind = RequestTimeout if self._attempts.delivered else Expired
            return self._not_taken(kind, f"its timeout of {seconds:g} s")

    def _not_taken(self, kind: type[FleetError], limit: str) -> FleetError:
        why = self._session.nodes.why_waiting(self.request, self.route.only)
        what = "went on with the answer" if self._attempts.delivered else "took the request"
        text = f"no node {what} within {limit}: {why.text}"
        return kind(text, **why.metadata, attempts=self._attempts.report(kind.code))

    # Submission and replies

    def submit(self, patience: float = math.inf) -> None:
        """Send the first attempt; wait at most `patience` seconds for a broker that is away. Raises why it could not be
        sent, unless the request was answered all the same."""
        with self._lock:
            request, last = self.request, self._attempts.last
        if isinstance(last, Failure):  # it was given up already
            raise last.error()
        try:
            self._send(request, min(self._session.settings.connect_timeout, self._queue_timeout, patience))
        except FleetError as error:
            self.give_up(error)
            if isinstance(self._attempts.last, Failure):
                raise self._attempts.last.error() from None
        except BaseException:  # also a KeyboardInterrupt: other readers may have joined
            self.give_up(Cancelled("the request was not sent"))
            raise
        self._check_at(self._queue_watch.first_check(self.route))
        self._limit_wait()

    def receive(self, node: str, frame: Frame) -> bool:
        """Take a frame of this request; return False if its attempt is not wanted any more."""
        with self._lock:
            if not self._attempts.wants(node, frame):
                return False
            self._heard_at = self._session.replies.clock
            now = time.monotonic()
            if isinstance(frame, Accepted) and frame.seq == 0:
                sent_at = self._queue_watch.sent_at
                self._session.admission.accepted(self.lane, now - sent_at, self.request.priority, sent_at)
                self.route.accepted(node)
                self._queue_watch.absence.accepted()
                self._accepted = self._session.nodes.seen(node)
                if self.place:
                    self.place.accepted(now)
            self._carry_out(self._attempts.take(node, frame, now))
            return True

    def give_up(self, error: FleetError) -> None:
        """End the request for all of its readers with this error, unless it has ended."""
        with self._lock:
            self._carry_out(self._attempts.give_up(error))

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Deliver(frame):
                    self.route.first_token()
                    self._deliver(frame)
                case End(frame):
                    self._attempts.last = frame = self.route.ended(frame)
                    self._deliver(frame)
                    self.ended_at = time.monotonic()
                    self._leave_place()
                    self._readers.end()
                    self._session.ended(self.request.request_id, frame)
                case RetryAfter(seconds):
                    self._leave_place()
                    self._session.scheduler.at(time.monotonic() + seconds, self._retry)
                    self._limit_wait()
                case to_node:
                    self._session.control.tell(self.request.request_id, to_node)

    def _leave_place(self) -> None:
        if self.place:
            self.place.ended(time.monotonic())

    def _deliver(self, frame: Frame) -> None:
        for buffer in self._readers.deliver(frame):
            self._overflow(buffer)

    def _overflow(self, buffer: ReplyBuffer) -> None:
        limit = self._session.settings.max_buffered
        text = f"{limit} deltas and more wait for a reader: read faster, or raise router.max_buffered"
        error = ReplyOverflow(text, attempts=self._attempts.report(ReplyOverflow.code))
        buffer.put(Failure.of(error, self.request.request_id, self.request.attempt, 0))
        buffer.close()
        self._drop_left()

    def _send(self, request: FleetRequest, patience: float) -> None:
        with self._lock:
            if self._attempts.state != "ended":  # or nothing would end it at the route again
                self.route.sent()
        with self._queue_watch.sending(request, self.route):
            self._session.submitter.submit(request, self.lane, patience=patience, prefixes=self.route.prefixes)

    def _limit_wait(self) -> None:
        ends = self._attempts.waits_since + self._queue_timeout
        if ends < self._deadline:
            self._session.scheduler.at(ends, self._end_wait)

    # In the scheduler thread

    def _end_wait(self) -> None:
        """Give up if no node has taken the request in all that time. A node may have had it meanwhile."""
        with self._lock:
            is_over = time.monotonic() >= self._attempts.waits_since + self._queue_timeout
            if is_over and self._attempts.state in ("waiting", "pausing"):
                self.give_up(self._not_taken(QueueTimeout, f"its queue_timeout of {self._queue_timeout:g} s"))

    def _retry(self) -> None:
        with self._lock:
            now = time.monotonic()
            if self._attempts.state != "pausing":
                return
            if self._attempts.deaths.must_wait(now):
                self._session.scheduler.at(now + TRY_EVERY, self._retry)
                return
            request, failed = self._attempts.next_attempt(), set(self._attempts.failed)
            blamed = self._attempts.blamed
        self.route.choose(request, failed, blamed=blamed)
        with self._lock:
            if self.place and self._is_waiting(request):
                self.place = self._session.admission.enter(self.lane, request.priority)
        self._send_again(request)

    def _send_again(self, request: FleetRequest) -> None:
        """Send a further attempt. While the broker is away, try again until the deadline."""
        if not self._is_waiting(request):
            return
        try:
            self._send(request, BROKER_PATIENCE)
        except FleetError as error:
            if not isinstance(error, BrokerUnavailable) or not error.retryable:
                self.give_up(error)
                return
            self._session.scheduler.at(time.monotonic() + TRY_EVERY, lambda: self._send_again(request))

    def _check(self) -> None:
        """Find out whether the present attempt is lost, and schedule the next check."""
        self._look_at_silent()
        now, state = time.monotonic(), self._attempts.state
        if state == "ended":
            return
        if now >= self._deadline:
            self.give_up(self.timed_out(self.request.timeout_seconds))
            return
        checks = {"waiting": self._check_queued, "running": self._check_heartbeat}
        next_at = now + TRY_EVERY
        try:
            next_at = checks[state](now) if state in checks else next_at
        finally:
            self._check_at(next_at)

    def _look_at_silent(self) -> None:
        if self._attempts.deaths.are_open:
            with self._lock:
                self._carry_out(self._attempts.look_at_silent(self._session.nodes.seen, time.monotonic()))

    def _check_at(self, when: float) -> None:
        latest = time.monotonic() + TRY_EVERY if self._attempts.deaths.are_open else math.inf
        self._session.scheduler.at(min(when, latest, self._deadline), self._check)

    def _check_queued(self, now: float) -> float:
        """Find out whether an attempt that no node has accepted still waits well; return the time of the next check."""
        request = self.request
        verdict, next_at = self._queue_watch.check(request, self.route, now)
        with self._lock:
            if verdict != "waits" and self._is_waiting(request):
                if verdict == "unserved":
                    limit = f"the {self._queue_watch.absence.limit:g} s of router.absent_timeout"
                    self.give_up(self._not_taken(QueueTimeout, limit))
                elif verdict == "lost":
                    self._carry_out(self._attempts.message_lost(now))
                elif self.route.leave():
                    self._carry_out(self._attempts.move())
        return next_at

    def _is_waiting(self, request: FleetRequest) -> bool:
        return self._attempts.state == "waiting" and self._attempts.request is request

    def _check_heartbeat(self, now: float) -> float:
        """Find out whether the node that has it is still heard; return the time of the next check."""
        lost_after = self._session.settings.lost_after
        with self._lock:
            silent_for = self._session.replies.silence(self._heard_at)
            left = lost_after - silent_for
            node = self._attempts.node
            if left <= 0 and self._attempts.state == "running" and node:
                seen = self._session.nodes.seen(node)
                silence = Silence.of(node, now - silent_for, accepted=self._accepted, seen=seen)
                self._carry_out(self._attempts.node_lost(now, silence))
        return now + max(left, 0.1)
