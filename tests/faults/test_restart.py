"""An operator restarts the whole fleet, first its MLX servers, then its nodes, and no request fails: also none that is
longer than the grace of a node, which others continue.

`python -m tests.benchmarks.restart` does the same to more hosts, under more requests.
"""

import re

import pytest

from fleet_worker import Router, Settings
from tests.fleets import Crowd, Load, report
from tests.hosts import Hosts

pytestmark = [pytest.mark.rest, pytest.mark.timeout(150), pytest.mark.parametrize("broker", ["valkey"], indirect=True)]
RATE = 10


@pytest.fixture(scope="module")
def hosts(broker):
    with Hosts(broker.url, 2, natural=200, grace=1.0, token_interval=0.04) as hosts:
        yield hosts


@pytest.fixture
def router(broker, hosts):
    with Router(Settings(broker_url=broker.url)) as router:
        hosts.wait_until_ready(router)
        yield router


# The servers first: a node that has just begun is not restarted yet.
@pytest.mark.parametrize(("options", "what"), [(("--server",), "has a restarted MLX server"), ((), "was restarted")])
def test_no_request_fails_while_the_whole_fleet_restarts(hosts, router, options, what):
    with Load(router, hosts, RATE) as load, Crowd(router, hosts, at_once=4) as crowd:
        crowd.wait_for_pieces(20)
        done = hosts.run("restart", "--all", *options)
    assert (done.returncode, done.stderr) == (0, "")
    restarted = [line for line in done.stdout.splitlines() if "was restarted just now" not in line]
    for line, name in zip(restarted, hosts.names, strict=True):
        assert re.fullmatch(rf"local@{name} {what}, available after [\d.]+ s", line)
    assert load.failed == []
    assert all(one.identical for one in crowd.told), report("streams meanwhile", crowd.told)
    assert any(one.interrupted for one in crowd.told)
    assert load.asked > 2 * RATE
