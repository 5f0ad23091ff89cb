"""What a router calls to place a request."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fleet_worker.broker.door import Refused
from fleet_worker.protocol.cache_digest import CacheDigest, DigestMessage
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.protocol.registry_event import Announcement, RegistryEvent
from fleet_worker.protocol.reply import Usage
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.protocol.status import InstanceStatus, ModelStatus
from fleet_worker.registry.view import Registry
from fleet_worker.router.affinity.affinity import Affinity
from tests.envelopes import envelope

LONG = "x" * 40_000


class _Fleet:
    """A fleet of nodes that say what they are told to say, on a clock that stands still."""

    def __init__(self, *names: str, **digest: Any) -> None:
        self.now = 1_000.0
        self.registry = Registry(clock=lambda: self.now)
        self.affinity = Affinity(self.registry, key=b"key", clock=lambda: self.now)
        for name in names:
            self.announce(name)
            self.tell(name, **digest)

    def announce(self, name: str, status: str = "available", slots: int = 4, running: int = 0) -> None:
        instance = InstanceStatus(
            host=name, name="local", node=name, status=status, pid=7, slots=slots, running=running
        )
        model = ModelStatus(model="m", capabilities=("chat", "stream_chat"), status=status)
        events = [RegistryEvent.about(instance), RegistryEvent.about(instance, model)]
        self.registry.apply(Announcement(v=1, host=name, interval=15.0, events=events))

    def tell(self, name: str, **digest: Any) -> None:
        said = CacheDigest(**{"node": name, "slots": 4, "running": 0, **digest})
        self.affinity.receive(DigestMessage(v=1, host=name, interval=1.0, digests=[said]).encode())

    def run(self, text: str, node: str, cached: int = 0, request_id: str = "1") -> Any:
        """Run a request at this node, wherever it should have gone."""
        request, prefixes = self.asked(text)
        self.affinity.sent(request_id, self.affinity.place(request, prefixes))
        self.affinity.accepted(request_id, node)
        self.affinity.first_token(request_id)
        usage = Usage(prompt_tokens=prefixes.size // 4, completion_tokens=20, cached_tokens=cached)
        return self.affinity.ended(request_id, usage, node)

    def asked(self, text: str) -> tuple[FleetRequest, PromptPrefixes]:
        params = {"messages": [{"role": "user", "content": text}]}
        request = FleetRequest.build(envelope(operation="chat", model="m", params=params))
        return request, self.affinity.prefixes(request)

    def place(self, text: str, *failed: str, blamed: bool = False) -> Any:
        return self.affinity.place(*self.asked(text), failed, blamed=blamed)


def test_a_long_prompt_goes_where_it_was_answered() -> None:
    fleet = _Fleet("a", "b", "c")
    assert fleet.run(LONG, "b") == "cold"
    placement = fleet.place(LONG)
    assert placement.node == "b"
    assert placement.expected > 0.9 * placement.tokens


def test_another_router_knows_it_from_the_digest() -> None:
    fleet = _Fleet("a", "b", "c")
    _, prefixes = fleet.asked(LONG)
    fleet.tell("c", held=[prefixes.chain[-1][0]])
    assert fleet.place(LONG).node == "c"


def test_a_short_prompt_goes_to_the_shared_lane() -> None:
    fleet = _Fleet("a", "b")
    fleet.run("hi", "a")
    assert fleet.place("hi").node is None


def test_what_became_of_a_short_prompt_is_told_too() -> None:
    fleet = _Fleet("a", "b")
    short = "x" * 300
    assert fleet.place(short).node is None
    assert fleet.run(short, "a") == "cold"
    assert fleet.run(short, "a", cached=80) == "hit"
    assert fleet.run(short, "b") == "moved"
    assert fleet.run(short, "a") == "miss"


def test_after_a_failure_it_is_the_next_warmest() -> None:
    fleet = _Fleet("a", "b", "c")
    fleet.run(LONG, "a")
    fleet.run(LONG, "b")
    assert fleet.place(LONG, "a").node == "b"
    assert fleet.place(LONG, "a", "b").node == "c"
    assert fleet.place(LONG, "a", "b", "c").node is None


def test_what_an_instance_died_of_goes_to_no_holder_of_it() -> None:
    fleet = _Fleet("a", "b", "c")
    fleet.run(LONG, "a")
    fleet.run(LONG, "b")
    assert fleet.place(LONG, "a", blamed=True).node == "c"
    assert fleet.place(LONG, "a", "c", blamed=True).node == "b"


def test_a_node_that_is_not_ready_gets_nothing() -> None:
    fleet = _Fleet("a", "b", "c")
    fleet.run(LONG, "a")
    fleet.announce("a", status="drained")
    fleet.now += 0.3
    assert fleet.place(LONG).node != "a"


def test_a_cache_that_was_emptied_is_cold() -> None:
    fleet = _Fleet("a", "b", "c")
    _, prefixes = fleet.asked(LONG)
    fleet.tell("a", held=[prefixes.chain[-1][0]], epoch=1)
    fleet.run(LONG, "a", cached=10_000)
    fleet.tell("a", epoch=2)
    assert fleet.place(LONG).expected == 0


def test_what_nobody_asked_for_is_known_where_it_is_read() -> None:
    fleet = _Fleet("a", "b")
    _, prefixes = fleet.asked(LONG)
    assert fleet.affinity.holders(prefixes) == {}
    fleet.affinity.warms("a", prefixes)
    assert fleet.affinity.holders(prefixes) == {"a": prefixes.size}
    assert fleet.place(LONG).node == "a"


def test_what_nodes_tell_is_returned() -> None:
    said = CacheDigest(node="a", slots=4, running=0, epoch=7)
    fleet = _Fleet("a")
    assert fleet.affinity.receive(DigestMessage(v=1, host="a", interval=1.0, digests=[said]).encode()) == [said]


def test_what_is_no_digest_is_refused() -> None:
    with pytest.raises(Refused):
        _Fleet().affinity.receive(b'{"v": 1}')


# --- Own sends ---


def test_long_prompts_are_placed_one_by_one() -> None:
    """What was sent counts at once, before any node tells of it."""
    fleet = _Fleet("a", "b", "c")
    placed = []
    for n in range(3):
        request, prefixes = fleet.asked(f"{n}{LONG}")
        placement = fleet.affinity.place(request, prefixes)
        fleet.affinity.sent(str(n), placement)
        placed.append(placement.node)
    assert sorted(placed) == ["a", "b", "c"]


def test_the_session_key_of_a_whole_application_jams_no_mini() -> None:
    """All of its users send the same one, and have nothing else in common."""
    fleet = _Fleet("a", "b", "c")
    nodes = []
    for n in range(12):
        params = {"messages": [{"role": "user", "content": f"{n}{LONG}"}]}
        request = FleetRequest.build(envelope(operation="chat", model="m", params=params))
        placement = fleet.affinity.place(request, fleet.affinity.prefixes(request, session="the application"))
        fleet.affinity.sent(str(n), placement)
        node = placement.node or "abc"[n % 3]
        fleet.affinity.accepted(str(n), node)
        nodes.append(node)
    assert max(nodes.count(node) for node in "abc") <= 6


def test_a_session_key_is_worth_a_quarter_of_the_prompt_until_it_was_not_cached() -> None:
    fleet = _Fleet("a", "b")
    request, _ = fleet.asked(LONG)
    prefixes = fleet.affinity.prefixes(request, session="s")
    fleet.tell("b", held=[prefixes.session])
    placement = fleet.affinity.place(request, prefixes)
    assert placement.node == "b"
    assert placement.expected == pytest.approx(placement.tokens / 4, abs=1)
    fleet.affinity.sent("1", placement)
    fleet.affinity.accepted("1", "b")
    usage = Usage(prompt_tokens=placement.tokens, completion_tokens=5, cached_tokens=0)
    assert fleet.affinity.ended("1", usage, "b") == "miss"


def test_a_popular_prompt_uses_all_minis() -> None:
    fleet = _Fleet("a", "b", "c")
    for node in "abc":
        fleet.run(LONG, node)
    assert fleet.place(LONG).node is None


def test_the_faster_of_two_minis_is_preferred_while_it_has_free_slots() -> None:
    """Four clients, one request after the other: those that find the faster one full take the other one."""
    fleet = _Fleet()
    for name, speed in (("slow", 1.0), ("fast", 4.0)):
        fleet.announce(name, slots=2)
        fleet.tell(name, slots=2, prefill_speed=200 * speed, decode_speed=20 * speed)
    placed = []
    for n in range(4):
        placement = fleet.place(f"{n} short")
        fleet.affinity.sent(str(n), placement)
        fleet.affinity.accepted(str(n), placement.node or "slow")
        placed.append(placement.node)
    assert placed == ["fast", "fast", None, None]


# --- What nodes tell ---


def test_a_node_without_digests_is_known_by_the_registry_and_by_what_was_sent_there() -> None:
    fleet = _Fleet()
    fleet.announce("old", running=1)
    fleet.announce("older")
    fleet.run(LONG, "old")
    assert fleet.place(LONG).node == "old"
    assert not fleet.affinity.has_free_slots("old")
    assert not fleet.affinity.is_silent("old", 5.0)
    fleet.now += 1.0
    fleet.announce("old", running=30)
    fleet.now += 1.0
    assert fleet.place(LONG).node == "older"


def test_a_node_that_ran_something_and_fell_silent_is_not_chosen() -> None:
    """Its host may be gone. A node that runs nothing has nothing to tell."""
    fleet = _Fleet("a", "b")
    fleet.run(LONG, "a")
    fleet.tell("a", running=1, held=[fleet.asked(LONG)[1].chain[-1][0]])
    assert fleet.place(LONG).node == "a"
    fleet.now += 5.5
    assert fleet.affinity.is_silent("a", 5.0)
    assert fleet.place(LONG).node == "b"
    fleet.tell("a", held=[fleet.asked(LONG)[1].chain[-1][0]])
    fleet.now += 5.5
    assert fleet.place(LONG).node == "a"


def test_what_a_node_holds_no_more_is_forgotten() -> None:
    fleet = _Fleet("a", "b")
    fleet.run(LONG, "a")
    fleet.now += 1.0
    fleet.tell("a", held=[])
    assert fleet.place(LONG).expected == 0


def test_a_digest_that_was_on_its_way_does_not_hide_what_was_answered_since() -> None:
    fleet = _Fleet("a", "b")
    fleet.run(LONG, "a")
    fleet.now += 0.2
    fleet.tell("a", held=[])
    assert fleet.place(LONG).node == "a"


def test_what_has_just_been_answered_is_held_though_the_last_digest_came_before() -> None:
    fleet = _Fleet("a", "b")
    request, prefixes = fleet.asked(LONG)
    fleet.affinity.sent("1", fleet.affinity.place(request, prefixes))
    fleet.affinity.accepted("1", "b")
    fleet.now += 1.0
    fleet.tell("b", running=1)
    assert fleet.affinity.holders(prefixes) == {}
    fleet.affinity.ended("1", Usage(prompt_tokens=10_000, cached_tokens=0), "b")
    assert fleet.affinity.holders(prefixes) == {"b": prefixes.size}


def test_nodes_that_are_gone_are_forgotten() -> None:
    fleet = _Fleet("a", "b")
    fleet.run(LONG, "a")
    fleet.now += 200.0
    fleet.announce("b")
    fleet.tell("b")
    assert fleet.affinity.holders(fleet.asked(LONG)[1]) == {}
    assert fleet.affinity._loads.keys() == {"b"}


def test_another_node_is_free_while_it_has_a_slot() -> None:
    fleet = _Fleet("a", "b")
    request, _ = fleet.asked(LONG)
    assert fleet.affinity.another_is_free(request, "a")
    fleet.tell("b", running=4)
    assert not fleet.affinity.another_is_free(request, "a")
    assert fleet.affinity.has_free_slots("a")
    assert not fleet.affinity.has_free_slots("b")


# --- What an answer tells ---


@pytest.mark.parametrize(
    ("holder", "node", "cached", "outcome"),
    [
        (None, "a", 0, "cold"),
        ("a", "a", 9_000, "hit"),
        ("a", "a", 5_100, "hit"),
        ("a", "a", 4_000, "miss"),
        ("a", "b", 0, "moved"),
        ("a", "b", 9_000, "hit"),
        ("a", "a", None, None),
    ],
)
def test_what_became_of_a_prompt(holder: str | None, node: str, cached: int | None, outcome: str | None) -> None:
    fleet = _Fleet("a", "b", "c")
    if holder:
        fleet.tell(holder, held=[fleet.asked(LONG)[1].chain[-1][0]])
    request, prefixes = fleet.asked(LONG)
    fleet.affinity.sent("1", fleet.affinity.place(request, prefixes))
    fleet.affinity.accepted("1", node)
    usage = Usage(prompt_tokens=10_000, completion_tokens=5, cached_tokens=cached)
    assert fleet.affinity.ended("1", usage, node) == outcome


def test_a_request_that_failed_has_no_outcome_and_leaves_nothing() -> None:
    fleet = _Fleet("a", "b")
    request, prefixes = fleet.asked(LONG)
    fleet.affinity.sent("1", fleet.affinity.place(request, prefixes))
    assert fleet.affinity.ended("1", None, None) is None
    assert fleet.affinity.ended("1", None, None) is None
    assert not fleet.affinity._in_flight
    assert {load.busy(fleet.now) for load in fleet.affinity._loads.values()} == {0}


def test_a_request_that_is_moved_is_counted_once() -> None:
    fleet = _Fleet("a", "b")
    request, prefixes = fleet.asked(LONG)
    placement = fleet.affinity.place(request, prefixes)
    fleet.affinity.sent("1", placement)
    fleet.affinity.sent("1", dataclasses.replace(placement, node=None))
    fleet.affinity.accepted("1", "b")
    assert {name: load.busy(fleet.now) for name, load in fleet.affinity._loads.items()} == {"a": 0, "b": 1}


def test_the_tokens_of_a_prompt_are_learned() -> None:
    """A quarter of its bytes at first; the servers count two tokens in three bytes here."""
    fleet = _Fleet("a")
    request, prefixes = fleet.asked(LONG)
    assert fleet.place(LONG).tokens == pytest.approx(prefixes.size / 4, abs=1)
    for n in range(40):
        fleet.affinity.sent(str(n), fleet.affinity.place(request, prefixes))
        fleet.affinity.accepted(str(n), "a")
        usage = Usage(prompt_tokens=prefixes.size * 2 // 3, completion_tokens=5, cached_tokens=0)
        fleet.affinity.ended(str(n), usage, "a")
    assert fleet.place(LONG).tokens == pytest.approx(prefixes.size * 2 / 3, rel=0.05)


@pytest.mark.parametrize(
    "usage", [Usage(prompt_tokens=-5, cached_tokens=-1), Usage(prompt_tokens=2**60, cached_tokens=2**62)]
)
def test_a_server_that_counts_nonsense_does_no_harm(usage: Usage) -> None:
    fleet = _Fleet("a", "b")
    request, prefixes = fleet.asked(LONG)
    for n in range(3):
        fleet.affinity.sent(str(n), fleet.affinity.place(request, prefixes))
        fleet.affinity.accepted(str(n), "a")
        fleet.affinity.ended(str(n), usage, "a")
    assert 0 < fleet.place(LONG).tokens <= 2 * prefixes.size


def test_many_threads_leave_nothing_behind() -> None:
    fleet = _Fleet("a", "b", "c")
    digests = [{"running": n % 5, "held": [fleet.asked(f"{n}{LONG}")[1].chain[-1][0]]} for n in range(5)]

    def one(number: int) -> None:
        request, prefixes = fleet.asked(f"{number % 5}{LONG}")
        fleet.affinity.sent(str(number), fleet.affinity.place(request, prefixes))
        fleet.tell("abc"[number % 3], **digests[number % 5])
        fleet.affinity.accepted(str(number), "abc"[number % 3])
        fleet.affinity.first_token(str(number))
        fleet.affinity.ended(str(number), Usage(prompt_tokens=10_000, cached_tokens=0), "abc"[number % 3])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(200)))
    for node in "abc":
        fleet.tell(node)
    assert not fleet.affinity._in_flight
    assert {load.busy(fleet.now) for load in fleet.affinity._loads.values()} == {0}
