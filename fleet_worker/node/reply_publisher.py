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
from typing import NamedTuple

from kombu import Connection

from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.node.outbox import NEVER, Outbox
from fleet_worker.node.reply_connection import ReplyConnection
from fleet_worker.node.reply_writer import ReplyWriter
from fleet_worker.protocol.reply import Alive, Frame, Reply

log = logging.getLogger(__name__)

HEARTBEAT_EVERY = 1.0
HEARTBEAT_WITHIN = 0.25
"""Seconds that a heartbeat may wait for the next frame, to travel with it: streams cost no message more."""
MOST_FRAMES, LARGE_MESSAGE_BYTES = 500, 384 * 1024
"""Frames and bytes of one message that has several frames: no more JSON values than routers read."""
FEW_REQUESTS, FEW_FRAMES = 4, 8
"""Requests in progress, and frames that wait, up to which the thread of a task publishes them itself. With more
requests the one thread of the publisher is cheaper: frames gather for its next message while it sends one."""


class _Batch(NamedTuple):
    """What the publisher's thread sends next."""

    frames: dict[str, list[Frame]]
    """Those that are due, by reply queue."""
    to_replay: set[str]
    """Reply queues of routers that have missed something."""
    has_heartbeats: bool
    """One of them is a heartbeat, once a second: then the broker has to confirm them all."""


