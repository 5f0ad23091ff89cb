"""What a node has cached reaches the routers that want to know it, and is published for nobody else."""

import time
from contextlib import contextmanager

import pytest
from kombu import Consumer

from fleet_worker import Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import receive
from fleet_worker.broker.topology import ask_queue, digest_queue, transport_of
from fleet_worker.protocol.cache_digest import DigestMessage
from fleet_worker.protocol.registry_event import WHOLE_STATUS
from fleet_worker.testing import SimulatedMLX, running_host
from tests.mlx_clients import HELLO

pytestmark = pytest.mark.rest


@pytest.fixture(scope="module")
def host(broker):
    """Its routers have been away for long enough: no test of this module runs before the first."""
    with SimulatedMLX(models=["m"], token_interval=0.002) as server:
        instances = {"local": {"base_url": server.base_url, "models": {"m": {}}}}
        with running_host(broker.url, instances, host="mini") as processes:
            yield processes


@contextmanager
def subscribed(broker, new_queue):
    """Yields a function that returns the bodies that come within so many seconds, or until `enough` says so."""
    bodies = []
    app = create_app(Settings(broker_url=broker.url))
    with app.connection_for_read() as connection, connection.channel() as channel:
        queue = new_queue(transport_of(broker.url))
        with Consumer(channel, [queue], on_message=lambda each: bodies.append(each.body), no_ack=True):
            receive(connection, 0.05)

            def heard(seconds, enough=lambda body: False):
                ends = time.monotonic() + seconds
                while time.monotonic() < ends and not any(enough(body) for body in bodies):
                    receive(connection, 0.05)
                taken, bodies[:] = bodies[:], []
                return taken

            yield heard
    app.close()


def a_router(broker, *, affinity):
    return Router(Settings(broker_url=broker.url, router={"affinity": affinity}))


def test_without_a_router_that_wants_them_there_are_no_digests(broker, host):
    """One that has turned affinity off asks for nothing, though it asks for the status of all hosts."""
    with (
        subscribed(broker, digest_queue) as digests,
        subscribed(broker, ask_queue) as asked,
        a_router(broker, affinity=False) as router,
    ):
        router.chat("m", HELLO, max_tokens=2, timeout=20)
        assert digests(1.5) == []
        assert set(asked(0.1)) == {WHOLE_STATUS}


def test_a_router_hears_within_two_seconds_what_a_node_has_cached(broker, host):
    with subscribed(broker, digest_queue) as digests, a_router(broker, affinity=True) as router:
        assert router.registry.models() == ["m"]
        assert digests(10, enough=bool), "it has just connected"
        router.chat("m", HELLO, max_tokens=2, timeout=20)
        began = time.monotonic()
        (body,) = digests(10, enough=has_cached)[-1:]
        assert time.monotonic() - began < 3.0
        message = DigestMessage.decode(body)
        assert message.host == "mini"
        assert [digest.node for digest in message.digests] == ["local@mini"]


def has_cached(body):
    return any(digest.held for digest in DigestMessage.decode(body).digests)
