"""What Celery's consumer makes of a message: a task that was made anew from its envelope, or nothing."""

import json
from types import SimpleNamespace

import celery.worker.consumer.consumer as celery_consumer
import celery.worker.state
import kombu
import pytest
from kombu import Connection
from redis.exceptions import NoPermissionError

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.door import NOT_JSON, OpenedMessage, Refused
from fleet_worker.broker.outage import STEADY_AFTER
from fleet_worker.node.consumer import NO_ADDRESS, NO_TASK, UNKNOWN_TASK, Consumer
from fleet_worker.node.task_request import Request
from fleet_worker.protocol.prompt_prefixes import HEADER

SECRET, TASK = "swordfish", "fleet.chat"
ENVELOPE = {"request_id": "r-1", "attempt": 1, "reply_to": "llm.fleet.reply.test.abc.60", "model": SECRET}
HOSTILE = [
    *({"timelimit": each} for each in (5, "x", [1, 2, 3], {"a": 1})),
    *({"shadow": each} for each in ({"a": {}}, ["x"], 5, "celery.backend_cleanup")),
    *({name: each} for name in ("eta", "expires") for each in ("2099-01-01", [SECRET], {SECRET: 1}, 1e300)),
    *({"stamped_headers": each, "stamps": each} for each in (5, ["x"], {"x": 1})),
    *({name: [SECRET]} for name in ("id", "root_id", "parent_id", "group", "retries", "lang", "utc", "ignore_result")),
    {"chord": {}, "callbacks": ["x"], "errbacks": ["x"], "chain": [1], "reply_to": "x", "replaced_task_nesting": "x"},
]


class Message(OpenedMessage, kombu.Message):
    pass


@pytest.fixture(scope="module")
def channel():
    with Connection("memory://") as connection:
        yield connection.default_channel


@pytest.fixture
def started():
    return []


@pytest.fixture
def failures():
    """Errors of the pool that starts a task."""
    return []


