"""Both ends of the reply protocol: what a node owes its routers, and where a router receives it.

One message carries the frames of all requests that a node owes a router since its last publish. The frames of one
attempt are numbered without a gap, the last one is a response or an error, and nothing else ends a reply.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kombu import Connection, Consumer, Queue
from kombu.transport.redis import Channel as RedisChannel

from fleet_worker.connections import BACK_OFF, hear, open_channel
from fleet_worker.errors import BrokerUnavailable, FleetError, InvalidRequest, RequestTimeout, where
from fleet_worker.frames import Accepted, Alive, ChatResponse, Delta, Deltas, EmbedResponse, Failure, Frame, Reply
from fleet_worker.lanes import listening_key, reply_queue
from fleet_worker.link import Link
from fleet_worker.publisher import Publisher
from fleet_worker.stop import Stop
from fleet_worker.wire import PROTOCOL_VERSION

__all__ = ["Answer", "ReplyInbox", "ReplySender"]

log = logging.getLogger(__name__)

LONGEST_GAP = 0.010
GAP_PER_ANSWER = 0.0003
"""Seconds between two publishes, more the more requests are in progress; a first token and a last frame do not wait.
At 32 streams of 50 tokens/s a gap of 5 ms makes 3,500 messages of 20,000, for a third of the CPU."""
ALIVE_EVERY = 1.0
RESEND_WINDOW = 5.0
"""Seconds of published frames that are published again after the broker was lost: it may have lost them."""
RESEND_BYTES = 16 * 1024 * 1024
TRIES = 5
"""How often the broker may refuse a message, as too large perhaps, before it is given up; it may be away for ever."""
REMEMBERED = 10_000
"""Attempts that a node remembers, so that a redelivered one is not generated twice."""
LONGEST_LOOK = 1.5
"""Seconds of the inbox's clock that one look for messages may count, however long the process was frozen in it."""
PROVE_EVERY = 1.0
"""Seconds after which an inbox asks the broker whether it is still there."""
PRESENCE = 6
"""Seconds for which Redis remembers that a router listens."""
_NEVER = float("inf")


# --- The node's end --------------------------------------------------------------------------------------------------


class Answer:
    """The reply to one attempt, as the task that serves it writes it."""

    def __init__(self, sender: ReplySender, request_id: str, attempt: int, reply_to: str) -> None:
        self._sender = sender
        self.id = request_id
        self.attempt = attempt
        self.reply_to = reply_to
        self._seq = 0
        self.appended = 0
        """Frames that the sender has; those of `_seq` beyond it are still on their way to it."""
        self.deadline = time.monotonic() + 3600.0
        self._stop = Stop()

    @contextmanager
    def stopped_by(self, stop: Stop) -> Iterator[None]:
        """Within this block nothing waits any longer once it is stopped; raises what it has been stopped with."""
        self._stop = stop
        with stop.cutting(self._sender.wake_up):
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
        if not self._sender.wait_for_room(self.deadline, self._stop):
            raise self._stop.error or RequestTimeout("the broker took no replies until the deadline")

    def _next(self) -> dict[str, Any]:
        seq, self._seq = self._seq, self._seq + 1
        return {"id": self.id, "attempt": self.attempt, "seq": seq}


