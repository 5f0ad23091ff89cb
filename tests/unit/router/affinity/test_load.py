"""What a node has to do, from what it told and what this router did since."""

import pytest

from fleet_worker.protocol.cache_digest import CacheDigest
from fleet_worker.router.affinity.load import BELIEVED_FOR, NodeLoad


@pytest.fixture
def load():
    """A node that has taken a request of this router."""
    load = NodeLoad("local@mini-1")
    load.send("own", 9.0, accepted=True)
    return load


def tell(load, running, prefill_left):
    digest = CacheDigest(node=load.name, slots=4, running=running, prefill_left=prefill_left)
    load.tell(digest, 1.0, 100.0)


def test_a_node_that_told_of_our_request_only_is_idle_as_soon_as_that_has_ended(load):
    tell(load, running=1, prefill_left=10.0)
    assert (load.busy(100.0), load.prefill_before(100.0)) == (1, 10.0)
    load.first_token("own")
    assert (load.busy(100.0), load.prefill_before(100.0)) == (1, 0.0)
    load.end("own")
    assert (load.busy(100.0), load.prefill_before(100.0)) == (0, 0.0)


def test_it_is_idle_also_if_the_request_failed_before_its_first_token(load):
    tell(load, running=1, prefill_left=10.0)
    load.end("own")
    assert (load.busy(100.0), load.prefill_before(100.0)) == (0, 0.0)


def test_of_two_own_requests_the_other_is_still_to_be_prefilled(load):
    load.send("other", 4.0, accepted=True)
    tell(load, running=2, prefill_left=15.0)
    load.end("own")
    assert (load.busy(100.0), load.prefill_before(100.0)) == (1, 4.0)


def test_what_a_node_does_for_others_is_known_to_that_node_only(load):
    tell(load, running=2, prefill_left=10.0)
    load.end("own")
    assert (load.busy(100.0), load.prefill_before(100.0)) == (1, 10.0)


def test_the_end_of_a_request_of_which_the_node_did_not_know_yet_changes_nothing_that_it_told(load):
    tell(load, running=1, prefill_left=10.0)
    load.send("newer", 1.0, accepted=False)
    load.end("newer")
    assert (load.busy(100.0), load.prefill_before(100.0)) == (1, 10.0)


def _told(load: NodeLoad, now: float, running: int = 0, prefill_left: float = 0.0) -> None:
    load.tell(CacheDigest(node="a", slots=4, running=running, prefill_left=prefill_left), 1.0, now)


def test_what_was_sent_adds_to_what_was_told_before() -> None:
    load = NodeLoad("a")
    _told(load, 1.0, running=2, prefill_left=3.0)
    load.send("r", 5.0, accepted=False)
    assert (load.busy(1.0), load.prefill_before(1.0)) == (3, 8.0)


def test_what_was_accepted_is_counted_once_when_the_node_tells_of_it() -> None:
    load = NodeLoad("a")
    load.send("r", 5.0, accepted=False)
    load.accept("r")
    _told(load, 1.0, running=3, prefill_left=4.0)
    assert (load.busy(1.0), load.prefill_before(1.0)) == (3, 5.0)


def test_what_waits_in_its_lane_is_not_told_and_counts_beside() -> None:
    load = NodeLoad("a")
    load.send("r", 5.0, accepted=False)
    _told(load, 1.0, running=3, prefill_left=4.0)
    assert (load.busy(1.0), load.prefill_before(1.0)) == (4, 9.0)


def test_what_has_ended_is_running_no_more_though_the_node_told_so() -> None:
    load = NodeLoad("a")
    load.send("r", 5.0, accepted=True)
    _told(load, 1.0, running=3)
    load.end("r")
    assert load.busy(1.0) == 2


def test_prefill_is_over_with_the_first_token_and_what_was_told_grows_old() -> None:
    load = NodeLoad("a")
    load.send("r", 5.0, accepted=True)
    load.first_token("r")
    assert load.prefill_before(1.0) == 0.0
    _told(load, 1.0, running=4, prefill_left=3.0)
    assert load.prefill_before(3.0) == 1.0
    assert load.prefill_before(9.0) == 0.0
    assert load.busy(1.0 + BELIEVED_FOR) == 1


def test_the_registry_counts_only_for_nodes_without_digests() -> None:
    load = NodeLoad("a")
    load.tell_of_registry(slots=2, running=1, heard_at=1.0)
    assert (load.slots, load.busy(1.0)) == (2, 1)
    _told(load, 2.0)
    load.tell_of_registry(slots=2, running=1, heard_at=3.0)
    assert (load.slots, load.busy(3.0)) == (4, 0)
