"""What was published a moment ago: how long it is kept, and in which form it is published again."""

from types import SimpleNamespace

import pytest

from fleet_worker.node import replay_buffer as module
from fleet_worker.node.replay_buffer import ReplayBuffer
from fleet_worker.protocol.reply import Delta, Deltas, Reply


def body(*seqs, text="x"):
    frames = [Deltas(id="r", attempt=1, seq=seq, deltas=[Delta(content=text)], tokens=seq) for seq in seqs]
    return Reply(v=2, node="n@h", frames=frames).encode()


def seqs(bodies):
    return [[frame.seq for frame in Reply.decode(each).frames] for each in bodies]


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_many_messages_to_one_router_are_one_when_they_are_published_again(clock):
    recent = ReplayBuffer()
    for reply_to, seq in [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 1)]:
        recent.add(reply_to, body(seq))
    assert [reply_to for reply_to, _ in recent.again()] == ["a", "b"]
    recent.add("b", body(2))
    assert seqs(each for _, each in recent.again()) == [[0, 1, 2], [0, 1, 2]]


def test_a_merged_message_says_all_that_its_parts_said(clock):
    recent = ReplayBuffer()
    recent.add("a", body(0, text="Grüße"))
    recent.add("a", body(1, 2))
    [(_, merged)] = recent.again()
    assert Reply.decode(merged) == Reply.decode(body(0, text="Grüße")).model_copy(
        update={"frames": Reply.decode(body(0, text="Grüße")).frames + Reply.decode(body(1, 2)).frames}
    )


def test_no_message_becomes_too_large_by_that(clock, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 1_000)
    recent = ReplayBuffer()
    for seq, length in enumerate([300, 300, 300, 5_000, 10, 10]):
        recent.add("a", body(seq, text="x" * length))
    assert seqs(each for _, each in recent.again()) == [[0, 1], [2], [3], [4, 5]]


def test_what_is_old_is_forgotten_and_what_was_published_again_is_new(clock):
    recent = ReplayBuffer()
    recent.add("a", body(0))
    clock.now += 3
    recent.add("b", body(0))
    clock.now += 3
    assert recent.readers() == {"b"}
    assert [reply_to for reply_to, _ in recent.again()] == ["b"]
    clock.now += 4
    assert recent.readers() == {"b"}
    clock.now += 2
    assert recent.readers() == set()
    assert not recent
    assert recent.again() == []


def test_not_more_bytes_than_allowed_are_kept(clock, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 3 * len(body(0)))
    recent = ReplayBuffer()
    for seq in range(5):
        recent.add("a", body(seq))
    assert seqs(each for _, each in recent.again()) == [[2, 3, 4]]
