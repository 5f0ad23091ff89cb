"""Wrong clocks: of a mini, of a router, and one that jumps. No request may suffer, and status names the clock."""

import json
import subprocess
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import python
from fleet_worker.testing import SimulatedMLX, running_host
from tests.faketime import wrong_clock
from tests.flow.conftest import work
from tests.mlx_clients import until

HELLO = [{"role": "user", "content": "Hello"}]
SKEWS = {"-1h": -3600, "-90s": -90, "+90s": 90, "+1h": 3600}


@contextmanager
def minis(broker_url, **clocks):
    """One host each, whose clock is as wrong as said; yields the model that all serve, and the servers."""
    model = f"clock-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        servers = {}
        for host, env in clocks.items():
            server = servers[host] = stack.enter_context(SimulatedMLX(models=[model], token_interval=0.005, tokens=40))
            instance = {"base_url": server.base_url, "models": {model: {}}, "limits": {"concurrency": 2}}
            stack.enter_context(running_host(broker_url, {"one": instance}, host=f"{model}-{host}", env=env))
        yield model, servers


def asked(router, model, times):
    """Sixty callers, of whom most have to wait; return their answers."""

    def ask(number):
        with router.stream_chat(model, HELLO, max_tokens=10, timeout=60) as stream:
            assert len([delta for delta in stream if delta.content]) >= 1
            return stream.response

    with ThreadPoolExecutor(20) as pool:
        return list(pool.map(ask, range(times)))


def status(broker_url, env=None):
    command = python("-m", "fleet_worker", "status")
    environment = {"PATH": "/usr/bin:/bin", "FLEET_BROKER_URL": broker_url, **(env or {})}
    said = {}
    for form in ("", "--json"):
        ended = subprocess.run([*command, *form.split()], env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        said[form] = ended.stdout
    return said[""], json.loads(said["--json"])


@pytest.mark.rest
@pytest.mark.parametrize("skew", SKEWS)
def test_a_mini_whose_clock_is_wrong_answers_like_the_others_and_is_named(broker, skew):
    with (
        minis(broker.url, right={}, wrong=wrong_clock(skew)) as (model, _),
        Router(Settings(broker_url=broker.url)) as router,
    ):
        router.registry.wait_for(model, 10)
        begun = time.monotonic()
        answers = asked(router, model, 60)
        took = time.monotonic() - begun
        assert len(answers) == 60
        assert Counter(len(answer.attempts) for answer in answers) == {1: 60}
        assert {answer.node.rpartition("-")[2] for answer in answers} == {"right", "wrong"}
        assert all(0 <= answer.timings.queue_wait <= took for answer in answers)
        assert all(0 <= answer.timings.ttft <= answer.timings.duration <= took for answer in answers)
        table, said = status(broker.url)
        assert (
            f"the clock of {model}-wrong is {abs(SKEWS[skew])} s {'ahead of' if SKEWS[skew] > 0 else 'behind'}" in table
        )
        assert "clock of this host" not in table
        ahead = {each["host"].rpartition("-")[2]: each["clock_ahead"] for each in said["instances"]}
        assert ahead == {"right": 0.0, "wrong": pytest.approx(SKEWS[skew], abs=2)}


ROUTER = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from fleet_worker import Router, Settings
from fleet_worker.ops.snapshot import SnapshotCollector
url, model = sys.argv[1:]
with Router(Settings(broker_url=url)) as router:
    router.registry.wait_for(model, 10)
    def ask(number):
        answer = router.chat(model, [{"role": "user", "content": "Hello"}], max_tokens=5, timeout=60)
        return [len(answer.attempts), answer.timings.queue_wait, answer.timings.ttft]
    begun = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(60)))
    print(json.dumps({"answers": answers, "took": time.monotonic() - begun}))
"""


@pytest.mark.rest
@pytest.mark.parametrize("skew", SKEWS)
def test_a_router_whose_clock_is_wrong_gets_every_answer(broker, skew):
    with minis(broker.url, one={}, two={}) as (model, _):
        environment = {"PATH": "/usr/bin:/bin", **wrong_clock(skew)}
        command = python("-c", ROUTER, broker.url, model)
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
        assert ended.returncode == 0, ended.stderr
        said = json.loads(ended.stdout)
        assert [attempts for attempts, *_ in said["answers"]] == [1] * 60
        assert all(0 <= wait <= said["took"] and 0 <= ttft <= said["took"] for _, wait, ttft in said["answers"])
        table, _ = status(broker.url, environment)
        way = "ahead of" if SKEWS[skew] > 0 else "behind"
        assert f"the clock of this host is {abs(SKEWS[skew])} s {way} the others" in table


@pytest.mark.rest
@pytest.mark.parametrize("step", ["+3600", "-3600"])
def test_a_clock_that_jumps_under_running_and_waiting_requests_costs_none(broker, step, tmp_path):
    """The clock of the only mini, registry node included, which goes on to report."""
    shown = tmp_path / "clock"
    shown.write_text("+0")
    often = {**wrong_clock(shown), "FLEET_REGISTRY__READINESS_INTERVAL": "0.5"}
    with (
        minis(broker.url, one=often) as (model, servers),
        Router(Settings(broker_url=broker.url)) as router,
        ThreadPoolExecutor(12) as pool,
    ):
        router.registry.wait_for(model, 10)
        with servers["one"].held(at_token=3):
            asked = [pool.submit(router.chat, model, HELLO, max_tokens=10, timeout=60) for _ in range(12)]
            until(lambda: servers["one"].counters["running"] == 2)
            shown.write_text(step)
            heard = router.registry.instances()[0].heard_at
            until(lambda: router.registry.instances()[0].heard_at > heard + 2, 20)
            servers["one"].release()
        answers = [each.result() for each in asked]
        assert [len(answer.attempts) for answer in answers] == [1] * 12
        assert all(0 <= answer.timings.queue_wait < 60 and 0 <= answer.timings.ttft < 60 for answer in answers)
        assert len(work(servers["one"])) == 12
