"""Names: of models that look alike, of hosts and instances in any writing, and of processes that have the same one."""

import time
from contextlib import ExitStack

import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import child
from fleet_worker.host.up.programs import node_command
from fleet_worker.testing import SimulatedMLX, running_host, running_node, worker_toml
from tests.brokers import any_broker
from tests.flow.conftest import work
from tests.mlx_clients import until

HELLO = [{"role": "user", "content": "Hello"}]
ALIKE = ["qwen3:8b", "qwen3-8b", "Qwen3-8B", "通义千问", "文心一言"]


@any_broker
@pytest.mark.rest
def test_models_whose_names_look_alike_never_get_each_others_requests(broker):
    with ExitStack() as stack:
        servers = [stack.enter_context(SimulatedMLX(models=[model])) for model in ALIKE]
        nodes = []
        for number, (model, server) in enumerate(zip(ALIKE, servers, strict=True)):
            name = f"one@alike-{number}"
            stack.enter_context(running_node(broker.url, name, base_url=server.base_url, models={model: {}}))
            nodes.append(name)
        router = stack.enter_context(Router(Settings(broker_url=broker.url)))
        for _ in range(5):
            for model, node in zip(ALIKE, nodes, strict=True):
                answer = router.chat(model, HELLO, max_tokens=1, timeout=20)
                assert (answer.node, answer.model, len(answer.attempts)) == (node, model, 1)
        assert [len(work(server)) for server in servers] == [5] * len(ALIKE)


@pytest.mark.rest
def test_a_node_serves_the_lanes_of_routers_that_are_not_updated_yet_if_it_is_told_to(broker, monkeypatch):
    from fleet_worker.broker import topology
    from fleet_worker.router import route

    with (
        SimulatedMLX(models=["Qwen/Qwen3-8B"]) as mlx,
        running_node(
            broker.url, env={"FLEET_WORKER__OLD_LANES": "true"}, base_url=mlx.base_url, models={"Qwen/Qwen3-8B": {}}
        ),
        Router(Settings(broker_url=broker.url)) as router,
    ):
        assert router.chat("Qwen/Qwen3-8B", HELLO, max_tokens=1, timeout=20).node == "sim@test"
        monkeypatch.setattr(route, "lane", topology.old_lane)
        assert router.chat("Qwen/Qwen3-8B", HELLO, max_tokens=1, timeout=20).node == "sim@test"


@pytest.mark.rest
@pytest.mark.parametrize(
    ("host", "names"),
    {"mini.local": ["local", "Local", "büro"], "Mini-7": ["local"], "büro-mini": ["büro"], "小米": ["Local"]}.items(),
)
def test_hosts_may_be_called_as_they_are(broker, host, names):
    with ExitStack() as stack:
        servers = {name: stack.enter_context(SimulatedMLX(models=["m"])) for name in names}
        instances = {name: {"base_url": server.base_url, "models": {"m": {}}} for name, server in servers.items()}
        stack.enter_context(running_host(broker.url, instances, host=host))
        router = stack.enter_context(Router(Settings(broker_url=broker.url)))
        router.registry.wait_for("m", 10)
        until(lambda: len(router.registry.offerings("m", ready=True)) == len(names))
        for name in names:
            for wanted in ({"instance": name}, {"node": f"{name}@{host}"}):
                assert router.chat("m", HELLO, max_tokens=1, timeout=20, **wanted).node == f"{name}@{host}"


MANY = 20


@pytest.fixture
def twin(broker, tmp_path):
    """Begins one more process of the name; each has a folder of its own, as on a host of its own."""
    with SimulatedMLX(models=["twin"]) as mlx, ExitStack() as stack:

        def begin(number):
            config = tmp_path / f"{number}.toml"
            config.write_text(worker_toml("one", {"base_url": mlx.base_url, "models": {"twin": {}}}), "utf-8")
            places = {"FLEET_CONFIG": str(config), "FLEET_BROKER_URL": broker.url}
            environment = {**places, "FLEET_STATE_DIR": str(tmp_path / str(number))}
            return stack.enter_context(child("one@twin", node_command("one@twin"), environment))

        yield begin


def survivors(processes):
    return [process for process in processes if not process.ended]


@any_broker  # the next test has them begin on both
@pytest.mark.rest
@pytest.mark.timeout(300)
def test_of_twenty_processes_of_one_name_that_begin_at_once_exactly_one_stays(broker, twin):
    assert_one_stays(broker, [twin(number) for number in range(MANY)])


@pytest.mark.rest
@pytest.mark.timeout(300)
def test_of_twenty_processes_of_one_name_exactly_one_stays_when_the_broker_restarts(broker, twin):
    processes = [twin(number) for number in range(MANY)]
    until(lambda: any("connected" in process.output.lower() for process in processes), 60)
    broker.stop()
    time.sleep(1)
    broker.start()
    assert_one_stays(broker, processes)


def assert_one_stays(broker, processes):
    until(lambda: len(survivors(processes)) <= 1, 200)
    assert len(survivors(processes)) == 1
    for process in processes:
        if process.ended:
            assert process.wait(5) == 78
            assert "another node is named one@twin" in process.output
    with Router(Settings(broker_url=broker.url)) as router:
        for _ in range(5):
            assert router.chat("twin", HELLO, max_tokens=1, timeout=30).node == "one@twin"
    assert len(survivors(processes)) == 1
