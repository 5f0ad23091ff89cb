import logging
from types import SimpleNamespace

import celery.worker.consumer.consumer as celery_consumer
import celery.worker.request
import celery.worker.state
import pytest
from celery import Celery, signals
from celery.utils.timer2 import Timer
from celery.worker.consumer.consumer import CONNECTION_RETRY
from celery.worker.control import Panel
from kombu import Message

from fleet_worker.node.log_privacy import (
    drop_beats,
    name_lines,
    protect_logs,
)
from fleet_worker.node.task_request import Request

SECRET = "swordfish"
LOGGERS = ["celery.worker.consumer.connection", "celery.pool", "httpcore", "httpx", "kombu", "amqp"]
FILTERED = [
    "celery.worker.consumer.consumer",
    "celery.worker.request",
    "py.warnings",
]


@pytest.fixture
def protected():
    """`protect_logs` is for the life of a process: what it changes is put back."""
    receivers = list(signals.after_setup_logger.receivers)
    levels = {name: logging.getLogger(name).level for name in {*LOGGERS, *FILTERED}}
    filters = {name: list(logging.getLogger(name).filters) for name in FILTERED}
    protect_logs()
    yield
    for name, before in filters.items():
        logging.getLogger(name).filters = before
    signals.after_setup_logger.receivers = receivers
    signals.after_setup_logger.sender_receivers_cache.clear()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def message():
    """A task with a secret among its arguments, sent and received over a broker in memory."""
    app = Celery("test", broker="memory://", set_as_current=False)
    app.conf.update(task_serializer="json", accept_content=["json"])

    @app.task(name="fleet.chat", shared=False)
    def chat(envelope, *, prompt):
        """Never runs."""

    with app.connection_for_write() as connection:
        connection.default_channel.queue_declare("celery")
        chat.apply_async(args=[{"prompt": [SECRET]}], kwargs={"prompt": SECRET}, task_id="r-1", connection=connection)
        message = connection.default_channel.basic_get("celery", no_ack=True)
        message.app = app
        yield message
    app.close()


@pytest.fixture(params=[Request])
def request_of_a_worker(request, message):
    """That task, as a worker holds it."""
    return request.param(message, app=message.app, hostname="local@mini-7", decoded=False)


with_celerys_own = pytest.mark.parametrize("request_of_a_worker", [celery.worker.request.Request], indirect=True)


@pytest.fixture
def worker(request_of_a_worker):
    """The state that remote-control commands see, with that task reserved, active and scheduled."""
    timer = Timer()
    timer.auto_start = False
    timer.schedule.enter_after(60, timer.Entry(print, (request_of_a_worker,)))
    worker_state = celery.worker.state
    worker_state.task_reserved(request_of_a_worker)
    yield SimpleNamespace(tset=set, consumer=SimpleNamespace(timer=timer), hostname="local@mini-7")
    worker_state.reserved_requests.discard(request_of_a_worker)
    worker_state.active_requests.discard(request_of_a_worker)
    worker_state.requests.pop("r-1", None)


def answers(state, request):
    """What every command that shows tasks answers, under each of its names."""
    shown = {}
    for name in ("reserved", "dump_reserved", "scheduled", "dump_schedule"):
        shown[name] = Panel.data[name](state)
    shown["query_task"] = Panel.data["query_task"](state, ["r-1"])
    celery.worker.state.task_accepted(request)
    for name in ("active", "dump_active"):
        shown[name] = Panel.data[name](state)
    shown["query_task of an active one"] = Panel.data["query_task"](state, ["r-1"])
    return shown


@with_celerys_own
def test_without_protection_every_command_shows_the_arguments(worker, request_of_a_worker):
    """Else the next test proves nothing."""
    shown = answers(worker, request_of_a_worker)
    assert {name for name, answer in shown.items() if SECRET in repr(answer)} == shown.keys()


def test_no_command_shows_the_arguments_of_a_task_under_any_of_its_names(worker, request_of_a_worker):
    shown = answers(worker, request_of_a_worker)
    assert {name for name, answer in shown.items() if SECRET in repr(answer)} == set()


def test_what_else_a_command_answers_stays(worker, request_of_a_worker):
    shown = answers(worker, request_of_a_worker)
    for answer in (shown["reserved"][0], shown["scheduled"][0]["request"], shown["active"][0]):
        assert (answer["id"], answer["name"], answer["hostname"]) == ("r-1", "fleet.chat", "local@mini-7")
        assert answer["args"] == answer["kwargs"] == "-"
    state, info = shown["query_task"]["r-1"]
    assert (state, info["id"]) == ("reserved", "r-1")


