"""A secret word goes in as prompt and comes back as answer, and is found nowhere else.

Each test has a word of its own. What it leaves behind is looked for in everything that a process of the fleet prints
or tells: logs at INFO and at DEBUG, Celery's events and remote control, Flower, and the router's errors and reprs.
"""

import base64
import json
import threading
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import redis
from celery import Celery
from kombu import Connection

from fleet_worker import FleetError, Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import direct_lane, lane, route_to
from fleet_worker.host.child_process import child, python
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.simulator import Fault
from fleet_worker.testing import SimulatedMLX, embedded_broker, worker_toml
from tests.envelopes import request_of
from tests.flower import running_flower

CHAT, EMBED = "sim-chat", "sim-embed"
LEVELS = {"quiet@test": "INFO", "talkative@test": "DEBUG"}
API_KEY, PASSWORD = f"key-{uuid.uuid4().hex}", f"password-{uuid.uuid4().hex}"
HELLO = [{"role": "user", "content": "Hello"}]

pytestmark = pytest.mark.parametrize("node", ["talkative@test", pytest.param("quiet@test", marks=pytest.mark.rest)])


class Events:
    """Every event of the fleet's workers, as any monitor receives them."""

    def __init__(self, app):
        self.all = []
        self._arrived = threading.Condition()
        self._receiver = None
        self._thread = threading.Thread(target=self._capture, args=(app,), daemon=True)
        self._thread.start()
        self.wait_for(lambda event: event["type"] == "worker-heartbeat")

    def stop(self):
        self._receiver.should_stop = True
        self._thread.join(10)

    def wait_for(self, fits):
        with self._arrived:
            assert self._arrived.wait_for(lambda: any(map(fits, self.all)), 15)

    def _capture(self, app):
        with app.connection_for_read() as connection:
            self._receiver = app.events.Receiver(connection, handlers={"*": self._take})
            self._receiver.capture(limit=None, timeout=None, wakeup=True)

    def _take(self, event):
        with self._arrived:
            self.all.append(event)
            self._arrived.notify_all()


class Fleet:
    """Two nodes, Flower, a receiver of events, a router, and all that they say."""

    def __init__(self, url, mlx, processes, flower, app, events, router):
        self.url, self.mlx, self.router, self.flower = url, mlx, router, flower
        self._processes, self._app, self._events = processes, app, events
        self._shown = set()

    def inspect(self, node, command, *arguments):
        """What a node answers to `celery inspect`."""
        return getattr(self._app.control.inspect([node], timeout=10, limit=1), command)(*arguments)[node]

    def output(self, node):
        return next(process.output for process in self._processes if process.name == node)

    def settle(self, node):
        """Return when everybody has heard of all that the node did: it has one slot, and this comes after it."""
        reply = self.router.chat(CHAT, HELLO, max_tokens=1, node=node, timeout=20)
        self._events.wait_for(lambda event: event["type"] == "task-succeeded" and event["uuid"] == reply.request_id)
        self.flower.ended(reply.request_id)

    def leaks(self, node, *words, said=()):
        """Where any of these words is, or a key of ours, with what stands around it."""
        found = []
        for place, text in {**self._places(node), "the router": "\n".join(said)}.items():
            for word in (*words, API_KEY, PASSWORD):
                found += [f"{place}: {around(text, spelling)}" for spelling in spellings(word) if spelling in text]
        return found

    def _places(self, node):
        paths = ["/", "/workers", "/workers?json=1", "/tasks", "/broker", "/metrics", "/api/tasks", "/api/task/types"]
        paths += ["/api/queues/length", f"/api/workers?refresh=1&workername={node}", f"/worker/{node}"]
        for task in self.flower.api("tasks").keys() - self._shown:
            self._shown.add(task)
            paths += [f"/task/{task}", f"/api/task/info/{task}"]
        commands = ("active", "reserved", "scheduled", "revoked", "registered", "stats", "conf", "report")
        return {
            **{f"the output of {process.name}": process.output for process in self._processes},
            "events": repr(self._events.all),
            **{f"inspect {command}": repr(self.inspect(node, command)) for command in commands},
            "the rows of /tasks": repr(self.flower.rows()),
            **{f"Flower's {path}": self.flower.page(path) for path in paths},
        }


