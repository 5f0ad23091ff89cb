"""What a node has to do, from what it told and what this router did since."""

import pytest

from fleet_worker.protocol.cache_digest import CacheDigest
from fleet_worker.router.affinity.load import NodeLoad


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
    assert (load.busy(100.0), load.before(100.0)) == (1, 10.0)
    load.first_token("own")
    assert (load.busy(100.0), load.before(100.0)) == (1, 0.0)
    load.end("own")
    assert (load.busy(100.0), load.before(100.0)) == (0, 0.0)


def test_it_is_idle_also_if_the_request_failed_before_its_first_token(load):
    tell(load, running=1, prefill_left=10.0)
    load.end("own")
    assert (load.busy(100.0), load.before(100.0)) == (0, 0.0)


def test_of_two_own_requests_the_other_is_still_to_be_prefilled(load):
    load.send("other", 4.0, accepted=True)
    tell(load, running=2, prefill_left=15.0)
    load.end("own")
    assert (load.busy(100.0), load.before(100.0)) == (1, 4.0)


def test_what_a_node_does_for_others_is_known_to_that_node_only(load):
    tell(load, running=2, prefill_left=10.0)
    load.end("own")
    assert (load.busy(100.0), load.before(100.0)) == (1, 10.0)


def test_the_end_of_a_request_of_which_the_node_did_not_know_yet_changes_nothing_that_it_told(load):
    tell(load, running=1, prefill_left=10.0)
    load.send("newer", 1.0, accepted=False)
    load.end("newer")
    assert (load.busy(100.0), load.before(100.0)) == (1, 10.0)
