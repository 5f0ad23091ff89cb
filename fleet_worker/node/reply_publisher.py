"""The node's end of the reply protocol (`router.reply_consumer` is the router's end).

One broker message carries the frames of all requests that a node has for a router since its last message to it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kombu import Connection

from fleet_worker.broker import replies
from fleet_worker.broker.connection import Publisher
from fleet_worker.broker.faults import refusal
from fleet_worker.broker.outage import Outage
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.node.outbox import NEVER, Outbox
from fleet_worker.node.replay_buffer import ReplayBuffer
from fleet_worker.node.reply_writer import ReplyWriter
from fleet_worker.protocol.reply import Alive, Frame, Reply
from fleet_worker.protocol.wire import PROTOCOL_VERSION

log = logging.getLogger(__name__)

HEARTBEAT_EVERY = 1.0
HEARTBEAT_WITHIN = 0.25
"""Seconds that a heartbeat may wait for the next frame, to travel with it: streams cost no message more."""
TRIES = 5
"""Tries until a message that the broker refuses for good is dropped: it may be too large."""
MOST_FRAMES, LARGE_MESSAGE_BYTES = 500, 384 * 1024
"""Frames and bytes of one message that has several frames: no more JSON values than routers read."""


class ReplyPublisher:
    """Publishes the frames of a node from one thread with one connection, as fast as the broker takes them.

    While a publish is in progress, and for a few milliseconds after it, frames gather for the next one; for longer if
    the router is behind. So a single token is published at once, and the cost of a token falls as the load of the node
    or of the router rises. First tokens and last frames never wait. While the broker is away the frames wait, and with
    `max_pending` of them the tasks wait too. A broker that comes back may have lost messages: the last ones are
    published again, and the router drops those that it has.
    """

    def __init__(self, connect: Callable[[], Connection], node: str, *, max_pending: int) -> None:
        self.node = node
        self._max_pending = max_pending
        self._changed = threading.Condition()
        self._outboxes: defaultdict[str, Outbox] = defaultdict(Outbox)
        """By reply queue."""
        self._count = 0
        """Frames that are in them, without heartbeats."""
        self._lag = 0.0
        self._due = NEVER
        """When the first of them must be published, as the next in `time.monotonic()` seconds."""
        self._next_heartbeat = 0.0
        self._beating: set[str] = set()
        """Reply queues whose next message is a heartbeat, too."""
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

    def learn(self, reply_to: str, waiting: int) -> None:
        """So many messages wait for this router at the broker. From any thread."""
        with self._changed:
            if outbox := self._outboxes.get(reply_to):
                outbox.learn(waiting)

    def take_lag(self) -> float:
        """Return the longest time in seconds that a frame has waited for its publish since the last call."""
        with self._changed:
            now = time.monotonic()
            lag, self._lag = max([self._lag, *(outbox.waits(now) for outbox in self._outboxes.values())]), 0.0
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
            if self._count >= self._max_pending // 2:
                delay = 0.0  # or the tasks would wait, also those that reply to other routers
            self._count += 1
            writer.appended += 1
            outbox = self._outboxes[writer.reply_to]
            outbox.append(frame, delay, len(self._writers))
            if outbox.due < self._due:
                self._due = outbox.due
                self._changed.notify_all()

    def _run(self) -> None:
        while not (self._closed.is_set() and not self._count):
            for reply_to, frames in self._take().items():
                self._publish_parts(reply_to, frames)
        self._publisher.close()

    def _take(self) -> dict[str, list[Frame]]:
        """Wait until frames, heartbeats or what was missed are due; return the frames of each router that is."""
        with self._changed:
            self._wait_until_due()
            now = time.monotonic()
            if now >= self._next_heartbeat:
                self._plan_heartbeats(now)
            self._to_replay &= self._replay.reply_queues()  # to the others nothing was published
            ends = self._closed.is_set()
            due = {reply_to for reply_to, outbox in self._outboxes.items() if ends or outbox.due <= now}
            self._lag = max([self._lag, *(self._outboxes[reply_to].waits(now) for reply_to in due)])
            batch = {reply_to: self._outboxes[reply_to].take(now) for reply_to in due | self._to_replay}
            self._count -= sum(map(len, batch.values()))
            self._add_heartbeats(batch)
            self._due = min((outbox.due for outbox in self._outboxes.values()), default=NEVER)
            self._changed.notify_all()
        return batch

    def _wait_until_due(self) -> None:
        while not (self._closed.is_set() or self._to_replay):
            idle = not self._writers and not self._replay
            wake = self._due if idle else min(self._due, self._next_heartbeat)
            left = wake - time.monotonic()
            if left <= 0:
                break
            self._changed.wait(None if wake is NEVER else left)

    def _plan_heartbeats(self, now: float) -> None:
        """Send something to every router with requests here, also to those whose requests ended a few seconds ago: so
        a broker that was lost right after a last frame is noticed, and the frame is published again."""
        self._next_heartbeat = now + HEARTBEAT_EVERY
        recent = self._replay.reply_queues() | {writer.reply_to for writer in self._writers}
        for reply_to in [each for each, outbox in self._outboxes.items() if outbox.is_empty and each not in recent]:
            del self._outboxes[reply_to]
        for outbox in (self._outboxes[reply_to] for reply_to in recent):
            outbox.due = min(outbox.due, now + HEARTBEAT_WITHIN)
        self._beating = recent

    def _add_heartbeats(self, batch: dict[str, list[Frame]]) -> None:
        """Tell in what is published now which requests are in progress."""
        if beating := self._beating & batch.keys():
            self._beating -= beating
            for writer in self._writers:
                if writer.reply_to in beating:
                    alive = Alive(id=writer.id, attempt=writer.attempt, seq=writer.appended)
                    batch[writer.reply_to].append(alive)

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
                    replies.push(self._publisher.channel, old_reply_to, old_body)
                waiting = replies.push(self._publisher.channel, reply_to, body)
                break
            except Exception as error:
                failures += 1
                if not self._retry_later(error, failures):
                    return
        self._outage.works()
        if waiting is not None:
            self.learn(reply_to, waiting)
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
