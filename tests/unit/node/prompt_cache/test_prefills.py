import pytest

from fleet_worker.node.prompt_cache.prefills import Prefills
from tests.clock import Clock


@pytest.fixture
def clock():
    return Clock(100.0)


def test_what_is_left_gets_less_as_the_server_reads(clock):
    prefills = Prefills(clock)
    assert prefills.left == 0
    prefills.began("a", 10.0)
    clock.now += 4
    assert prefills.left == pytest.approx(6)
    clock.now += 100
    assert prefills.left == 0


def test_two_prompts_take_the_time_of_both(clock):
    prefills = Prefills(clock)
    prefills.began("a", 10.0)
    clock.now += 2
    prefills.began("b", 4.0)
    assert prefills.left == pytest.approx(12)
    clock.now += 4
    assert prefills.left == pytest.approx(8)


def test_what_has_its_first_token_takes_nothing_more(clock):
    prefills = Prefills(clock)
    prefills.began("a", 10.0)
    prefills.began("b", 4.0)
    prefills.ended("a")
    assert prefills.left == pytest.approx(4)
    prefills.ended("a")
    prefills.ended("b")
    assert prefills.left == 0


def test_a_prompt_that_takes_longer_than_expected_is_expected_to_end_soon(clock):
    prefills = Prefills(clock)
    prefills.began("a", 1.0)
    prefills.began("b", 10.0)
    clock.now += 4
    assert prefills.left == pytest.approx(8)
    clock.now += 4
    assert prefills.left == pytest.approx(4)
