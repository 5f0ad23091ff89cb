"""Whoever stops waiting stops costing: a stream that is cancelled or left, and all that a killed router had asked for.

FAULTS=full pytest -s tests/faults/test_abandoned.py
"""

import os
import signal
import time

import pytest

from fleet_worker import RequestTimeout, Router, Settings
from fleet_worker.host.child_process import child, python
from fleet_worker.simulator import Fault
from tests.fleets import Fleet, conversation, until

FULL = os.environ.get("FAULTS") == "full"
CANCELLED, KILLED = (100, 10) if FULL else (12, 1)
SLOTS, WAITING = 4, 4
ASKED = 64 if FULL else 12
CANCEL_WITHIN, KILLED_WITHIN = 1.0, 2.0
ENDLESS = 100_000

pytestmark = pytest.mark.timeout(900 if FULL else 120)

ASKING = """
import sys, time
from fleet_worker import RequestTimeout, Router, Settings
url, model, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
router = Router(Settings(broker_url=url))
streams = []
for number in range(count):
    messages = [{"role": "user", "content": f"a router that is killed, {number}"}]
    streams.append(router.stream_chat(model, messages, max_tokens=100_000, timeout=600).__enter__())
time.sleep(600)
"""


@pytest.fixture(scope="module")
def fleet(broker):
    """Two nodes whose answers never end: only somebody who stops them does."""
    flavours = {"one": "mlx_lm", "two": "vllm_batched"}
    with Fleet(broker.url, flavours, slots=SLOTS, natural=ENDLESS, token_interval=0.05) as fleet:
        yield fleet


@pytest.fixture
def router(broker, fleet):
    with Router(Settings(broker_url=broker.url, router={"lost_after": 2.0})) as router:
        fleet.wait_until_ready(router, fleet.servers)
        until(lambda: idle(fleet), 5)
        yield router


def idle(fleet):
    return fleet.busy() == []


def begun(fleet):
    """How many requests the servers have seen."""
    return sum(len(server.requests()) for server in fleet.servers.values())


def generated(fleet):
    return sum(server.counters()["generated"] for server in fleet.servers.values())


def ask(router, fleet, of):
    return router.stream_chat(fleet.model, conversation(of), max_tokens=4096, temperature=0, timeout=600)


WAYS = {
    "cancelled": lambda stream: stream.cancel(),
    "left": lambda stream: stream.__exit__(None, None, None),
}


@pytest.mark.parametrize("leave", WAYS.values(), ids=WAYS)
def test_what_nobody_reads_any_more_is_not_generated_a_second_later(fleet, router, broker, leave):
    """As many at a time as there are slots, and some more, which never begin."""
    took = []
    for turn in range(-(-CANCELLED // (2 * SLOTS))):
        before = begun(fleet)
        streams = [ask(router, fleet, f"{turn} {number}").__enter__() for number in range(2 * SLOTS + WAITING)]
        until(lambda: sum(server.running for server in fleet.servers.values()) == 2 * SLOTS)
        for stream in reversed(streams):  # those that wait first: else a slot would be free for them
            leave(stream)
        took.append(until(lambda: idle(fleet), 5))
        said = generated(fleet)
        time.sleep(0.3)
        assert (generated(fleet), begun(fleet) - before) == (said, 2 * SLOTS)
    print(f"{len(took) * 2 * SLOTS} streams, {broker.name}: their servers stopped within {max(took):.2f} s")
    assert max(took) <= CANCEL_WITHIN


def test_a_request_that_is_cancelled_before_its_first_token_frees_its_slot(fleet, router):
    """The server is still silent: it would be for a minute."""
    silent = Fault("slow_headers", seconds=60, times=None, contains="something difficult")
    for server in fleet.servers.values():
        server.fail(silent)
    before = begun(fleet)
    streams = [ask(router, fleet, f"something difficult, {number}").__enter__() for number in range(2 * SLOTS)]
    until(lambda: begun(fleet) == before + 2 * SLOTS)
    for stream in streams:
        stream.cancel()
    started = time.monotonic()
    router.chat(fleet.model, conversation("something easy"), max_tokens=1, timeout=30)
    assert time.monotonic() - started <= CANCEL_WITHIN + 0.2


@pytest.mark.rest
def test_a_deadline_frees_the_slot(fleet, router):
    before = begun(fleet)
    with pytest.raises(RequestTimeout):
        list(router.stream_chat(fleet.model, conversation("in a hurry"), max_tokens=4096, timeout=1.0))
    until(lambda: idle(fleet), CANCEL_WITHIN)
    assert begun(fleet) == before + 1


@pytest.mark.rest
def test_what_a_killed_router_had_asked_for_stops_and_what_it_had_queued_never_starts(fleet, router, broker):
    took = []
    for turn in range(KILLED):
        before = begun(fleet)
        command = python("-c", ASKING, broker.url, fleet.model, str(ASKED))
        with child(f"router {turn}", command) as asking:
            until(lambda: sum(server.running for server in fleet.servers.values()) == 2 * SLOTS, 20)
            time.sleep(1.0)  # the rest is in the lane by now
            asking.signal(9)
            took.append(until(lambda: idle(fleet), 30))
        assert begun(fleet) == before + 2 * SLOTS
        # What is queued behind the dead is served.
        router.chat(fleet.model, conversation(f"after {turn}"), max_tokens=1, timeout=30)
        assert begun(fleet) == before + 2 * SLOTS + 1
    print(f"{KILLED} routers killed, {broker.name}: their servers stopped within {max(took):.1f} s")
    assert max(took) <= KILLED_WITHIN


@pytest.mark.rest
def test_a_router_that_is_frozen_for_three_seconds_loses_no_request(fleet, broker):
    """It goes on where it was: no attempt is stopped, so none is begun anew."""
    before = begun(fleet)
    command = python("-c", ASKING, broker.url, fleet.model, str(2 * SLOTS))
    with child("router", command) as asking:
        until(lambda: sum(server.running for server in fleet.servers.values()) == 2 * SLOTS, 20)
        asking.signal(signal.SIGSTOP)
        time.sleep(3.0)
        asking.signal(signal.SIGCONT)
        time.sleep(2.0)
        assert sum(server.running for server in fleet.servers.values()) == 2 * SLOTS
        assert begun(fleet) == before + 2 * SLOTS
        asking.signal(signal.SIGKILL)
        until(lambda: idle(fleet), KILLED_WITHIN)


@pytest.mark.rest
def test_a_router_that_loses_its_connections_loses_no_request(fleet, broker):
    before, others = begun(fleet), broker.connections()
    command = python("-c", ASKING, broker.url, fleet.model, str(2 * SLOTS))
    with child("router", command) as asking:
        until(lambda: sum(server.running for server in fleet.servers.values()) == 2 * SLOTS, 20)
        for _ in range(3):
            broker.drop_connections(broker.connections() - others)
            time.sleep(1.2)
        assert sum(server.running for server in fleet.servers.values()) == 2 * SLOTS
        assert begun(fleet) == before + 2 * SLOTS
        asking.signal(signal.SIGKILL)
        until(lambda: idle(fleet), KILLED_WITHIN)
