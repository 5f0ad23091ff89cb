"""Prompts that are run again on a server that lost its cache: how they are sent, and what ends them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fleet_worker.broker.topology import direct_lane
from fleet_worker.errors import BrokerUnavailable, ConnectionFailure, FleetError, Overloaded
from fleet_worker.protocol.cache_digest import CacheDigest
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.protocol.reply import Accepted, Attempt, ChatResponse, Failure, Timings, Usage
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router import warm_ups as warm_ups_module
from fleet_worker.router.affinity.kept_prompts import KEPT_FOR, KeptPrompts
from fleet_worker.router.affinity.warming import Warming
from fleet_worker.router.attempts import MOVED
from fleet_worker.router.effects import CancelOrphan, Confirm, ToNode
from fleet_worker.router.warm_ups import LONGEST, TAKEN_WITHIN, WarmUps
from tests.envelopes import envelope, user

A = "local@a"
REPLY_TO = "llm.fleet.reply.mini-1.0123456789ab.120"
PREFIXES = PromptPrefixes(chain=(("a" * 11, 10_000), ("b" * 11, 40_000)))


class Router:
    """The parts of a router that `WarmUps` uses. Time passes when a test says so, and so do the calls that are due."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(warm_ups_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.sent: list[tuple[FleetRequest, str, PromptPrefixes | None]] = []
        self.told: list[tuple[str, ToNode]] = []
        self.error: FleetError | None = None
        self._calls: list[tuple[float, Callable[[], object]]] = []
        self.kept = KeptPrompts(10_000_000)
        self.warming = Warming(self.kept, lambda prefixes: {}, lambda model, operation: {A})
        self.warm: list[tuple[str, PromptPrefixes]] = []
        self.warm_ups = WarmUps(
            self.warming,
            self.kept,
            lambda node, prefixes: self.warm.append((node, prefixes)),
            REPLY_TO,
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
        )
        self.warm_ups.start()

    def at(self, when: float, call: Callable[[], object]) -> None:
        self._calls.append((when, call))

    def soon(self, call: Callable[[], object]) -> None:
        self.at(self.now, call)

    def tell(self, request_id: str, effect: ToNode) -> None:
        self.told.append((request_id, effect))

    def submit(self, request: FleetRequest, lane: str, *, patience: float, prefixes: str | None) -> None:
        if self.error:
            raise self.error
        self.sent.append((request, lane, prefixes))

    def wait(self, seconds: float = 0.0) -> None:
        self.now += seconds
        due, self._calls = self._calls, []
        for when, call in due:
            if when <= self.now:
                call()
            else:
                self.at(when, call)

    # What happens in the fleet

    def answer(self, request_id: str = "r-1", *, errors: tuple[str | None, ...] = (None,)) -> None:
        """A caller's request is answered; each attempt ended with one of `errors`."""
        params = {"messages": [user("A secret.")], "max_tokens": 700}
        request = FleetRequest.build(envelope(request_id=request_id, params=params, caller={"name": "Ann"}))
        self.warm_ups.asked(request, PREFIXES)
        attempts = [Attempt(attempt=n, node=A, error=error, delivered=0) for n, error in enumerate(errors, 1)]
        self.warm_ups.ended(request_id, response(request_id).model_copy(update={"attempts": attempts}))

    def lose_cache(self, epoch: int = 2) -> None:
        self.warm_ups.heard(CacheDigest(node=A, slots=4, running=0, epoch=epoch))
        self.wait()

    @property
    def id(self) -> str:
        """That of the request that was sent last."""
        return self.sent[-1][0].request_id


def response(request_id: str) -> ChatResponse:
    usage = Usage(prompt_tokens=10_000, completion_tokens=1)
    timings = Timings(queue_wait=0.0, duration=0.1)
    rest: dict[str, Any] = {"node": A, "instance": "local", "model": "qwen3-14b", "finish_reason": "length"}
    return ChatResponse(id=request_id, attempt=1, seq=1, usage=usage, timings=timings, **rest)


def failure(request_id: str, error: FleetError) -> Failure:
    return Failure.of(error, request_id, 1, 1)


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Router:
    """A router whose caller was answered by a server that then lost its cache."""
    router = Router(monkeypatch)
    router.lose_cache(epoch=1)
    router.answer()
    router.lose_cache()
    return router


