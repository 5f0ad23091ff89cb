"""The node's end of the reply protocol (`router.reply_consumer` is the router's end).

One broker message carries the frames of all requests that a node has for a router since its last publish. The frames
of one attempt are numbered without a gap. The last one is a response or an error, and only these end a reply.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from kombu import Connection

from fleet_worker.broker.connection import Publisher
from fleet_worker.broker.faults import refusal
from fleet_worker.broker.outage import Outage
from fleet_worker.broker.topology import reply_queue
from fleet_worker.errors import FleetError, RequestTimeout
from fleet_worker.mlx.timeouts import CancelToken
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
GAP_PER_REQUEST = 0.0003
"""Seconds between two publishes: the more requests are in progress, the longer. Not before a first token or a last
frame. At 32 streams of 50 tokens/s a gap of 5 ms makes 3,500 messages of 20,000, for a third of the CPU."""
HEARTBEAT_EVERY = 1.0
TRIES = 5
"""Tries until a message that the broker refuses for good is dropped: it may be too large."""
REPLAY_WINDOW = 5.0
REPLAY_MAX_BYTES = 16 * 1024 * 1024
"""Messages are kept for so many seconds, and together so many bytes, to be published again."""
REPLAY_MESSAGE_BYTES = 256 * 1024
"""Bytes up to which they are merged into one message."""
MOST_FRAMES, LARGE_MESSAGE_BYTES = 500, 384 * 1024
"""Frames and bytes of one message that has several frames: no more JSON values than routers read."""
_NEVER = float("inf")


class ReplyWriter:
    """Writes the reply to one attempt, from the thread of its task."""

    def __init__(self, publisher: ReplyPublisher, request_id: str, attempt: int, reply_to: str) -> None:
        self._publisher = publisher
        self.id = request_id
        self.attempt = attempt
        self.reply_to = reply_to
        self.deadline = time.monotonic() + 3600.0
        self.appended = 0
        """Frames that the publisher has. A frame with a higher number is still on its way from the task to it."""
        self._seq = 0
        self._cancel_token = CancelToken()

    @contextmanager
    def cancelled_by(self, cancel_token: CancelToken) -> Iterator[None]:
        """Within this block a cancel ends every wait, which then raises the token's error."""
        self._cancel_token = cancel_token
        with cancel_token.on_cancel(self._publisher.wake_up):
            yield

    def accept(self, *, at_once: bool = False, **fields: Any) -> None:
        """Tell the router which instance accepted the attempt. Unless it is to be told at once, this may wait for the
        next frame, to travel with it."""
        self._wait_for_room()
        self._publisher.append(self, Accepted(**self._next(), **fields), delay=0.0 if at_once else LONGEST_GAP)

    def put(self, deltas: list[Delta], tokens: int) -> None:
        """Append deltas, with which the answer has about so many tokens; the first ones are published at once.

        Waits while too many frames are pending, so that the MLX server's stream is not read meanwhile.

        Raises:
            RequestTimeout: the broker took nothing until the deadline.
            FleetError: the attempt was cancelled.
        """
        self._wait_for_room()
        first = self._seq <= 1
        frame = Deltas(**self._next(), deltas=deltas, tokens=tokens)
        self._publisher.append(self, frame, delay=0.0 if first else None)

    def end(self, frame: type[ChatResponse] | type[EmbedResponse], **fields: Any) -> None:
        self._publisher.append(self, frame(**self._next(), node=self._publisher.node, **fields), delay=0.0)

    def fail(self, error: FleetError) -> None:
        self._publisher.append(self, Failure.of(error, self.id, self.attempt, self._next()["seq"]), delay=0.0)

    def _wait_for_room(self) -> None:
        """Wait before the frame gets its number: a number that is never sent would be missing before the error."""
        if not self._publisher.wait_for_room(self.deadline, self._cancel_token):
            raise self._cancel_token.error or RequestTimeout("the broker took no replies until the deadline")

    def _next(self) -> dict[str, Any]:
        seq, self._seq = self._seq, self._seq + 1
        return {"id": self.id, "attempt": self.attempt, "seq": seq}