def spellings(word):
    """A word as it is, and as it looks inside of base64, wherever it begins there: so bodies wait on the broker."""
    yield word
    for before in range(3):
        yield base64.b64encode(b"." * before + word.encode()).decode()[4 if before else 0 : -4]


def around(text, word):
    at = text.index(word)
    return text[max(0, at - 80) : at + len(word) + 80]


@pytest.fixture(scope="module")
def broker_url():
    """A broker with a password."""
    with embedded_broker() as url, redis.Redis.from_url(url) as client:
        client.config_set("requirepass", PASSWORD)
        yield url.replace("redis://", f"redis://:{PASSWORD}@")
        client.config_set("requirepass", "")


@contextmanager
def running_nodes(broker_url, mlx, folder):
    with ExitStack() as stack:
        nodes = []
        for name, level in LEVELS.items():
            models = {CHAT: {"features": {"vision": True, "tools": True}}, EMBED: {}}
            instance = {"base_url": mlx.base_url, "api_key": API_KEY, "models": models}
            config = folder / f"{name}.toml"
            config.write_text(worker_toml(name.partition("@")[0], instance), "utf-8")
            command = python("-m", "celery", "-A", "fleet_worker", "worker", "-n", name, "--loglevel", level)
            environment = {"FLEET_CONFIG": str(config), "FLEET_BROKER_URL": broker_url}
            # One failure follows the other here: without it a node would have to prove itself once a minute.
            environment["FLEET_WORKER__CANARY"] = "false"
            nodes.append(stack.enter_context(child(name, command, environment)))
        for node in nodes:
            node.wait_for("is ready", 30)
        yield nodes


@pytest.fixture(scope="module")
def fleet(broker_url, tmp_path_factory):
    settings = Settings(broker_url=broker_url, router={"max_attempts": 1})
    app = create_app(settings)
    with (
        SimulatedMLX(flavour="vllm_batched", models=[CHAT, EMBED], api_key=API_KEY) as mlx,
        running_nodes(broker_url, mlx, tmp_path_factory.mktemp("nodes")) as nodes,
        running_flower(broker_url) as flower,
        Router(settings) as router,
    ):
        flower.wait_for_workers(*LEVELS)
        events = Events(app)
        yield Fleet(broker_url, mlx, [*nodes, flower.process], flower, app, events, router)
        events.stop()
    app.close()


@pytest.fixture
def word(fleet, caplog):
    """A new secret word, which every answer of the MLX server will contain."""
    caplog.set_level("DEBUG")
    caplog.set_level("WARNING", "httpcore")  # of the client that asks Flower
    word = f"swordfish{uuid.uuid4().hex}"
    fleet.mlx.reasoning = (word,)
    fleet.mlx.tool_calls = [{"name": "look_up", "arguments": {"query": word}}]
    return word


