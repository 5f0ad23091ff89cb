"""Conversations through several routers meet the prompt caches of their servers."""

import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet_worker import Router, Settings
from tests.benchmarks.conversations import DIGESTS_WITHIN, PREFILL_RATE, later, minis, routers, talk, words
from tests.brokers import any_broker


@pytest.fixture(scope="module")
def fleet(broker):
    with minis(broker.url, 2, slots=2) as fleet:
        yield fleet


@pytest.fixture
def warm(fleet):
    with routers(fleet, 2, settle=0.0) as made:
        yield made


def test_conversations_find_their_servers_again_through_any_router(fleet, warm):
    turns = talk(fleet, warm, 3, 2, 1.2)
    assert [turn.response.cache for turn in later(turns)] == ["hit"] * 3
    assert min(turn.cached_share for turn in later(turns)) > 0.5


@pytest.mark.rest
@any_broker
def test_a_popular_prompt_uses_all_servers(fleet, warm):
    popular = words("popular", 600)

    def ask(number):
        question = [{"role": "system", "content": popular}, {"role": "user", "content": words(number, 5)}]
        return warm[number % 2].chat(fleet.model, question, max_tokens=8, timeout=60).instance

    with ThreadPoolExecutor(8) as pool:
        answered = Counter(pool.map(ask, range(48)))
    assert min(answered["mini-0"], answered["mini-1"]) >= 16


@pytest.mark.rest
@any_broker
def test_the_first_request_of_a_new_router_finds_the_server_of_a_long_prompt(fleet, warm):
    """A program that is started for each question, too, asks where its document is cached."""
    document = {"role": "system", "content": words("document", 1_200)}

    def ask(router, number):
        question = [document, {"role": "user", "content": words(number, 5)}]
        return router.chat(fleet.model, question, max_tokens=8, timeout=60).cache

    ask(warm[0], 0)
    for number in range(1, 4):
        with Router(Settings(broker_url=fleet.broker_url)) as new:
            assert ask(new, number) == "hit"


@pytest.mark.rest
@any_broker
def test_a_session_key_finds_its_server_again_though_the_whole_prompt_has_changed(fleet, warm):
    def ask(router, number):
        question = [{"role": "user", "content": words(number, 600)}]
        return router.chat(fleet.model, question, max_tokens=8, session="one", timeout=60).node

    first = ask(warm[0], 1)
    time.sleep(DIGESTS_WITHIN)
    assert ask(warm[1], 2) == first


@pytest.mark.rest
@pytest.mark.timeout(120)
@any_broker
def test_later_turns_begin_in_half_the_time_that_they_need_without_affinity(broker):
    ttft = {}
    with minis(broker.url, 4, prefill_rate=2 * PREFILL_RATE) as fleet:
        for affinity in (False, True):
            with routers(fleet, 2, affinity=affinity) as made:
                turns = later(talk(fleet, made, 8, 4, 1.5))
                ttft[affinity] = statistics.fmean(turn.ttft for turn in turns)
    assert statistics.fmean(turn.cached_share > 0.5 for turn in turns) >= 0.95
    assert ttft[True] <= ttft[False] / 2
