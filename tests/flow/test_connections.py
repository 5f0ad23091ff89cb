"""How many connections to the broker nodes hold when they have nothing to do."""

import pytest

from fleet_worker import Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import any_broker
from tests.mlx_clients import HELLO, until

AT_MOST = 4
BEATS = {"FLEET_REGISTRY__READINESS_INTERVAL": "1"}
"""So that the registry node uses every connection that it will ever open."""


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(models=["m-connections"]) as server:
        yield server


@pytest.mark.rest
def test_an_idle_node_and_an_idle_registry_node_hold_four_connections_each(broker, mlx):
    """After a request, control commands, and a router that asked for the registry."""
    others = broker.connections()
    instances = {"one": {"base_url": mlx.base_url, "models": {mlx.models[0]: {}}}}
    with running_host(broker.url, instances, host="idle", env=BEATS) as nodes:
        use(broker, mlx.models[0])
        until(lambda: len(broker.connections() - others) <= 2 * AT_MOST, 10)
        assert nodes["one"].stop() == 0
        until(lambda: 0 < len(broker.connections() - others) <= AT_MOST, 10)
    with running_host(broker.url, instances, host="idle", registry=False):
        use(broker, mlx.models[0])
        until(lambda: 0 < len(broker.connections() - others) <= AT_MOST, 10)


def use(broker, model):
    with Router(Settings(broker_url=broker.url)) as router:
        router.chat(model, HELLO, max_tokens=2, timeout=20)
    with create_app(Settings(broker_url=broker.url)) as app:
        for command in ("ping", "active", "stats", "conf"):
            (answer, *_) = app.control.broadcast(command, destination=["one@idle"], reply=True, timeout=5)
            assert "error" not in answer["one@idle"]


@any_broker
def test_the_channels_of_a_node_share_a_socket_and_one_that_closes_leaves_it_to_the_others(broker):
    def socket_of(connection):
        with connection.default_channel.conn_or_acquire() as client:
            return client.client_id()

    with create_app(Settings(broker_url=broker.url), is_node=True) as app, app.connection_for_write() as other:
        with app.connection_for_read() as closed:
            shared = socket_of(closed)
            assert socket_of(other) == shared
        assert socket_of(other) == shared
        with create_app(Settings(broker_url=broker.url)) as router, router.connection_for_write() as apart:
            assert socket_of(apart) != shared
