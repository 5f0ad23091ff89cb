"""The tasks of a node in this process: a simulated MLX server, no broker, and the frames that would be published."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet_worker.broker.app import create_app
from fleet_worker.errors import FleetError, InstanceUnavailable, InvalidRequest, ProviderError, RequestTimeout
from fleet_worker.node import confirmations
from fleet_worker.node import tasks as tasks_module
from fleet_worker.node.confirmations import Confirmations
from fleet_worker.node.node import Node
from fleet_worker.node.readiness import State
from fleet_worker.node.router_clocks import RouterClocks
from fleet_worker.node.server_discovery import find_server
from fleet_worker.node.tasks import register_tasks
from fleet_worker.protocol import clock
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.settings import Settings
from fleet_worker.simulator import Fault
from fleet_worker.testing import SimulatedMLX
from tests.mlx_clients import took_less_than, until

CHAT, EMBED = "sim-chat", "sim-embed"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(flavour="vllm_batched", models=[CHAT, EMBED]) as mlx:
        yield mlx


@pytest.fixture(scope="module")
def node_and_tasks(mlx):
    opted_in = {"enabled": True, "respond_to_requests": True}
    instance = {"base_url": mlx.base_url, "models": {CHAT: {}, EMBED: {}}, "fleet": opted_in}
    settings = Settings(instances={"one": instance}, broker_url="redis://127.0.0.1:1")
    app = create_app(settings)
    node = Node(app, settings, "one@test", find_server(settings.instances["one"], 5))
    register_tasks(app, node)
    yield node, app.tasks
    node.close()
    app.close()


@pytest.fixture
def node(node_and_tasks, monkeypatch):
    node, _ = node_and_tasks
    node.frames = []
    monkeypatch.setattr(node, "state", State("available"))

    def append(writer, frame, delay):
        node.frames.append(frame)
        writer.appended += 1

    monkeypatch.setattr(node.publisher, "append", append)
    return node


@pytest.fixture
def run(node_and_tasks, request):
    """Returns a function that runs a task for an envelope of the wire, with changes."""

    def run(task, model=CHAT, params=HELLO, prefixes=(), **changes):
        expires_at = clock.now() + 20
        envelope = {"protocol_version": 2, "operation": task, "provider": "mlx", "provider_instance": "any"}
        envelope |= {"request_id": request.node.name, "correlation_id": "c", "idempotency_key": "k", "attempt": 1}
        envelope |= {"model": model, "params": params, "reply_to": "llm.fleet.reply.test.60", "priority": "normal"}
        envelope |= {"timeout_seconds": 20, "expires_at": expires_at, "signed_token": None}
        envelope |= {"message_context": {}, "caller": {}, "trace_context": {}}
        return node_and_tasks[1][f"fleet.{task}"].run(envelope | changes, *prefixes)

    return run


@pytest.mark.parametrize(
    ("operation", "model", "params", "kinds"),
    [
        ("chat", CHAT, HELLO, ["accepted", "response"]),
        ("stream_chat", CHAT, HELLO, ["accepted", "deltas", "response"]),
        ("embed", EMBED, {"input": ["a", "b"]}, ["accepted", "embedding"]),
    ],
)
def test_a_request_is_accepted_and_answered_in_frames_without_a_gap(node, run, operation, model, params, kinds):
    before = node.counters.report()["requests"].get(operation, 0)
    assert run(operation, model, params) is None
    assert list(dict.fromkeys(frame.kind for frame in node.frames)) == kinds
    assert [frame.seq for frame in node.frames] == list(range(len(node.frames)))
    last = node.frames[-1]
    assert (last.node, last.instance, last.model) == ("one@test", "one", model)
    assert 0 < last.timings.duration < 10
    assert node.counters.report()["requests"][operation] == before + 1


PREFIXES = PromptPrefixes("session____", None, (("system_____", 40), ("prompt_____", 90)))


def held(node):
    return node._report().prompt_cache.held


@pytest.mark.parametrize("operation", ["chat", "stream_chat"])
def test_what_an_answered_prompt_left_in_the_cache_is_told(node, run, mlx, operation, monkeypatch):
    monkeypatch.setattr(mlx, "flush_each", True)
    node.prompt_cache.clear()
    with mlx.held(at_token=2), ThreadPoolExecutor() as pool:
        answered = pool.submit(run, operation, prefixes=[PREFIXES.encode()])
        until(lambda: held(node) == ["system_____"])  # its first token has come
        mlx.release()
        answered.result()
    assert held(node) == ["session____", "system_____", "prompt_____"]
    told = node._report()
    assert (told.prompt_cache.node, told.prompt_cache.slots, told.prompt_cache.running) == ("one@test", 1, 0)
    assert told.instance.prompt_tokens == sum(told.counters["prompt_tokens"].values()) > 0
    assert told.instance.cached_tokens is None  # vllm-mlx does not tell


@pytest.mark.parametrize(
    "header", ["", "x", 5, None, ["x"], {"x": 1}, True, "x" * 984, PREFIXES.encode()[:-1], "..\n", b".."]
)
def test_a_header_that_makes_no_sense_ends_nothing_and_holds_nothing(node, run, header):
    node.prompt_cache.clear()
    run("chat", prefixes=[header])
    assert node.frames[-1].kind == "response"
    assert held(node) == []


def test_a_request_that_fails_is_not_held(node, run, mlx):
    node.prompt_cache.clear()
    mlx.fail(Fault("status", status=500))
    with pytest.raises(FleetError):
        run("chat", prefixes=[PREFIXES.encode()])
    assert held(node) == []
    assert node._report().prompt_cache.prefill_left == 0


def test_embeddings_have_nothing_to_do_with_it(node, run):
    node.prompt_cache.clear()
    before = node._report().instance.prompt_tokens
    run("embed", EMBED, {"input": "a"}, prefixes=[PREFIXES.encode()])
    assert held(node) == []
    assert node._report().instance.prompt_tokens == before


def refused(node, run, **changes):
    """What the reply, the task and the counters tell of a refused request must be the same error."""
    with pytest.raises(FleetError) as caught:
        run("chat", **changes)
    failure = node.frames[-1]
    assert (failure.kind, failure.code, failure.message) == ("error", caught.value.code, caught.value.message)
    assert node.counters.report()["errors"][failure.code] >= 1
    return caught.value


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"operation": "stream_chat"}, InvalidRequest),
        ({"provider_instance": "two"}, InstanceUnavailable),
        ({"params": {}}, InvalidRequest),
    ],
)
def test_a_request_that_is_refused_ends_in_one_error_and_nothing_else(node, run, changes, error):
    with pytest.raises(error):
        raise refused(node, run, **changes)
    assert [frame.kind for frame in node.frames] == ["error"]


def test_vectors_that_are_larger_than_a_reply_may_be_are_refused(node, run, monkeypatch):
    monkeypatch.setattr(tasks_module, "REPLY_SPARE_BYTES", 69_000 - node.settings.max_body_bytes)
    with pytest.raises(InvalidRequest, match="send fewer texts at a time"):
        run("embed", EMBED, {"input": ["a"] * 3})
    run("embed", EMBED, {"input": "a"}, attempt=2)


def test_vectors_are_not_shortened(node, run):
    run("embed", EMBED, {"input": "a", "dimensions": 384})
    with pytest.raises(InvalidRequest, match="dimensions: this model's vectors have 384 numbers") as caught:
        run("embed", EMBED, {"input": "a", "dimensions": 128}, attempt=2)
    assert caught.value.param == "dimensions"


def test_a_failure_beside_a_canary_or_what_is_left_of_another_request_is_told_as_such(node, mlx, run, monkeypatch):
    """Its server has one slot. vllm-mlx's Simple engine answers 500 to a second request."""
    counted = []
    monkeypatch.setattr(node._readiness, "failed", lambda error, request_id: counted.append(error))

    def failure(attempt):
        mlx.fail(Fault("status", status=500))
        with pytest.raises(ProviderError) as caught:
            run("chat", attempt=attempt)
        return caught.value.metadata.get("disturbed", False)

    assert not failure(1)
    monkeypatch.setattr(node.mlx, "_canary_runs", True)
    assert failure(2)
    monkeypatch.setattr(node.mlx, "_canary_runs", False)
    assert not failure(3)
    with mlx.held(at_token=1), pytest.raises(RequestTimeout):
        run("chat", attempt=4, timeout_seconds=0.2, expires_at=clock.now() + 0.2)
    assert failure(5)
    assert len(counted) == 3  # with the timeout


