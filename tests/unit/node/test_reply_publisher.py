"""The reply protocol, over a Valkey of the tests' own."""

import queue
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from fleet_worker.broker import replies
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import reply_name
from fleet_worker.errors import ReplyLost, RequestTimeout
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.node import replay_buffer, reply_publisher
from fleet_worker.node.replay_buffer import ReplayBuffer
from fleet_worker.node.reply_publisher import ReplyPublisher
from fleet_worker.protocol.reply import Accepted, Alive, ChatResponse, Delta, Deltas, Reply, Timings, Usage
from fleet_worker.registry.view import Registry
from fleet_worker.router.reply_consumer import ReplyConsumer
from fleet_worker.settings import Settings
from fleet_worker.testing import embedded_broker
from tests.mlx_clients import SOON, WHY, took_less_than, until

SOMEWHERE = reply_name("test", 60)


def accepted(seq=0, attempt=1):
    return Accepted(id="r", attempt=attempt, seq=seq, instance="i", queue_wait=0.0)


def deltas(seq, text="x", attempt=1, count=1):
    return Deltas(id="r", attempt=attempt, seq=seq, deltas=[Delta(content=text)] * count, tokens=count)


def response(seq):
    timings = Timings(queue_wait=0.0, duration=1.0)
    facts = {"node": "n", "instance": "i", "model": "m", "finish_reason": "stop", "usage": Usage(), "timings": timings}
    return ChatResponse(id="r", attempt=1, seq=seq, **facts)


def alive(seq):
    return Alive(id="r", attempt=1, seq=seq)


@pytest.fixture(scope="module")
def connect():
    """Opens connections to a broker."""
    with embedded_broker() as url:
        yield create_app(Settings(broker_url=url)).connection_for_write


class Arrived:
    """The frames that an inbox received."""

    def __init__(self):
        self.frames = queue.SimpleQueue()

    def __call__(self, node, frame):
        if not isinstance(frame, Alive):
            self.frames.put(frame)

    def get(self):
        return self.frames.get(timeout=10)

    def until_the_error(self):
        frames = [self.get()]
        while frames[-1].kind != "error":
            frames.append(self.get())
        return frames


@pytest.fixture
def arrived():
    return Arrived()


@pytest.fixture
def inbox(connect, arrived):
    inbox = ReplyConsumer(
        connect, "redis://", reply_name("test", 60), lambda node, frame: arrived(node, frame), Registry()
    )
    inbox.start(5)
    yield inbox
    inbox.close()


@pytest.fixture
def publisher(connect):
    publisher = ReplyPublisher(connect, "n@h", max_pending=50)
    yield publisher
    publisher.close()


def test_a_whole_reply_travels_from_node_to_router(publisher, inbox, arrived):
    with publisher.reply("r", 1, inbox.name) as reply:
        reply.accept(instance="i", queue_wait=0.5)
        reply.put([Delta(content="a"), Delta(content="b")], 2)
        timings = Timings(queue_wait=0.5, duration=1.0)
        reply.end(ChatResponse, instance="i", model="m", finish_reason="stop", usage=Usage(), timings=timings)
    kinds = [arrived.get().kind for _ in range(3)]
    assert kinds == ["accepted", "deltas", "response"]


def test_each_heartbeat_tells_of_a_request_in_progress(publisher, inbox):
    seen = queue.SimpleQueue()
    inbox._on_frame = lambda node, frame: seen.put(frame)
    with publisher.reply("r", 1, inbox.name) as reply:
        reply.accept(instance="i", queue_wait=0.0)
        assert seen.get(timeout=5).kind == "accepted"
        life = seen.get(timeout=5)
        assert (life.kind, life.seq) == ("alive", 1)


@pytest.fixture
def messages(publisher, monkeypatch):
    """The kinds of the frames of each message that is sent."""
    messages, add = [], publisher._connection.add

    def record(reply_to, body, **options):
        messages.append([frame.kind for frame in Reply.decode(body).frames])
        add(reply_to, body, **options)

    monkeypatch.setattr(publisher._connection, "add", record)
    return messages


def test_the_heartbeat_of_a_stream_travels_with_its_next_frame(messages, publisher):
    with publisher.reply("r", 1, SOMEWHERE) as reply:
        reply.accept(instance="i", queue_wait=0.0, at_once=True)
        until(lambda: any("alive" in kinds for kinds in messages))
        until(lambda: publisher._beating)
        reply.put([Delta(content="x")], 1)
        until(lambda: ["deltas", "alive"] in messages)
        assert publisher.take_lag() < reply_publisher.HEARTBEAT_WITHIN / 2
        reply.fail(ReplyLost("the end"))


