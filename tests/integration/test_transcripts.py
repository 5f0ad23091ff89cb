"""The simulated `mlx_lm.server` and the real one give the same transcripts, so that the simulated one cannot drift.

Every test runs against both. The real one serves a real model, some 14 tokens a second on two cores.
"""

import json
import re
import socket
from contextlib import closing
from typing import NamedTuple

import pytest

from fleet_worker.demo.models import chat_model, platform_problem
from fleet_worker.errors import ModelNotServed, UnsupportedCapability
from fleet_worker.host.child_process import child, python
from fleet_worker.mlx.health import Health
from fleet_worker.testing import SimulatedMLX
from tests.brokers import free_port, missing
from tests.mlx_clients import Client, took_less_than

pytestmark = pytest.mark.timeout(300)  # the first run downloads the model

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
JSON, EVENTS = "application/json", "text/event-stream"
CHUNK = {"id", "system_fingerprint", "object", "model", "created", "choices"}
USAGE = {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"}


@pytest.fixture(scope="module", params=["simulated", pytest.param("real", marks=pytest.mark.rest)])
def url(request, tmp_path_factory):
    if request.param == "simulated":
        with SimulatedMLX(flavour="mlx_lm", models=["default"], tokens=9, token_interval=0.01) as server:
            yield server.base_url
        return
    if problem := platform_problem():
        missing(problem)
    port, home = free_port(), tmp_path_factory.mktemp("huggingface")
    (home / "hub").mkdir()  # without it the list of models is an empty body
    folder = str(chat_model(lambda *_: None))
    command = python("-m", "mlx_lm", "server", "--model", folder, "--host", "127.0.0.1", "--port", str(port))
    with child("mlx_lm.server", command, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}) as process:
        process.wait_for("Starting httpd", 120)
        yield f"http://127.0.0.1:{port}"


# --- What is no chat


def test_health(url):
    answer = talk(url, "GET", "/health")
    assert (answer.status, answer.body) == (200, b'{"status": "ok"}')
    assert answer.is_framed_by_its_end_as(JSON)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/some/model", "/v1/modelsandmore"])
def test_models(url, path):
    answer = talk(url, "GET", path)
    assert answer.status == 200
    assert answer.is_framed_by_its_end_as(JSON)
    assert answer.json.keys() == {"object", "data"}
    (model,) = answer.json["data"]
    assert model.keys() == {"id", "object", "created"}
    assert (answer.json["object"], model["object"]) == ("list", "model")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/health/"),
        ("GET", "/health?a=1"),
        ("GET", CHAT),
        ("POST", CHAT + "/"),
        ("POST", CHAT + "?a=1"),
        ("POST", "/health"),
        ("POST", "/v1/models"),
        ("POST", "/v1/embeddings"),
        ("POST", "/nowhere"),
    ],
)
def test_a_path_that_is_not_exactly_known(url, method, path):
    """Two words that are called JSON."""
    answer = talk(url, method, path, None if method == "GET" else chat())
    assert (answer.status, answer.body) == (404, b"Not Found")
    assert answer.is_framed_by_its_end_as(JSON)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "HEAD"])
def test_a_method_that_is_not_known(url, method):
    answer = talk(url, method, "/v1/models")
    assert answer.status == 501
    assert answer.headers["content-type"] == "text/html;charset=utf-8"


def test_browsers_may_ask_what_is_allowed(url):
    answer = talk(url, "OPTIONS", CHAT)
    assert (answer.status, answer.body) == (204, b"")


def test_every_route_closes_its_connection(url):
    """HTTP/1.0 whatever is asked for: each of these transcripts is read to the end of its connection."""
    assert talk(url, "GET", "/health", head="Connection: keep-alive\r\n").status == 200


# --- Chats that are refused


def test_a_chat_without_a_length(url):
    for head, body in (("", b""), ("Transfer-Encoding: chunked\r\n", b"2\r\n{}\r\n0\r\n\r\n")):
        answer = talk(url, "POST", CHAT, body, head=head)
        assert answer.is_an_error(411)
        assert answer.json == {"error": "Content-Length header is required"}


def test_a_length_that_is_no_number(url):
    answer = talk(url, "POST", CHAT, b"{}", head="Content-Length: two\r\n")
    assert answer.is_an_error(400)
    assert answer.json == {"error": "Invalid Content-Length header"}