def test_a_fault_of_the_worker_itself_ends_in_an_error_that_quotes_nothing(node, run, monkeypatch, caplog):
    monkeypatch.setattr(node.mlx, "chat", lambda *_, **__: int("a secret"))
    assert isinstance(refused(node, run), ProviderError)
    assert [frame.kind for frame in node.frames] == ["accepted", "error"]
    assert "ValueError at" in caplog.text
    assert "secret" not in caplog.text + node.frames[-1].message


# --- Clocks


REPLY_TO = "llm.fleet.reply.test.60"


@pytest.fixture
def connected(node, monkeypatch):
    """A node that hears routers, since so many seconds, and knows the clock of none."""

    def connected(since=1000.0, answer=None):
        monkeypatch.setattr(node, "router_clocks", RouterClocks())
        monkeypatch.setattr(node, "confirmations", Confirmations())
        monkeypatch.setattr(confirmations, "ANSWER_WITHIN", 0.1 if answer is None else 10.0)
        node.confirmations.hears_since = time.monotonic() - since

        def append(writer, frame, delay):
            node.frames.append(frame)
            writer.appended += 1
            if answer and frame.kind == "accepted" and frame.asks:
                answer(node, frame)

        monkeypatch.setattr(node.publisher, "append", append)
        return node

    return connected


