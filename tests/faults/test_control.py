"""What a broker does to a node's ear: it hears again, and nobody is taken for dead in the meantime."""

import signal
import time
import uuid

import pytest

from fleet_worker.protocol.reply import ChatResponse
from fleet_worker.testing import SimulatedMLX, running_node
from tests.brokers import Valkey
from tests.callers import Caller
from tests.mlx_clients import until

IMPATIENT = {"FLEET_WORKER__ABANDONED_AFTER": "5"}


@pytest.fixture
def mlx():
    """Its model is one test's own: a broker may deliver again what it lost."""
    with SimulatedMLX(models=[f"m-{uuid.uuid4().hex[:8]}"], token_interval=0.02, tokens=5000) as server:
        yield server


def heard_again(caller, request):
    """A router says it again as long as the work goes on."""

    def cancelled():
        caller.cancel((request, 1))
        return any(getattr(frame, "code", "") == "cancelled" for frame in caller.frames(request))

    until(cancelled, 20)


def test_after_a_restart_of_the_broker_work_goes_on_and_cancels_are_heard(broker, mlx):
    model = mlx.models[0]
    with (
        running_node(broker.url, base_url=mlx.base_url, models={model: {}}, env=IMPATIENT),
        Caller(broker) as caller,
    ):
        running = caller.begin(model, max_tokens=5000)
        broker.stop()
        broker.start()
        before = len(caller.frames(running))
        until(lambda: len(caller.frames(running)) > before, 20)
        heard_again(caller, running)


@pytest.mark.rest
def test_a_broker_that_was_frozen_has_not_lost_its_routers(mlx):
    model = mlx.models[0]
    with (
        Valkey() as broker,
        running_node(broker.url, base_url=mlx.base_url, models={model: {}}, env=IMPATIENT),
        Caller(broker) as caller,
    ):
        running = caller.begin(model, max_tokens=5000)
        broker.signal(signal.SIGSTOP)
        time.sleep(6.0)  # longer than a node waits for an answer, and for a router that is gone
        broker.signal(signal.SIGCONT)
        before = len(caller.frames(running))
        until(lambda: len(caller.frames(running)) > before)
        heard_again(caller, running)
        assert isinstance(caller.last(caller.submit(model, max_tokens=1)), ChatResponse)
