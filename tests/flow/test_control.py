"""What nobody wants any more is stopped, or never begun."""

import time
import uuid

import pytest

from fleet_worker.protocol.reply import ChatResponse
from fleet_worker.testing import SimulatedMLX, running_host
from tests.callers import Caller
from tests.clients import took_less_than, until
from tests.flow.conftest import work

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
        assert time.monotonic() - left >= ABANDONED_AFTER
    assert not asked(mlx, "asked by a dead router")
    assert isinstance(caller.last(listened), ChatResponse)
