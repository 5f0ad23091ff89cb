import socket

import pytest

from fleet_worker import BrokerUnavailable, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.queue_depth import waiting
from fleet_worker.broker.topology import transport_of
from tests.brokers import free_port
from tests.mlx_clients import took_less_than

SCHEMES = ["redis", "amqp"]


def ask(url, timeout=0.3):
    return waiting(create_app(Settings(broker_url=url)), transport_of(url), ["llm.fleet.chat.m"], timeout=timeout)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_broker_that_is_not_there_is_said_at_once(scheme):
    with took_less_than(1.5), pytest.raises(BrokerUnavailable) as caught:
        ask(f"{scheme}://user:hush-hush@127.0.0.1:{free_port()}//", timeout=60)
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_broker_that_says_nothing_is_not_waited_for(scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent, took_less_than(1.8), pytest.raises(BrokerUnavailable):
        ask(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}//")