class ReplyPublisher:
    """Publishes the frames of a node from one thread with one connection, as fast as the broker takes them.

    While a publish is in progress, and for a few milliseconds after it, frames gather for the next one. So a single
    token is published at once, and the cost of a token falls as the load rises. While the broker is away the frames
    wait, and with `max_pending` of them the tasks wait too. A broker that comes back may have lost messages: the last
    ones are published again, and the router drops those that it has.
    """

    def __init__(self, connect: Callable[[], Connection], node: str, *, max_pending: int) -> None:
        self.node = node
        self._max_pending = max_pending
        self._changed = threading.Condition()
        self._pending: dict[str, list[Frame]] = {}
        self._count = 0
        self._oldest = self._lag = 0.0
        self._due = _NEVER
        """When the pending frames must be published, as the times below in `time.monotonic()` seconds."""
        self._last_publish = self._next_heartbeat = 0.0
        self._writers: set[ReplyWriter] = set()
        self._replay = ReplayBuffer()
        self._to_replay: set[str] = set()
        """Reply queues of routers that may have missed the last messages."""
        self._closed = threading.Event()
        self._publisher = Publisher(connect)
        self._outage = Outage("replies: the broker", log)
        self.refused: Callable[[], object] = lambda: None  # called in its thread when the broker refuses a reply
        self._thread = threading.Thread(target=self._run, name="fleet-replies", daemon=True)
        self._thread.start()

    @contextmanager
    def reply(self, request_id: str, attempt: int, reply_to: str) -> Iterator[ReplyWriter]:
        """Within this block the attempt is replied to, and each heartbeat tells its router that it is in progress."""
        writer = ReplyWriter(self, request_id, attempt, reply_to)
        with self._changed:
            self._writers.add(writer)
            self._changed.notify()
        try:
            yield writer
        finally:
            with self._changed:
                self._writers.discard(writer)
                if not self._writers:
                    self._changed.notify_all()

    def publish_again(self, reply_to: str) -> None:
        """Publish the last messages to this router again: it lost its connection. From any thread."""
        with self._changed:
            self._to_replay.add(reply_to)
            self._changed.notify_all()

    def take_lag(self) -> float:
        """Return the longest time in seconds that a frame has waited for its publish since the last call."""
        with self._changed:
            waiting = time.monotonic() - self._oldest if self._count else 0.0
            lag, self._lag = max(self._lag, waiting), 0.0
        return round(lag, 4)

    def wait_until_idle(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until no reply is in progress; return whether none is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._writers, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Publish what is pending and end; drop what the broker does not take within `timeout` seconds."""
        self._closed.set()
        self.wake_up()
        self._thread.join(timeout)

    def wait_for_room(self, deadline: float, cancel_token: CancelToken) -> bool:
        """Wait until there is room for one frame; return False if the deadline comes first, or a cancel."""
        if self._count < self._max_pending:
            return True
        with self._changed:
            self._changed.wait_for(
                lambda: self._count < self._max_pending or cancel_token.error is not None, deadline - time.monotonic()
            )
            return self._count < self._max_pending

    def wake_up(self) -> None:
        """Let all waiting threads check their condition again."""
        with self._changed:
            self._changed.notify_all()

    def append(self, writer: ReplyWriter, frame: Frame, *, delay: float | None) -> None:
        """Publish a frame within `delay` seconds; with None, when the gap after the last publish is over."""
        with self._changed:
            self._pending.setdefault(writer.reply_to, []).append(frame)
            if not self._count:
                self._oldest = time.monotonic()
            self._count += 1
            writer.appended += 1
            if delay is None:
                due = self._last_publish + min(LONGEST_GAP, len(self._writers) * GAP_PER_REQUEST)
            else:
                due = time.monotonic() + delay
            if due < self._due:
                self._due = due
                self._changed.notify_all()

    def _run(self) -> None:
        while not (self._closed.is_set() and not self._pending):
            for reply_to, frames in self._take().items():
                self._publish_parts(reply_to, frames)
        self._publisher.close()

    def _take(self) -> dict[str, list[Frame]]:
        """Wait until frames or heartbeats are due, and return all that is pending."""
        with self._changed:
            while not (self._closed.is_set() or self._to_replay):
                idle = not self._writers and not self._replay
                wake = self._due if idle else min(self._due, self._next_heartbeat)
                left = wake - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(None if wake is _NEVER else left)
            self._last_publish, self._due = time.monotonic(), _NEVER
            if self._last_publish >= self._next_heartbeat:
                self._add_heartbeats()
            if self._to_replay:
                self._to_replay &= self._replay.reply_queues()  # to the others nothing was published
                for reply_to in self._to_replay:
                    self._pending.setdefault(reply_to, [])
            if self._count:
                self._lag = max(self._lag, self._last_publish - self._oldest)
            batch, self._pending, self._count = self._pending, {}, 0
            self._changed.notify_all()
        return batch

    def _add_heartbeats(self) -> None:
        """Send something to every router with requests here, also to those whose requests ended a few seconds ago: so
        a broker that was lost right after a last frame is noticed, and the frame is published again."""
        self._next_heartbeat = self._last_publish + HEARTBEAT_EVERY
        for reply_to in self._replay.reply_queues():
            self._pending.setdefault(reply_to, [])
        for writer in self._writers:
            alive = Alive(id=writer.id, attempt=writer.attempt, seq=writer.appended)
            self._pending.setdefault(writer.reply_to, []).append(alive)

    def _publish_parts(self, reply_to: str, frames: list[Frame]) -> None:
        """Publish frames as one message, or as several: routers drop what is larger than any message should be."""
        body = Reply(v=PROTOCOL_VERSION, node=self.node, frames=frames).encode()
        half = len(frames) // 2
        if half and (len(frames) > MOST_FRAMES or len(body) > LARGE_MESSAGE_BYTES):
            self._publish_parts(reply_to, frames[:half])
            self._publish_parts(reply_to, frames[half:])
        else:
            self._publish(reply_to, body, bool(frames))

    def _publish(self, reply_to: str, body: bytes, has_frames: bool) -> None:
        """Publish, however long the broker is away, unless the node ends."""
        failures = 0
        while True:
            try:
                for old_reply_to, old_body in self._lost(reply_to, failures):
                    self._publisher.publish(old_body, routing_key=old_reply_to, declare=reply_queue)
                self._publisher.publish(body, routing_key=reply_to, declare=reply_queue)
                break
            except Exception as error:
                failures += 1
                if not self._retry_later(error, failures):
                    return
        self._outage.works()
        if has_frames:
            self._replay.add(reply_to, body)

    def _lost(self, reply_to: str, failures: int) -> list[tuple[str, bytes]]:
        """Return the messages that the broker may have lost, or this router, in the order of their publishing."""
        if failures:
            return self._replay.take()
        if reply_to not in self._to_replay:
            return []
        self._to_replay.discard(reply_to)
        return [each for each in self._replay.take() if each[0] == reply_to]

    def _retry_later(self, error: Exception, failures: int) -> bool:
        """Wait before the next try; return False if there should be none."""
        self._publisher.drop()
        closing = self._closed.wait(self._outage.failed(error))
        if known := refusal(error):
            self.refused()
        refused = not isinstance(error, self._publisher.connection_errors) and not (known and known.passes)
        if is_over := failures >= TRIES and (closing or refused):
            log.error("replies were given up: %s", "the node ends" if closing else f"refused, {type(error).__name__}")
        return not is_over


class ReplayBuffer:
    """The messages of the last seconds with their reply queues, to be published again. For one thread."""

    def __init__(self) -> None:
        self._messages: deque[tuple[float, str, bytes]] = deque()
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._messages)

    def add(self, reply_to: str, body: bytes) -> None:
        self._messages.append((time.monotonic(), reply_to, body))
        self._bytes += len(body)
        self._drop_old()

    def reply_queues(self) -> set[str]:
        self._drop_old()
        return {reply_to for _, reply_to, _ in self._messages}

    def take(self) -> list[tuple[str, bytes]]:
        """Return the frames in few messages: the broker confirms each, and meanwhile no new frame is published.

        They are kept anew: the broker may be lost once more before a router has read them.
        """
        bodies: dict[str, list[bytes]] = {}
        for _, reply_to, body in self._messages:
            bodies.setdefault(reply_to, []).append(body)
        self._messages, self._bytes = deque(), 0
        for reply_to, parts in bodies.items():
            for group in _grouped(parts):
                self.add(reply_to, Reply.merged(group))
        return [(reply_to, body) for _, reply_to, body in self._messages]

    def _drop_old(self) -> None:
        oldest = time.monotonic() - REPLAY_WINDOW
        while self._messages and (self._messages[0][0] < oldest or self._bytes > REPLAY_MAX_BYTES):
            self._bytes -= len(self._messages.popleft()[2])


def _grouped(bodies: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield them in their order, in groups of up to `REPLAY_MESSAGE_BYTES`; a longer one alone."""
    group: list[bytes] = []
    size = 0
    for body in bodies:
        if group and size + len(body) > REPLAY_MESSAGE_BYTES:
            yield group
            group, size = [], 0
        group.append(body)
        size += len(body)
    yield group
