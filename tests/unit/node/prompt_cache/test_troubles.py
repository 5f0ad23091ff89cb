import pytest

from fleet_worker.node.prompt_cache.troubles import (
    CHANGED_PROMPTS,
    FORGOTTEN_AFTER,
    MOST,
    REQUESTS,
    UNUSED_BEGINNINGS,
    Troubles,
)
from fleet_worker.protocol.status import CacheTrouble
from tests.clock import Clock


@pytest.fixture
def clock():
    return Clock(5.0)


@pytest.fixture
def troubles(clock):
    return Troubles(clock)


def kinds(troubles):
    return [each.kind for each in troubles.found()]


def test_a_node_without_troubles_has_none(troubles):
    for number in range(100):
        troubles.began("m", f"r{number}", changes=False)
        troubles.repeated("m", f"r{number}", cached=5)
        troubles.answered("m", f"r{number}", came_too_late=False)
    assert troubles.found() == ()


def test_prompts_that_change_are_told_with_the_last_one(troubles):
    troubles.began("m", "r-0", changes=None)
    troubles.began("m", "r-1", changes=False)
    for number in range(2, 2 + CHANGED_PROMPTS):
        assert troubles.found() == ()
        troubles.began("m", f"r-{number}", changes=True)
    troubles.began("other", "r-9", changes=False)
    assert troubles.found() == (
        CacheTrouble(kind="changing", model="m", count=CHANGED_PROMPTS, of=CHANGED_PROMPTS + 2, request_id="r-4"),
    )


def test_a_few_of_many_prompts_that_seem_to_change_are_no_trouble(troubles):
    for number in range(300):
        troubles.began("m", "r", changes=number < 5)
    assert troubles.found() == ()


def test_a_cache_that_never_helps_is_told_until_it_helps_once(troubles):
    for _ in range(UNUSED_BEGINNINGS):
        assert troubles.found() == ()
        troubles.repeated("m", "r", cached=0)
    assert kinds(troubles) == ["unused"]
    troubles.repeated("m", "r", cached=1)
    troubles.repeated("m", "r", cached=0)
    assert troubles.found() == ()


@pytest.mark.parametrize(("late", "of", "told"), [(3, 20, True), (2, 20, False), (19, 19, False), (11, 100, True)])
def test_a_cache_is_too_small_if_many_of_enough_requests_came_too_late(troubles, late, of, told):
    for number in range(of):
        troubles.answered("m", "r", came_too_late=number < late)
    assert kinds(troubles) == (["small"] if told else [])


def test_a_cache_that_is_off_is_not_called_too_small(troubles):
    for _ in range(REQUESTS):
        troubles.repeated("m", "r", cached=0)
        troubles.answered("m", "r", came_too_late=True)
    assert kinds(troubles) == ["unused"]


def test_what_was_long_ago_is_forgotten(troubles, clock):
    for _ in range(CHANGED_PROMPTS):
        troubles.began("m", "r", changes=True)
    clock.now += FORGOTTEN_AFTER
    assert troubles.found() == ()
    troubles.began("m", "r", changes=True)
    assert troubles.found() == ()


def test_a_server_that_was_restarted_begins_anew(troubles):
    for _ in range(REQUESTS):
        troubles.began("m", "r", changes=True)
        troubles.repeated("m", "r", cached=0)
    troubles.forget_cache()
    assert kinds(troubles) == ["changing"]  # that is not the server's


def test_counts_stay_small(troubles):
    for _ in range(3 * MOST):
        troubles.began("m", "r", changes=True)
    (found,) = troubles.found()
    assert MOST / 2 <= found.count == found.of <= MOST