@pytest.mark.parametrize("body", [b"", b"{", b"[1", b"nothing"])
def test_a_body_that_is_no_json(url, body):
    answer = talk(url, "POST", CHAT, body)
    assert answer.is_an_error(400)
    assert answer.json["error"].startswith("Invalid JSON in request body: ")


def test_a_body_that_is_no_utf8_gets_no_answer_at_all(url):
    assert talk(url, "POST", CHAT, b'{"messages": "\xff\xfe"}').raw == b""


@pytest.mark.parametrize("body", [[], [1], "text", 5, None])
def test_a_body_that_is_no_object(url, body):
    answer = talk(url, "POST", CHAT, json.dumps(body).encode())
    assert answer.is_an_error(400)
    assert answer.json == {"error": "Request should be a JSON dictionary"}


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": "5"},
        {"max_tokens": 5.0},
        {"max_tokens": None},
        {"max_completion_tokens": 0},
        {"temperature": "0"},
        {"temperature": -1},
        {"temperature": None},
        {"top_p": 2},
        {"top_p": None},
        {"top_k": -1},
        {"top_k": None},
        {"min_p": 2},
        {"repetition_penalty": -1},
        {"repetition_penalty": None},
        {"presence_penalty": None},
        {"frequency_penalty": "1"},
        {"seed": "a"},
        {"logit_bias": []},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"1": "a"}},
        {"top_logprobs": 12},
        {"logprobs": None},
        {"xtc_probability": 1},
        {"model": None},
        {"model": 5},
        {"stream": None},
        {"stream": "true"},
        {"adapters": 5},
        {"messages": "Hello"},
        {"messages": [5]},
        {"messages": None},
    ],
    ids=json.dumps,
)
def test_a_field_of_the_wrong_type_or_size(url, field):
    answer = talk(url, "POST", CHAT, chat(**field))
    assert answer.is_an_error(400)
    assert isinstance(answer.json["error"], str)


def test_a_chat_without_messages(url):
    answer = talk(url, "POST", CHAT, {"max_tokens": 3})
    assert answer.is_an_error(400)
    assert answer.json == {"error": "Request did not contain messages"}


@pytest.mark.parametrize("messages", [[], [{"content": "no role"}]])
@pytest.mark.parametrize("stream", [False, True])
def test_messages_that_its_template_does_not_take(url, messages, stream):
    """404, as for a missing route: only the body tells."""
    answer = talk(url, "POST", CHAT, chat(messages=messages, stream=stream))
    assert answer.is_an_error(404)
    assert isinstance(answer.json["error"], str)


@pytest.mark.parametrize(
    "field",
    [
        {"seed": None},
        {"logit_bias": None},
        {"logit_bias": {"5": 1}},
        {"stop": "###"},
        {"stop": ["###", "@@@"]},
        {"stop": None},
        {"tools": []},
        {"tool_choice": "none", "response_format": {"type": "json_object"}, "n": 2, "user": "me", "unknown": {}},
        {"model": "default_model"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    ],
    ids=json.dumps,
)
def test_a_chat_that_is_taken(url, field):
    answer = talk(url, "POST", CHAT, chat(max_tokens=1, **field))
    assert answer.status == 200
    assert answer.json["object"] == "chat.completion"


# --- Chats that are answered


def test_a_chat(url):
    answer = talk(url, "POST", CHAT, chat(model="default_model"))
    assert answer.status == 200
    assert answer.headers["content-type"] == JSON
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert answer.json.keys() == CHUNK | {"usage"}
    assert (answer.json["object"], answer.json["model"]) == ("chat.completion", "default_model")
    (choice,) = answer.json["choices"]
    assert choice.keys() == {"index", "finish_reason", "message"}
    assert choice["message"].keys() == {"role", "content"}
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "length", "assistant")
    usage = answer.json["usage"]
    assert usage.keys() == USAGE
    assert usage["prompt_tokens_details"].keys() == {"cached_tokens"}
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3


def test_a_stream(url):
    """A comment, a chunk a token with the role in each, a finish chunk without content, and [DONE]."""
    answer = talk(url, "POST", CHAT, chat(stream=True))
    assert answer.status == 200
    assert answer.is_framed_by_its_end_as(EVENTS)
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.body.isascii()
    assert all(re.fullmatch(r": keepalive \d+/\d+", comment) for comment in answer.comments)
    assert answer.comments
    *chunks, done = answer.events
    assert done == "[DONE]"
    assert [chunk.keys() for chunk in chunks] == [CHUNK] * 4
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert all(choice.keys() == {"index", "finish_reason", "delta"} for choice in choices)
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]
    assert [choice["delta"].keys() for choice in choices] == [{"role", "content"}] * 3 + [{"role"}]
    assert {choice["delta"]["role"] for choice in choices} == {"assistant"}


