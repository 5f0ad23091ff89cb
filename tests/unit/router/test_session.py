"""What a connected router has at a broker, here a Valkey of the test's own: connections, a reply queue, and cancels."""

import pytest
import redis

from fleet_worker import Router, Settings
from fleet_worker.router import session as session_module
from fleet_worker.router import submitter as submitter_module
from fleet_worker.testing import embedded_broker
from tests.clients import HELLO, until


@pytest.fixture(scope="module")
def broker_url():
    with embedded_broker() as url:
        yield url


@pytest.fixture
def valkey(broker_url):
    with redis.Redis.from_url(broker_url, single_connection_client=True) as client:
        yield client
        client.flushdb()


@pytest.fixture
def router(broker_url, monkeypatch):
    monkeypatch.setattr(session_module, "IDLE_AFTER", 0.1)
    monkeypatch.setattr(submitter_module, "IDLE_AFTER", 0.1)
    with Router(Settings(broker_url=broker_url)) as router:
        router.registry.require_offered = lambda *_: None
        yield router


def connections(valkey):
    return len(valkey.client_list()) - 1


def reply_queues(valkey):
    return list(valkey.scan_iter("*llm.fleet.reply.*"))


def test_an_idle_session_holds_three_connections(valkey, router):
    assert connections(valkey) <= 3
    with router.stream_chat("m", HELLO, timeout=20):
        assert 3 < connections(valkey) <= 4
        until(lambda: connections(valkey) <= 3, 5)
    until(lambda: connections(valkey) <= 3, 5)


def test_what_is_left_is_cancelled_at_all_nodes(valkey, router):
    with valkey.pubsub() as nodes:
        nodes.psubscribe("*llm.fleet.cancel*")
        assert nodes.get_message(timeout=5)["type"] == "psubscribe"
        with router.stream_chat("m", HELLO, timeout=20):
            pass
        assert nodes.get_message(timeout=5)["type"] == "pmessage"


def test_a_session_that_is_closed_leaves_nothing_at_the_broker(valkey, router):
    with router.stream_chat("m", HELLO, timeout=20):
        assert reply_queues(valkey)
    router.close()
    assert reply_queues(valkey) == []
    until(lambda: connections(valkey) == 0, 5)
