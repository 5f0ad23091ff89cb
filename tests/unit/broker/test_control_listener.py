"""What a node receives from routers and operators, over kombu's in-memory transport."""

import pytest
from celery.worker.control import Panel

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.control_listener import ControlListener
from fleet_worker.broker.topology import cancel_exchange, cancel_queue
from tests.mlx_clients import until

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
    listener = ControlListener(app, NAME, subscription, {"where": lambda state: state.hostname})
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


@pytest.mark.parametrize("clock", ["9", None, 1.5, [9], True])
def test_a_reply_with_any_clock_ends_no_command_line(app, clock):
    """kombu gives the clock of each reply to this function."""
    assert app.control.mailbox.clock.adjust(clock) == 0
    assert app.control.mailbox.clock.adjust(9) == 10
