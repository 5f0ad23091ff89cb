"""The soak, short: seconds of what `python -m tests.faults.soak` does for half an hour."""

import json
from dataclasses import asdict

import pytest

from tests.faults.soak import KINDS, Plan, drawn_asks, drawn_strikes, planned, soak

PLAN = Plan(seed=3, requests=150, faults=15, broker="valkey")


def test_one_seed_draws_the_same_every_time_and_its_log_can_be_replayed():
    asks, strikes = drawn_asks(PLAN), drawn_strikes(PLAN)
    assert (asks, strikes) == (drawn_asks(PLAN), drawn_strikes(PLAN))
    log = "\n".join(["a line of something else", *(json.dumps(asdict(each)) for each in (PLAN, *strikes))])
    assert planned(log) == (PLAN, strikes)
    assert {strike.kind for strike in drawn_strikes(Plan(3, 10_000, 1_000, "valkey"))} == KINDS.keys()


@pytest.mark.rest
@pytest.mark.timeout(180)
def test_whatever_breaks_every_request_ends_in_one_right_answer_or_one_typed_error(broker):
    summary = soak(broker, drawn_asks(PLAN), drawn_strikes(PLAN))
    print(*summary.lines(), sep="\n")
    assert summary.problems == []
