"""What a router shows on a real Valkey, and what nodes make of it."""

import pytest
import redis

from fleet_worker.broker import presence
from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import connect
from fleet_worker.broker.presence import look_for
from fleet_worker.broker.topology import listening_key, reply_name
from fleet_worker.settings import Settings
from fleet_worker.testing import embedded_broker
from tests.mlx_clients import until


@pytest.fixture(scope="module")
def url():
    with embedded_broker() as url:
        yield url


@pytest.fixture
def client(url):
    with redis.Redis.from_url(url) as client:
        yield client
        client.config_set("maxmemory", "0")
        client.flushall()


@pytest.fixture
def channel(url):
    with create_app(Settings(broker_url=url)).connection_for_read() as connection:
        yield connect(connection, 5.0).channel()


@pytest.fixture
def sees(url):
    with create_app(Settings(broker_url=url)).connection_for_read() as connection:
        node = connect(connection, 5.0).channel()
        yield lambda name: look_for(node, "redis", [name])[name]


NAME = reply_name("test", 60)


def test_a_router_that_listens_is_here_and_is_away_as_soon_as_its_socket_is_closed(channel, sees, client):
    assert sees(NAME) == "away"
    presence.appear(channel, NAME)
    assert sees(NAME) == "here"
    channel.subclient.connection.disconnect()
    until(lambda: sees(NAME) == "away")
    assert client.exists(listening_key(NAME))


def test_a_router_that_is_frozen_is_silent_when_its_key_has_expired(channel, sees, client):
    presence.appear(channel, NAME)
    client.delete(listening_key(NAME))
    assert sees(NAME) == "silent"


def test_a_router_of_an_older_version_shows_its_key_only(sees, client):
    client.set(listening_key(NAME), 1)
    assert sees(NAME) == "here"
    client.delete(listening_key(NAME))
    assert sees(NAME) == "away"


def test_many_routers_are_one_question(channel, sees, client):
    presence.appear(channel, NAME)
    names = [reply_name("other", 60) for _ in range(100)]
    before = client.info("stats")["total_commands_processed"]
    found = look_for(channel, "redis", [*names, NAME])
    assert client.info("stats")["total_commands_processed"] - before <= 4
    assert found[NAME] == "here"
    assert {found[name] for name in names} == {"away"}


def test_a_router_stays_while_the_broker_is_full(channel, sees, client):
    presence.appear(channel, NAME)
    client.config_set("maxmemory", "1")
    presence.stay(channel, NAME)
    assert sees(NAME) == "here"


def test_what_anybody_publishes_on_the_channel_of_a_router_is_no_message(channel, client):
    presence.appear(channel, NAME)
    client.publish(listening_key(NAME), b"hush-hush")
    for _ in range(2):
        assert not channel._receive_one(channel.subclient)