class ReplyPublisher:
    """Publishes the frames of a node with one connection, as fast as the broker takes them.

    After a publish frames gather for the next one: for a few milliseconds, for longer if the router is behind. So a
    single token is published at once, and the cost of a token falls as the load of the node or of the router rises.
    First tokens and last frames never wait. At a node with few requests, a frame that is due at once is published by
    the thread of its task: waking another thread takes longer. The publisher's own thread does all else.

    While the broker is away the frames wait, and with `max_pending` of them the tasks wait too. A broker that comes
    back may have lost messages: the last ones are published again, and the router drops those that it has.

    The lock covers everything but the connection. The thread that has set `_is_publishing` under the lock uses the
    connection, without it; no other thread touches the connection until that is reset.
    """

    def __init__(self, connect: Callable[[], Connection], node: str, *, max_pending: int) -> None:
        self.node = node
        self._max_pending = max_pending
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        """There is room for a frame, or no reply is in progress."""
        self._wakes = threading.Condition(lock)
        """The publisher's thread has to check what is due."""
        self._wakes_at = 0.0
        """When it checks by itself, in time.monotonic() seconds, as all times here; 0 if it does not wait."""
        self._outboxes: defaultdict[str, Outbox] = defaultdict(Outbox)
        """By reply queue."""
        self._count = 0
        """Frames in all of them, without heartbeats."""
        self._due = NEVER
        """When the first of these frames must be published."""
        self._next_heartbeat = 0.0
        self._beating: set[str] = set()
        """Reply queues whose next message is a heartbeat, too."""
        self._lag = 0.0
        """The longest that a frame has waited since `take_lag`, in seconds."""
        self._writers: set[ReplyWriter] = set()
        """Of the attempts in progress."""
        self._to_replay: set[str] = set()
        """Reply queues of routers that may have missed the last messages."""
        self._closed = threading.Event()
        self._is_publishing = False
        """One thread is, and uses the connection."""
        self._has_rest = False
        """A task has left messages in the connection that it could not send at once."""
        self._gathers_until = NEVER
        """When the first gap ends in which more frames are expected."""
        self._connection = ReplyConnection(connect, self._closed)
        self._connection.learned = self.learn
        self._thread = threading.Thread(target=self._run, name="fleet-replies", daemon=True)
        self._thread.start()

    def on_refused(self, refused: Callable[[], object]) -> None:
        """Call this function, in the publisher's thread, when the broker refuses a reply."""
        self._connection.refused = refused

    @contextmanager
    def reply(self, request_id: str, attempt: int, reply_to: str) -> Iterator[ReplyWriter]:
        """Within this block the attempt is replied to, and each heartbeat tells its router that it is in progress."""
        writer = ReplyWriter(self, request_id, attempt, reply_to)
        with self._changed:
            self._writers.add(writer)
            self._wake_in_time()
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
            self._wakes.notify()

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
            self._wakes.notify()

    def append(self, writer: ReplyWriter, frame: Frame, *, delay: float | None) -> None:
        """Publish a frame within `delay` seconds; with None, when the gap after the last publish is over."""
        reply_to = writer.reply_to
        with self._changed:
            if self._count >= self._max_pending // 2:
                delay = 0.0  # or the tasks would wait, also those that reply to other routers
            self._count += 1
            outbox = self._outboxes[reply_to]
            if outbox.append(frame, delay, len(self._writers)):
                writer.appended += 1
            self._due = min(self._due, outbox.due)
            if not self._is_for_the_task(reply_to, outbox):
                self._wake_in_time()
                return
            frames = self._take(reply_to)
            self._is_publishing = True
        self._publish_at_once(reply_to, frames)

    def _is_for_the_task(self, reply_to: str, outbox: Outbox) -> bool:
        """Return whether these frames are due, and can be published without waiting for anything."""
        is_small = len(self._writers) <= FEW_REQUESTS and len(outbox) <= FEW_FRAMES
        is_waiting = outbox.due > time.monotonic() or self._is_publishing or bool(self._to_replay)
        return is_small and not is_waiting and self._connection.is_free(reply_to)

    def _publish_at_once(self, reply_to: str, frames: list[Frame]) -> None:
        is_done = False
        try:
            self._add_messages(reply_to, frames)
            is_done = self._connection.send_at_once()
        finally:
            with self._changed:
                self._is_publishing, self._has_rest = False, not is_done
                self._wake_in_time()

    def _wake_in_time(self) -> None:
        """Wake the publisher's thread if it would check too late by itself. A thread that publishes does that later."""
        if not self._is_publishing and (self._has_rest or self._next() < self._wakes_at):
            self._wakes.notify()

    def _next(self) -> float:
        """Return when the publisher's thread has something to do."""
        is_idle = not self._writers and self._connection.is_settled
        return self._due if is_idle else min(self._due, self._next_heartbeat)

    def _take(self, reply_to: str) -> list[Frame]:
        """Return all frames for this router, with its heartbeats if they are due."""
        now, outbox = time.monotonic(), self._outboxes[reply_to]
        self._lag = max(self._lag, outbox.waits(now))
        self._count -= len(outbox)
        frames = outbox.take(now)
        self._due = min(outbox.due for outbox in self._outboxes.values())
        self._changed.notify_all()
        return frames + self._heartbeats(reply_to) if reply_to in self._beating else frames

    def _heartbeats(self, reply_to: str) -> list[Frame]:
        """Return the heartbeats of the requests of this router, for a message that is published now."""
        self._beating.discard(reply_to)
        writers = [writer for writer in self._writers if writer.reply_to == reply_to]
        return [Alive(id=writer.id, attempt=writer.attempt, seq=writer.appended) for writer in writers]

    # In the publisher's thread

    def _run(self) -> None:
        ends = False
        while not ends:
            batch = self._wait_for_batch()
            if batch.to_replay:
                self._connection.send_again(batch.to_replay)
            for reply_to, frames in batch.frames.items():
                self._add_or_drop(reply_to, frames)
            self._connection.send_all()
            if batch.has_heartbeats:
                self._connection.settle()
            ends = self._closed.is_set() and not self._count
        self._connection.settle()
        self._connection.close()

    def _wait_for_batch(self) -> _Batch:
        """Wait until frames or heartbeats are due, or a router has missed something; return all that is to be sent."""
        with self._changed:
            self._is_publishing = False
            self._wait_until_due()
            self._is_publishing, self._has_rest = True, False
            now, ends = time.monotonic(), self._closed.is_set()
            if now >= self._next_heartbeat:
                self._plan_heartbeats(now)
            to_replay, self._to_replay = self._to_replay, set()
            due = [reply_to for reply_to, outbox in self._outboxes.items() if ends or outbox.due <= now]
            has_heartbeats = not self._beating.isdisjoint(due)
            frames = {reply_to: self._take(reply_to) for reply_to in due}
            self._gathers_until = min(map(self._gap_end, frames, frames.values()), default=NEVER)
        return _Batch(frames, to_replay, has_heartbeats)

    def _gap_end(self, reply_to: str, frames: list[Frame]) -> float:
        """Return when frames of streams like these are due again; NEVER if it was one, after which none may come."""
        return self._outboxes[reply_to].gap_end(len(self._writers)) if len(frames) > 1 else NEVER

    def _wait_until_due(self) -> None:
        while self._is_publishing or not self._is_something_due():
            # The end of the gap: without that, the first frame in it would wake this thread, only to wait once more.
            self._wakes_at = NEVER if self._is_publishing else min(self._next(), self._gathers_until)
            self._gathers_until = NEVER
            self._wakes.wait(None if self._wakes_at is NEVER else self._wakes_at - time.monotonic())
        self._wakes_at = 0.0

    def _is_something_due(self) -> bool:
        return self._closed.is_set() or bool(self._to_replay) or self._has_rest or self._next() <= time.monotonic()

    def _plan_heartbeats(self, now: float) -> None:
        """Send something to every router with requests here, also to those whose requests ended a few seconds ago: so
        a broker that was lost right after a last frame is noticed, and the frame is published again."""
        self._next_heartbeat = now + HEARTBEAT_EVERY
        recent = self._connection.recent() | {writer.reply_to for writer in self._writers}
        for reply_to in [each for each, outbox in self._outboxes.items() if not outbox and each not in recent]:
            del self._outboxes[reply_to]
        for outbox in (self._outboxes[reply_to] for reply_to in recent):
            outbox.due = min(outbox.due, now + HEARTBEAT_WITHIN)
            self._due = min(self._due, outbox.due)
        self._beating = recent

    def _add_or_drop(self, reply_to: str, frames: list[Frame]) -> None:
        """Add messages with these frames. Drop what is no JSON, or this thread would end, and with it all replies: the
        router misses the frames, and tries their requests again."""
        try:
            self._add_messages(reply_to, frames)
        except ValueError as error:
            log.error("%d frames for a router cannot be written and are dropped: %s", len(frames), type(error).__name__)

    def _add_messages(self, reply_to: str, frames: list[Frame]) -> None:
        """Make one message of frames, or several: routers drop what is too large. ValueError: they are no JSON."""
        body = Reply.encoded(self.node, frames)
        half = len(frames) // 2
        if half and (len(frames) > MOST_FRAMES or len(body) > LARGE_MESSAGE_BYTES):
            self._add_messages(reply_to, frames[:half])
            self._add_messages(reply_to, frames[half:])
        else:
            self._connection.add(reply_to, body, is_kept=bool(frames))
