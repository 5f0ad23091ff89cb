"""The reply protocol, over kombu's in-memory transport."""

import queue
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from kombu import Connection

from fleet_worker.broker.topology import reply_name
from fleet_worker.errors import ReplyLost, RequestTimeout
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.node.reply_publisher import ReplyPublisher
from fleet_worker.protocol.reply import Accepted, Alive, ChatResponse, Delta, Deltas, Reply, Timings, Usage
from fleet_worker.router.reply_consumer import ReplyConsumer
from tests.clients import SOON, WHY, took_less_than, until


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


@pytest.fixture
def memory(request):
    """kombu's in-memory transport: a broker inside of this process."""
    return lambda: Connection("memory://", transport_options={"polling_interval": 0.001})


class Arrived:
    """The frames that an inbox received."""

    def __init__(self):
        self.frames = queue.SimpleQueue()

    def __call__(self, node, frame):
        if not isinstance(frame, Alive):
            self.frames.put(frame)

    def get(self):
        return self.frames.get(timeout=10)


@pytest.fixture
def arrived():
    return Arrived()


@pytest.fixture
def inbox(memory, arrived):
    inbox = ReplyConsumer(memory, "memory://", reply_name("test", 60), lambda node, frame: arrived(node, frame))
    inbox.start(5)
    yield inbox
    inbox.close()


@pytest.fixture
def sender(memory):
    sender = ReplyPublisher(memory, "n@h", max_pending=50)
    yield sender
    sender.close()


def test_a_whole_reply_travels_from_node_to_router(sender, inbox, arrived):
    with sender.answering("r", 1, inbox.name) as answer:
        answer.accept(instance="i", queue_wait=0.5)
        answer.put([Delta(content="a"), Delta(content="b")], 2)
        timings = Timings(queue_wait=0.5, duration=1.0)
        answer.end(ChatResponse, instance="i", model="m", finish_reason="stop", usage=Usage(), timings=timings)
    kinds = [arrived.get().kind for _ in range(3)]
    assert kinds == ["accepted", "deltas", "response"]


def test_a_redelivered_attempt_is_not_answered_twice(sender, inbox):
    with sender.answering("r", 1, inbox.name) as first, sender.answering("r", 1, inbox.name) as second:
        assert first
        assert second is None
    with sender.answering("r", 1, inbox.name) as third:
        assert third is None
    with sender.answering("r", 2, inbox.name) as another_attempt:
        assert another_attempt


def test_a_request_in_progress_shows_life(sender, inbox):
    seen = queue.SimpleQueue()
    inbox._on_frame = lambda node, frame: seen.put(frame)
    with sender.answering("r", 1, inbox.name) as answer:
        answer.accept(instance="i", queue_wait=0.0)
        assert seen.get(timeout=5).kind == "accepted"
        life = seen.get(timeout=5)
        assert (life.kind, life.seq) == ("alive", 1)


def test_a_sign_of_life_never_runs_ahead_of_the_frames(sender, inbox, arrived):
    """Many short waits around the moment when life is shown: a frame on its way must not look lost."""
    with sender.answering("r", 1, inbox.name) as answer:
        answer.accept(instance="i", queue_wait=0.0)
        for _ in range(300):
            sender._next_alive = 0.0
            answer.put([Delta(content="x")], 1)
        answer.fail(ReplyLost("the end"))
    frames = [arrived.get() for _ in range(302)]
    assert [frame.seq for frame in frames] == list(range(302))
    assert frames[-1].message == "the end"


class Broker:
    """Connections that fail while it is away."""

    def __init__(self):
        self.away = False

    def connect(self):
        if self.away:
            raise ConnectionError("away")
        return Connection("memory://", transport_options={"polling_interval": 0.001})


def put_many(answer, count):
    for _ in range(count):
        answer.put([Delta(content="x")], 1)


@pytest.fixture
def broker():
    broker = Broker()
    broker.away = True
    return broker


@pytest.fixture
def narrow(broker):
    sender = ReplyPublisher(broker.connect, "n@h", max_pending=5)
    yield sender
    broker.away = False
    sender.close()


def test_when_the_broker_is_away_a_bounded_number_of_frames_wait_and_the_error_is_the_next(
    broker, narrow, inbox, arrived
):
    with narrow.answering("r", 1, inbox.name) as answer:
        answer.deadline = time.monotonic() + 0.5
        with pytest.raises(RequestTimeout) as raised:
            put_many(answer, 20)
        answer.fail(raised.value)
        broker.away = False
        frames = [arrived.get()]
        while frames[-1].kind != "error":
            frames.append(arrived.get())
        assert [frame.seq for frame in frames] == list(range(len(frames)))
        assert 6 <= len(frames) <= 12  # one batch is being published, one waits


def test_a_task_that_waits_for_the_broker_can_be_stopped(narrow):
    stop = CancelToken()

    def work():
        with narrow.answering("r", 1, reply_name("test", 60)) as answer, answer.stopped_by(stop):
            put_many(answer, 20)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        until(lambda: narrow._count == 5)
        time.sleep(0.05)  # it waits now
        with took_less_than(SOON):
            stop.cancel(WHY)
            assert working.exception(timeout=10) is WHY
    assert narrow.wait_until_idle(0)


def test_what_a_router_has_missed_is_published_again(sender, inbox, arrived):
    with sender.answering("r", 1, inbox.name) as answer:
        answer.accept(instance="i", queue_wait=0.5)
        answer.put([Delta(content="x")], 1)
        assert [arrived.get().seq for _ in range(2)] == [0, 1]
        sender.publish_again("another queue")
        sender.publish_again(inbox.name)
        assert [arrived.get().seq for _ in range(2)] == [0, 1]
        answer.put([Delta(content="y")], 2)
        assert arrived.get().seq == 2
        assert arrived.frames.empty()


def test_a_message_of_another_protocol_is_dropped_and_the_next_one_read(sender, inbox, memory, arrived):
    with memory() as connection, connection.Producer() as producer:
        for body in (b"not json", b'{"v": 9}', Reply(v=2, node="n", frames=[accepted()]).encode()):
            producer.publish(
                body, exchange="", routing_key=inbox.name, content_type="application/json", content_encoding="utf-8"
            )
    assert arrived.get().kind == "accepted"


def test_a_frame_that_cannot_be_taken_is_dropped_and_the_next_one_read(sender, memory, arrived, caplog):
    def clumsy(node, frame):
        if isinstance(frame, Accepted):
            raise OverflowError("quoting a secret")
        arrived(node, frame)

    inbox = ReplyConsumer(memory, "memory://", reply_name("test", 60), clumsy)
    inbox.start(5)
    with sender.answering("r", 1, inbox.name) as answer:
        answer.accept(instance="i", queue_wait=0.5)
        answer.put([Delta(content="x")], 1)
    assert arrived.get().kind == "deltas"
    assert "a frame of n@h (accepted) was dropped: OverflowError at test_reply_publisher.py" in caplog.text
    assert "secret" not in caplog.text
    inbox.close()