def test_a_stream_that_ends_by_itself(url):
    answer = talk(url, "POST", CHAT, chat(stream=True, max_tokens=50))
    *_, finish, done = answer.events
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert finish["choices"][0]["delta"] == {"role": "assistant"}
    assert done == "[DONE]"


def test_a_stream_with_usage(url):
    """In a chunk without choices that calls itself a completion."""
    *_, finish, usage, done = talk(url, "POST", CHAT, chat(stream=True, stream_options={"include_usage": True})).events
    assert finish["choices"][0]["finish_reason"] == "length"
    assert usage.keys() == CHUNK | {"usage"}
    assert (usage["object"], usage["choices"]) == ("chat.completion", [])
    assert usage["usage"].keys() == USAGE
    assert usage["usage"]["completion_tokens"] == 3
    assert usage["id"] == finish["id"]
    assert done == "[DONE]"


def test_a_stream_with_half_its_options_breaks_off(url):
    *_, finish = talk(url, "POST", CHAT, chat(stream=True, stream_options={})).events
    assert finish["choices"][0]["finish_reason"] == "length"


def test_a_chat_and_a_stream_say_the_same(url):
    streamed = talk(url, "POST", CHAT, chat(stream=True, max_tokens=50)).events
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in streamed[:-1])
    message = talk(url, "POST", "/chat/completions", chat(max_tokens=50)).json["choices"][0]["message"]
    assert message == {"role": "assistant", "content": text}


def test_a_stop_string_ends_a_stream_only_if_it_is_made_of_whole_tokens(url):
    """Else its text is cut out, and the rest follows."""
    pieces = pieces_of(url, max_tokens=9)
    whole = "".join(pieces)
    assert "".join(pieces_of(url, max_tokens=9, stop=[pieces[3]])) == "".join(pieces[:3])
    for stop in (pieces[3][2:], pieces[2][2:] + pieces[3][:3]):
        assert "".join(pieces_of(url, max_tokens=9, stop=[stop])) == whole.replace(stop, "", 1)


def pieces_of(url, **asked):
    events = talk(url, "POST", CHAT, chat(stream=True, **asked)).events
    deltas = [event["choices"][0]["delta"] for event in events if event != "[DONE]"]
    return [delta["content"] for delta in deltas if delta.get("content")]


# --- What it caches


def test_a_conversation_is_cached_with_its_answers(url):
    """The next turn has only its own tokens to be read; the same prompt again has one."""
    asked = [{"role": "system", "content": "Answer in a few words."}, *QUESTION]
    first, answer = counted(url, asked)
    again, _ = counted(url, asked)
    assert (again.prompt, again.cached) == (first.prompt, first.prompt - 1)
    turn, _ = counted(url, [*asked, answer, {"role": "user", "content": "And of Spain?"}])
    assert first.prompt < turn.cached < turn.prompt
    other, _ = counted(url, [*asked[:1], {"role": "user", "content": "What is the capital of Peru?"}])
    assert 0 < other.cached < first.prompt
    changed, _ = counted(url, [{"role": "system", "content": "Now answer in a few words."}, *QUESTION])
    assert changed.cached < other.cached


@pytest.mark.parametrize("alone", [{}, {"seed": 1}], ids=["in a batch", "alone"])
def test_the_prompt_of_an_interrupted_answer_is_cached(url, alone):
    asked = [{"role": "user", "content": f"Tell me a tale of mice and a cat. {alone}"}]
    with closing(Client(url, model={"backend": "default_model"})) as client:
        with client.open(asked, max_tokens=5000, logit_bias=ENDLESS, seconds=120, **alone) as stream:
            next(iter(stream))
        client.ask(QUESTION, max_tokens=1, seed=1, seconds=120)  # which waits for all that runs
    again, _ = counted(url, asked)
    assert again.cached == again.prompt - 1


class Counted(NamedTuple):
    prompt: int
    cached: int


def counted(url, messages):
    """The tokens of this prompt, and the message of the answer."""
    answer = talk(url, "POST", CHAT, chat(messages=messages, max_tokens=5)).json
    usage = answer["usage"]
    counts = Counted(usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])
    return counts, answer["choices"][0]["message"]