def test_each_request_has_one_heartbeat_in_each_period_whatever_is_published(messages, publisher, monkeypatch):
    monkeypatch.setattr(reply_publisher, "HEARTBEAT_EVERY", 0.2)
    monkeypatch.setattr(reply_publisher, "HEARTBEAT_WITHIN", 0.05)
    ends = time.monotonic() + 1.0
    with publisher.reply("r", 1, SOMEWHERE) as reply, publisher.reply("s", 1, SOMEWHERE) as other:
        other.accept(instance="i", queue_wait=0.0)
        reply.accept(instance="i", queue_wait=0.0)
        while time.monotonic() < ends:
            reply.put([Delta(content="x")], 1)
            time.sleep(0.02)
        counts = [kinds.count("alive") for kinds in messages if "alive" in kinds]
        reply.fail(ReplyLost("the end"))
        other.fail(ReplyLost("the end"))
    assert 3 <= len(counts) <= 6
    assert set(counts[1:]) == {2}


def test_a_heartbeat_never_runs_ahead_of_the_frames(publisher, inbox, arrived):
    """Many short waits around a heartbeat: a frame on its way must not look lost."""
    with publisher.reply("r", 1, inbox.name) as reply:
        reply.accept(instance="i", queue_wait=0.0)
        for _ in range(300):
            publisher._next_heartbeat = 0.0
            reply.put([Delta(content="x")], 1)
        reply.fail(ReplyLost("the end"))
    frames = arrived.until_the_error()
    assert [frame.seq for frame in frames] == list(range(len(frames)))
    assert sum(len(frame.deltas) for frame in frames[1:-1]) == 300
    assert frames[-1].message == "the end"
    assert publisher._count == 0


class Broker:
    """Connections that fail while it is away."""

    def __init__(self, connect):
        self.away = False
        self._connect = connect

    def connect(self):
        if self.away:
            raise ConnectionError("away")
        return self._connect()


def put_many(reply, count):
    for _ in range(count):
        reply.put([Delta(content="x")], 1)


@pytest.fixture
def broker(connect):
    broker = Broker(connect)
    broker.away = True
    return broker


@pytest.fixture
def narrow(broker):
    publisher = ReplyPublisher(broker.connect, "n@h", max_pending=5)
    yield publisher
    broker.away = False
    publisher.close()


def test_when_the_broker_is_away_a_bounded_number_of_frames_wait_and_the_error_is_the_next(
    broker, narrow, inbox, arrived
):
    with narrow.reply("r", 1, inbox.name) as reply:
        reply.deadline = time.monotonic() + 0.5
        with pytest.raises(RequestTimeout) as raised:
            put_many(reply, 20)
        reply.fail(raised.value)
        broker.away = False
        frames = arrived.until_the_error()
        assert [frame.seq for frame in frames] == list(range(len(frames)))
        assert 5 <= sum(len(frame.deltas) for frame in frames[:-1]) <= 11  # one batch is being published, one waits


def test_a_task_that_waits_for_the_broker_can_be_stopped(narrow):
    stop = CancelToken()

    def work():
        with narrow.reply("r", 1, reply_name("test", 60)) as reply, reply.cancelled_by(stop):
            put_many(reply, 20)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        until(lambda: narrow._count == 5)
        time.sleep(0.05)  # it waits now
        with took_less_than(SOON):
            stop.cancel(WHY)
            assert working.exception(timeout=10) is WHY
    assert narrow.wait_until_idle(0)


def test_what_a_router_has_missed_is_published_again(publisher, inbox, arrived):
    with publisher.reply("r", 1, inbox.name) as reply:
        reply.accept(instance="i", queue_wait=0.5)
        reply.put([Delta(content="x")], 1)
        assert [arrived.get().seq for _ in range(2)] == [0, 1]
        publisher.publish_again("another queue")
        publisher.publish_again(inbox.name)
        assert [arrived.get().seq for _ in range(2)] == [0, 1]
        reply.put([Delta(content="y")], 2)
        assert arrived.get().seq == 2
        assert arrived.frames.empty()


def test_a_message_of_another_protocol_is_dropped_and_the_next_one_read(inbox, connect, arrived):
    with connect() as connection:
        sender = replies.sender_on(connection.default_channel)
        for body in (b"not json", b'{"v": 9}', Reply(v=2, node="n", frames=[accepted()]).encode()):
            sender.send(inbox.name, body)
            sender.confirm()
    assert arrived.get().kind == "accepted"


