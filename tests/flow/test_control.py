"""What nobody wants any more is stopped, or never begun."""

import time
import uuid

import pytest
from celery import Celery

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import receive
from fleet_worker.protocol.reply import ChatResponse
from fleet_worker.testing import SimulatedMLX, running_host
from tests.callers import Caller
from tests.flow.conftest import work
from tests.mlx_clients import took_less_than, until

ABANDONED_AFTER = 5.0
IMPATIENT = {"FLEET_WORKER__ABANDONED_AFTER": str(ABANDONED_AFTER)}


@pytest.fixture(scope="module")
def servers():
    with SimulatedMLX(**server()) as one, SimulatedMLX(**server()) as two:
        yield one, two


def server():
    return {"models": [f"m-{uuid.uuid4().hex[:8]}"], "token_interval": 0.02, "tokens": 1000}


@pytest.fixture(scope="module")
def nodes(broker, servers):
    """Two, each with a model and a server of its own, and with one slot."""
    instances = {
        name: {"base_url": mlx.base_url, "models": {mlx.models[0]: {}}}
        for name, mlx in zip(("one", "two"), servers, strict=True)
    }
    with running_host(broker.url, instances, registry=False, env=IMPATIENT) as processes:
        yield processes


@pytest.fixture
def mlx(servers):
    return servers[0]


@pytest.fixture
def model(nodes, mlx):
    return mlx.models[0]


def asked(mlx, text):
    """Has the server been asked this?"""
    return any(request.body["messages"][0]["content"] == text for request in work(mlx))


@pytest.mark.both_brokers
def test_a_cancelled_stream_frees_its_slot_within_a_second_and_its_server_stops(caller, model, mlx):
    before = mlx.generated_after_leave
    first = caller.begin(model)
    second = caller.submit(model)
    with took_less_than(1.0):
        caller.cancel((first, 1))
        until(lambda: caller.node(second))
    assert caller.last(first).code == "cancelled"
    assert not caller.last(first).retryable
    mlx.wait_for(lambda mlx: any(request.disconnected for request in work(mlx)), 1)
    caller.cancel((second, 1), node="one@test")
    assert caller.last(second).code == "cancelled"
    mlx.wait_for(lambda mlx: mlx.counters["running"] == 0, 1)
    assert mlx.generated_after_leave - before < 20


def test_a_cancelled_request_that_waits_in_its_lane_never_starts(caller, model, mlx):
    running = caller.begin(model)
    waiting = caller.submit(model, "never to be asked")
    caller.cancel((waiting, 1))
    caller.cancel((running, 1))
    assert caller.last(waiting).code == "cancelled"
    last = caller.submit(model, max_tokens=2)
    assert isinstance(caller.last(last), ChatResponse)
    assert not asked(mlx, "never to be asked")


def test_to_cancel_an_attempt_or_at_another_node_leaves_the_later_attempt_alone(caller, model, mlx):
    request = caller.begin(model, attempt=2, max_tokens=100)
    caller.cancel((request, 1))
    caller.cancel((request, 2), node="two@test")
    assert isinstance(caller.last(request, attempt=2), ChatResponse)
    caller.submit(model, "an attempt too late", request_id=request, attempt=1)
    assert caller.last(request, attempt=1).code == "cancelled"
    assert not asked(mlx, "an attempt too late")


def test_what_runs_for_a_router_that_is_gone_is_stopped_and_what_waits_never_starts(
    broker, caller, model, mlx, servers
):
    """And what runs for one that listens goes on all the while."""
    listened = caller.begin(servers[1].models[0], max_tokens=20)
    with servers[1].held(at_token=5), Caller(broker) as gone:
        gone.begin(model)
        gone.submit(model, "asked by a dead router")
        mine = caller.submit(model, max_tokens=2)
        gone.leave()
        left = time.monotonic()
        assert isinstance(caller.last(mine, seconds=ABANDONED_AFTER + 10), ChatResponse)
        assert time.monotonic() - left < 4
    assert not asked(mlx, "asked by a dead router")
    assert isinstance(caller.last(listened), ChatResponse)


HARM = [
    ("shutdown", {}),
    ("rate_limit", {"task_name": "fleet.chat", "rate_limit": "1/h"}),
    ("pool_shrink", {"n": 1}),
    ("cancel_consumer", {"queue": "LANE"}),
    ("add_consumer", {"queue": "of-another"}),
    ("disable_events", {}),
]


def broadcast(app, model, **options):
    """Send what would do harm; return the answers."""
    for command, arguments in HARM:
        values = {key: f"llm.fleet.chat.{model}" if value == "LANE" else value for key, value in arguments.items()}
        yield app.control.broadcast(command, values, reply=True, **options)


@pytest.mark.both_brokers
def test_commands_of_celery_that_would_change_something_are_refused(broker, nodes, caller, model):
    with create_app(Settings(broker_url=broker.url)) as app:
        for answers in broadcast(app, model, timeout=5, limit=2):
            assert {name for each in answers for name in each} == {"one@test", "two@test"}
            assert all("does not obey" in reply["error"] for each in answers for reply in each.values())
        assert app.control.ping(timeout=5, limit=2)
    assert all(isinstance(caller.last(caller.submit(model, max_tokens=2)), ChatResponse) for _ in range(3))
    assert not any(process.ended for process in nodes.values())


@pytest.mark.both_brokers
def test_another_celery_application_on_the_same_broker_neither_reaches_nodes_nor_is_reached(
    broker, nodes, caller, model
):
    with (
        Celery("other", broker=broker.url, set_as_current=False) as other,
        create_app(Settings(broker_url=broker.url)) as ours,
        other.connection_for_read() as connection,
    ):
        heard, channel = [], connection.channel()
        worker = other.control.mailbox(connection).Node("w@other", channel=channel)
        worker.listen(callback=lambda body, message: heard.append(body["method"]))
        receive(connection, 0.1)  # only now kombu's Redis transport subscribes
        assert not any(broadcast(other, model, timeout=0.2))
        assert ours.control.ping(timeout=5, limit=2)
        for _ in range(len(HARM) + 1):
            receive(connection, 0.2)
        assert heard == [command for command, _ in HARM]
    assert isinstance(caller.last(caller.submit(model, max_tokens=2)), ChatResponse)
