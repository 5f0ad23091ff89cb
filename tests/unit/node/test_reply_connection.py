"""How replies are sent, on a Valkey of the tests' own: by which thread, and what is sent again."""

import threading
import time

import pytest
import redis
from redis.exceptions import ResponseError

from fleet_worker.broker import replies
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import reply_name
from fleet_worker.node import reply_connection, reply_publisher
from fleet_worker.node.reply_connection import ReplyConnection
from fleet_worker.node.reply_publisher import ReplyPublisher
from fleet_worker.protocol.reply import Alive, Delta, Deltas, Reply
from fleet_worker.settings import Settings
from fleet_worker.testing import embedded_broker
from tests.mlx_clients import took_less_than, until


@pytest.fixture(scope="module")
def url():
    with embedded_broker() as url:
        yield url


@pytest.fixture
def valkey(url):
    with redis.Redis.from_url(url, single_connection_client=True) as client:
        yield client
        client.flushdb()


@pytest.fixture
def connect(url):
    return create_app(Settings(broker_url=url)).connection_for_write


@pytest.fixture
def connection(connect):
    connection = ReplyConnection(connect, threading.Event())
    yield connection
    connection.close()


@pytest.fixture
def reply_to():
    return reply_name("test", 60)


def bodies(valkey, reply_to):
    """In the order in which they were sent."""
    return valkey.lrange(reply_to, 0, -1)[::-1]


def sent(valkey, reply_to):
    """All frames that were sent, without heartbeats."""
    replies = map(Reply.decode, bodies(valkey, reply_to))
    return [frame for reply in replies for frame in reply.frames if not isinstance(frame, Alive)]


def seqs(valkey, reply_to):
    """Their numbers."""
    return [frame.seq for frame in sent(valkey, reply_to)]


def texts(valkey, reply_to):
    """Their deltas, some of which have become one frame."""
    frames = [frame for frame in sent(valkey, reply_to) if isinstance(frame, Deltas)]
    return [delta.content for frame in frames for delta in frame.deltas]


def lose_connections(valkey):
    """As a broker does that is restarted: what it had is gone."""
    valkey.flushdb()
    valkey.client_kill_filter(_type="normal", skipme=True)


# --- One message after the other


def test_a_message_is_sent_without_waiting_for_the_answer_to_it_and_after_the_one_to_the_last(
    connection, valkey, reply_to
):
    assert not connection.is_free(reply_to)  # nothing is connected
    connection.add(reply_to, b"1")
    connection.settle()
    assert connection.is_free(reply_to)
    valkey.client_pause(200)
    connection.add(reply_to, b"2")
    with took_less_than(0.1):
        assert connection.send_at_once()
        assert not connection.is_free(reply_to)
    until(lambda: connection.is_free(reply_to))
    connection.add(reply_to, b"3")
    assert connection.send_at_once()
    connection.settle()
    assert bodies(valkey, reply_to) == [b"1", b"2", b"3"]


def test_what_the_broker_may_have_lost_is_sent_again_whether_or_not_it_was_confirmed(connection, valkey, reply_to):
    for body in (b'{"v":2,"node":"n","frames":[]}', b'{"v":2,"node":"m","frames":[]}'):
        connection.add(reply_to, body)
        connection.send_all()
        time.sleep(0.05)
    lose_connections(valkey)
    connection.settle()
    connection.add(reply_to, b"next", is_kept=False)
    connection.settle()
    [again, last] = bodies(valkey, reply_to)
    assert (Reply.decode(again), last) == (Reply(v=2, node="n", frames=[]), b"next")


@pytest.mark.parametrize("when", ["send", "confirm"])
def test_only_what_the_broker_refuses_is_given_up(connection, valkey, reply_to, monkeypatch, caplog, when):
    good, wrong = b'{"v":2,"node":"n","frames":[]}', reply_name("wrong", 60)
    sender_on = replies.sender_on

    class Refusing:
        def __init__(self, channel):
            sender, self.sent_to = sender_on(channel), None
            self._methods = {"send": sender.send, "confirm": sender.confirm}

        def send(self, reply_to, body):
            self.sent_to = reply_to
            self._call("send", reply_to, body)

        def confirm(self):
            return self._call("confirm")

        def _call(self, name, *args):
            if name == when and self.sent_to == wrong:
                raise ResponseError("ERR it is too large")
            return self._methods[name](*args)

    monkeypatch.setattr(replies, "sender_on", Refusing)
    monkeypatch.setattr(reply_connection, "TRIES", 2)
    for each in (reply_to, wrong, reply_to):
        connection.add(each, good)
    connection.settle()
    assert caplog.text.count("replies were given up: refused, ResponseError") == 1
    assert set(bodies(valkey, reply_to)) == {good}
    assert 2 <= valkey.llen(reply_to) <= 4  # what came before it, once more for each failure