def test_a_command_can_be_asked_for_less(worker, request_of_a_worker):
    celery.worker.state.task_accepted(request_of_a_worker)
    assert SECRET not in repr(Panel.data["active"](worker, safe=True))


class CutOff:
    """A channel whose connection was lost."""

    no_ack_consumers = None

    def basic_ack(self, *_, **__):
        raise ConnectionResetError


def acknowledge_too_late(request):
    """As a worker does when a task ends whose connection is gone."""
    headers = {"id": "r-2", "task": "fleet.chat"}
    message = Message("[[], {}, {}]", 1, "application/json", "utf-8", channel=CutOff(), headers=headers)
    type(request)(
        message, on_ack=message.ack_log_error, app=request.app, connection_errors=(ConnectionError,)
    ).acknowledge()


@with_celerys_own
def test_without_protection_a_message_that_cannot_be_acknowledged_is_an_alarm(caplog, request_of_a_worker):
    """Else the next test proves nothing."""
    acknowledge_too_late(request_of_a_worker)
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]


def test_a_message_that_cannot_be_acknowledged_is_no_alarm(protected, caplog, request_of_a_worker):
    acknowledge_too_late(request_of_a_worker)
    (record,) = caplog.records
    assert (record.levelname, record.exc_info, "harmless" in record.getMessage()) == ("WARNING", None, True)


@pytest.mark.parametrize(
    ("level", "task", "is_logged"),
    [
        (logging.INFO, "registry.publish_readiness", False),
        (logging.INFO, "registry.publish_models", False),
        (logging.ERROR, "registry.publish_readiness", True),
        (logging.INFO, "fleet.chat", True),
    ],
)
def test_a_beat_of_a_registry_node_is_logged_only_if_it_failed(level, task, is_logged):
    record = logging.LogRecord("celery.app.trace", level, "trace.py", 1, "Task ended", None, None)
    record.data = {"id": "r-1", "name": task}
    assert drop_beats(record) is is_logged


def test_celery_does_not_alarm_about_what_it_might_do_some_day_and_other_warnings_stay(protected, caplog):
    log = logging.getLogger("py.warnings")
    log.warning("%s", celery_consumer.CANCEL_TASKS_BY_DEFAULT)
    assert caplog.records == []
    log.warning("%s", "another warning")
    assert len(caplog.records) == 1


def test_events_name_the_lane_of_a_task_and_never_its_arguments(request_of_a_worker):
    """Whatever the sender, which may be any Celery client, put into the headers."""
    request = request_of_a_worker
    assert SECRET not in f"{request.argsrepr} {request.kwargsrepr} {request!r} {request.humaninfo()}"
    assert request_of_a_worker.argsrepr == request_of_a_worker.delivery_info["routing_key"] == "celery"


@pytest.mark.parametrize("name", LOGGERS)
def test_loggers_that_show_arguments_or_keys_do_not_speak_of_details(protected, name):
    assert not logging.getLogger(name).isEnabledFor(logging.DEBUG)


def test_a_request_to_a_server_is_no_line_of_the_log(protected):
    assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)


def test_a_log_level_of_debug_does_not_undo_it(protected):
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    signals.after_setup_logger.send(sender=None, logger=logging.getLogger(), loglevel=logging.DEBUG, logfile=None)
    assert [name for name in LOGGERS if logging.getLogger(name).isEnabledFor(logging.DEBUG)] == []


def test_a_logger_that_was_told_to_say_less_says_less(protected):
    logging.getLogger("kombu").setLevel(logging.ERROR)
    protect_logs()
    assert logging.getLogger("kombu").level == logging.ERROR


def test_every_line_names_the_node_that_logs_it():
    app = Celery("test", set_as_current=False)
    name_lines(app, "local@mini%7")
    record = logging.LogRecord("celery.worker", logging.INFO, "worker.py", 1, "hello", None, None)
    record.task_name = record.task_id = "-"
    for setting in ("worker_log_format", "worker_task_log_format"):
        assert "INFO/local@mini%7]" in logging.Formatter(app.conf[setting]).format(record)


def test_a_lost_connection_is_no_line_of_celery_and_what_else_is_logged_there_stays(protected, caplog):
    log = logging.getLogger("celery.worker.consumer.consumer")
    log.warning("%s (%r)", CONNECTION_RETRY, ConnectionResetError(SECRET))
    assert caplog.records == []
    log.warning("Started consuming from %s", "a lane")
    assert len(caplog.records) == 1
    assert not logging.getLogger("celery.worker.consumer.connection").isEnabledFor(logging.INFO)
