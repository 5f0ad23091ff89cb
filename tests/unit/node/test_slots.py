"""When the event loop of a node on Redis is woken because a task has ended: only if it waits for a free slot."""

from contextlib import closing
from types import SimpleNamespace

import pytest
from kombu.transport import virtual

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.node.consumer import Consumer
from fleet_worker.testing import embedded_broker


@pytest.fixture(scope="module")
def channel():
    with (
        embedded_broker() as url,
        closing(create_app(Settings(broker_url=url), is_node=True)) as app,
        app.connection_for_read() as connection,
    ):
        yield connection.channel()


@pytest.fixture
def slots(channel):
    """The slots of a node, which has one."""
    slots = channel.qos
    slots.prefetch_count = 1
    yield slots
    slots._flush()


@pytest.fixture
def woken():
    """What the event loop is woken for."""
    return []


@pytest.fixture
def end(channel, slots, woken):
    """Ends the task of the message that has this tag, as its thread does."""
    consumer = object.__new__(Consumer)
    consumer.task_consumer = SimpleNamespace(channel=channel)
    consumer.hub = SimpleNamespace(call_soon=woken.append)
    return lambda tag: consumer.call_soon_ack(slots.ack, tag)


def test_a_loop_that_waits_for_a_slot_is_woken(slots, end, woken):
    slots.append("message", 1)
    assert not slots.can_consume()
    end(1)
    assert len(woken) == 1
    assert slots.can_consume()


def test_a_loop_that_reads_its_lanes_is_left_alone(slots, end, woken):
    slots.append("message", 1)
    end(1)
    assert woken == []
    assert slots.can_consume()


def test_a_slot_that_becomes_free_while_the_loop_looks_is_seen(slots, monkeypatch):
    looks = iter([False, True])
    monkeypatch.setattr(virtual.QoS, "can_consume", lambda _: next(looks))
    assert slots.can_consume()
    assert not slots.is_full
