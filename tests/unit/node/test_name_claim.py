"""Which of several processes of one name stays, whatever the order of their questions, and however many there are."""

import random
import threading
from types import SimpleNamespace

import pytest

from fleet_worker.node import name_claim as module
from fleet_worker.node.name_claim import NameClaim
from tests.mlx_clients import until

NAME = "one@test"


class Broker:
    """It brings each question to all that are connected, and their answers back after a while."""

    def __init__(self, *, has_one_queue=False):
        self.claims = []
        self.has_one_queue = has_one_queue
        """As on RabbitMQ: only the first of those that are connected hears questions."""
        self.control = self

    def broadcast(self, command, *, destination, timeout, **_):
        assert (command, destination) == ("process", [NAME])
        hearing = self.claims[:1] if self.has_one_queue else [*self.claims]
        answers = [{NAME: claim.process(None)} for claim in hearing]
        threading.Event().wait(timeout)
        return answers

    def claim(self):
        """A process that has just connected; it is gone as soon as it has lost."""
        claim = NameClaim(self, NAME, lambda: self.leave(claim))
        self.claims.append(claim)
        claim.connected(True, not self.has_one_queue or self.claims[0] is claim)
        return claim

    def leave(self, claim):
        self.claims.remove(claim)
        if self.has_one_queue and self.claims:
            self.claims[0].connected(True, True)

    @property
    def is_decided(self):
        return len(self.claims) == 1 and self.claims[0]._is_settled and not self.claims[0]._is_asking


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(module, "ANSWERED_WITHIN", 0.02)
    monkeypatch.setattr(module, "ASKED_AGAIN_AFTER", (0.005, 0.01))
    monkeypatch.setattr(module, "SPREAD", 0.01)


@pytest.mark.parametrize("has_one_queue", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_of_twenty_processes_that_begin_at_once_one_stays(has_one_queue, seed):
    draw, broker = random.Random(seed), Broker(has_one_queue=has_one_queue)
    for _ in range(20):
        broker.claim()
        threading.Event().wait(draw.choice([0.0, 0.0, 0.005]))
    until(lambda: broker.is_decided, 10)


def test_a_process_that_was_there_before_stays_however_often_another_begins():
    broker = Broker()
    first = broker.claim()
    until(lambda: broker.is_decided)
    for _ in range(10):
        broker.claim()
        until(lambda: broker.is_decided)
        assert broker.claims == [first]


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_that_did_not_hear_of_each_other_while_the_broker_was_away_one_stays(order):
    one, other = Broker(), Broker()
    claims = [one.claim(), other.claim()]
    until(lambda: one.is_decided and other.is_decided)
    other.claims = one.claims  # one broker for both
    one.claims.append(claims[1])
    for claim in claims:
        claim._lost = lambda claim=claim: one.claims.remove(claim)
    for claim in claims[::order]:
        claim.connected(True, True)
    until(lambda: one.is_decided)


def test_one_that_was_frozen_while_another_began_finds_it_by_the_question_that_waited_for_it():
    broker = Broker()
    frozen = broker.claim()
    until(lambda: broker.is_decided)
    broker.claims.remove(frozen)
    broker.claim()
    until(lambda: broker.is_decided)
    broker.claims.append(frozen)
    frozen.process(None)  # the question of the other one, whose answer nobody waits for any more
    until(lambda: broker.is_decided)


def test_none_leaves_because_answers_come_too_late_on_a_busy_machine(monkeypatch):
    class Slow(Broker):
        def broadcast(self, *_, **options):
            answers = super().broadcast(*_, **options)
            return [answer for answer in answers if late.random() < 0.5]

    late, broker = random.Random(1), Slow()
    for _ in range(20):
        broker.claim()
    until(lambda: broker.is_decided, 10)


@pytest.mark.parametrize("answers", [[None], [{NAME: 5}], [{NAME: {"error": "no"}}], [{NAME: ["x"]}], ["text"]])
def test_an_answer_that_is_none_counts_for_nothing(answers):
    told = SimpleNamespace(control=SimpleNamespace(broadcast=lambda *_, **__: answers))
    claim = NameClaim(told, NAME, pytest.fail)
    claim.connected(True, True)
    assert not claim._is_decided()
    assert not claim._has_lost
    claim.connected(False, False)
