"""Parts of a fleet are killed, frozen, restarted and cut off under streams, and nobody who reads one notices more than
a pause.

    FAULTS=full pytest -s tests/faults/test_failover.py

is the size of the figures in tests/README.md. FAULTS_SEED chooses what is drawn.
"""

import os
import random
import time

import pytest

from fleet_worker import ConnectionFailure, InstanceUnavailable, PoisonSuspected, Router, Settings
from fleet_worker.demo.models import chat_model, platform_problem
from fleet_worker.host.child_process import python
from fleet_worker.simulator import Fault
from fleet_worker.testing import embedded_broker, running_host
from tests.brokers import any_broker, free_port, missing
from tests.fleets import CANARIES, Crowd, Fleet, Load, Part, conversation, read, report, until
from tests.flow.test_readiness import HELLO

FULL = os.environ.get("FAULTS") == "full"
SEED = int(os.environ.get("FAULTS_SEED", "7"))
AT_ONCE, ROUNDS = (40, 5) if FULL else (12, 2)
RESTARTS, DROPS, STREAMS = (10, 50, 32) if FULL else (2, 8, 12)
FROZEN = 30.0 if FULL else 3.5
RATE = 100 if FULL else 30
LOST_AFTER = 2.0
NATURAL = 100
"""Tokens of a reply."""
INTERVAL = 0.04
"""Seconds between two tokens."""
FLAVOURS = {"one": "mlx_lm", "two": "vllm_batched", "three": "mlx_openai"}

pytestmark = pytest.mark.timeout(1800 if FULL else 150)


@pytest.fixture(scope="module")
def made(broker):
    """Three nodes, two of which could carry all that a test asks for at a time."""
    env = {"FLEET_WORKER__DRAIN_GRACE": "1"}
    with Fleet(
        broker.url, FLAVOURS, slots=AT_ONCE * 2 // 3, natural=NATURAL, env=env, token_interval=INTERVAL
    ) as fleet:
        yield fleet


@pytest.fixture
def router(broker):
    patient = {"lost_after": LOST_AFTER, "accept_timeout": 2.0, "connect_timeout": 60.0}
    with Router(Settings(broker_url=broker.url, router=patient)) as router:
        yield router


@pytest.fixture
def fleet(made, router):
    made.mend(router)
    return made


@pytest.fixture
def draw(request):
    return random.Random(f"{SEED} {request.node.name}")


