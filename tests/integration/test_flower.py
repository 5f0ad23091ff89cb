"""A fleet as Flower shows it: its tasks with lane, node, state and runtime, its nodes, its metrics."""

import html
import re

import httpx
import pytest

from fleet_worker import ContextLengthExceeded, InvalidRequest, Overloaded, Router, Settings
from fleet_worker.broker.topology import lane
from fleet_worker.simulator import Fault
from fleet_worker.testing import SimulatedMLX, embedded_broker, running_host, running_node
from tests.envelopes import request_of
from tests.flower import running_flower

CHAT, EMBED, NODE = "sim-chat", "sim-embed", "sim@test"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def broker_url():
    with embedded_broker() as url:
        yield url


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(flavour="vllm_batched", models=[CHAT, EMBED]) as server:
        yield server


@pytest.fixture(scope="module")
def flower(broker_url, mlx):
    models = {CHAT: {}, EMBED: {}}
    with (
        running_node(broker_url, NODE, base_url=mlx.base_url, limits={"concurrency": 3}, models=models),
        running_flower(broker_url) as flower,
    ):
        flower.wait_for_workers(NODE)
        yield flower


@pytest.fixture
def router(broker_url):
    with Router(Settings(broker_url=broker_url, router={"max_attempts": 1})) as router:
        yield router


def failed(flower, mlx, router, fault, error):
    """What the API says about a chat that fails with this error."""
    before = flower.api("tasks").keys()
    mlx.fail(fault)
    with pytest.raises(error):
        router.chat(CHAT, HELLO, timeout=20)
    flower.eventually(lambda: len(flower.api("tasks").keys() - before) == 1)
    return flower.ended(*(flower.api("tasks").keys() - before))


def test_a_task_is_shown_with_its_lane_node_state_and_runtime(flower, router):
    stream = router.stream_chat(CHAT, HELLO, max_tokens=3, timeout=20)
    assert len(list(stream)) == 3
    replies = {
        "chat": (CHAT, router.chat(CHAT, HELLO, max_tokens=3, timeout=20)),
        "stream_chat": (CHAT, stream.response),
        "embed": (EMBED, router.embed(EMBED, ["Hello"], timeout=20)),
    }
    for operation, (model, reply) in replies.items():
        task = flower.ended(reply.request_id)
        assert (task["name"], task["args"]) == (f"fleet.{operation}", lane(operation, model))
        assert (task["worker"], task["state"], task["result"]) == (NODE, "SUCCESS", "None")
        assert 0 < task["runtime"] < 20


def test_a_request_for_one_node_is_shown_in_its_direct_lane(flower, router):
    reply = router.chat(CHAT, HELLO, max_tokens=1, node=NODE, timeout=20)
    assert flower.ended(reply.request_id)["args"] == f"llm.fleet.node.{NODE}"


def test_a_failed_task_shows_which_error_of_ours_it_was(flower, mlx, router):
    task = failed(flower, mlx, router, Fault("status", status=429, body="slow down, Hello"), Overloaded)
    assert (task["args"], task["worker"], task["state"]) == (lane("chat", CHAT), NODE, "FAILURE")
    assert task["exception"] == "Overloaded('the MLX server is busy (429)')"
    body = {"error": {"message": "maximum context length is 8192 tokens, Hello"}}
    task = failed(flower, mlx, router, Fault("status", status=400, body=body), ContextLengthExceeded)
    assert task["exception"].startswith("ContextLengthExceeded(")
    task = failed(flower, mlx, router, Fault("status", status=422, body=body["error"]["message"][-5:]), InvalidRequest)
    assert task["traceback"].rstrip().endswith("the MLX server refused the request (422)")


def test_the_page_of_tasks_has_a_column_for_the_lane_and_a_row_for_each_task(flower, router):
    reply = router.chat(CHAT, HELLO, max_tokens=1, timeout=20)
    flower.ended(reply.request_id)
    columns = re.findall(r"<th[^>]*>\s*(.*?)\s*</th>", flower.page("/tasks"))
    assert columns[:4] == ["Name", "args", "State", "Worker"]
    row = next(row for row in flower.rows() if row["uuid"] == reply.request_id)
    assert (row["name"], row["args"], row["state"]) == ("fleet.chat", lane("chat", CHAT), "SUCCESS")
    assert (row["worker"], row["runtime"] > 0) == (NODE, True)
    page = html.unescape(flower.page(f"/task/{reply.request_id}"))
    assert all(shown in page for shown in ("fleet.chat", lane("chat", CHAT), NODE, "SUCCESS"))


