"""What a node receives from routers and operators, over kombu's in-memory transport."""

import signal
import threading
from types import SimpleNamespace

import pytest
from celery.worker.control import Panel

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.control_listener import ControlListener
from fleet_worker.broker.topology import cancel_exchange, cancel_queue
from tests.clients import until

NAME = "one@test"


@pytest.fixture
def app():
    with create_app(Settings()) as app:
        app.conf.update(broker_url="memory://", broker_transport_options={"polling_interval": 0.01})
        yield app


@pytest.fixture
def received():
    return []


@pytest.fixture
def listener(app, received):
    subscription = (cancel_queue, lambda message: received.append(bytes(message.body)))
    listener = ControlListener(app, NAME, subscription, {"where": lambda state, **_: state.hostname})
    listener.start()
    assert listener._thread.worked.wait(10)
    yield listener
    listener.close(timeout=5)


def ask(app, command, **arguments):
    return app.control.broadcast(command, arguments, reply=True, destination=[NAME], timeout=5)


def test_messages_of_a_fanout_are_received_and_commands_answered_by_one_thread(app, listener, received):
    with app.connection_for_write() as connection:
        producer = connection.Producer(exchange=cancel_exchange())
        producer.publish(b"{}", content_type="application/json")
    until(lambda: received)
    assert ask(app, "where") == [{NAME: NAME}]
    assert ask(app, "ping") == [{NAME: {"ok": "pong"}}]


def test_its_commands_are_not_those_of_other_workers_of_the_process(listener):
    assert "where" not in Panel.data


def test_a_command_that_is_unknown_or_nonsense_does_no_harm(app, listener, caplog):
    assert "error" in ask(app, "no_such_command")[0][NAME]
    with app.connection_for_write() as connection:
        producer = connection.Producer(exchange=app.control.mailbox.exchange, serializer="json")
        for nonsense in ("secret", {"destination": [NAME], "arguments": ["secret"]}, {"secret": 1}):
            producer.publish(nonsense)
    assert ask(app, "where") == [{NAME: NAME}]
    assert "a control command was dropped" in caplog.text
    assert "secret" not in "".join(record.getMessage() for record in caplog.records if "fleet" in record.name)


def test_the_command_shutdown_ends_the_node_as_sigterm_does(app, listener):
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        app.control.broadcast("shutdown", destination=[NAME])
        until(asked.is_set)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_event_that_a_command_asks_for_is_sent_by_the_event_loop(app, listener):
    """No other thread may use the connection of the worker."""
    left_to_it, sent = [], []
    dispatcher = SimpleNamespace(send=lambda kind, **_: sent.append(kind))
    listener._state.consumer = SimpleNamespace(event_dispatcher=dispatcher, call_soon=left_to_it.append)
    app.control.broadcast("heartbeat", destination=[NAME])
    until(lambda: left_to_it)
    assert sent == []
    left_to_it[0]()
    assert sent == ["worker-heartbeat"]
