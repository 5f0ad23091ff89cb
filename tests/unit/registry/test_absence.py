"""What is told of a model for which nothing is ready."""

import pytest

from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry.absence import LONGEST_REASON, are_away, counts, described, is_absent
from fleet_worker.registry.offered import Offered


def instance(status, reason="", *, ready=False):
    known = InstanceStatus(host="mini", name="local", status=status, reason=reason)
    return Offered("m", ("chat",), (), {}, ready, known)


USER, HOURS = instance("away", "a user is at it"), instance("away", "outside of its hours, until 19:00")
DRAINED, STARTING = instance("drained", "it takes no work"), instance("starting")
READY = instance("available", ready=True)


@pytest.mark.parametrize(
    ("offered", "text"),
    [
        ([USER], "its only instance is away (a user is at it)"),
        ([DRAINED], "its only instance is drained"),
        ([USER, USER], "all 2 instances of it are away (a user is at it)"),
        ([HOURS, USER], "all 2 instances of it are away (a user is at it; outside of its hours, until 19:00)"),
        ([USER, DRAINED, USER], "of its 3 instances 2 are away (a user is at it) and 1 is drained"),
        (
            [STARTING, DRAINED, STARTING, USER],
            "of its 4 instances 2 are starting, 1 is drained and 1 is away (a user is at it)",
        ),
        ([instance("available")], "its only instance is without the model"),
        ([instance("away")], "its only instance is away"),
    ],
)
def test_it_is_told_how_many_are_in_which_state_and_why_they_are_away(offered, text):
    assert described(offered) == text


def test_what_other_hosts_say_is_told_briefly_and_on_one_line():
    many = [instance("away", f"{number}\n\x1b[31m" + "x" * 900) for number in range(5)]
    text = described(many)
    assert text.isprintable()
    assert text.endswith("; ...)")
    assert len(text) < 3 * LONGEST_REASON + 60
    assert described([instance("\x1b[31m" * 40)]) == "its only instance is not ready"


@pytest.mark.parametrize(
    ("offered", "absent", "away"),
    [
        ([], False, False),
        ([READY], False, False),
        ([READY, USER], False, False),
        ([USER, HOURS], True, True),
        ([USER, DRAINED], True, False),
        ([STARTING], True, False),
    ],
)
def test_only_what_is_known_counts_as_absent(offered, absent, away):
    assert (is_absent(offered), are_away(offered)) == (absent, away)


def test_each_state_is_counted():
    assert counts([USER, DRAINED, HOURS]) == {"away": 2, "drained": 1}