def test_what_a_router_has_missed_comes_before_what_is_new(connection, valkey, reply_to):
    old, other = b'{"v":2,"node":"old","frames":[]}', reply_name("other", 60)
    for each in (reply_to, other):
        connection.add(each, old)
    connection.settle()
    valkey.flushdb()
    connection.send_again({reply_to})
    connection.add(reply_to, b"new")
    connection.settle()
    assert bodies(valkey, reply_to) == [old, b"new"]
    assert not valkey.exists(other)


# --- By which thread


@pytest.fixture
def publisher(connect):
    publisher = ReplyPublisher(connect, "n@h", max_pending=50)
    yield publisher
    publisher.close()


@pytest.fixture
def reply(publisher, valkey, reply_to):
    """The reply to an attempt that was accepted."""
    with publisher.reply("r", 1, reply_to) as reply:
        reply.accept(at_once=True, instance="i", queue_wait=0.0)
        until(lambda: seqs(valkey, reply_to) == [0] and not publisher._is_publishing)
        yield reply


def senders(publisher, monkeypatch):
    """The threads that send messages, from now on."""
    threads = []
    send = publisher._connection._send
    monkeypatch.setattr(publisher._connection, "_send", lambda: (threads.append(threading.current_thread()), send()))
    return threads


def test_the_thread_of_a_task_publishes_what_is_due(publisher, reply, valkey, reply_to, monkeypatch):
    threads = senders(publisher, monkeypatch)
    for seq in (1, 2, 3):
        time.sleep(0.01)  # longer than the gap
        reply.put([Delta(content="x")], seq)
        assert threads[-1] is threading.current_thread()
    until(lambda: seqs(valkey, reply_to) == [0, 1, 2, 3])


def test_it_leaves_what_has_to_be_waited_for_to_the_thread_of_the_publisher(
    publisher, reply, valkey, reply_to, monkeypatch
):
    threads = senders(publisher, monkeypatch)
    valkey.client_pause(300)
    with took_less_than(0.2):
        for number in range(19):
            reply.put([Delta(content=str(number))], number)
    until(lambda: texts(valkey, reply_to) == [str(number) for number in range(19)])
    assert set(threads) > {publisher._thread}
    reply.put([Delta(content="last")], 20)
    until(lambda: texts(valkey, reply_to)[19:] == ["last"])
    assert seqs(valkey, reply_to) == list(range(reply.appended))


def test_a_connection_that_is_lost_under_a_task_loses_nothing(publisher, reply, valkey, reply_to):
    for seq in range(1, 30):
        if seq % 10 == 0:
            lose_connections(valkey)
        reply.put([Delta(content=str(seq))], seq)
        time.sleep(0.002)
    until(lambda: set(texts(valkey, reply_to)) == {str(seq) for seq in range(1, 30)})
    assert set(seqs(valkey, reply_to)) == set(range(reply.appended))


HALF_A_CHARACTER = Delta.model_construct(content="\ud800", reasoning=None, tool_calls=None, resumed=None)


def test_a_frame_that_cannot_be_written_ends_its_own_attempt_only(publisher, reply, valkey, reply_to):
    time.sleep(0.01)
    with pytest.raises(ValueError, match="surrogate"):
        reply.put([HALF_A_CHARACTER], 1)
    reply.put([Delta(content="x")], 2)
    until(lambda: seqs(valkey, reply_to) == [0, 2])


def test_the_thread_of_the_publisher_survives_a_frame_that_cannot_be_written(
    publisher, reply, valkey, reply_to, monkeypatch, caplog
):
    monkeypatch.setattr(reply_publisher, "FEW_REQUESTS", 0)
    reply.put([HALF_A_CHARACTER], 1)
    until(lambda: "cannot be written" in caplog.text)
    reply.put([Delta(content="x")], 2)
    until(lambda: seqs(valkey, reply_to) == [0, 2])


def test_what_a_task_could_not_send_is_sent_by_the_thread_of_the_publisher_soon(
    publisher, reply, valkey, reply_to, monkeypatch
):
    def broken(reply_to, body):
        raise ConnectionResetError

    publisher._next_heartbeat = time.monotonic() + 60
    time.sleep(0.01)
    monkeypatch.setattr(publisher._connection._sender, "send", broken)
    reply.put([Delta(content="x")], 1)
    until(lambda: set(seqs(valkey, reply_to)) == {0, 1})
