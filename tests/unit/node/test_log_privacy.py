import logging
from types import SimpleNamespace

import celery.worker.consumer.consumer as celery_consumer
import celery.worker.state
import pytest
from celery import Celery, signals
from celery.utils.timer2 import Timer
from celery.worker.control import Panel
from celery.worker.request import Request
from kombu import Connection, Message
from kombu.exceptions import DecodeError

from fleet_worker.node.log_privacy import name_lines, protect_logs

SECRET = "swordfish"
LOGGERS = ["celery.pool", "httpcore", "httpx", "kombu", "amqp"]
FILTERED = [
    "celery.app.trace",
    "celery.worker.consumer.connection",
    "celery.worker.consumer.consumer",
    "celery.worker.request",
    "py.warnings",
]


@pytest.fixture
def protected():
    """`protect_logs` is for the life of a process: what it changes is put back."""
    panel, dump = dict(Panel.data), celery_consumer.dump_body
    methods = {owner: dict(vars(owner)) for owner in (celery_consumer.Consumer, Request)}
    receivers = list(signals.after_setup_logger.receivers)
    levels = {name: logging.getLogger(name).level for name in {*LOGGERS, *FILTERED}}
    filters = {name: list(logging.getLogger(name).filters) for name in FILTERED}
    protect_logs()
    yield
    for name, before in filters.items():
        logging.getLogger(name).filters = before
    Panel.data.clear()
    Panel.data.update(panel)
    celery_consumer.dump_body = dump
    for owner, before in methods.items():
        for name, changed in dict(vars(owner)).items():
            if changed is not before.get(name):
                setattr(owner, name, before[name])
    signals.after_setup_logger.receivers = receivers
    signals.after_setup_logger.sender_receivers_cache.clear()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def request_of_a_worker():
    """A task with a secret among its arguments, as a worker holds it: sent and received over a broker in memory."""
    app = Celery("test", broker="memory://", set_as_current=False)
    app.conf.update(task_serializer="json", accept_content=["json"])

    @app.task(name="fleet.chat")
    def chat(envelope, *, prompt):
        """Never runs."""

    with app.connection_for_write() as connection:
        connection.default_channel.queue_declare("celery")
        chat.apply_async(args=[{"prompt": [SECRET]}], kwargs={"prompt": SECRET}, task_id="r-1", connection=connection)
        message = connection.default_channel.basic_get("celery", no_ack=True)
        yield Request(message, app=app, hostname="local@mini-7", decoded=False)
    app.close()


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


def test_without_protection_every_command_shows_the_arguments(worker, request_of_a_worker):
    """Else the next test proves nothing."""
    shown = answers(worker, request_of_a_worker)
    assert {name for name, answer in shown.items() if SECRET in repr(answer)} == shown.keys()


def test_no_command_shows_the_arguments_of_a_task_under_any_of_its_names(protected, worker, request_of_a_worker):
    shown = answers(worker, request_of_a_worker)
    assert {name for name, answer in shown.items() if SECRET in repr(answer)} == set()


def test_what_else_a_command_answers_stays(protected, worker, request_of_a_worker):
    shown = answers(worker, request_of_a_worker)
    for answer in (shown["reserved"][0], shown["scheduled"][0]["request"], shown["active"][0]):
        assert (answer["id"], answer["name"], answer["hostname"]) == ("r-1", "fleet.chat", "local@mini-7")
        assert answer["args"] == answer["kwargs"] == "-"
    state, info = shown["query_task"]["r-1"]
    assert (state, info["id"]) == ("reserved", "r-1")


def test_a_command_can_be_asked_for_less(protected, worker, request_of_a_worker):
    celery.worker.state.task_accepted(request_of_a_worker)
    assert SECRET not in repr(Panel.data["active"](worker, safe=True))


def test_protecting_twice_is_protecting_once(protected, worker, request_of_a_worker):
    protect_logs()
    assert Panel.data["reserved"](worker)[0]["id"] == "r-1"
    assert SECRET not in repr(Panel.data["reserved"](worker))


def test_a_message_that_celery_does_not_understand_is_not_shown(protected):
    body = f'{{"prompt": "{SECRET}"}}'.encode()
    shown = celery_consumer.dump_body(SimpleNamespace(body=body), body)
    assert SECRET not in shown
    assert str(len(body)) in shown


@pytest.fixture
def bad_message():
    """Returns a function that makes a message of a body, with headers that repeat its arguments."""
    with Connection("memory://") as connection:

        def make(body):
            headers = {"id": "r-1", "task": "fleet.chat", "argsrepr": SECRET, "kwargsrepr": SECRET}
            channel = connection.default_channel
            return Message(
                body, 1, "application/json", "utf-8", headers=headers, accept={"application/json"}, channel=channel
            )

        yield make


bare_consumer = object.__new__(celery_consumer.Consumer)  # it needs no worker to complain
bare_consumer.connection_errors = ()


@pytest.mark.parametrize("body", [SECRET.encode() + b"\xff", f'["{SECRET}'.encode()])
def test_a_message_that_cannot_be_decoded_is_not_shown(protected, caplog, bad_message, body):
    """The error of a decoder holds all that it could not decode, and headers may hold the arguments."""
    message = bad_message(body)
    try:
        message.decode()
    except DecodeError as error:
        bare_consumer.on_decode_error(message, error)
    assert "decode" in caplog.text
    assert "r-1" in caplog.text
    assert SECRET not in caplog.text


def test_a_message_that_is_no_task_is_not_shown(protected, caplog, bad_message):
    bare_consumer.on_unknown_message(SECRET, bad_message(SECRET))
    assert "unknown message" in caplog.text
    assert SECRET not in caplog.text


class CutOff:
    """A channel whose connection was lost."""

    no_ack_consumers = None

    def basic_ack(self, *_, **__):
        raise ConnectionResetError


def acknowledge_too_late(request):
    """As a worker does when a task ends whose connection is gone."""
    headers = {"id": "r-2", "task": "fleet.chat"}
    message = Message("[[], {}, {}]", 1, "application/json", "utf-8", channel=CutOff(), headers=headers)
    Request(message, on_ack=message.ack_log_error, app=request.app, connection_errors=(ConnectionError,)).acknowledge()


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
def test_a_beat_of_a_registry_node_is_logged_only_if_it_failed(protected, caplog, level, task, is_logged):
    caplog.set_level(logging.INFO, "celery.app.trace")
    data = {"id": "r-1", "name": task}
    logging.getLogger("celery.app.trace").log(level, "Task %(name)s[%(id)s] ended", data, extra={"data": data})
    assert bool(caplog.records) is is_logged


def test_celery_does_not_alarm_about_what_it_might_do_some_day_and_other_warnings_stay(protected, caplog):
    log = logging.getLogger("py.warnings")
    log.warning("%s", celery_consumer.CANCEL_TASKS_BY_DEFAULT)
    assert caplog.records == []
    log.warning("%s", "another warning")
    assert len(caplog.records) == 1


def test_events_name_the_lane_of_a_task_and_never_its_arguments(protected, request_of_a_worker):
    """Whatever the sender, who may not be ours, says that its arguments look like."""
    assert SECRET not in f"{request_of_a_worker.argsrepr} {request_of_a_worker.kwargsrepr}"
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