def test_a_frame_that_cannot_be_taken_is_dropped_and_the_next_one_read(publisher, connect, arrived, caplog):
    def clumsy(node, frame):
        if isinstance(frame, Accepted):
            raise OverflowError("quoting a secret")
        arrived(node, frame)

    inbox = ReplyConsumer(connect, "redis://", reply_name("test", 60), clumsy, Registry())
    inbox.start(5)
    with publisher.reply("r", 1, inbox.name) as reply:
        reply.accept(instance="i", queue_wait=0.5)
        reply.put([Delta(content="x")], 1)
    assert arrived.get().kind == "deltas"
    assert "a frame of n@h (accepted) was dropped: OverflowError at test_reply_publisher.py" in caplog.text
    assert "secret" not in caplog.text
    inbox.close()


# --- What is published again


def body(*seqs, text="x"):
    frames = [Deltas(id="r", attempt=1, seq=seq, deltas=[Delta(content=text)], tokens=seq) for seq in seqs]
    return Reply(v=2, node="n@h", frames=frames).encode()


def seqs(bodies):
    return [[frame.seq for frame in Reply.decode(each).frames] for each in bodies]


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(replay_buffer, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize(
    ("frames", "parts"),
    [
        ([], 1),
        ([deltas(0)], 1),
        ([deltas(seq) for seq in range(500)], 1),
        ([deltas(seq) for seq in range(501)], 2),
        ([deltas(seq, "x" * 40_000) for seq in range(8)], 4),
        ([deltas(0), deltas(1, "x" * 1_000_000), deltas(2), deltas(3)], 3),
    ],
)
def test_no_message_is_larger_than_routers_read(publisher, monkeypatch, frames, parts):
    monkeypatch.setattr(reply_publisher, "LARGE_MESSAGE_BYTES", 100_000)
    bodies = []
    monkeypatch.setattr(publisher._connection, "add", lambda reply_to, body, is_kept: bodies.append(body))
    publisher._add_messages("queue", frames)
    assert [frame for body in bodies for frame in Reply.decode(body).frames] == frames
    assert len(bodies) == parts


def test_many_messages_to_one_router_are_one_when_they_are_published_again(clock):
    buffer = ReplayBuffer()
    for reply_to, seq in [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 1)]:
        buffer.add(reply_to, body(seq))
    again = buffer.take()
    assert [reply_to for reply_to, _ in again] == ["a", "b"]
    assert seqs(each for _, each in again) == [[0, 1, 2], [0, 1]]
    assert not buffer


def test_what_is_published_again_to_one_router_only_is_taken_out(clock):
    buffer = ReplayBuffer()
    for reply_to, seq in [("a", 0), ("b", 0), ("a", 1), ("b", 1)]:
        buffer.add(reply_to, body(seq))
    assert buffer.take({"c"}) == []
    [(reply_to, merged)] = buffer.take({"b", "c"})
    assert (reply_to, seqs([merged])) == ("b", [[0, 1]])
    assert buffer.reply_queues() == {"a"}


def test_a_merged_message_says_all_that_its_parts_said(clock):
    buffer = ReplayBuffer()
    buffer.add("a", body(0, text="Grüße"))
    buffer.add("a", body(1, 2))
    [(_, merged)] = buffer.take()
    assert Reply.decode(merged) == Reply.decode(body(0, text="Grüße")).model_copy(
        update={"frames": Reply.decode(body(0, text="Grüße")).frames + Reply.decode(body(1, 2)).frames}
    )


def test_no_message_becomes_too_large_by_that(clock, monkeypatch):
    monkeypatch.setattr(replay_buffer, "REPLAY_MESSAGE_BYTES", 1_000)
    buffer = ReplayBuffer()
    for seq, length in enumerate([300, 300, 300, 5_000, 10, 10]):
        buffer.add("a", body(seq, text="x" * length))
    assert seqs(each for _, each in buffer.take()) == [[0, 1], [2], [3], [4, 5]]


def test_what_is_old_is_forgotten(clock):
    buffer = ReplayBuffer()
    buffer.add("a", body(0))
    clock.now += 3
    buffer.add("b", body(0))
    clock.now += 3
    assert buffer.reply_queues() == {"b"}
    clock.now += 3
    assert buffer.reply_queues() == set()
    assert not buffer
    assert buffer.take() == []


def test_not_more_bytes_than_allowed_are_kept(clock, monkeypatch):
    monkeypatch.setattr(replay_buffer, "REPLAY_MAX_BYTES", 3 * len(body(0)))
    buffer = ReplayBuffer()
    for seq in range(5):
        buffer.add("a", body(seq))
    assert seqs(each for _, each in buffer.take()) == [[2, 3, 4]]
