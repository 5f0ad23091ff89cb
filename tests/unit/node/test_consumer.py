"""Messages that Celery's consumer cannot use: it lives on, and the log does not quote them."""

from types import SimpleNamespace

import celery.worker.consumer.consumer as celery_consumer
import pytest
from celery import Celery
from kombu import Connection, Message
from kombu.exceptions import DecodeError

from fleet_worker.node.consumer import Consumer

SECRET, TASK = "swordfish", "fleet.chat"


@pytest.fixture
def bad_message():
    """Returns a function that makes a message of a body, with headers that repeat its arguments."""
    with Connection("memory://") as connection:

        def make(body, **changes):
            headers = {"id": "r-1", "task": TASK, "argsrepr": SECRET, "kwargsrepr": SECRET, **changes}
            channel = connection.default_channel
            return Message(
                body, 1, "application/json", "utf-8", headers=headers, accept={"application/json"}, channel=channel
            )

        yield make


bare_consumer = object.__new__(Consumer)  # it needs no worker to complain
bare_consumer.connection_errors = ()
bare_consumer.event_dispatcher = bare_consumer.pool = bare_consumer.controller = None
bare_consumer.app = Celery("test", broker="memory://", set_as_current=False)


def decode_error(body, message):
    """The error of a decoder holds all that it could not decode."""
    try:
        message.decode()
    except DecodeError as error:
        bare_consumer.on_decode_error(message, error)


def unknown_message(body, message):
    bare_consumer.on_unknown_message(body, message)


def unknown_task(body, message):
    bare_consumer.on_unknown_task(None, message, KeyError("fleet.unheard_of"))


def unknown_task_without_id(body, message):
    message.headers = {"argsrepr": SECRET}
    unknown_task(body, message)


def invalid_task(body, message):
    bare_consumer.on_invalid_task(body, message, ValueError("not a task"))


@pytest.mark.parametrize(
    ("complain", "body", "said"),
    [
        (decode_error, SECRET.encode() + b"\xff", "decode message body"),
        (decode_error, f'["{SECRET}'.encode(), "decode message body"),
        (unknown_message, f'"{SECRET}"'.encode(), "unknown message"),
        (unknown_task, f'["{SECRET}"]'.encode(), "unregistered task of type 'fleet.unheard_of'"),
        (unknown_task_without_id, f'["{SECRET}"]'.encode(), "unregistered task of type 'fleet.unheard_of'"),
        (invalid_task, f'["{SECRET}"]'.encode(), "invalid task"),
    ],
)
def test_a_message_that_cannot_be_used_is_logged_by_its_size_and_not_shown(caplog, bad_message, complain, body, said):
    complain(body, bad_message(body))
    assert said in caplog.text
    assert f"{len(body)} bytes, not shown" in caplog.text
    assert SECRET not in caplog.text


def test_celery_has_the_methods_that_are_overridden():
    """If this fails, a new Celery logs bad messages elsewhere: see `node.consumer.Consumer`."""
    for method in ("on_unknown_message", "on_unknown_task", "on_invalid_task", "on_decode_error"):
        assert callable(getattr(celery_consumer.Consumer, method))
        assert getattr(Consumer, method) is not getattr(celery_consumer.Consumer, method)


@pytest.fixture(scope="module")
def receive():
    """What a worker does with each message."""
    with Celery("test", broker="memory://", set_as_current=False) as app:
        app.conf.worker_send_task_events = False

        @app.task(name=TASK, shared=False)
        def chat(envelope):
            """Never runs."""

        controller = SimpleNamespace(state=SimpleNamespace(revoked=()), use_eventloop=False)
        pool = SimpleNamespace(apply_async=pytest.fail, is_green=False)
        timer = SimpleNamespace(call_at=pytest.fail)
        consumer = Consumer(pytest.fail, app=app, controller=controller, pool=pool, timer=timer)
        consumer.event_dispatcher = None
        consumer.update_strategies()
        yield consumer.create_task_handler()


@pytest.mark.parametrize("body", [b"5", b"{}", b"[1]", b"[[], {}]"])
def test_a_message_that_is_no_task_is_dropped(receive, bad_message, body, caplog):
    """Celery would end the worker."""
    message = bad_message(body)
    receive(message)
    assert message.acknowledged
    assert f"{len(body)} bytes, not shown" in caplog.text


@pytest.mark.parametrize("header", ["eta", "expires", "task", "id"])
@pytest.mark.parametrize("value", [[SECRET], {SECRET: SECRET}])
def test_a_task_with_a_malformed_header_is_dropped_without_a_quotation(receive, bad_message, header, value, caplog):
    receive(bad_message(b"[[1], {}, {}]", **{header: value}))
    assert "invalid task" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("header", ["eta", "expires"])
def test_a_task_at_no_time_at_all_is_dropped_without_a_quotation(receive, bad_message, header, caplog):
    receive(bad_message(b"[[1], {}, {}]", **{header: SECRET}))
    assert "invalid task" in caplog.text
    assert SECRET not in caplog.text


def test_a_broker_that_is_lost_meanwhile_is_not_a_bad_message(receive, bad_message):
    message = bad_message(b"[[1], {}, {}]")
    message.decode = lambda: (_ for _ in ()).throw(ConnectionResetError())
    with pytest.raises(ConnectionResetError):
        receive(message)
