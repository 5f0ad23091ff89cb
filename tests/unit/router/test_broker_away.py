"""What a router answers while its broker is away: how long it waits, from when, and that it connects again."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fleet_worker import BrokerUnavailable, Router, Settings
from fleet_worker.host.child_process import child
from fleet_worker.router import reply_consumer as reply_consumer_module
from fleet_worker.testing import READY_WITHIN, VALKEY_READY, embedded_broker, valkey_command
from tests.brokers import free_port
from tests.mlx_clients import HELLO, took_less_than, until
from tests.unit.router.test_router import Fleet, accepted, chat, response

SOON = 0.2
"""Seconds that may pass when something is answered at once, on a busy machine."""


def router_at(port, **router):
    return Router(Settings(broker_url=f"redis://127.0.0.1:{port}/0", router=router))


def refused(router, seconds=SOON):
    with took_less_than(seconds), pytest.raises(BrokerUnavailable) as caught:
        router.chat("m", HELLO)
    assert caught.value.retryable
    return caught.value.message


def arefused(router):
    async def ask():
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            await router.achat("m", HELLO)
        return time.monotonic() - began

    assert asyncio.run(ask()) < SOON


def test_a_broker_that_was_never_there_is_waited_for_once_and_found_when_it_comes(tmp_path):
    port = free_port()
    with router_at(port, connect_timeout=0.3) as router:
        assert router.broker_away_for is None
        assert "within 0.3 s" in refused(router, 1.5)
        refused(router)
        for _ in range(3):
            assert "has not answered for" in refused(router)
            arefused(router)
        assert router.broker_away_for >= 0.3
        with child("Valkey", valkey_command(port, Path(tmp_path))) as broker:
            broker.wait_for(VALKEY_READY, READY_WITHIN)
            until(lambda: router.broker_away_for == 0, 5)
            assert asyncio.run(router.connect()).models() == []


def test_a_broker_that_nobody_asks_for_any_more_is_not_tried_for_ever(monkeypatch):
    monkeypatch.setattr(reply_consumer_module, "TRY_FOR", 0.3)
    with router_at(free_port(), connect_timeout=0.2) as router:
        refused(router, 1.5)
        session = router._session
        until(lambda: session.replies.has_given_up, 5)
        assert "within 0.2 s" in refused(router, 1.5), "tried anew"
        assert router._session is not session


def test_requests_of_all_tasks_are_answered_at_once_though_all_threads_wait(monkeypatch):
    with Fleet(connect_timeout=5.0) as fleet:
        fleet.session.replies._away_since = time.monotonic() - 20
        busy = [fleet.router._threads.submit(time.sleep, 1) for _ in range(20)]

        async def ask():
            began = time.monotonic()
            asked = [fleet.router.achat("m", HELLO) for _ in range(20)]
            ends = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(end) for end in ends} == {BrokerUnavailable}
            return time.monotonic() - began

        assert asyncio.run(ask()) < SOON
        assert not all(each.done() for each in busy)


def test_the_time_to_come_back_is_counted_from_when_the_broker_was_missed(monkeypatch):
    patience = []
    with Fleet(connect_timeout=5.0) as fleet:
        fleet.session.submitter.submit = lambda request, lane, patience, **_: patiently(patience)

        def patiently(seconds):
            patience.append(seconds)
            raise BrokerUnavailable("away", retryable=True)

        for away_for in (0.0, 3.0, 5.1):
            fleet.session.replies._away_since = time.monotonic() - away_for if away_for else None
            with pytest.raises(BrokerUnavailable):
                chat(fleet)
    assert patience == [pytest.approx(5.0, abs=0.2), pytest.approx(2.0, abs=0.2)]


def test_an_answer_that_is_known_is_given_though_the_broker_is_away():
    with Fleet(connect_timeout=5.0) as fleet:
        fleet.answers = [[accepted(), response("hi")]]
        chat(fleet, idempotency_key="k")
        fleet.session.replies._away_since = time.monotonic() - 20
        assert chat(fleet, idempotency_key="k").content == "hi"
        assert asyncio.run(fleet.router.achat("m", HELLO, idempotency_key="k")).content == "hi"
        with pytest.raises(BrokerUnavailable):
            chat(fleet, idempotency_key="another")


def test_a_router_connects_for_a_task_without_a_request():
    with embedded_broker() as url:

        async def use():
            async with Router(Settings(broker_url=url)) as router:
                registry = await router.connect()
                assert registry is await router.connect()
                found = router.broker_away_for, registry.offerings()
            with pytest.raises(RuntimeError, match="closed"):
                await router.connect()
            return found

        with took_less_than(5):
            assert asyncio.run(use()) == (0.0, [])


def test_who_connects_at_the_same_time_waits_for_one_connection():
    with embedded_broker() as url, Router(Settings(broker_url=url)) as router, ThreadPoolExecutor(4) as pool:
        registries = [pool.submit(lambda: router.registry) for _ in range(4)]
        assert {each.result() for each in registries} == {router.registry}
