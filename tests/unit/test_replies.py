"""The reply protocol: order, repeats, gaps, bounds; and a sender over kombu's in-memory transport."""

import asyncio
import queue
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu import Connection

from fleet_worker.errors import ReplyLost, ReplyOverflow, RequestTimeout
from fleet_worker.frames import Accepted, Alive, ChatResponse, Delta, Deltas, Failure, Reply, Timings, Usage
from fleet_worker.lanes import reply_name
from fleet_worker.mailbox import Mailbox
from fleet_worker.replies import ReplyInbox, ReplySender


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


def mailbox_of(attempt=1, max_buffered=100, seconds=0.0):
    return Mailbox("r", attempt, deadline=time.monotonic() + seconds, max_buffered=max_buffered)


def drain(mailbox):
    """What has arrived by now, from a mailbox whose deadline has passed."""
    frames = []
    while True:
        try:
            frames.append(mailbox.get())
        except queue.Empty:
            return frames


def test_frames_arrive_in_order():
    mailbox = mailbox_of()
    whole = [accepted(), deltas(1), deltas(2), response(3)]
    for frame in whole:
        mailbox.put("n", frame)
    assert drain(mailbox) == whole


@given(st.lists(st.integers(0, 3), max_size=12))
def test_what_is_published_again_is_dropped(repeats):
    """After any frame, the sender may publish any of those before it again."""
    mailbox = mailbox_of()
    whole = [accepted(), deltas(1), deltas(2), response(3)]
    for position, frame in enumerate(whole):
        mailbox.put("n", frame)
        for repeat in repeats:
            mailbox.put("n", whole[min(repeat, position)])
    assert drain(mailbox) == whole


def test_a_gap_ends_the_reply_with_an_error():
    mailbox = mailbox_of()
    for frame in (accepted(), deltas(1), deltas(3), response(4)):
        mailbox.put("n", frame)
    *_, last = drain(mailbox)
    assert isinstance(last, Failure)
    assert isinstance(last.error(), ReplyLost)
    assert last.retryable


def test_a_sign_of_life_shows_that_the_end_is_missing():
    mailbox = mailbox_of()
    mailbox.put("n", accepted())
    mailbox.put("n", alive(1))
    assert [frame.kind for frame in drain(mailbox)] == ["accepted"]
    mailbox.put("n", alive(2))
    assert [frame.kind for frame in drain(mailbox)] == ["error"]


def test_frames_of_another_attempt_or_another_node_are_not_listened_to():
    mailbox = mailbox_of(attempt=2)
    mailbox.put("n", accepted(attempt=1))
    mailbox.put("n", accepted(attempt=2))
    mailbox.put("other", deltas(1, attempt=2))
    mailbox.put("n", deltas(1, "mine", attempt=2))
    assert [frame.kind for frame in drain(mailbox)] == ["accepted", "deltas"]


def test_a_reader_that_is_too_slow_is_told_so():
    mailbox = mailbox_of(max_buffered=10)
    mailbox.put("n", accepted())
    for seq in range(1, 8):
        mailbox.put("n", deltas(seq, count=3))
    frames = drain(mailbox)
    assert isinstance(frames[-1].error(), ReplyOverflow)
    assert sum(len(frame.deltas) for frame in frames if isinstance(frame, Deltas)) <= 10


def test_a_reader_that_keeps_up_may_read_any_amount():
    mailbox = mailbox_of(max_buffered=10)
    mailbox.put("n", accepted())
    for seq in range(1, 100):
        mailbox.put("n", deltas(seq, count=5))
        assert drain(mailbox)[-1].kind == "deltas"


def test_an_asyncio_reader_is_woken_by_the_inbox_thread_and_by_its_deadline():
    mailbox = mailbox_of(seconds=0.5)

    async def read():
        reader = asyncio.create_task(mailbox.aget())
        await asyncio.sleep(0)
        threading.Thread(target=mailbox.put, args=("n", accepted())).start()
        assert (await reader).kind == "accepted"
        with pytest.raises(queue.Empty):
            await mailbox.aget()

    asyncio.run(read())


