"""Did the MLX server die while it worked on a request? The router must know, or it tries the next one with it."""

import pytest

from fleet_worker import Router, Settings
from fleet_worker.errors import ConnectionFailure, InstanceUnavailable
from fleet_worker.simulator import Fault
from fleet_worker.testing import SimulatedMLX, running_node
from tests.brokers import any_broker
from tests.flow.conftest import CHAT

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def mortal(broker):
    with (
        SimulatedMLX(models=[CHAT], token_interval=0.02, tokens=1000) as mlx,
        running_node(broker.url, "mortal@test", base_url=mlx.base_url, models={CHAT: {}}),
    ):
        yield mlx


@pytest.fixture
def once(broker):
    """A router that tries a request once."""
    with Router(Settings(broker_url=broker.url, router={"max_attempts": 1})) as router:
        yield router


@any_broker
def test_a_death_is_told_and_a_mere_break_is_none(mortal, once):
    mortal.fail(Fault("reset", at_token=3))
    with pytest.raises(ConnectionFailure) as broken:
        once.chat(CHAT, HELLO, timeout=20)
    assert "instance_died" not in broken.value.metadata

    stream = once.stream_chat(CHAT, HELLO, max_tokens=900, timeout=20)
    next(stream)
    mortal.kill()
    with pytest.raises(ConnectionFailure) as killed:
        list(stream)
    assert killed.value.metadata["instance_died"] is True


@any_broker
def test_a_generation_thread_that_dies_of_a_request_is_a_death(mortal, once):
    mortal.fail(Fault("thread_death"))
    with pytest.raises(InstanceUnavailable) as dead:
        once.chat(CHAT, HELLO, timeout=20)
    assert dead.value.metadata["instance_died"] is True
