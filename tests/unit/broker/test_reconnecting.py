"""A link makes its connection again, as long as it is not closed."""

import threading

import pytest
from kombu import Connection

from fleet_worker.broker.reconnecting import ReconnectingThread
from tests.mlx_clients import until


@pytest.fixture
def used():
    """How often a connection was used; it does not work before the third, which breaks, as the fourth does."""
    return []


@pytest.fixture
def link(used):
    def use(connection):
        used.append(connection)
        if len(used) in (3, 5):
            link.works()
        if len(used) < 5:
            raise ConnectionError
        while not link.closed.wait(0.05):
            link.works()

    link = ReconnectingThread("something", lambda: Connection("memory://"), use)
    yield link
    link.close(timeout=5)
    assert not any(thread.name == "fleet-something" for thread in threading.enumerate())


def test_a_broken_connection_is_made_again_and_the_log_says_it_once(link, used, caplog):
    link.start()
    until(lambda: len(used) == 5)
    until(lambda: len(caplog.messages) == 2)
    away, back = caplog.messages
    assert away == "something: the broker is away (ConnectionError); it is tried again"
    assert back.startswith("something: the broker is back after ")
    assert len({id(each) for each in used}) == 5


def test_a_link_that_never_began_is_closed_at_once(link):
    link.close(timeout=5)