def test_a_frame_for_an_event_loop_that_is_closed_harms_nobody():
    mailbox = mailbox_of()

    async def give_up():
        reader = asyncio.create_task(mailbox.aget())
        await asyncio.sleep(0)
        reader.cancel()

    asyncio.run(give_up())
    mailbox.put("n", accepted())
    assert mailbox.get().kind == "accepted"


@pytest.fixture
def memory(request):
    """kombu's in-memory transport: a broker inside of this process."""
    return lambda: Connection("memory://", transport_options={"polling_interval": 0.001})


@pytest.fixture
def inbox(memory):
    inbox = ReplyInbox(memory, reply_name("test", 60), max_buffered=1000)
    inbox.start(5)
    yield inbox
    inbox.close()


@pytest.fixture
def sender(memory):
    sender = ReplySender(memory, "n@h", max_pending=50)
    yield sender
    sender.close()


def test_a_whole_reply_travels_from_node_to_router(sender, inbox):
    mailbox = inbox.mailbox("r", 1, deadline=time.monotonic() + 10)
    with sender.answering("r", 1, inbox.name) as answer:
        answer.accept(instance="i", queue_wait=0.5)
        answer.put([Delta(content="a"), Delta(content="b")], 2)
        timings = Timings(queue_wait=0.5, duration=1.0)
        answer.end(ChatResponse, instance="i", model="m", finish_reason="stop", usage=Usage(), timings=timings)
    kinds = [mailbox.get().kind for _ in range(3)]
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
    mailbox = inbox.mailbox("r", 1, deadline=time.monotonic() + 10)
    mailbox.put = lambda node, frame: seen.put(frame)
    with sender.answering("r", 1, inbox.name) as answer:
        answer.accept(instance="i", queue_wait=0.0)
        assert seen.get(timeout=5).kind == "accepted"
        life = seen.get(timeout=5)
        assert (life.kind, life.seq) == ("alive", 1)


def test_a_sign_of_life_never_runs_ahead_of_the_frames(sender, inbox):
    """Many short waits around the moment when life is shown: a frame on its way must not look lost."""
    mailbox = inbox.mailbox("r", 1, deadline=time.monotonic() + 10)
    with sender.answering("r", 1, inbox.name) as answer:
        answer.accept(instance="i", queue_wait=0.0)
        for _ in range(300):
            sender._next_alive = 0.0
            answer.put([Delta(content="x")], 1)
        answer.fail(ReplyLost("the end"))
    frames = [mailbox.get() for _ in range(302)]
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


def test_when_the_broker_is_away_a_bounded_number_of_frames_wait():
    broker = Broker()
    broker.away = True
    sender = ReplySender(broker.connect, "n@h", max_pending=5)
    name = reply_name("test", 60)
    with sender.answering("r", 1, name) as answer:
        answer.deadline = time.monotonic() + 0.5
        with pytest.raises(RequestTimeout):
            put_many(answer, 20)
        inbox = ReplyInbox(lambda: Connection("memory://"), name, max_buffered=100)
        inbox.start(5)
        mailbox = inbox.mailbox("r", 1, deadline=time.monotonic() + 10)
        broker.away = False
        assert [mailbox.get().seq for _ in range(5)] == [0, 1, 2, 3, 4]
    inbox.close()
    sender.close()


def test_a_message_of_another_protocol_is_dropped_and_the_next_one_read(sender, inbox, memory):
    mailbox = inbox.mailbox("r", 1, deadline=time.monotonic() + 10)
    with memory() as connection, connection.Producer() as producer:
        for body in (b"not json", b'{"v": 9}', Reply(v=2, node="n", frames=[accepted()]).encode()):
            producer.publish(
                body, exchange="", routing_key=inbox.name, content_type="application/json", content_encoding="utf-8"
            )
    assert mailbox.get().kind == "accepted"
