"""Whether a node that fell silent under a request has died, or only its host is silent."""

from dataclasses import replace

import pytest

from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.router.deaths import HEARTBEAT, SETTLED_AFTER, WAITS_FOR, Deaths, Silence

NODE = "local@mini"
SINCE = 100.0
"""When the node was heard last."""
LOST = SINCE + 5.0
"""When it counts as lost."""
BACK = SINCE + 60.0
"""When its host is heard again."""


def said(status="available", at=SINCE - 3.0, pid=7, server_restarts=0, process="p"):
    """What the host says about the node, and when it is heard."""
    facts = {"pid": pid, "process": process, "server_restarts": server_restarts, "heard_at": at}
    return InstanceStatus(host="mini", name="local", node=NODE, status=status, **facts)


def silence(accepted=None, seen=None):
    return Silence.of(NODE, SINCE, accepted=accepted or said(), seen=seen)


# --- When it falls silent


@pytest.mark.parametrize(
    "seen",
    [said(), said(at=SINCE + HEARTBEAT), said("degraded"), said("drained"), None],
    ids=["before", "just before", "slow", "drained", "forgotten"],
)
def test_a_node_that_is_silent_with_its_whole_host_may_live(seen):
    assert silence(seen=seen)


@pytest.mark.parametrize(
    "seen",
    [
        said(at=SINCE + HEARTBEAT + 0.1),
        said("unavailable", pid=None),
        said("unavailable", at=SINCE + 0.1),
        said(pid=8),
        said(server_restarts=1),
        said("of a newer version"),
    ],
    ids=["host is heard", "no node", "no server", "another node", "another server", "unknown"],
)
def test_a_node_that_alone_is_silent_or_is_said_to_be_dead_has_died(seen):
    assert silence(seen=seen) is None


def test_a_node_of_which_no_host_tells_has_died():
    """There may be no registry nodes: then nobody will tell, and a request could kill one server after the other."""
    assert Silence.of(NODE, SINCE, accepted=None, seen=None) is None


def test_what_the_host_said_before_it_knew_the_node_counts_for_nothing():
    assert Silence.of(NODE, SINCE, accepted=said("unavailable", pid=None), seen=said())


# --- When its host is heard again


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (None, "open"),
        (said(), "open"),
        (said(at=SINCE + HEARTBEAT), "open"),
        (said(at=BACK), "lived"),
        (said("degraded", at=BACK), "lived"),
        (said("away", at=BACK), "lived"),
        (said(at=BACK, pid=8), "died"),
        (said("starting", at=BACK, pid=8), "died"),
        (said(at=BACK, process="q"), "died"),
        (said(at=BACK, server_restarts=1), "died"),
        (said("unavailable", at=BACK), "open"),
        (said("unavailable", at=BACK, pid=None), "open"),
        (said(at=BACK, server_restarts=None), "lived"),
    ],
)
def test_what_the_host_says_when_it_is_heard_again_decides(seen, verdict):
    assert silence().verdict(seen, BACK) == verdict


def test_a_host_that_has_just_come_back_does_not_know_all_of_its_nodes_yet():
    one = silence()
    away = said("unavailable", at=BACK, pid=None)
    assert one.verdict(away, BACK) == "open"
    assert one.verdict(away, BACK + SETTLED_AFTER - 0.1) == "open"
    assert one.verdict(replace(away, heard_at=BACK + SETTLED_AFTER), BACK + SETTLED_AFTER) == "died"
    other = silence()
    assert other.verdict(away, BACK) == "open"
    assert other.verdict(said(at=BACK + 1), BACK + 1) == "lived"


def test_a_server_that_died_with_its_host_asleep_is_found_out():
    one = silence()
    assert one.verdict(said("unavailable", at=BACK), BACK) == "open"
    assert one.verdict(said("unavailable", at=BACK), BACK + SETTLED_AFTER) == "died"


# --- Of one request


def two_silent(now=LOST, deadline=LOST + 1000.0):
    deaths = Deaths()
    for name in ("one", "two"):
        deaths.fell_silent(Silence(f"{name}@mini", said(), SINCE), now, deadline)
    return deaths


def test_two_silent_hosts_are_no_deaths_but_the_next_attempt_waits_for_their_word():
    deaths = two_silent()
    assert (bool(deaths), deaths.are_open, deaths.are_enough) == (True, True, False)
    assert deaths.must_wait(LOST + WAITS_FOR - 0.1)
    assert not deaths.must_wait(LOST + WAITS_FOR)


def test_a_request_with_little_time_waits_for_a_part_of_it_only():
    deaths = two_silent(deadline=LOST + 40.0)
    assert deaths.must_wait(LOST + 9.9)
    assert not deaths.must_wait(LOST + 10.0)


def test_after_one_silent_host_nothing_waits():
    deaths = Deaths()
    deaths.fell_silent(silence(), LOST, LOST + 1000.0)
    assert not deaths.must_wait(LOST)


def test_one_death_and_one_silent_host_may_be_two_deaths():
    deaths = Deaths()
    deaths.certain = 1
    deaths.fell_silent(silence(), LOST, LOST + 1000.0)
    assert deaths.must_wait(LOST)


def test_a_host_that_slept_is_no_death_and_ends_the_wait():
    deaths = two_silent()
    deaths.look_at_silent({"one@mini": said(at=BACK)}.get, BACK)
    assert (deaths.certain, deaths.are_open, deaths.must_wait(BACK)) == (0, True, False)
    deaths.look_at_silent({"two@mini": said(at=BACK)}.get, BACK)
    assert (bool(deaths), deaths.are_open) == (False, False)


def test_hosts_that_were_restarted_are_deaths():
    deaths = two_silent()
    deaths.look_at_silent({"one@mini": said("starting", at=BACK, pid=8)}.get, BACK)
    assert (deaths.certain, deaths.are_enough) == (1, False)
    assert deaths.must_wait(BACK - 10)
    deaths.look_at_silent({"two@mini": said("starting", at=BACK, pid=8)}.get, BACK)
    assert (deaths.certain, deaths.are_enough, deaths.are_open) == (2, True, False)