class ReplySender:
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
        self._answers: dict[tuple[str, int], Answer] = {}
        self._taken: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._recent: deque[tuple[float, str, bytes]] = deque()
        self._recent_bytes = 0
        self._closed = threading.Event()
        self._publisher = Publisher(connect)
        self._thread = threading.Thread(target=self._run, name="fleet-replies", daemon=True)
        self._thread.start()

    @contextmanager
    def answering(self, request_id: str, attempt: int, reply_to: str) -> Iterator[Answer | None]:
        """Open the answer to an attempt; None if this node has it already (a redelivered message)."""
        key = (request_id, attempt)
        with self._changed:
            if key in self._taken:
                answer = None
            else:
                self._taken[key] = None
                if len(self._taken) > REMEMBERED:
                    self._taken.popitem(last=False)
                answer = self._answers[key] = Answer(self, request_id, attempt, reply_to)
                self._changed.notify()
        try:
            yield answer
        finally:
            if answer:
                with self._changed:
                    self._answers.pop(key, None)
                    if not self._answers:
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

    def wait_for_room(self, deadline: float, stop: Stop) -> bool:
        """Wait until a frame more may wait; False once that is not worth waiting for: its time is over, or it was
        stopped, and somebody called `wake_up`."""
        if self._count < self._max_pending:
            return True
        with self._changed:
            self._changed.wait_for(
                lambda: self._count < self._max_pending or stop.error is not None, deadline - time.monotonic()
            )
            return self._count < self._max_pending

    def wake_up(self) -> None:
        """Whoever waits looks again."""
        with self._changed:
            self._changed.notify_all()

    def _append(self, answer: Answer, frame: Frame, *, delay: float | None) -> None:
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
            while not self._closed.is_set():
                idle = not self._answers and not self._recent
                wake = self._due if idle else min(self._due, self._next_alive)
                left = wake - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(None if wake is _NEVER else left)
            self._published, self._due = time.monotonic(), _NEVER
            if self._published >= self._next_alive:
                self._show_life()
            if self._count:
                self._lag = max(self._lag, self._published - self._oldest)
            batch, self._pending, self._count = self._pending, {}, 0
            self._changed.notify_all()
        return batch

    def _show_life(self) -> None:
        """Tell every router that has work here, or had until a moment ago: so a broker that was lost right after a
        last frame is noticed, and the frame published again."""
        self._next_alive = self._published + ALIVE_EVERY
        self._forget_old()
        for _, reply_to, _ in self._recent:
            self._pending.setdefault(reply_to, [])
        for answer in self._answers.values():
            self._pending.setdefault(answer.reply_to, []).append(answer.alive())

    def _publish(self, reply_to: str, frames: list[Frame]) -> None:
        """Publish, however long the broker is away, unless the node ends."""
        body = Reply(v=PROTOCOL_VERSION, node=self.node, frames=frames).encode()
        failures = 0
        while True:
            try:
                if failures:
                    self._resend()
                self._publisher.publish(body, routing_key=reply_to, declare=reply_queue)
                break
            except Exception as error:
                failures += 1
                if not self._again(error, failures):
                    return
        if failures:
            log.warning("the broker is back, replies flow again")
        if frames:
            self._remember(reply_to, body)

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

    def _resend(self) -> None:
        """They are recent again: the broker may be lost once more before anybody has read them."""
        for _, reply_to, body in self._recent:
            self._publisher.publish(body, routing_key=reply_to, declare=reply_queue)
        now = time.monotonic()
        self._recent = deque((now, reply_to, body) for _, reply_to, body in self._recent)

    def _remember(self, reply_to: str, body: bytes) -> None:
        self._recent.append((time.monotonic(), reply_to, body))
        self._recent_bytes += len(body)
        self._forget_old()

    def _forget_old(self) -> None:
        oldest = time.monotonic() - RESEND_WINDOW
        while self._recent and (self._recent[0][0] < oldest or self._recent_bytes > RESEND_BYTES):
            self._recent_bytes -= len(self._recent.popleft()[2])


# --- The router's end ------------------------------------------------------------------------------------------------


