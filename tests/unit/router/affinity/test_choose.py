"""The rule, case by case: which node, or the shared lane."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from fleet_worker.router.affinity.choose import Candidate, Choice, Work, choose

SLOTS, PREFILL, DECODE = 4, 400.0, 40.0
SHARED = None


def _node(name: str, *, busy: int = 0, prefill_before: float = 0.0, cached: int = 0, times: float = 1.0) -> Candidate:
    """A node that is so many times as fast as the others."""
    return Candidate(name, SLOTS, busy, prefill_before, cached, PREFILL * times, DECODE * times)


def _chosen(
    *nodes: Candidate, tokens: int = 8_000, must: bool = False, tie: Callable[[], float] = lambda: 0.5
) -> Choice:
    mean = sum(node.cached for node in nodes) / max(1, len(nodes))
    return choose(nodes, Work(tokens, 250.0, 6.0), mean, tie=tie, must=must)


@pytest.mark.parametrize(
    ("nodes", "tokens", "expected"),
    [
        pytest.param([_node("a"), _node("b", cached=7_900)], 8_000, "b", id="the warm one"),
        pytest.param([_node("a", cached=4_000), _node("b", cached=7_900)], 8_000, "b", id="the warmer one"),
        pytest.param([_node("a"), _node("b", cached=7_900, busy=3)], 8_000, "b", id="warm, with a free slot"),
        pytest.param(
            [_node("a"), _node("b", cached=7_900, prefill_before=60.0)],
            8_000,
            "a",
            id="waiting there is longer than prefill here",
        ),
        pytest.param([_node("a"), _node("b", cached=7_900, busy=30)], 8_000, "a", id="thirty wait at the warm one"),
        pytest.param(
            [_node("a", cached=4_000), _node("b", cached=4_500, busy=3)], 8_000, "a", id="its prefill would stop three"
        ),
        pytest.param([_node("a"), _node("b", cached=7_900, busy=5)], 8_000, "b", id="two wait at the warm one"),
        pytest.param([_node("a"), _node("b", cached=600, busy=9)], 700, SHARED, id="they wait for less than it saves"),
        pytest.param([_node("a"), _node("b", cached=90)], 100, SHARED, id="it saves a moment only"),
        pytest.param([_node("a", cached=500), _node("b", cached=500)], 600, SHARED, id="all hold it"),
        pytest.param(
            [_node("a", cached=500, busy=3), _node("b", cached=500)], 600, SHARED, id="all hold it, one is busy"
        ),
        pytest.param([_node("a", busy=1), _node("b")], 8_000, "b", id="long and cold: placed where nothing runs"),
        pytest.param(
            [_node("a", busy=4), _node("b", busy=4)], 8_000, SHARED, id="long and cold, all full: the next free"
        ),
        pytest.param([_node("a"), _node("b")], 400, SHARED, id="short and cold"),
        pytest.param([_node("a"), _node("b", times=4.0)], 400, "b", id="the faster one"),
        pytest.param([_node("a"), _node("b", times=4.0, busy=3)], 400, "b", id="the faster one has a slot"),
        pytest.param([_node("a"), _node("b", times=4.0, busy=4)], 400, SHARED, id="the faster one is full"),
        pytest.param([_node("a"), _node("b", times=1.4)], 400, SHARED, id="about equally fast"),
        pytest.param([_node("a", cached=7_900), _node("b", times=4.0)], 8_000, "a", id="warm is faster than fast"),
        pytest.param(
            [_node("a", cached=1_000), _node("b", times=4.0)], 8_000, "b", id="fast is faster than a little warm"
        ),
        pytest.param([], 8_000, SHARED, id="nobody is ready"),
    ],
)
def test_where_it_goes(nodes: list[Candidate], tokens: int, expected: str | None) -> None:
    assert _chosen(*nodes, tokens=tokens).node == expected


def test_after_a_failure_it_is_always_a_node() -> None:
    full = [_node("a", busy=9), _node("b", busy=8)]
    assert _chosen(*full, tokens=10, must=True).node == "b"


def test_of_equal_nodes_each_is_chosen_as_often() -> None:
    """Whatever their names and their order."""
    seeded = random.Random(7)
    chosen = Counter(_chosen(*(_node(name) for name in "abcd"), tie=seeded.random).node for _ in range(400))
    assert len(chosen) == 4
    assert max(chosen.values()) < 2 * min(chosen.values())


def test_it_may_wait_as_long_as_expected_and_as_long_as_it_saves() -> None:
    near = _chosen(_node("a"), _node("b", cached=7_900)).patience
    far = _chosen(_node("a"), _node("b", cached=7_900, prefill_before=5.0)).patience
    assert 10.0 < near < 30.0
    assert far == pytest.approx(near + 5.0)


@pytest.mark.parametrize(("busy", "wait"), [(0, 0.0), (3, 0.0), (4, 1.5), (5, 3.0)])
def test_the_wait_for_a_slot_is_without_that_for_other_prompts(busy: int, wait: float) -> None:
    choice = _chosen(_node("a", prefill_before=300.0), _node("b", cached=7_900, prefill_before=5.0, busy=busy))
    assert (choice.node, choice.wait) == ("b", wait)


def test_the_shared_lane_is_told_what_is_cached_at_best() -> None:
    assert _chosen(_node("a", cached=500), _node("b", cached=520), tokens=600) == Choice(
        None, 520, pytest.approx(0.2, abs=0.05), 0.0
    )
