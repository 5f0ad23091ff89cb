"""MLX servers that are frozen (SIGSTOP), or only slow, under streams."""

import time

import pytest

from fleet_worker import Router, Settings
from tests.brokers import any_broker
from tests.fleets import Crowd, Fleet, conversation, read, report, until

GIVEN_AWAY_WITHIN = 8.0
"""Seconds, from the last token of the frozen server to the first one of another."""
LONG = GIVEN_AWAY_WITHIN + 1
"""Seconds in which a server reads a prompt: a frozen one is given less."""

pytestmark = [
    pytest.mark.rest,
    pytest.mark.timeout(120),
    any_broker,
]


@pytest.fixture
def router(broker):
    with Router(Settings(broker_url=broker.url)) as router:
        yield router


@pytest.mark.parametrize("flavour", ["mlx_lm", "openai"])  # all kinds: unit/node/test_frozen_servers.py
def test_the_streams_of_a_frozen_server_go_on_elsewhere(broker, router, flavour):
    flavours = {"one": flavour, "two": flavour}
    with Fleet(broker.url, flavours, slots=8, natural=400, token_interval=0.02) as fleet:
        fleet.wait_until_ready(router, flavours)
        with Crowd(router, fleet, at_once=8, streams=8) as crowd:
            crowd.wait_for_pieces(8 * 20)
            victim = fleet.busy()[0]
            working = fleet.servers[victim].running
            fleet.servers[victim].freeze()
        figures = report(f"{flavour} frozen under {working} streams, {broker.name}", crowd.told)
        assert all(one.identical for one in crowd.told), figures
        interrupted = [one for one in crowd.told if one.interrupted]
        assert len(interrupted) == working >= 1, figures
        assert max(one.gap for one in interrupted) < GIVEN_AWAY_WITHIN, figures
        fleet.servers[victim].thaw()
        until(lambda: fleet.ready(router) == set(flavours), 20)


def test_a_long_prompt_is_read_in_peace(broker, router):
    """Nothing comes for longer than a frozen server is given."""
    flavours = {"one": "mlx_lm"}
    with Fleet(broker.url, flavours, natural=20, token_interval=0.02, ttft=LONG) as fleet:
        started = time.monotonic()
        told = read(router, fleet, "long", False, lambda: None)
        assert told.identical
        assert len(told.attempts) == 1
        assert time.monotonic() - started > LONG


def test_a_prompt_that_a_frozen_server_reads_is_read_elsewhere(broker, router):
    flavours = {"one": "mlx_lm", "two": "mlx_lm"}
    with Fleet(broker.url, flavours, natural=20, token_interval=0.02, ttft=1) as fleet:
        fleet.wait_until_ready(router, flavours)
        with Crowd(router, fleet, at_once=1, streams=1) as crowd:
            until(lambda: fleet.busy())
            victim = fleet.busy()[0]
            fleet.servers[victim].freeze()
        (told,) = crowd.told
        assert told.identical
        assert told.attempts[0].node == fleet.node_name(victim)
        assert told.gap < GIVEN_AWAY_WITHIN + 1
        assert router.chat(fleet.model, conversation("more"), max_tokens=2, timeout=20).node != fleet.node_name(victim)
        fleet.servers[victim].thaw()


def test_the_only_server_goes_on_itself_when_it_thaws(broker, router):
    with Fleet(broker.url, {"one": "mlx_lm"}, natural=100, token_interval=0.05) as fleet:
        fleet.wait_until_ready(router, ["one"])
        for _ in range(2):
            with Crowd(router, fleet, at_once=2, streams=2) as crowd:
                crowd.wait_for_pieces(20)
                fleet.servers["one"].freeze()
                time.sleep(GIVEN_AWAY_WITHIN)
                fleet.servers["one"].thaw()
            figures = report(f"the only server frozen, {broker.name}", crowd.told)
            assert all(one.identical and len(one.attempts) == 2 for one in crowd.told), figures
