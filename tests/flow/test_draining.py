"""Nodes are taken out of service and back while their processes live, and no request notices."""

import signal
import sys
import time
import uuid

import pytest

from fleet_worker import Router, Settings
from fleet_worker.cli import main
from fleet_worker.errors import InvalidRequest
from fleet_worker.ops.drain import DrainControl
from fleet_worker.protocol.reply import ChatResponse
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import any_broker
from tests.mlx_clients import took_less_than, until

WITHIN = 20.0


@pytest.fixture(scope="module")
def mlx():
    """Of many slots: two instances share it."""
    with SimulatedMLX(
        flavour="vllm_batched", models=[f"m-{uuid.uuid4().hex[:8]}"], token_interval=0.01, tokens=1000
    ) as server:
        yield server


@pytest.fixture(scope="module")
def nodes(broker, mlx):
    instance = {"base_url": mlx.base_url, "models": {mlx.models[0]: {}}, "limits": {"concurrency": 2}}
    with running_host(broker.url, {"one": instance, "two": instance}, host="mini") as processes:
        yield processes


@pytest.fixture
def model(nodes, mlx):
    return mlx.models[0]


@pytest.fixture
def draining(broker, nodes):
    """Afterwards every node takes work again."""
    draining = DrainControl(Settings(broker_url=broker.url))
    yield draining
    until(lambda: len(draining.ask("undrain", ["one@mini", "two@mini"])) == 2, WITHIN)


@pytest.fixture
def run(broker, draining, monkeypatch, capsys):
    """`fleet-worker ...`, in this process: its exit code, and what it prints."""
    monkeypatch.setenv("FLEET_BROKER_URL", broker.url)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fleet-worker", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_two_hundred_requests_while_a_node_is_drained_again_and_again(draining, caller, model):
    """Each is tried once, so that one that a node took and forgot would be missing."""
    requests = []
    for _ in range(5):
        requests += [caller.submit(model, max_tokens=2) for _ in range(20)]
        draining.ask("drain", ["one@mini"])
        requests += [caller.submit(model, max_tokens=2) for _ in range(20)]
        draining.ask("undrain", ["one@mini"])
    assert {type(caller.last(each)) for each in requests} == {ChatResponse}
    assert {caller.node(each) for each in requests} == {"one@mini", "two@mini"}


def test_a_drained_node_finishes_what_it_has_and_takes_no_more_until_it_is_undrained(run, caller, model, mlx):
    with mlx.held(at_token=5):
        running = caller.begin(model, max_tokens=20)
        name = caller.node(running)
        code, said, _ = run("drain", name)
        assert (code, said) == (0, f"{name} is drained: it takes no more work, 1 request not finished yet\n")
        run("drain", name)  # it answers before it leaves its lanes, but a second time only after that
        after = [caller.submit(model, max_tokens=2) for _ in range(10)]
        assert {type(caller.last(each)) for each in after} == {ChatResponse}
    assert isinstance(caller.last(running), ChatResponse)
    assert name not in {caller.node(each) for each in after}
    assert run("drain", name, "--wait")[:2] == (0, f"{name} is drained: nothing runs there any more\n")
    code, said, _ = run("undrain", name)
    assert (code, said.partition(":")[0]) == (0, f"{name} is not drained")
    other = ({"one@mini", "two@mini"} - {name}).pop()
    run("drain", other)
    assert isinstance(caller.last(again := caller.submit(model, max_tokens=2)), ChatResponse)
    assert caller.node(again) == name


def test_nodes_answer_at_once_and_leave_their_lanes_after_it(draining, caller, model):
    """The thread that answers is the one that leaves them."""
    assert isinstance(caller.last(caller.submit(model, max_tokens=2)), ChatResponse)
    with took_less_than(0.4):
        assert [each.drained for each in draining.ask("drain", ["one@mini", "two@mini"])] == [True, True]


def test_what_has_not_ended_when_a_drain_has_waited_long_enough_is_handed_over(run, caller, model, mlx):
    with mlx.held(at_token=5):
        running = caller.begin(model)
        name = caller.node(running)
        code, said, _ = run("drain", name, "--wait", "0.5")
    assert code == 0
    assert said == f"{name} is drained: nothing runs there any more, 1 request handed over to other nodes\n"
    failure = caller.last(running)
    assert (failure.code, failure.retryable) == ("instance_unavailable", True)


@pytest.mark.rest
def test_a_host_means_all_its_nodes_and_they_stay_drained_through_a_reload_and_a_reconnect(
    run, broker, nodes, caller, model
):
    code, said, _ = run("drain", "mini")
    assert code == 0
    assert [line.split()[0] for line in said.splitlines()] == ["one@mini", "two@mini"]
    nodes["one"].signal(signal.SIGHUP)
    nodes["one"].wait_for("follows the new configuration", WITHIN)
    broker.drop_connections()
    with Router(Settings(broker_url=broker.url)) as router:
        until(lambda: {each.status for each in router.registry.instances()} == {"drained"}, WITHIN)
        assert "undrain" in router.registry.instances()[0].reason
    waiting = caller.submit(model, max_tokens=2)
    time.sleep(2.0)
    assert caller.node(waiting) is None
    until(lambda: run("undrain", "mini")[0] == 0, WITHIN)  # a node that has just lost its connection may be deaf
    assert isinstance(caller.last(waiting), ChatResponse)


@pytest.mark.rest
def test_who_does_not_answer_is_named(run):
    code, said, error = run("drain", "three@mini", "one@mini")
    assert (code, said.split()[0]) == (69, "one@mini")
    assert error.startswith("fleet-worker: three@mini does not answer: ")
    code, _, error = run("undrain", "nowhere", "one@mini", "attic")
    assert code == 69
    assert [line.split()[1] for line in error.splitlines()] == ["nowhere", "attic"]


@pytest.mark.rest
@any_broker
def test_a_frozen_node_of_a_host_is_named_since_it_takes_work_later(run, nodes):
    nodes["one"].signal(signal.SIGSTOP)
    try:
        code, said, error = run("drain", "mini")
        assert (code, said.split()[0]) == (69, "two@mini")
        assert error.startswith("fleet-worker: one@mini does not answer: ")
        assert "drain it again" in error
        code, said, error = run("undrain", "mini")
        assert (code, said.split()[0], error.split()[1]) == (69, "two@mini", "one@mini")
        assert "undrain it again" in error
    finally:
        nodes["one"].signal(signal.SIGCONT)


@pytest.mark.rest
@any_broker
def test_a_node_that_has_not_begun_yet_is_named_too(run, broker):
    opted_in = {"FLEET_INSTANCES__LATE__FLEET": '{"enabled": true, "respond_to_requests": true}'}
    with running_host(broker.url, {}, host="attic", env=opted_in):  # only its registry node
        code, said, error = run("drain", "attic", "mini")
    assert (code, [line.split()[0] for line in said.splitlines()]) == (69, ["one@mini", "two@mini"])
    assert [line.split()[1] for line in error.splitlines()] == ["late@attic"]


@pytest.mark.rest
def test_the_name_of_a_host_is_no_pattern(run):
    patterns = ["*", "min?", "min.", "min(i)", "mini|attic", "ini"]
    code, said, error = run("drain", *patterns)
    assert (code, said) == (69, "")
    assert [line.split()[1] for line in error.splitlines()] == patterns


def test_a_registry_node_has_nothing_to_drain(draining):
    with pytest.raises(InvalidRequest):
        draining.find(["registry@mini"])