@pytest.mark.parametrize("skew", [-3600.0, -90.0, 90.0, 3600.0])
def test_a_wrong_clock_costs_no_request_and_shows_in_no_figure(connected, run, skew):
    """The clock of the router is so far ahead of the one of the node."""

    def confirm(node, frame):
        node.router_clocks.told(REPLY_TO, clock.now() + skew)
        node.confirmations.confirm(frame.id, frame.attempt)

    node = connected(answer=confirm)
    for attempt in (1, 2):
        run("chat", attempt=attempt, expires_at=clock.now() + skew + 20 - 3)  # it has waited for 3 s
        waited = [frame.timings.queue_wait for frame in node.frames if frame.kind == "response"]
        assert waited == [pytest.approx(3.0, abs=1)] * attempt
    assert [frame.asks for frame in node.frames if frame.kind == "accepted"] == [True, None]


def test_what_has_expired_by_the_clock_of_its_router_is_dropped_before_it_starts(connected, run):
    node = connected()
    node.router_clocks.told(REPLY_TO, clock.now() + 3600)
    assert refused(node, run, expires_at=clock.now() + 3600 - 1).code == "expired"
    assert [frame.kind for frame in node.frames] == ["error"]


def cancel(node, frame):
    node.running.cancel(frame.id, frame.attempt)


@pytest.mark.parametrize("answer", [None, cancel])
def test_what_seems_to_have_expired_does_not_start_before_its_router_has_confirmed_it(connected, run, answer):
    node = connected(answer=answer)
    with took_less_than(5.0):
        assert refused(node, run, expires_at=clock.now() - 1).code == ("cancelled" if answer else "expired")
    assert [frame.kind for frame in node.frames] == ["accepted", "error"]


def test_what_only_seems_to_have_expired_starts_once_its_router_has_told_its_time_to_anybody(
    connected, run, monkeypatch
):
    node = connected(answer=lambda node, frame: node.router_clocks.told(REPLY_TO, clock.now() - 3600))
    monkeypatch.setattr(confirmations, "ANSWER_WITHIN", 0.1)
    run("chat", expires_at=clock.now() - 3600 + 15)
    assert node.frames[-1].kind == "response"


def test_what_was_submitted_before_the_node_heard_cancels_does_not_start_if_it_was_cancelled(connected, run):
    for knows in (False, True):
        node = connected(since=1.0, answer=cancel)
        if knows:
            node.router_clocks.told(REPLY_TO, clock.now())
        assert refused(node, run, attempt=1 + knows, expires_at=clock.now() + 15).code == "cancelled"


def test_a_router_that_does_not_answer_gets_what_has_not_expired(connected, run):
    node = connected(since=1.0)
    with took_less_than(3.0):
        run("chat", expires_at=clock.now() + 15)
    assert node.frames[-1].kind == "response"


def test_an_attempt_that_is_delivered_twice_is_answered_once(node, run):
    run("chat")
    answered = len(node.frames)
    assert run("chat") is None
    assert len(node.frames) == answered


def test_a_message_without_an_address_ends_in_an_error_of_the_task_only(node, run):
    with pytest.raises(InvalidRequest, match="without a reply_to"):
        run("chat", reply_to="elsewhere")
    assert node.frames == []
