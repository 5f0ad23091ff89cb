"""Processes of a host killed and frozen: what its routers see, and what is left behind."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import child, python
from fleet_worker.testing import SimulatedMLX, running_host, running_node
from tests.flow.test_readiness import HELLO, QUICK, statuses, wait_until

WITHIN = 10.0


@pytest.fixture(scope="module")
def servers():
    with SimulatedMLX(models=["m"]) as one, SimulatedMLX(models=["m"]) as two:
        yield {"one": one, "two": two}


@pytest.fixture
def host(broker, servers):
    instances = {name: {"base_url": server.base_url, "models": {"m": {}}} for name, server in servers.items()}
    with running_host(broker.url, instances, env=QUICK) as processes:
        yield processes


@pytest.fixture
def settled(host, router):
    """A host whose nodes are all available to its router."""
    wait_until(lambda: statuses(router) == {"one": "available", "two": "available"})
    return host


def test_a_killed_and_a_frozen_node_are_noticed_and_the_other_goes_on(settled, router):
    one, two = settled["one"], settled["two"]
    one.signal(signal.SIGKILL)
    wait_until(lambda: statuses(router)["one"] == "unavailable", 2)
    assert {router.chat("m", HELLO, max_tokens=1, timeout=20).node for _ in range(5)} == {"two@test"}
    two.signal(signal.SIGSTOP)
    wait_until(lambda: statuses(router)["two"] == "unavailable", WITHIN)
    two.signal(signal.SIGCONT)
    wait_until(lambda: statuses(router)["two"] == "available", WITHIN)


@pytest.mark.rest
def test_a_host_that_ends_says_so_and_one_that_is_killed_is_forgotten(settled, router):
    settled["registry"].signal(signal.SIGTERM)
    wait_until(lambda: set(statuses(router).values()) == {"unavailable"}, WITHIN)
    assert settled["registry"].wait(WITHIN) == 0
    wait_until(lambda: statuses(router) == {}, WITHIN)
    # Without a word of any registry node requests are not refused: their lanes are still served.
    with Router(Settings(broker_url=router._settings.broker_url)) as fresh:
        assert fresh.chat("m", HELLO, max_tokens=1, timeout=20).content


@pytest.mark.rest
def test_a_killed_registry_node_leaves_no_beat_and_its_successor_takes_over(settled, router):
    registry = settled["registry"]
    registry.signal(signal.SIGKILL)
    registry.wait(WITHIN)
    wait_until(lambda: statuses(router) == {}, WITHIN)
    heard = []
    router.registry.subscribe(heard.append)
    time.sleep(2.5)
    assert not heard


def test_events_go_on_after_the_broker_was_restarted(settled, router, broker):
    broker.stop()
    time.sleep(1)
    broker.start()
    restarted = time.monotonic()

    def told_again():
        states = router.registry.instances()
        return len(states) == 2 and all(state.ready and state.heard_at > restarted for state in states)

    wait_until(told_again, 40)
    assert all(process.ended is False for process in settled.values())


@pytest.mark.rest
def test_killed_routers_leave_nothing_behind(settled, broker, router):
    """But what expires: twelve routers die while they wait for a reply, and while they listen to the registry."""
    asking = (
        "import os; from fleet_worker import Router, Settings;"
        f"s = Router(Settings(broker_url='{broker.url}', router={{'reply_expires': 2}}))"
        f".stream_chat('m', {HELLO}, max_tokens=20, timeout=20); next(s); os._exit(0)"
    )
    before = broker.inventory()

    def grown():
        return {key: size for key, size in broker.inventory().items() if size > before.get(key, 0)}

    processes = [child(f"router {number}", python("-c", asking)) for number in range(12)]
    for process in processes:
        with process as one:
            assert one.wait(30) == 0
    wait_until(lambda: not grown(), 20)


@pytest.mark.rest
def test_killed_nodes_leave_their_lanes_with_the_work_in_them_and_nothing_else(settled, servers, broker, router):
    before = broker.inventory()
    for name in servers:
        settled[name].signal(signal.SIGKILL)
        settled[name].wait(WITHIN)
    wait_until(lambda: set(statuses(router).values()) == {"unavailable"}, WITHIN)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(router.chat, "m", HELLO, max_tokens=1, timeout=30)
        with running_node(broker.url, "one@test", base_url=servers["one"].base_url, models={"m": {}}):
            assert waiting.result(30).node == "one@test"
    wait_until(lambda: broker.inventory().keys() <= before.keys(), WITHIN)
