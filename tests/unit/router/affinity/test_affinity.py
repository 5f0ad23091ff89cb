"""What a router calls to place a request."""

from __future__ import annotations

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
