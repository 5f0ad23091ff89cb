"""The node's end of the reply protocol: what it owes its routers. `inbox.py` is where a router receives it.

One message carries the frames of all requests that a node owes a router since its last publish. The frames of one
attempt are numbered without a gap, the last one is a response or an error, and nothing else ends a reply.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kombu import Connection

from fleet_worker.broker.connection import BACK_OFF
from fleet_worker.broker.publisher import Publisher
from fleet_worker.broker.topology import reply_queue
from fleet_worker.errors import FleetError, RequestTimeout
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.node.replay_buffer import ReplayBuffer
from fleet_worker.protocol.reply import (
    Accepted,
    Alive,
    ChatResponse,
    Delta,
    Deltas,
    EmbedResponse,
    Failure,
    Frame,
    Reply,
)
from fleet_worker.protocol.wire import PROTOCOL_VERSION

log = logging.getLogger(__name__)

LONGEST_GAP = 0.010
GAP_PER_ANSWER = 0.0003
"""Seconds between two publishes, more the more requests are in progress; a first token and a last frame do not wait.
At 32 streams of 50 tokens/s a gap of 5 ms makes 3,500 messages of 20,000, for a third of the CPU."""
ALIVE_EVERY = 1.0
TRIES = 5
"""How often the broker may refuse a message, as too large perhaps, before it is given up; it may be away for ever."""
REMEMBERED = 10_000
"""Attempts that a node remembers, so that a redelivered one is not generated twice."""
_NEVER = float("inf")


class ReplyWriter:
    """The reply to one attempt, as the task that serves it writes it."""

    def __init__(self, sender: ReplyPublisher, request_id: str, attempt: int, reply_to: str) -> None:
        self._sender = sender
        self.id = request_id
        self.attempt = attempt
        self.reply_to = reply_to
        self._seq = 0
        self.appended = 0
        """Frames that the sender has; those of `_seq` beyond it are still on their way to it."""
        self.deadline = time.monotonic() + 3600.0
        self._cancel_token = CancelToken()

    @contextmanager
    def stopped_by(self, cancel_token: CancelToken) -> Iterator[None]:
        """Within this block nothing waits any longer once it is stopped; raises what it has been stopped with."""
        self._cancel_token = cancel_token
        with cancel_token.on_cancel(self._sender.wake_up):
            yield

    def accept(self, **fields: Any) -> None:
        """Tell who took it. Nobody waits for this, so it may travel with what comes next."""
        self._wait_for_room()
        self._sender._append(self, Accepted(**self._next(), **fields), delay=LONGEST_GAP)

    def put(self, deltas: list[Delta], tokens: int) -> None:
        """Append deltas, with which the answer has about so many tokens; the first leave at once. Waits while too many
        frames are pending, so that nobody reads on.

        Raises:
            RequestTimeout: the broker did not take anything until the deadline.
            FleetError: it was stopped.
        """
        self._wait_for_room()
        first = self._seq <= 1
        frame = Deltas(**self._next(), deltas=deltas, tokens=tokens)
        self._sender._append(self, frame, delay=0.0 if first else None)

    def end(self, frame: type[ChatResponse] | type[EmbedResponse], **fields: Any) -> None:
        self._sender._append(self, frame(**self._next(), node=self._sender.node, **fields), delay=0.0)

    def fail(self, error: FleetError) -> None:
        self._sender._append(self, Failure.of(error, self.id, self.attempt, self._next()["seq"]), delay=0.0)

    def alive(self) -> Alive:
        return Alive(id=self.id, attempt=self.attempt, seq=self.appended)

    def _wait_for_room(self) -> None:
        """Before a frame has its number: one that never leaves would be missing before the error."""
        if not self._sender.wait_for_room(self.deadline, self._cancel_token):
            raise self._cancel_token.error or RequestTimeout("the broker took no replies until the deadline")

    def _next(self) -> dict[str, Any]:
        seq, self._seq = self._seq, self._seq + 1
        return {"id": self.id, "attempt": self.attempt, "seq": seq}


class ReplyPublisher:
    """Publishes the frames of a node from one thread with one connection, as fast as the broker takes them.

    It clocks itself: while a publish is on its way, and for a few milliseconds after it, frames gather for the next.
    So a lone token leaves at once, and the cost of a token falls as the load rises. When the broker is away the frames
    wait, and beyond `max_pending` the tasks wait too. A broker that comes back may have forgotten: what was published
    last is published again, and the router drops what it knows.
    """

    def __init__(self, connect: Callable[[], Connection], node: str, *, max_pending: int) -> None:
        self.node = node
        self._max_pending = max_pending
        self._changed = threading.Condition()
        self._pending: dict[str, list[Frame]] = {}
        self._count = 0
        self._oldest = 0.0
        self._lag = 0.0
        self._due = _NEVER
        """When what is pending must leave; when the last publish began; when to show life: monotonic seconds."""
        self._published = self._next_alive = 0.0
        self._answers: dict[tuple[str, int], ReplyWriter] = {}
        self._taken: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._recent = ReplayBuffer()
        self._missed: set[str] = set()
        """Reply queues into which what is recent has to go again."""
        self._closed = threading.Event()
        self._publisher = Publisher(connect)
        self._thread = threading.Thread(target=self._run, name="fleet-replies", daemon=True)
        self._thread.start()

    @contextmanager
    def answering(self, request_id: str, attempt: int, reply_to: str) -> Iterator[ReplyWriter | None]:
        """Open the answer to an attempt; None if this node has it already (a redelivered message)."""
        key = (request_id, attempt)
        with self._changed:
            if key in self._taken:
                answer = None
            else:
                self._taken[key] = None
                if len(self._taken) > REMEMBERED:
                    self._taken.popitem(last=False)
                answer = self._answers[key] = ReplyWriter(self, request_id, attempt, reply_to)
                self._changed.notify()
        try:
            yield answer
        finally:
            if answer:
                with self._changed:
                    self._answers.pop(key, None)
                    if not self._answers:
                        self._changed.notify_all()

    def publish_again(self, reply_to: str) -> None:
        """That router was cut off for a moment, and may have missed what it was sent last. From any thread."""
        with self._changed:
            self._missed.add(reply_to)
            self._changed.notify_all()

    def take_lag(self) -> float:
        """Return the longest time in seconds that a frame has waited for its publish since the last call."""
        with self._changed:
            waiting = time.monotonic() - self._oldest if self._count else 0.0
            lag, self._lag = max(self._lag, waiting), 0.0
        return round(lag, 4)

    def wait_until_idle(self, timeout: float) -> bool:
        """Wait until no answer is open, or for so many seconds; tell whether none is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._answers, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Publish what is pending and end; what the broker does not take within `timeout` seconds is given up."""
        self._closed.set()
        self.wake_up()
        self._thread.join(timeout)

    def wait_for_room(self, deadline: float, cancel_token: CancelToken) -> bool:
        """Wait until a frame more may wait; False once that is not worth waiting for: its time is over, or it was
        stopped, and somebody called `wake_up`."""
        if self._count < self._max_pending:
            return True
        with self._changed:
            self._changed.wait_for(
                lambda: self._count < self._max_pending or cancel_token.error is not None, deadline - time.monotonic()
            )
            return self._count < self._max_pending

    def wake_up(self) -> None:
        """Whoever waits looks again."""
        with self._changed:
            self._changed.notify_all()

    def _append(self, answer: ReplyWriter, frame: Frame, *, delay: float | None) -> None:
        """Let a frame leave within `delay` seconds; with None, once the gap since the last publish is over."""
        with self._changed:
            self._pending.setdefault(answer.reply_to, []).append(frame)
            if not self._count:
                self._oldest = time.monotonic()
            self._count += 1
            answer.appended += 1
            due = self._published + self._gap() if delay is None else time.monotonic() + delay
            if due < self._due:
                self._due = due
                self._changed.notify_all()

    def _gap(self) -> float:
        return min(LONGEST_GAP, len(self._answers) * GAP_PER_ANSWER)

    def _run(self) -> None:
        while not (self._closed.is_set() and not self._pending):
            for reply_to, frames in self._take().items():
                self._publish(reply_to, frames)
        self._publisher.close()

    def _take(self) -> dict[str, list[Frame]]:
        """Wait until frames are due, or until it is time to show life, and return all that is pending."""
        with self._changed:
            while not (self._closed.is_set() or self._missed):
                idle = not self._answers and not self._recent
                wake = self._due if idle else min(self._due, self._next_alive)
                left = wake - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(None if wake is _NEVER else left)
            self._published, self._due = time.monotonic(), _NEVER
            if self._published >= self._next_alive:
                self._show_life()
            if self._missed:
                self._missed &= self._recent.readers()  # for others there is nothing
                for reply_to in self._missed:
                    self._pending.setdefault(reply_to, [])
            if self._count:
                self._lag = max(self._lag, self._published - self._oldest)
            batch, self._pending, self._count = self._pending, {}, 0
            self._changed.notify_all()
        return batch

    def _show_life(self) -> None:
        """Tell every router that has work here, or had until a moment ago: so a broker that was lost right after a
        last frame is noticed, and the frame published again."""
        self._next_alive = self._published + ALIVE_EVERY
        for reply_to in self._recent.readers():
            self._pending.setdefault(reply_to, [])
        for answer in self._answers.values():
            self._pending.setdefault(answer.reply_to, []).append(answer.alive())

    def _publish(self, reply_to: str, frames: list[Frame]) -> None:
        """Publish, however long the broker is away, unless the node ends."""
        body = Reply(v=PROTOCOL_VERSION, node=self.node, frames=frames).encode()
        failures = 0
        while True:
            try:
                for recent in self._missing(reply_to, failures):
                    self._send(*recent)
                self._send(reply_to, body)
                break
            except Exception as error:
                failures += 1
                if not self._again(error, failures):
                    return
        if failures:
            log.warning("the broker is back, replies flow again")
        if frames:
            self._recent.add(reply_to, body)

    def _again(self, error: Exception, failures: int) -> bool:
        """Wait before another try, and tell whether there should be one."""
        self._publisher.drop()
        if failures == 1:
            log.warning("replies wait: the broker is away (%s)", type(error).__name__)
        closing = self._closed.wait(BACK_OFF[min(failures, len(BACK_OFF)) - 1])
        refused = not isinstance(error, self._publisher.connection_errors)
        if failures < TRIES or not (closing or refused):
            return True
        log.error("replies were given up: %s", "the node ends" if closing else f"refused, {type(error).__name__}")
        return False

    def _missing(self, reply_to: str, failures: int) -> list[tuple[str, bytes]]:
        """What the broker may have lost, or this router."""
        if failures:
            return self._recent.again()
        if reply_to not in self._missed:
            return []
        self._missed.discard(reply_to)
        return [each for each in self._recent.again() if each[0] == reply_to]

    def _send(self, reply_to: str, body: bytes) -> None:
        self._publisher.publish(body, routing_key=reply_to, declare=reply_queue)