def everywhere(word):
    """A chat with the word in every place that a caller can fill with text."""
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{word}"}}
    schema = {"type": "object", "properties": {word: {"type": "string"}}}
    return {
        "messages": [
            {"role": "system", "content": word},
            {"role": "user", "content": [{"type": "text", "text": word}, picture], "name": word},
            {"role": "assistant", "tool_calls": [{"id": word, "function": {"name": word, "arguments": word}}]},
            {"role": "tool", "content": word, "tool_call_id": word},
            {"role": "user", "content": word},
        ],
        "tools": [{"type": "function", "function": {"name": word, "description": word, "parameters": schema}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        "stop": [word],
        "user": word,
        "session": word,
        "cache_scope": word,
        "caller": {"name": word},
        "message_context": {word: word},
        "trace_context": {"baggage": word},
        "timeout": 20,
    }


def told_by(error):
    """All that an error says to whoever catches, logs or prints it."""
    return "".join([*traceback.format_exception(error), repr(error), error.message, repr(error.metadata)])


def test_a_request_that_succeeds_leaves_no_trace(fleet, node, word, caplog):
    called = fleet.router.chat(CHAT, **everywhere(word), node=node)
    assert word in str(called.tool_calls)
    stream = fleet.router.stream_chat(CHAT, HELLO, max_tokens=20, node=node, timeout=20)
    deltas = list(stream)
    assert word in stream.response.reasoning
    vectors = fleet.router.embed(EMBED, [word], user=word, caller={"name": word}, node=node, timeout=20)
    bodies = [json.dumps(request.body) for request in fleet.mlx.requests]
    assert sum(word in body for body in bodies) == 2
    assert fleet.mlx.requests[-1].headers["authorization"] == f"Bearer {API_KEY}"
    fleet.settle(node)
    said = [caplog.text, repr([called, stream, stream.response, *deltas, vectors])]
    words = (word, stream.response.content[:30], vectors.data[0][:30], str(vectors.vectors[0][0]))
    assert fleet.leaks(node, *words, said=said) == []


def failures(word):
    """What an MLX server can answer, with the word wherever it has room for text."""
    for status in (400, 401, 404, 413, 422, 429, 500, 503):
        yield Fault("status", status=status, body=f"{word} {API_KEY}")
        yield Fault("status", status=status, body={"error": {"message": word, "code": word, "type": word}})
    yield Fault("status", status=404, body={"detail": f"The model '{word}' does not exist"})
    yield Fault("status", status=422, body={"detail": [{"loc": ["body", word], "input": word, "msg": word}]})
    yield Fault("status", status=400, body={"error": f"maximum context length is 10 tokens, not those of {word}"})
    yield Fault("status", status=429, body=word, headers={"retry-after": word})
    yield Fault("status", status=302, body=word, headers={"location": f"http://{word}/"})
    yield Fault("status", status=200, body=word)
    yield Fault("status", status=200, body=f"data: {word}\n\n")
    yield Fault("status", status=200, body=f'data: {{"choices": "{word}"}}\n\n')
    yield Fault("error_event", at_token=1, message=word)
    yield Fault("error_event", at_token=1, message=word, code=word)
    yield Fault("early_error", message=word)
    for kind in ("garbage", "eof", "truncate", "reset"):
        yield Fault(kind, at_token=2)
    yield Fault("done_without_finish")


def test_a_request_that_fails_at_the_server_leaves_no_trace(fleet, node, word, caplog):
    request = everywhere(word)
    said = []
    for fault in failures(word):
        fleet.mlx.fail(fault)
        with pytest.raises(FleetError) as caught:
            fleet.router.chat(CHAT, **request, node=node)
        said.append(told_by(caught.value))
    for fault in (Fault("wrong_count"), Fault("status", status=200, body=word), Fault("status", body=word)):
        fleet.mlx.fail(fault)
        with pytest.raises(FleetError) as caught:
            fleet.router.embed(EMBED, [word], node=node, timeout=20)
        said.append(told_by(caught.value))
    fleet.settle(node)
    assert fleet.leaks(node, word, said=[caplog.text, *said]) == []


def bad_values(word):
    """Fields of an envelope that hold the word where something else belongs."""
    yield from ({name: word} for name in ("protocol_version", "operation", "provider", "timeout_seconds", "priority"))
    yield from ({name: [word]} for name in ("model", "caller", "idempotency_key", "expires_at", "signed_token"))
    yield {"schema_version": word}
    yield {"provider_instance": word}
    yield {"params": word}
    yield {"params": {"messages": word}}
    yield {"params": {"messages": [{"role": word, "content": word}]}}
    yield {"params": {"messages": [{"role": "user", "content": {"text": word}}]}}
    yield {"params": {"messages": [{"role": "user", "content": word, "name": [word]}]}}
    yield {"params": {"messages": [{"role": "user", "content": [picture_of(f"http://{word}/")]}]}}
    yield {"params": {"messages": [{"role": "user", "content": [{"type": word}]}]}}
    yield {"params": {"messages": HELLO, "logit_bias": {word: word}}}
    yield from ({"params": {"messages": HELLO, name: word}} for name in ("temperature", "tools", "tool_choice", "n"))


def picture_of(url):
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture
def refusal(fleet, node, monkeypatch):
    """Returns a function that sends an envelope with changes around the router's own checks, and returns the error."""
    encode = FleetRequest.encode

    def send(changes):
        monkeypatch.setattr(FleetRequest, "encode", lambda request: encode(request) | changes)
        with pytest.raises(FleetError) as caught:
            fleet.router.chat(CHAT, HELLO, node=node, timeout=20)
        monkeypatch.undo()
        assert caught.value.code in ("invalid_request", "instance_unavailable")
        return told_by(caught.value)

    return send


def test_a_request_that_a_node_refuses_leaves_no_trace(fleet, node, word, refusal, caplog):
    said = [refusal(changes) for changes in bad_values(word)]
    fleet.settle(node)
    assert fleet.leaks(node, word, said=[caplog.text, *said]) == []


def test_a_request_that_the_router_refuses_quotes_nothing(fleet, node, word, caplog):
    said = []
    wrong = [{name: word} for name in ("temperature", "tools", "timeout", "priority", "caller", "keep_warm")]
    for options in [*wrong, {"session": [word]}, {"cache_scope": 100 * word}]:
        with pytest.raises(FleetError) as caught:
            fleet.router.chat(CHAT, **everywhere(word) | options, node=node)
        said.append(told_by(caught.value))
    request = request_of(fleet.router, "chat", CHAT, **everywhere(word))
    assert fleet.leaks(node, word, said=[caplog.text, *said, repr(request), repr(request.params)]) == []


def publish(fleet, node, body, headers, content_type="application/json"):
    """Put a message into the lane of a node, as anything that reaches the broker can."""
    with Connection(fleet.url) as connection:
        connection.Producer().publish(
            body,
            exchange="",
            routing_key=direct_lane(node),
            headers=headers,
            content_type=content_type,
            content_encoding="binary" if "pickle" in content_type else "utf-8",
        )


@contextmanager
def other_client(fleet, node):
    """Sends tasks as a Celery client that is not ours does: the headers of its messages show the arguments."""
    with Celery("other", broker=fleet.url, set_as_current=False) as app:
        yield lambda *task, **options: app.send_task(*task, **options, **route_to(direct_lane(node), "redis")).id


def test_a_message_that_is_no_request_of_ours_leaves_no_trace(fleet, node, word):
    header = {"id": "1", "task": "fleet.chat", "argsrepr": word, "kwargsrepr": word}
    publish(fleet, node, b"\xff" + word.encode(), header)
    publish(fleet, node, f'{{"prompt": "{word}'.encode(), header)
    publish(fleet, node, word.encode(), header, content_type="application/x-python-serialize")
    publish(fleet, node, json.dumps({"prompt": word}).encode(), {"argsrepr": word})
    first_protocol = {"task": "fleet.chat", "id": node, "args": [{"prompt": word}], "kwargs": {"prompt": word}}
    publish(fleet, node, json.dumps(first_protocol).encode(), {})
    with other_client(fleet, node) as send:
        sent = [send(f"fleet.{name}", args=[{"prompt": word}]) for name in ("chat", "embed", "unheard_of")]
        sent += [send("fleet.chat", kwargs={"prompt": word})]
    fleet.settle(node)
    assert fleet.flower.api("tasks").keys().isdisjoint(sent)
    assert fleet.output(node).count("a message was dropped: ") >= 3
    assert fleet.leaks(node, word) == []


def test_a_message_that_waits_shows_its_lane_outside_of_its_body(fleet, node, word):
    model = f"unserved-{node}"
    request = request_of(fleet.router, "chat", model, **everywhere(word))
    fleet.router._connected().submitter.submit(request, lane("chat", model), patience=5.0)
    with redis.Redis.from_url(fleet.url) as client:
        (key,) = client.scan_iter(f"{lane('chat', model)}*")
        message = json.loads(client.lindex(key, 0))
    body = base64.b64decode(message.pop("body")).decode()
    assert word in body
    assert message["headers"]["argsrepr"] == lane("chat", model)
    assert [spelling for spelling in spellings(word) if spelling in json.dumps(message)] == []


def test_what_a_node_says_of_the_tasks_that_it_has_shows_no_arguments(fleet, node, word):
    fleet.mlx.fail(Fault("freeze", at_token=1))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fleet.router.chat, CHAT, **everywhere(word) | {"timeout": 60}, node=node)
        try:
            fleet.flower.eventually(lambda: fleet.inspect(node, "active"))
            known = fleet.inspect(node, "query_task", [fleet.inspect(node, "active")[0]["id"]])
            assert known.keys() == {"error"}
            assert fleet.leaks(node, word, said=[repr(known)]) == []
        finally:
            fleet.mlx.kill()
            fleet.mlx.restart()
        assert isinstance(running.exception(20), FleetError)
    fleet.settle(node)
    assert fleet.leaks(node, word) == []
