"""Which prompts are run again on a server that lost its cache, and when."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fleet_worker.protocol.cache_digest import CacheDigest
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router.affinity.kept_prompts import KEPT_FOR, KeptPrompts
from fleet_worker.router.affinity.warming import DIGEST_WITHIN, MOST_PROMPTS, RESTS_FOR, Warming, WarmUp
from tests.envelopes import envelope, user

A, B = "local@a", "local@b"


def prompt_id(name: str) -> str:
    return f"{name:_<11}"


class Fleet:
    """Two nodes that are ready, and what a router has seen of them. The name of a prompt is its id."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.held: dict[str, dict[str, int]] = {}
        """By prompt: the bytes of it that each node holds."""
        self.ready = {A, B}
        self.kept = KeptPrompts(10_000_000)
        self.warming = Warming(
            self.kept, lambda prefixes: self.held.get(prefixes.chain[-1][0], {}), lambda model, operation: self.ready
        )
        for node in (A, B):
            self.tell(node, epoch=1)

    def tell(self, node: str = A, *, epoch: int = 2, **said: Any) -> bool:
        return self.warming.heard(
            CacheDigest(**{"node": node, "slots": 4, "running": 0, "epoch": epoch, **said}), self.now
        )

    def answer(self, name: str, node: str = A, *, size: int = 40_000, age: float = 0.0, model: str = "m") -> None:
        request = FleetRequest.build(envelope(model=model, params={"messages": [user(name)]}))
        prefixes = PromptPrefixes(chain=((prompt_id(name), size),))
        epoch = self.warming.epoch_of(node)
        self.kept.keep(request, prefixes, tokens=size // 4, node=node, epoch=epoch, now=self.now - age)

    def due(self) -> list[WarmUp]:
        return list(self.warming.due(self.now))

    def warm(self, most: int = 100) -> list[str]:
        """Answer what is due, one after the other; return its names in this order."""
        names = []
        while len(names) < most and (due := self.due()):
            (warm_up,) = due
            names.append(name_of(warm_up))
            self.end(warm_up)
        return names

    def end(self, warm_up: WarmUp, outcome: Any = "answered") -> None:
        self.warming.ended(warm_up, outcome, self.now)
        if outcome == "answered":
            self.held[warm_up.prompt.prefixes.chain[-1][0]] = {warm_up.node: warm_up.prompt.prefixes.size}
            self.tell(warm_up.node, epoch=warm_up.epoch)


def name_of(warm_up: WarmUp) -> str:
    return warm_up.prompt.prefixes.chain[-1][0].rstrip("_")


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_a_server_that_lost_its_cache_is_warmed_once(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    fleet.answer("one")
    fleet.answer("other", B)
    assert not fleet.tell(epoch=1)
    assert fleet.due() == []
    with caplog.at_level(logging.INFO):
        assert fleet.tell(epoch=2)
        assert fleet.warm() == ["one"]
    assert caplog.messages == [f"{A} has lost its prompt cache: it reads recent prompts again, 1 at most"]
    fleet.held.clear()
    assert not fleet.tell(epoch=2)
    assert fleet.due() == []


def test_a_restarted_host_has_another_epoch_not_a_higher_one(fleet: Fleet) -> None:
    fleet.answer("one")
    fleet.tell(epoch=0)
    assert fleet.warm() == ["one"]


@pytest.mark.parametrize("epochs", [(2, 3), (3, 2)])
def test_after_the_second_restart_it_is_warmed_again(fleet: Fleet, epochs: tuple[int, int]) -> None:
    fleet.answer("one")
    for epoch in epochs:
        fleet.held.clear()
        fleet.tell(epoch=epoch)
        assert fleet.warm() == ["one"]


def test_what_a_node_answered_before_it_told_anything_may_be_older_than_its_cache(fleet: Fleet) -> None:
    fleet.answer("one", "local@c")
    for epoch in (1, 2):
        fleet.tell("local@c", epoch=epoch)
        assert fleet.warm() == []


def test_what_was_evicted_since_then_is_not_run_twice(fleet: Fleet) -> None:
    fleet.answer("one")
    fleet.tell(epoch=2)
    (first,) = fleet.due()
    fleet.end(first)
    fleet.held.clear()
    assert fleet.warm() == []


def test_what_a_node_answered_since_then_is_warm_already(fleet: Fleet) -> None:
    fleet.answer("before")
    fleet.tell(epoch=2)
    fleet.answer("after")
    assert fleet.warm() == ["before"]


def test_the_one_with_the_most_to_gain_comes_first(fleet: Fleet) -> None:
    fleet.answer("short", size=10_000)
    fleet.answer("old", size=40_000, age=600.0)
    fleet.answer("long", size=40_000)
    fleet.answer("too old", size=40_000, age=KEPT_FOR)
    fleet.held[prompt_id("long")] = {B: 5_000}
    fleet.tell(epoch=2)
    assert fleet.warm() == ["long", "short", "old"]


def test_no_server_swaps_its_model_for_it(fleet: Fleet) -> None:
    fleet.answer("long", age=5.0, size=80_000, model="another")
    fleet.answer("latest", age=1.0)
    fleet.answer("before", age=9.0)
    fleet.tell(epoch=2)
    assert fleet.warm() == ["latest", "before"]


@pytest.mark.parametrize("holder", [A, B])
def test_what_a_ready_node_holds_is_left_out(fleet: Fleet, holder: str) -> None:
    """It may be this one: another router has warmed it."""
    fleet.answer("one")
    fleet.held[prompt_id("one")] = {holder: 39_500}
    fleet.tell(epoch=2)
    assert fleet.warm() == []


def test_a_holder_that_is_not_ready_does_not_count(fleet: Fleet) -> None:
    fleet.answer("one")
    fleet.held[prompt_id("one")] = {B: 40_000}
    fleet.ready = {A}
    fleet.tell(epoch=2)
    assert fleet.warm() == ["one"]


def test_a_node_that_is_not_ready_is_waited_for(fleet: Fleet) -> None:
    fleet.answer("one")
    fleet.ready = {B}
    fleet.tell(epoch=2)
    assert fleet.due() == []
    fleet.ready = {A, B}
    assert fleet.warm() == ["one"]


def test_it_is_one_after_the_other_on_each_node(fleet: Fleet) -> None:
    for name, node in (("a1", A), ("a2", A), ("b1", B)):
        fleet.answer(name, node)
        fleet.tell(node, epoch=2)
    assert sorted(name_of(warm_up)[0] for warm_up in fleet.due()) == ["a", "b"]
    assert fleet.due() == []


@pytest.mark.parametrize(("slots", "running", "begins"), [(1, 0, True), (1, 1, False), (2, 1, False), (4, 2, True)])
def test_a_slot_is_left_to_callers(fleet: Fleet, slots: int, running: int, begins: bool) -> None:
    fleet.answer("one")
    fleet.tell(epoch=2, slots=slots, running=running)
    assert len(fleet.due()) == begins
    fleet.tell(epoch=2, slots=slots, running=0)
    assert len(fleet.due()) == (not begins)


def test_a_node_gets_a_few_and_not_all(fleet: Fleet) -> None:
    for n in range(20):
        fleet.answer(f"p{n}", size=4_000)
    fleet.tell(epoch=2)
    assert len(fleet.warm()) == MOST_PROMPTS


def test_no_other_begins_after_a_minute_of_prefill(fleet: Fleet) -> None:
    """10,000 tokens each, at 400 tokens a second, and then at 50."""
    for n in range(5):
        fleet.answer(f"p{n}")
    fleet.tell(epoch=2)
    assert len(fleet.warm()) == 3
    fleet.held.clear()
    fleet.tell(epoch=3, prefill_speed=50.0)
    assert len(fleet.warm()) == 1


def test_nothing_is_evicted_for_it(fleet: Fleet) -> None:
    """What a node says about its room counts before each one: other routers, and callers, fill it too."""
    for name in ("one", "two", "three"):
        fleet.answer(name)
    fleet.tell(epoch=2, room=10)
    assert len(fleet.warm(most=1)) == 1
    fleet.tell(epoch=2, room=2)
    assert fleet.warm() == []


def test_the_next_one_waits_for_what_the_node_tells(fleet: Fleet) -> None:
    fleet.answer("one")
    fleet.answer("two")
    fleet.tell(epoch=2)
    (first,) = fleet.due()
    fleet.tell(epoch=2, slots=1, running=1)
    fleet.warming.ended(first, "answered", fleet.now)
    assert fleet.due() == []
    fleet.now += DIGEST_WITHIN  # it may be lost
    assert len(fleet.due()) == 1


def test_a_node_without_a_free_slot_gets_no_more(fleet: Fleet) -> None:
    fleet.answer("one")
    fleet.answer("two")
    fleet.tell(epoch=2)
    (first,) = fleet.due()
    fleet.end(first, "not_taken")
    assert not fleet.tell(epoch=2)
    assert fleet.due() == []
    assert len(fleet.kept) == 2


def test_one_that_failed_is_forgotten_and_its_node_rests(fleet: Fleet) -> None:
    fleet.answer("poison", size=50_000)
    fleet.answer("good")
    fleet.tell(epoch=2)
    (first,) = fleet.due()
    fleet.end(first, "failed")
    assert (name_of(first), len(fleet.kept)) == ("poison", 1)
    assert not fleet.tell(epoch=3)
    fleet.now += RESTS_FOR - 1
    fleet.answer("good")
    assert not fleet.tell(epoch=4)
    fleet.now += 1
    fleet.warming.forget_old(fleet.now)
    fleet.tell(epoch=5)
    assert fleet.warm() == ["good"]


@pytest.mark.parametrize(("accepted", "expected"), [(True, []), (False, ["one"])])
def test_a_cache_that_is_lost_under_one_counts_as_its_failure(
    fleet: Fleet, accepted: bool, expected: list[str]
) -> None:
    """Unless it was only waiting there."""
    fleet.answer("one")
    fleet.tell(epoch=2)
    (first,) = fleet.due()
    first.is_accepted = accepted
    fleet.tell(epoch=3)
    fleet.warming.ended(first, "failed", fleet.now)  # known already
    assert fleet.warm() == expected


def test_what_is_over_is_forgotten(fleet: Fleet) -> None:
    fleet.answer("one")
    fleet.tell(epoch=2)
    fleet.now += KEPT_FOR
    fleet.warming.forget_old(fleet.now)
    assert (len(fleet.kept), fleet.warming._rounds) == (0, {})


def test_a_node_that_tells_another_epoch_each_time_gets_one_at_a_time(fleet: Fleet) -> None:
    for name in ("one", "two", "three"):
        fleet.answer(name)
    sent = []
    for epoch in range(2, 50):
        fleet.tell(epoch=epoch)
        sent += fleet.due()
    assert len(sent) == 1
    fleet.end(sent[0], "not_taken")
    fleet.tell(epoch=50)
    assert len(fleet.due()) == 1