def test_a_node_is_online_with_its_pool_its_slots_and_its_lanes(flower):
    assert flower.alive() == {NODE}
    node = flower.api("workers")[NODE]
    assert node["stats"]["pool"]["implementation"] == "celery.concurrency.thread:TaskPool"
    assert node["stats"]["pool"]["max-concurrency"] == 3
    lanes = {lane("chat", CHAT), lane("stream_chat", CHAT), lane("embed", EMBED), f"llm.fleet.node.{NODE}"}
    assert {queue["name"] for queue in node["active_queues"]} == lanes
    assert {"fleet.chat", "fleet.stream_chat", "fleet.embed"} <= set(node["registered"])
    page = html.unescape(flower.page(f"/worker/{NODE}"))
    assert all(shown in page for shown in ("concurrency.thread:TaskPool", *lanes))
    assert NODE in flower.page("/workers")


def test_the_lengths_of_lanes_are_those_of_lanes_that_a_node_serves(flower, router):
    """The README says so: a lane that nobody serves, the one to worry about, is not there."""
    request = request_of(router, "chat", "unserved", messages=HELLO)
    router._connected().submitter.submit(request, lane("chat", "unserved"), patience=5.0)
    lengths = {queue["name"]: queue["messages"] for queue in flower.api("queues/length")["active_queues"]}
    assert lengths[lane("chat", CHAT)] == 0
    assert lane("chat", "unserved") not in lengths
    assert lane("chat", CHAT) in flower.page("/broker")


def test_metrics_count_tasks_and_runtimes_by_node_and_task(flower, router):
    reply = router.embed(EMBED, ["Hello"], timeout=20)
    flower.ended(reply.request_id)
    metrics = flower.page("/metrics")
    assert f'flower_events_total{{task="fleet.embed",type="task-succeeded",worker="{NODE}"}}' in metrics
    assert re.search(
        rf'flower_task_runtime_seconds_bucket{{le="600.0",task="fleet.embed",worker="{NODE}"}} \d', metrics
    )
    assert f'flower_worker_online{{worker="{NODE}"}} 1.0' in metrics
    assert set(re.findall(r'worker="(.*?)"', metrics)) == {NODE}  # no series for every router that ever sent a task


def test_without_the_password_there_are_metrics_and_nothing_else(flower):
    with httpx.Client(base_url=flower.url, trust_env=False) as stranger:
        for path in ("/", "/tasks", "/workers", "/broker", "/api/tasks", "/api/workers"):
            assert stranger.get(path).status_code == 401, path
        assert stranger.get("/metrics").status_code == stranger.get("/healthcheck").status_code == 200


def test_it_starts_without_any_instance_and_never_complains(flower):
    assert "Registered tasks" in flower.process.output
    assert "Traceback" not in flower.process.output


def test_nothing_can_be_changed_through_it(flower):
    for action in (f"worker/shutdown/{NODE}", f"worker/pool/grow/{NODE}", "task/send-task/fleet.chat"):
        assert flower.post(f"/api/{action}") == 403, action
    assert flower.alive() == {NODE}


@pytest.mark.rest
def test_the_registry_node_of_a_host_is_shown_with_its_tasks(flower, broker_url, mlx):
    beats = {"FLEET_REGISTRY__READINESS_INTERVAL": "0.5", "FLEET_REGISTRY__MODELS_INTERVAL": "0.5"}
    with running_host(broker_url, {"two": {"base_url": mlx.base_url, "models": {CHAT: {}}}}, env=beats):
        flower.wait_for_workers("registry@test", "two@test")
        names = {"registry.publish_readiness", "registry.publish_models"}

        def told():
            tasks = flower.api("tasks").values()
            return {task["name"] for task in tasks if task["worker"] == "registry@test" and task["state"] == "SUCCESS"}

        flower.eventually(lambda: told() == names)
        lanes = {task["args"] for task in flower.api("tasks").values() if task["worker"] == "registry@test"}
        assert lanes == {"llm.fleet.node.registry@test"}