def rounds(fleet, router, draw, strike):
    """Strike a busy node at a random token, in each of some rounds; return what the streams of all rounds got."""
    told = []
    for _ in range(ROUNDS):
        fleet.mend(router)
        with Crowd(router, fleet, at_once=AT_ONCE, streams=AT_ONCE) as crowd:
            crowd.wait_for_pieces(draw.randrange(1, AT_ONCE * fleet.natural * 3 // 5))
            strike(draw.choice(fleet.busy()[:2]))
        told += crowd.told
    return told


def test_a_node_killed_at_a_random_token_costs_no_stream_anything_but_a_pause(fleet, router, broker, draw):
    told = rounds(fleet, router, draw, lambda name: fleet.nodes[name].kill())
    figures = report(f"node killed {ROUNDS} times, {broker.name}", told)
    assert all(one.identical for one in told), figures
    assert median_gap(told) <= LOST_AFTER + 1.0, figures


@pytest.mark.rest
@any_broker
def test_a_server_killed_at_a_random_token_costs_no_stream_anything_but_a_pause(fleet, router, broker, draw):
    told = rounds(fleet, router, draw, lambda name: fleet.servers[name].kill())
    figures = report(f"MLX server killed {ROUNDS} times, {broker.name}", told)
    assert all(one.identical for one in told), figures
    assert median_gap(told) <= 1.5, figures


def last_words(fleet):
    """Of the nodes that have ended."""
    return [node.output[-4_000:] for node in (*fleet.nodes.values(), fleet.registry) if node.ended]


def median_gap(told):
    """Without the time that the other server takes to generate again what was delivered, if it has to.

    Below zero where most of them did not have to.
    """
    gaps = sorted(one.gap - seconds_of(one) for one in told if one.interrupted)
    assert gaps, "nothing was interrupted"
    return gaps[len(gaps) // 2]


def seconds_of(told):
    delivered = max(attempt.delivered for attempt in told.attempts if attempt.error)
    return delivered / len(told.expected) * NATURAL * INTERVAL


@pytest.mark.rest
@any_broker
def test_each_interruption_is_told_where_it_was(fleet, router):
    """The caller sees a marker in the stream, and in the end which nodes it was that worked for him."""
    with Crowd(router, fleet, at_once=6, streams=6) as crowd:
        crowd.wait_for_pieces(60)
        victim = fleet.busy()[0]
        fleet.servers[victim].kill()
    interrupted = [one for one in crowd.told if one.interrupted]
    assert interrupted
    for one in interrupted:
        first, second = one.attempts
        assert (first.node, first.attempt, second.attempt) == (fleet.node_name(victim), 1, 2)
        assert (first.error is None, second.error, second.node == first.node) == (False, None, False)
        assert one.resumed == (1 if first.delivered else 0)
        assert second.delivered == len(one.text) > first.delivered
    assert all(len(one.attempts) == 1 and one.resumed == 0 for one in crowd.told if not one.interrupted)


@any_broker
def test_a_caller_who_wants_no_resumed_answer_gets_an_error_and_what_came_before(fleet, router):
    def strike():
        for name in fleet.busy():
            fleet.servers[name].kill()

    told = read(router, fleet, "one answer from one server", False, strike, on_interrupt="fail")
    assert isinstance(told.error, ConnectionFailure | InstanceUnavailable)
    assert len(told.error.metadata["attempts"]) == 1
    assert told.text
    assert told.expected.startswith(told.text)


@pytest.mark.rest
def test_a_frozen_node_is_replaced_and_says_nothing_more_after_it_thaws(broker, router, draw):
    """Its streams go on elsewhere; it thaws while they still run, and then its server stops working for nobody."""
    natural = round((FROZEN + 4.0) / 0.05)
    flavours = {"one": "mlx_lm", "two": "vllm_batched"}
    with Fleet(broker.url, flavours, slots=8, natural=natural, token_interval=0.05) as fleet:
        fleet.wait_until_ready(router, flavours)
        with Crowd(router, fleet, at_once=8, streams=8) as crowd:
            crowd.wait_for_pieces(draw.randrange(480, 800))  # so late that its frames count further than the next one's
            victim = fleet.busy()[0]
            working = fleet.servers[victim].running
            fleet.nodes[victim].freeze()
            time.sleep(FROZEN)
            fleet.nodes[victim].thaw()
            assert len(crowd.told) < 8
        figures = report(f"node frozen {FROZEN:g} s, {broker.name}", crowd.told)
        assert all(one.identical for one in crowd.told), figures
        assert sorted(len(one.attempts) for one in crowd.told) == [1] * (8 - working) + [2] * working, figures
        fleet.wait_until_ready(router, [victim])
        until(lambda: fleet.busy() == [], 5)


@pytest.mark.rest
def test_a_broker_that_is_restarted_again_and_again_costs_no_token_and_no_node(fleet, router, broker, draw):
    with Crowd(router, fleet, at_once=STREAMS) as crowd:
        for _ in range(RESTARTS):
            crowd.wait_for_pieces(draw.randrange(50, 400))
            broker.stop()
            time.sleep(draw.uniform(0.0, 1.0))
            broker.start()
        crowd.wait_for_pieces(50)
    figures = report(f"broker restarted {RESTARTS} times, {broker.name}", crowd.told)
    assert all(one.identical and not one.resumed for one in crowd.told), figures
    assert len(crowd.told) >= STREAMS
    assert last_words(fleet) == []


@pytest.mark.rest
def test_connections_that_are_dropped_cost_no_token_and_no_node(fleet, router, broker, draw):
    with Crowd(router, fleet, at_once=STREAMS) as crowd:
        for _ in range(DROPS):
            time.sleep(draw.uniform(0.0, 1.0))
            crowd.wait_for_pieces(1)
            broker.drop_connections()
        crowd.wait_for_pieces(50)
    figures = report(f"connections dropped {DROPS} times, {broker.name}", crowd.told)
    assert all(one.identical and not one.resumed for one in crowd.told), figures
    assert len(crowd.told) >= STREAMS
    assert last_words(fleet) == []


@pytest.mark.rest
def test_a_rolling_restart_of_all_nodes_under_load_loses_nothing(fleet, router, broker):
    """Streams that take longer than a node waits for them go on elsewhere."""
    with Load(router, fleet, RATE) as load, Crowd(router, fleet, at_once=3) as crowd:
        for name, node in fleet.nodes.items():
            until(lambda name=name: fleet.servers[name].running, 10)
            assert node.stop() == 0, node.output
            node.start()
            node.wait_until_ready()
            until(lambda name=name: fleet.servers[name].running, 20)
    print(f"rolling restart under {RATE} requests/s, {broker.name}: {load.asked} requests, {len(load.failed)} failed")
    figures = report(f"streams meanwhile, {broker.name}", crowd.told)
    assert load.failed == []
    assert load.asked > 3 * RATE
    assert all(one.identical for one in crowd.told), figures


@pytest.mark.rest
@any_broker
@pytest.mark.parametrize("kind", ["death", "thread_death"])
def test_of_five_instances_a_poison_request_kills_at_most_two(broker, router, kind):
    """Whatever `max_attempts` says; and a request that is like it in all but the poison is answered afterwards."""
    names = ("one", "two", "three", "four", "five")
    marker = f"poison {kind}"
    patient = {"max_attempts": 10, "lost_after": LOST_AFTER}
    with (
        Fleet(broker.url, dict.fromkeys(names, "mlx_lm"), slots=2, token_interval=0.01) as fleet,
        Router(Settings(broker_url=broker.url, router=patient)) as router,
    ):
        fleet.wait_until_ready(router, names)
        for server in fleet.servers.values():
            server.fail(Fault(kind, at_token=5, times=None, contains=marker))
        with pytest.raises(PoisonSuspected):
            list(router.stream_chat(fleet.model, conversation(marker), max_tokens=20, temperature=0, timeout=60))
        print(f"poison, {kind}, {broker.name}: {len(fallen(fleet))} of 5 died")
        assert 1 <= len(fallen(fleet)) <= 2
        until(lambda: fleet.ready(router) == set(names) - fallen(fleet), 10)
        sound = router.chat(fleet.model, HELLO, max_tokens=5, temperature=0, timeout=30)
        assert sound.content == fleet.expected(HELLO, 5)


def fallen(fleet):
    return {name for name, server in fleet.servers.items() if not server.healthy}


@pytest.mark.rest
def test_a_real_server_killed_in_mid_answer_leaves_an_answer_that_looks_uninterrupted():
    if problem := platform_problem():
        missing(problem)
    question = [{"role": "user", "content": "Write one sentence about the sea, and one about the wind."}]
    options = {"max_tokens": 48, "temperature": 0.0, "timeout": 120}
    servers = {name: RealServer(name) for name in ("one", "two")}
    models = {"smollm2": {"backend": "default_model"}}
    instances = {name: {"base_url": server.base_url, "models": models} for name, server in servers.items()}
    with (
        embedded_broker() as broker_url,
        servers["one"],
        servers["two"],
        running_host(broker_url, instances, env=CANARIES, ready_within=90),
        Router(Settings(broker_url=broker_url, router={"lost_after": LOST_AFTER})) as router,
    ):
        until(lambda: len(router.registry.offerings("smollm2", ready=True)) == 2, 90)
        whole = router.chat("smollm2", question, **options)
        pieces = []
        with router.stream_chat("smollm2", question, **options) as stream:
            for delta in stream:
                pieces.append(delta.content or "")
                if len(pieces) == 16:
                    servers[stream._call._request._attempts.node.partition("@")[0]].kill()
        assert "".join(pieces) == stream.response.content == whole.content
        assert [attempt.error is None for attempt in stream.response.attempts] == [False, True]


class RealServer(Part):
    """A real `mlx_lm.server` with the model of the demo."""

    def __init__(self, name):
        port, folder = free_port(), str(chat_model(lambda *_: None))
        self.base_url = f"http://127.0.0.1:{port}"
        command = python("-m", "mlx_lm", "server", "--model", folder, "--host", "127.0.0.1", "--port", str(port))
        super().__init__(name, command, {"HF_HUB_OFFLINE": "1"}, says="Starting httpd")