class ReplyInbox:
    """One reply queue, one thread and one connection for all requests of a router: each frame that comes is handed to
    `receive`, with the name of its node.

    `also` is a subscription that the same thread listens to: a maker of its queue, and what takes its messages.
    `listening` is called with a channel each time it has begun to listen.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        name: str,
        receive: Callable[[str, Frame], object],
        *,
        also: tuple[Callable[[], Queue], Callable[[Any], None]] | None = None,
        listening: Callable[[Any], None] = lambda channel: None,
    ) -> None:
        self.name = name
        self._also = also
        self._on_listening = listening
        self._connect = connect
        self._link = Link("the reply queue", connect, self._listen)
        self._queue = reply_queue(name)
        self._take = receive
        self.clock = 0.0
        """Seconds of listening so far. It stands still while the broker, or this process, does nothing."""
        self._back = 0.0
        """When it last began to listen, on this clock."""
        self._listening = threading.Event()
        self._next_proof = 0.0

    def start(self, timeout: float, *, waited: float = 0.0) -> None:
        """Listen; raises `BrokerUnavailable` if the broker is not there within `timeout` seconds, some of which may
        have been waited already."""
        if waited < timeout:
            self._link.start()
        if not self._listening.wait(timeout - waited):
            self._link.close()
            cause = self._link.failure or "no answer"
            raise BrokerUnavailable(f"the broker did not answer within {timeout:g} s ({cause})")

    def close(self) -> None:
        """Stop listening and delete the reply queue."""
        self._link.close()
        if self._listening.is_set():
            self._wake_up()
            self._link.close(timeout=5.0)

    def silence(self, since: float) -> float:
        """Seconds for which it has listened without a break since this moment of its clock."""
        return self.clock - max(since, self._back)

    def _listen(self, connection: Connection) -> None:
        channel = open_channel(connection)
        consumer = Consumer(channel, [self._queue], on_message=self._receive)
        consumer.consume()
        if self._also:
            new_queue, take = self._also
            Consumer(channel, [new_queue()], on_message=take, no_ack=True).consume()
        hear(connection, 0.01)  # only now kombu's Redis transport subscribes
        self._on_listening(channel)
        self._back, self._next_proof = self.clock, 0.0
        self._prove(channel)  # before anything is asked, or a node might take this router for gone
        self._link.works()
        self._listening.set()
        while not self._link.closed.is_set():
            self._prove(channel)
            before = time.monotonic()
            hear(connection, 1.0)
            self.clock += min(time.monotonic() - before, LONGEST_LOOK)
        with contextlib.suppress(Exception):  # it all expires anyway
            self._leave(consumer, channel)

    def _leave(self, consumer: Consumer, channel: Any) -> None:
        consumer.cancel()
        self._queue.bind(channel).delete()
        if isinstance(channel, RedisChannel):
            with channel.conn_or_acquire() as client:
                client.delete(listening_key(self.name))

    def _prove(self, channel: Any) -> None:
        """Ask the broker something: a line that was cut brings no messages, and no errors either. Meanwhile the clock
        stands still. On Redis this says that the router listens, so that nodes work for it; RabbitMQ knows that."""
        if time.monotonic() < self._next_proof:
            return
        if isinstance(channel, RedisChannel):
            with channel.conn_or_acquire() as client:
                client.set(listening_key(self.name), 1, ex=PRESENCE)
        else:
            self._queue.bind(channel).queue_declare(passive=True)
        self._next_proof = time.monotonic() + PROVE_EVERY

    def _receive(self, message: Any) -> None:
        try:
            reply = Reply.decode(message.body)
        except InvalidRequest as error:
            log.error("a message in the reply queue was dropped: %s", error)
        else:
            for frame in reply.frames:
                self._hand_on(reply.node, frame)
        message.ack()

    def _hand_on(self, node: str, frame: Frame) -> None:
        try:
            self._take(node, frame)
        except Exception as error:  # the broker would deliver it again, for ever
            log.error("a frame of %s (%s) was dropped: %s at %s", node, frame.kind, type(error).__name__, where(error))

    def _wake_up(self) -> None:
        """An empty reply to ourselves ends the wait in `drain_events` at once."""
        with contextlib.suppress(Exception), self._connect() as connection:
            empty = Reply(v=PROTOCOL_VERSION, node="", frames=[]).encode()
            Publisher(lambda: connection).publish(empty, routing_key=self.name, declare=reply_queue)
