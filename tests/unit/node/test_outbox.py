"""When the frames for a router are due."""

from types import SimpleNamespace

import pytest

from fleet_worker.node import outbox as module
from fleet_worker.node.outbox import (
    GAP_PER_REQUEST,
    LONGEST_GAP,
    LONGEST_GAP_BEHIND,
    MOST_CHARACTERS,
    MOST_DELTAS,
    MOST_JOINED,
    NEVER,
    Outbox,
)
from fleet_worker.protocol.reply import Delta, Deltas
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
    frames = [deltas(1, "x"), deltas(2, "y", attempt=2)]
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


def put(outbox, frame):
    """As a writer does: its next frame has the same number if this one was joined."""
    return outbox.append(frame, None, 1)


def small(seq, *texts, **about):
    return Deltas(**{"id": "r", "attempt": 1} | about, seq=seq, tokens=seq, deltas=[Delta(content=t) for t in texts])


def test_small_deltas_that_wait_are_one_frame_of_each_attempt(outbox):
    assert [put(outbox, small(1, "a")), put(outbox, small(2, "b", attempt=2))] == [True, True]
    assert [put(outbox, small(2, "c", "d")), put(outbox, small(3, "e", attempt=2))] == [False, False]
    assert len(outbox) == 4
    first, second = outbox.take(NOW)
    assert (first.seq, first.tokens, [each.content for each in first.deltas]) == (1, 2, ["a", "c", "d"])
    assert (second.seq, second.tokens, [each.content for each in second.deltas]) == (2, 3, ["b", "e"])
    assert put(outbox, small(2, "f"))  # what was taken does not grow
    assert outbox.take(NOW) == [small(2, "f")]


def test_a_frame_has_no_more_than_one_message_can_carry_and_the_order_stays(outbox):
    count = 3 * MOST_JOINED
    assert sum(put(outbox, small(number, str(number))) for number in range(count)) == 3
    frames = outbox.take(NOW)
    assert [len(frame.deltas) for frame in frames] == [MOST_JOINED] * 3
    assert [delta.content for frame in frames for delta in frame.deltas] == [str(number) for number in range(count)]


@pytest.mark.parametrize(
    "large",
    [
        [Delta(content="x" * (MOST_CHARACTERS + 1))],
        [Delta(reasoning="x" * (MOST_CHARACTERS + 1))],
        [Delta(tool_calls=[{"index": 0, "function": {"arguments": "x"}}])],
        [Delta(content="x")] * (MOST_DELTAS + 1),
    ],
    ids=["content", "reasoning", "tool call", "many"],
)
def test_what_may_be_large_is_a_frame_of_its_own_between_the_others(outbox, large):
    frames = [small(1, "a"), Deltas(id="r", attempt=1, seq=2, tokens=2, deltas=large), small(3, "b")]
    assert all(put(outbox, frame) for frame in frames)
    assert not put(outbox, small(4, "c"))
    taken = outbox.take(NOW)
    assert taken[:2] == frames[:2]
    assert [delta.content for delta in taken[2].deltas] == ["b", "c"]