def test_it_is_one_token_for_nobody_at_the_lowest_priority(router: Router) -> None:
    ((request, lane, prefixes),) = router.sent
    assert (lane, prefixes) == (direct_lane(A), PREFIXES)
    assert request.request_id.startswith("warm-up.")
    assert (request.priority, request.caller, request.reply_to) == ("low", {}, REPLY_TO)
    assert request.encode()["params"] == {"messages": [user("A secret.")], "max_tokens": 1, "temperature": 0.0}
    assert TAKEN_WITHIN < request.timeout_seconds <= LONGEST
    assert FleetRequest.decode(request.encode(), max_bytes=10_000).addressed_to(REPLY_TO)


def test_its_frames_are_wanted_until_it_has_ended(router: Router) -> None:
    accepted = Accepted(id=router.id, attempt=1, seq=0, instance="local", queue_wait=0.0, asks=True)
    assert not router.warm_ups.receive("local@b", accepted)
    assert router.warm_ups.receive(A, accepted)
    assert router.told == [(router.id, Confirm(A, 1))]
    assert router.warm_ups.receive(A, response(router.id))
    assert not router.warm_ups.receive(A, accepted)
    assert len(router.kept) == 1


def test_its_conversation_is_sent_there_as_soon_as_it_is_read(router: Router) -> None:
    """A digest that comes meanwhile does not name it."""
    assert router.warm == []
    router.warm_ups.receive(A, Accepted(id=router.id, attempt=1, seq=0, instance="local", queue_wait=0.0))
    assert len(router.warm) == 1
    router.lose_cache(epoch=2)
    assert len(router.warm) == 2
    router.warm_ups.receive(A, response(router.id))
    assert router.warm == [(A, PREFIXES)] * 3
    router.lose_cache(epoch=2)
    assert len(router.warm) == 3


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (ConnectionFailure("The server died.", instance_died=True), 0),
        (ConnectionFailure("The node drains.", handed_over=True), 1),
        (Overloaded("It is busy."), 1),
    ],
)
def test_one_that_fails_is_tried_nowhere_again(router: Router, error: FleetError, kept: int) -> None:
    router.warm_ups.receive(A, failure(router.id, error))
    assert len(router.kept) == kept
    router.wait(5.0)
    router.lose_cache(epoch=2)
    assert len(router.sent) == 1


def test_a_node_that_does_not_take_it_is_left_alone(router: Router) -> None:
    router.wait(TAKEN_WITHIN)
    assert router.told == [(router.id, CancelOrphan(A, 1))]
    assert not router.warm_ups.receive(A, Accepted(id=router.id, attempt=1, seq=0, instance="local", queue_wait=0.0))
    router.wait(5.0)
    assert (len(router.sent), len(router.kept)) == (1, 1)


def test_one_that_does_not_end_is_cancelled(router: Router) -> None:
    router.warm_ups.receive(A, Accepted(id=router.id, attempt=1, seq=0, instance="local", queue_wait=0.0))
    router.wait(TAKEN_WITHIN)
    assert router.told == []
    router.wait(LONGEST)
    assert router.told == [(router.id, CancelOrphan(A, 1))]
    assert len(router.kept) == 0


def test_without_a_broker_nothing_is_sent(router: Router) -> None:
    router.warm_ups.receive(A, response(router.id))
    router.error = BrokerUnavailable("It is away.")
    router.lose_cache(epoch=3)
    assert len(router.told) == 1  # the broker may have it all the same
    router.error = None
    router.wait(5.0)
    assert (len(router.sent), len(router.kept)) == (1, 1)


def test_a_closed_router_leaves_nothing_behind(router: Router) -> None:
    router.warm_ups.close()
    assert router.told == [(router.id, CancelOrphan(A, 1))]


@pytest.mark.parametrize(("errors", "kept"), [((None,), 1), ((MOVED, None), 1), (("connection_failure", None), 0)])
def test_a_request_with_which_a_node_failed_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, errors: tuple[str | None, ...], kept: int
) -> None:
    router = Router(monkeypatch)
    router.answer(errors=errors)
    assert len(router.kept) == kept


def test_a_request_that_failed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router(monkeypatch)
    router.warm_ups.asked(FleetRequest.build(envelope()), PREFIXES)
    router.warm_ups.ended("r-1", failure("r-1", Overloaded("It is busy.")))
    assert (len(router.kept), router.warm_ups._asked) == (0, {})


def test_what_is_old_is_forgotten_without_any_traffic(router: Router) -> None:
    router.wait(KEPT_FOR)
    assert len(router.kept) == 0


def test_a_digest_makes_its_own_node_be_looked_at_and_no_other(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str | None] = []
    monkeypatch.setattr(router.warming, "due", lambda now, only=None: looked_at.append(only) or [])
    router.lose_cache(epoch=3)
    assert looked_at == [A]
    router.wait(1.0)
    assert looked_at == [A, None]
