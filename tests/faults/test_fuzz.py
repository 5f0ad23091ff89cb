"""Malformed messages, few: what `python -m tests.faults.fuzz` does for an hour."""

import pytest

from tests.faults import fuzz_messages
from tests.faults.fuzz import fuzz
from tests.faults.fuzz_messages import RECIPES, message
from tests.faults.fuzz_samples import Sample

KINDS = ("ask", "beat", "chat", "control", "reply")
SAMPLES = {kind: Sample(kind, b'[[{"a": 1}], {}, {"chain": null}]', {"id": "x"}, {"priority": 1}) for kind in KINDS}


def test_one_seed_draws_the_same_every_time_and_the_first_messages_are_of_all_kinds(monkeypatch):
    monkeypatch.setattr(fuzz_messages, "INFLATED", 2**20)
    monkeypatch.setattr(fuzz_messages, "_bomb", fuzz_messages._bomb.__wrapped__)
    first = [message(3, number, SAMPLES) for number in range(len(KINDS) * len(RECIPES) + 40)]
    assert [each.text for each in first] == [message(3, number, SAMPLES).text for number in range(len(first))]
    assert {(each.kind, each.recipe) for each in first} == {(kind, recipe) for kind in KINDS for recipe in RECIPES}
    assert len({message(seed, 200, SAMPLES).text for seed in range(10)}) > 5


@pytest.mark.rest
@pytest.mark.timeout(300)
def test_no_message_ends_a_process_takes_a_slot_or_costs_memory_and_real_requests_are_answered(broker):
    outcome = fuzz(broker, range(200), seed=1)
    print(*outcome.lines(), sep="\n")
    assert outcome.problems == []
