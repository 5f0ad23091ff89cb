"""Wrong clocks: of minis, of a router, and one that jumps. No request may suffer, and status names the clock."""

import json
import re
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import python
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import any_broker
from tests.faketime import wrong_clock
from tests.flow.conftest import work
from tests.mlx_clients import until

pytestmark = pytest.mark.rest
HELLO = [{"role": "user", "content": "Hello"}]
SKEWS = {"-1h": -3600, "-90s": -90, "+90s": 90, "+1h": 3600}
ROOT = Path(__file__).parents[2]


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


@pytest.fixture(scope="module")
def model(broker):
    """Served by two minis whose clocks are right."""
    with minis(broker.url, one={}, two={}) as (model, _):
        yield model


def meet(router, model, count):
    """Have each of so many nodes learn what the clock of this router shows.

    Until then a node asks about each request that seems to have expired. A router that is too busy to answer within two
    seconds has to send it again, at no cost.
    """
    until(lambda: len(router.registry.offerings(model, ready=True)) == count, 10)
    for offered in router.registry.offerings(model):
        answer = router.chat(model, HELLO, max_tokens=1, timeout=60, node=offered.instance.node)
        assert {attempt.error for attempt in answer.attempts} <= {None, "expired"}


def ask(router, model, times):
    """Twenty callers, of whom most have to wait; return their answers, each of one attempt and with possible times."""

    def ask_once(number):
        with router.stream_chat(model, HELLO, max_tokens=10, timeout=60) as stream:
            assert len([delta for delta in stream if delta.content]) >= 1
            return stream.response

    begun = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask_once, range(times)))
    took = time.monotonic() - begun
    assert [[attempt.error for attempt in answer.attempts] for answer in answers] == [[None]] * times
    assert all(0 <= answer.timings.queue_wait <= took for answer in answers)
    assert all(0 <= answer.timings.ttft <= answer.timings.duration <= took for answer in answers)
    return answers


def status(broker_url, form="", env=None):
    command = python("-m", "fleet_worker", "status", *form.split())
    environment = {"PATH": "/usr/bin:/bin", "FLEET_BROKER_URL": broker_url, **(env or {})}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def named(table):
    """By host, by how many seconds status calls its clock ahead."""
    said = re.findall(r"the clock of (\S+|this host) is (\d+) s (ahead of|behind) the others", table)
    return {host: int(seconds) if way == "ahead of" else -int(seconds) for host, seconds, way in said}


def test_minis_whose_clocks_are_wrong_answer_like_the_others_and_are_named(broker):
    skews = dict(zip("abcd", SKEWS, strict=True))
    clocks = {host: wrong_clock(skew) for host, skew in skews.items()}
    with minis(broker.url, right={}, **clocks) as (model, _), Router(Settings(broker_url=broker.url)) as router:
        meet(router, model, 1 + len(clocks))
        answers = ask(router, model, 100)
        assert {answer.node for answer in answers} == {f"one@{model}-{host}" for host in ("right", *clocks)}
        wrong = {f"{model}-{host}": pytest.approx(SKEWS[skew], abs=2) for host, skew in skews.items()}
        assert named(status(broker.url)) == wrong
        instances = json.loads(status(broker.url, "--json"))["instances"]
        ahead = {each["host"]: each["clock_ahead"] for each in instances if each["host"].startswith(model)}
        assert ahead == {**wrong, f"{model}-right": 0.0}


@any_broker
@pytest.mark.parametrize("skew", SKEWS)
def test_a_router_whose_clock_is_wrong_gets_every_answer(broker, model, skew):
    environment = {"PATH": "/usr/bin:/bin", **wrong_clock(skew)}
    command = python("-m", "tests.flow.test_clocks", broker.url, model)
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert ended.returncode == 0, ended.stderr
    assert named(status(broker.url, env=environment))["this host"] == pytest.approx(SKEWS[skew], abs=2)


def test_a_clock_that_jumps_under_running_and_waiting_requests_costs_none(broker, tmp_path):
    """The clock of the only mini, registry node included, which goes on to report: an hour ahead, then behind."""
    shown = tmp_path / "clock"
    shown.write_text("+0")
    often = {**wrong_clock(shown), "FLEET_REGISTRY__READINESS_INTERVAL": "0.5"}
    with (
        minis(broker.url, one=often) as (model, servers),
        Router(Settings(broker_url=broker.url)) as router,
        ThreadPoolExecutor(12) as pool,
    ):
        server = servers["one"]
        router.registry.wait_for(model, 10)
        for step in ("+3600", "-3600"):
            with server.held(at_token=3):
                asked = [pool.submit(router.chat, model, HELLO, max_tokens=10, timeout=60) for _ in range(12)]
                until(lambda: server.counters["running"] == 2)
                shown.write_text(step)
                heard = router.registry.instances()[0].heard_at
                until(lambda heard=heard: router.registry.instances()[0].heard_at > heard + 2, 20)
                server.release()
            answers = [each.result() for each in asked]
            assert [len(answer.attempts) for answer in answers] == [1] * 12
            assert all(0 <= answer.timings.queue_wait < 60 and 0 <= answer.timings.ttft < 60 for answer in answers)
        assert len(work(server)) == 24


def main(broker_url, model):
    """A router of a process of its own, whose clock is wrong."""
    with Router(Settings(broker_url=broker_url)) as router:
        meet(router, model, 2)
        ask(router, model, 60)


if __name__ == "__main__":
    main(*sys.argv[1:])
