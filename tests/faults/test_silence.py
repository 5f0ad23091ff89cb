"""The broker falls silent without a word: frozen, or behind a network that was cut. Whoever talks to it notices by
itself, and no frame is lost. The real timeouts are five times as long as these.
"""

import queue
import signal
import threading
import time
from contextlib import closing, contextmanager, suppress

import pytest
from kombu import Producer

from fleet_worker import Settings
from fleet_worker.broker import connection as connections
from fleet_worker.broker import reconnecting as link
from fleet_worker.broker.app import create_app
from fleet_worker.broker.control_listener import ControlListener
from fleet_worker.broker.topology import cancel_exchange, cancel_queue, reply_name, transport_of
from fleet_worker.node import router_presence
from fleet_worker.node.reply_publisher import ReplyPublisher
from fleet_worker.node.router_presence import RouterPresence
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.protocol.reply import Alive, Delta, Timings, Usage
from fleet_worker.protocol.reply import ChatResponse as Response
from fleet_worker.protocol.request import ControlMessage
from fleet_worker.registry.view import Registry
from fleet_worker.router.reply_consumer import ReplyConsumer
from tests.mlx_clients import until
from tests.relay import Relay

NOTICED_WITHIN = 5.0
"""Seconds; about half of it is what RabbitMQ takes to forget a router that it cannot hear."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(connections, "ANSWER_WITHIN", 1.0)
    monkeypatch.setattr(link, "HEARTBEAT", 1.0)


@pytest.fixture
def relay(broker):
    with Relay(broker) as relay:
        yield relay


class Reader:
    """Reads the answer to one request as a router does: repeats are dropped, and a gap would be the end."""

    def __init__(self):
        self.frames = []
        self.gaps = []
        self._arrived = threading.Condition()

    def receive(self, node, frame):
        with self._arrived:
            if frame.seq > len(self.frames):
                self.gaps.append(frame.seq)
            elif frame.seq == len(self.frames) and not isinstance(frame, Alive):
                self.frames.append(frame)
                self._arrived.notify_all()

    def wait_until(self, true, seconds):
        """Until it is true of the frames that came, each once and in order."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: true(self.frames), seconds), f"only {len(self.frames)} frames"
            assert self.gaps == []

    def goes_on_within(self, seconds):
        there = len(self.frames)
        self.wait_until(lambda frames: len(frames) > there + 20, seconds)


def app_of(url):
    app = create_app(Settings(broker_url=url))
    options = app.conf.broker_transport_options
    app.conf.broker_transport_options = {
        **options,
        **{name: 1.0 for name in ("socket_timeout", "read_timeout", "write_timeout") if name in options},
    }
    return app


@contextmanager
def a_stream(node_url, router_url):
    """A node answers a request of a router with a token each 10 ms; yields the reader, and what ends the answer."""
    reader, ends = Reader(), threading.Event()
    inbox = ReplyConsumer(
        app_of(router_url).connection_for_read, router_url, reply_name("test", 60), reader.receive, Registry()
    )
    inbox.start(5)
    sender = ReplyPublisher(app_of(node_url).connection_for_write, "n@h", max_pending=10_000)

    def work():
        with sender.reply("r", 1, inbox.name) as answer:
            answer.accept(instance="i", queue_wait=0.0)
            while not ends.wait(0.01):
                answer.put([Delta(content="x")], 1)
            timings = Timings(queue_wait=0.0, duration=1.0)
            answer.end(Response, instance="i", model="m", finish_reason="stop", usage=Usage(), timings=timings)

    thread = threading.Thread(target=work)
    with closing(inbox), closing(sender):
        thread.start()
        try:
            reader.goes_on_within(5)
            yield reader
        finally:
            ends.set()
            thread.join()
        reader.wait_until(lambda frames: frames[-1].kind == "response", 5)


def cut_for_a_while(relay, stream):
    """The network comes back before anybody has noticed: it is the old connections that stay dead."""
    relay.cut()
    time.sleep(0.2)
    relay.mend()
    stream.goes_on_within(NOTICED_WITHIN)


def test_a_node_whose_network_was_cut_loses_no_frame(broker, relay):
    with a_stream(relay.url, broker.url) as stream:
        cut_for_a_while(relay, stream)


def test_a_node_and_a_router_whose_network_was_cut_lose_no_frame(relay):
    with a_stream(relay.url, relay.url) as stream:
        cut_for_a_while(relay, stream)


@pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True)
def test_a_router_whose_network_was_cut_loses_no_frame(broker, relay):
    """What Redis sent into the dead connection is lost: there the next attempt goes on with the answer."""
    with a_stream(broker.url, relay.url) as stream:
        cut_for_a_while(relay, stream)


def test_a_frozen_broker_is_noticed_and_costs_no_frame(broker, caplog):
    with a_stream(broker.url, broker.url) as stream:
        broker.signal(signal.SIGSTOP)
        try:
            until(
                lambda: all(f"{who}: the broker is away" in caplog.text for who in ("replies", "the reply queue")),
                NOTICED_WITHIN,
            )
        finally:
            broker.signal(signal.SIGCONT)
        stream.goes_on_within(NOTICED_WITHIN)


@pytest.mark.rest
def test_a_node_whose_network_was_cut_hears_cancels_again(broker, relay):
    cancelled = queue.SimpleQueue()
    app = app_of(relay.url)
    control = ControlListener(app, "n@h", (cancel_queue, lambda message: cancelled.put(bytes(message.body))), {})
    control.start()

    def hears(number):
        with create_app(Settings(broker_url=broker.url)).connection_for_write() as connection:
            body = ControlMessage(cancelled=[("r", number)]).encode()
            Producer(connection, cancel_exchange()).publish(
                body, content_type="application/json", content_encoding="utf-8"
            )
        with suppress(queue.Empty):
            return cancelled.get(timeout=0.2) == body

    try:
        until(lambda: hears(1))
        relay.cut()
        relay.mend()
        until(lambda: hears(2), NOTICED_WITHIN)
    finally:
        control.close(5.0)


@pytest.mark.rest
def test_a_node_without_requests_keeps_the_connection_on_which_it_asks_about_routers(broker, monkeypatch):
    monkeypatch.setattr(router_presence, "CHECK_EVERY", 0.3)
    app, opened = app_of(broker.url), []

    def connect():
        opened.append(app.connection_for_read())
        return opened[-1]

    presence = RouterPresence(connect, transport_of(broker.url), RunningAttempts(), abandoned_after=5.0)
    presence.start()
    try:
        until(lambda: presence._is_connected)
        time.sleep(NOTICED_WITHIN)
        assert not presence.listens(reply_name("nobody", 60))
        assert len(opened) == 1
    finally:
        presence.close(5.0)