# --- Our client with it


@pytest.fixture
def client(url):
    with closing(Client(url, model={"backend": "default_model"})) as client:
        yield client


def test_our_client_knows_it(client):
    assert client.health() == Health(ready=True, server="mlx_lm")
    assert len(client.models()) == 1


def test_our_client_gets_the_answer(client, request):
    answer = client.ask(QUESTION, seconds=120)
    deltas, whole, ended = client.stream(QUESTION, seconds=120)
    assert whole["content"] == answer.content
    assert len(deltas) >= 7
    assert (answer.finish_reason, ended.finish_reason) == ("stop", "stop")
    assert answer.usage.completion_tokens == ended.usage.completion_tokens
    assert ended.usage.cached_tokens is not None
    assert 0 < answer.ttft < 120
    if "real" in request.node.callspec.id:
        assert answer.content == "The capital of France is Paris."


def test_our_client_sends_nothing_that_it_refuses(client):
    """Every field that we pass on to this kind of server."""
    answer = client.ask(
        [{"role": "developer", "content": "Be brief."}, *QUESTION],
        seconds=120,
        max_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=50,
        min_p=0.01,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        seed=7,
        stop=["###"],
        logit_bias={"5": 0.5},
        tools=[{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
        tool_choice="auto",
        response_format={"type": "json_object"},
        reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": False},
        user="me",
    )
    assert answer.usage.completion_tokens == 2


def test_our_client_ends_at_stop_strings(client):
    whole = client.ask(QUESTION, max_tokens=9, seconds=120).content
    for stop in (whole[6:12], whole[-3:]):
        answer = client.ask(QUESTION, max_tokens=9, stop=["never", stop], seconds=120)
        assert (answer.content, answer.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_our_client_stops_it_by_leaving(client):
    """A seed is served alone, after all that runs: were the long answer still running, it would have to wait for it."""
    with took_less_than(60):
        with client.open(QUESTION, max_tokens=5000, logit_bias=ENDLESS, seconds=120) as stream:
            next(iter(stream))
        client.ask(QUESTION, max_tokens=1, seed=1, seconds=120)


def test_our_client_knows_that_it_has_no_embeddings(client):
    with pytest.raises(UnsupportedCapability):
        client.vectors("a")


def test_a_model_that_is_not_there(url):
    """Last: it drops the model that was."""
    answer = talk(url, "POST", CHAT, chat(model="gpt-4o"))
    assert answer.is_an_error(404)
    assert answer.json["error"].startswith("Cannot find an appropriate cached snapshot")
    with closing(Client(url, model={"backend": "nobody/nothing"})) as client, pytest.raises(ModelNotServed):
        client.ask(seconds=120)


# --- Transcripts

ENDLESS = {"2": -100}
"""Keeps the model from saying its end marker."""


def chat(**changes):
    return {"messages": QUESTION, "max_tokens": 3, "temperature": 0, **changes}


class Transcript:
    """What a server said from the beginning to the end of a connection."""

    def __init__(self, raw):
        self.raw = raw
        head, _, self.body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self.version, status = (*first.split(" "), "0")[:2]
        self.status = int(status)
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def _events(self):
        return self.body.decode().removesuffix("\n\n").split("\n\n")

    @property
    def comments(self):
        return [event for event in self._events if event.startswith(":")]

    @property
    def events(self):
        data = [event.removeprefix("data: ") for event in self._events if event.startswith("data: ")]
        return [item if item == "[DONE]" else json.loads(item) for item in data]

    def is_framed_by_its_end_as(self, content_type):
        framing = self.headers.keys() & {"content-length", "transfer-encoding", "connection"}
        server = self.headers["server"].startswith("BaseHTTP/")
        return (self.version, self.headers["content-type"]) == ("HTTP/1.0", content_type) and server and not framing

    def is_an_error(self, status):
        return self.status == status and self.json.keys() == {"error"} and self.is_framed_by_its_end_as(JSON)


def talk(url, method, path, body=None, *, head=None):
    """Send one request over a connection of its own, and read until that ends."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    if head is None:
        head = "" if body is None else f"Content-Length: {len(data)}\r\n"
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{head}\r\n".encode() + data)
        received = []
        while part := received_from(connection):
            received.append(part)
    return Transcript(b"".join(received))


def received_from(connection):
    try:
        return connection.recv(65536)
    except ConnectionResetError:  # it closed without reading all that was sent
        return b""