@pytest.fixture
def receive(channel, started, failures):
    """What a worker does with a message of this body and these headers."""
    with create_app(Settings()) as app:
        app.conf.update(broker_url="memory://", worker_send_task_events=False)
        app.Task.Request = Request

        @app.task(name=TASK, shared=False)
        def chat(envelope):
            """Never runs."""

        @app.task(name="registry.publish_models", shared=False)
        def publish():
            """Never runs."""

        def start(function, args, **_):
            if failures:
                raise failures[0]
            started.append(args)

        controller = SimpleNamespace(state=SimpleNamespace(revoked=()), use_eventloop=False)
        pool = SimpleNamespace(apply_async=start, is_green=False)
        timer = SimpleNamespace(call_at=pytest.fail)
        consumer = Consumer(
            lambda request: request.execute_using_pool(pool), app=app, controller=controller, pool=pool, timer=timer
        )
        consumer.event_dispatcher = None
        consumer.update_strategies()
        handle = consumer.create_task_handler()

        def receive(content, properties=None, **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            headers = {"id": "x", "task": TASK, "argsrepr": SECRET, "kwargsrepr": SECRET, **headers}
            content = {"content_type": "application/json", "content_encoding": "utf-8", "properties": properties or {}}
            came_by = {"exchange": "", "routing_key": "the lane"}
            handle(Message(body, 1, headers=headers, delivery_info=came_by, channel=channel, **content))

        yield receive
    celery.worker.state.reset_state()


def refused(receive, *args, **headers):
    with pytest.raises(Refused) as caught:
        receive(*args, **headers)
    assert SECRET not in f"{caught.value} {caught.value.kind} {caught.value.detail}"
    return caught.value.kind


@pytest.mark.parametrize("headers", [{}, *HOSTILE])
def test_a_task_is_made_anew_from_its_envelope(receive, started, headers):
    receive([[ENVELOPE], {}, {"callbacks": ["x"], "chord": 5, "chain": [1]}], {"reply_to": "x"}, **headers)
    ((task, task_id, request, body, content_type, content_encoding),) = started
    assert (task, task_id, body, content_type, content_encoding) == (TASK, "r-1", ([ENVELOPE], {}, None), None, None)
    assert {**request, "hostname": ""} == {
        "id": "r-1",
        "root_id": "r-1",
        "task": TASK,
        "retries": 0,
        "ignore_result": True,
        "properties": {"correlation_id": "r-1", "priority": None},
        "correlation_id": "r-1",
        "reply_to": None,
        "delivery_info": {"exchange": "", "routing_key": "the lane", "priority": None, "redelivered": False},
        "args": [ENVELOPE],
        "kwargs": {},
        "hostname": "",
    }


@pytest.mark.parametrize("prefixes", ["..", "x", 5, ["x"], None])
def test_the_header_with_the_prefixes_of_a_prompt_is_an_argument(receive, started, prefixes):
    """Whatever it is: the task reads it."""
    receive([[ENVELOPE], {}, {}], **{HEADER: prefixes})
    ((_, _, request, body, *_),) = started
    assert body == ([ENVELOPE, prefixes], {}, None)
    assert HEADER not in request


@pytest.mark.parametrize(
    "task", [["x"], {"x": 1}, None, 5, "", "fleet.unheard_of", "celery.backend_cleanup", "registry"]
)
def test_only_tasks_of_this_node_can_be_called(receive, started, task):
    assert refused(receive, [[ENVELOPE], {}, {}], task=task) == UNKNOWN_TASK
    assert not started


def test_the_name_of_a_foreign_task_is_shown_in_part():
    assert len(Refused(UNKNOWN_TASK, "n\u00e4me\n" * 10_000).detail) < 500


@pytest.mark.parametrize("body", [b"", b"\xff", b"[", f"[{SECRET}".encode(), b"\x80\x04K\x05.", b"[" * 100_000])
def test_what_is_not_json_is_no_task(receive, body):
    assert refused(receive, body) == NOT_JSON


@pytest.mark.parametrize(
    "content",
    [
        *(None, 5, SECRET, {}, {"task": TASK, "id": "x", "args": [ENVELOPE], "kwargs": {}}, {"args": []}, []),
        [1],
        [[], {}],
        [[ENVELOPE], {}],
        [{"args": []}, {}, {}],
        [[ENVELOPE], {SECRET: 1}, {}],
        [5, {}, {}],
        ["abc", 1, 2],
    ],
)
def test_what_has_no_arguments_as_celery_sends_them_is_no_task(receive, started, content):
    assert refused(receive, content) == NO_TASK
    assert not started


@pytest.mark.parametrize(
    "args",
    [*([], [1], [None], [[ENVELOPE]], [ENVELOPE, ENVELOPE], [{}])]
    + [[{**ENVELOPE, "request_id": each}] for each in (None, 5, "", "a\nb", "x" * 201, "\u00e4", [SECRET], {"a": {}})]
    + [[{**ENVELOPE, "attempt": each}] for each in (None, 0, -1, True, 1.0, "1", 10**30, [1])]
    + [
        [{**ENVELOPE, "reply_to": f"llm.fleet.reply.{each}"}]
        for each in ("", ".nope", "x.nan", "x.0", "x.1e9", "x.9999999", "\u00e4.5", "x.5\n", "X.5", "x" * 300 + ".5")
    ]
    + [[{**ENVELOPE, "reply_to": each}] for each in (None, 5, [], "elsewhere", "llm.fleet.chat.model", "celery.5")],
)
def test_a_request_that_cannot_be_answered_takes_no_slot(receive, started, args):
    assert refused(receive, [args, {}, {}]) == NO_ADDRESS
    assert not started


def test_a_beat_has_no_arguments(receive, started):
    receive([[SECRET], {}, {}], task="registry.publish_models")
    ((task, task_id, _, body, *_),) = started
    assert (task, task_id, body) == ("registry.publish_models", "registry.publish_models", ([], {}, None))


def test_the_arguments_are_those_that_were_sent(receive, started):
    """kombu would make a UUID, bytes and a time of these."""
    kinds = {"uuid": {"hex": "0" * 32}, "bytes": "x", "datetime": "2026-01-01", "nothing": 1, "decimal": "1.5"}
    schemas = [{"__type__": kind, "__value__": value} for kind, value in kinds.items()]
    sent = {**ENVELOPE, "params": {"tools": schemas, "big": 10**400, "small": 5e-324, "text": "\U0001f600\u0000"}}
    receive([[sent], {}, {}])
    assert started[0][3][0] == [sent]


def test_a_broker_that_is_lost_meanwhile_is_not_a_bad_message(receive, failures):
    failures.append(ConnectionResetError(SECRET))
    with pytest.raises(ConnectionResetError):
        receive([[ENVELOPE], {}, {}])


def test_a_fault_of_celery_does_not_end_the_node(receive, failures):
    failures.append(RuntimeError(SECRET))
    assert refused(receive, [[ENVELOPE], {}, {}]) == NO_TASK


def test_celery_has_the_methods_that_are_overridden():
    """If this fails, a new Celery logs bad messages elsewhere: see `node.consumer.Consumer`."""
    for method in ("on_unknown_message", "on_unknown_task", "on_invalid_task", "on_decode_error"):
        assert callable(getattr(celery_consumer.Consumer, method))
        assert getattr(Consumer, method) is not getattr(celery_consumer.Consumer, method)


class Failing:
    """A connection to a broker that is away for some tries."""

    def ensure_connection(self, errback, callback):
        for _ in range(5):
            errback(OSError(SECRET), 2.0)


@pytest.fixture
def consumer(monkeypatch):
    """With pauses that are noted."""
    pauses = []
    monkeypatch.setattr(Consumer, "_pause", lambda self, seconds: pauses.append(seconds))
    monkeypatch.setattr(celery_consumer.Consumer, "connect", lambda self: "connected")
    monkeypatch.setattr(celery_consumer.Consumer, "on_connection_error_after_connected", lambda self, exc: None)
    with create_app(Settings(broker_url=f"redis://operator:{SECRET}@broker:6379/0")) as app:
        timers = []
        timer = SimpleNamespace(call_after=lambda seconds, act, kwargs: timers.append(seconds))
        controller = SimpleNamespace(state=SimpleNamespace(revoked=()), use_eventloop=False)
        consumer = Consumer(pytest.fail, app=app, controller=controller, pool=None, timer=timer)
        yield consumer, pauses, timers


def test_an_outage_is_one_line_and_no_secret_is_in_it(consumer, caplog):
    caplog.set_level("INFO")
    consumer, pauses, timers = consumer
    consumer.connect()
    assert caplog.messages == ["connected to the broker at broker:6379"]
    caplog.clear()
    consumer.on_connection_error_after_connected(ConnectionResetError(SECRET))
    consumer.ensure_connected(Failing())
    consumer.connect()
    assert caplog.messages == ["the broker at broker:6379 is away (ConnectionResetError); it is tried again"]
    assert pauses == [0.05]
    assert min(timers) > STEADY_AFTER  # then it is back


def test_a_broker_that_refuses_something_is_tried_again_after_growing_pauses(consumer):
    consumer, pauses, _ = consumer
    for _ in range(10):
        consumer.connect()
        consumer.on_connection_error_after_connected(NoPermissionError("No permissions to access a key"))
        consumer.on_connection_error_before_connected(NoPermissionError("No permissions to access a key"))
    assert pauses == sorted(pauses)
    assert pauses[-1] == 5.0
