"""When the frames for a router are due."""

from types import SimpleNamespace

import pytest

from fleet_worker.node import outbox as module
from fleet_worker.node.outbox import GAP_PER_REQUEST, LONGEST_GAP, LONGEST_GAP_BEHIND, NEVER, Outbox
from tests.unit.router.test_attempts import deltas

NOW = 1000.0


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: NOW))


@pytest.fixture
def outbox():
    outbox = Outbox()
    outbox.take(NOW)
    return outbox


def gap_of(outbox, delay=None, requests=1):
    outbox.append(deltas(1, "x"), delay, requests)
    due, _ = outbox.due - NOW, outbox.take(NOW)
    return pytest.approx(due)


def test_the_gap_grows_with_the_requests_of_the_node(outbox):
    assert gap_of(outbox) == GAP_PER_REQUEST
    assert gap_of(outbox, requests=10) == 10 * GAP_PER_REQUEST
    assert gap_of(outbox, requests=1_000) == LONGEST_GAP


def test_the_gap_grows_with_what_waits_for_the_router_and_falls_when_that_has_gone(outbox):
    outbox.learn(500)
    assert gap_of(outbox) == 0.1
    outbox.learn(1_000_000)
    assert gap_of(outbox) == LONGEST_GAP_BEHIND == 1.0
    outbox.learn(0)
    assert gap_of(outbox) == GAP_PER_REQUEST


def test_a_first_token_and_a_last_frame_never_wait_and_take_the_others_with_them(outbox):
    outbox.learn(1_000_000)
    frames = [deltas(1, "x"), deltas(2, "y")]
    outbox.append(frames[0], None, 1)
    outbox.append(frames[1], 0.0, 1)
    assert outbox.due == NOW
    assert outbox.take(NOW) == frames
    assert outbox.due == NEVER
    assert not outbox


def test_it_tells_how_long_its_first_frame_has_waited(outbox):
    assert outbox.waits(NOW + 5) == 0.0
    outbox.append(deltas(1, "x"), None, 1)
    assert outbox.waits(NOW + 5) == 5.0
