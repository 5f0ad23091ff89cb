"""The client of an MLX server, against every flavour of the simulated one, over real sockets."""

import base64
import os
import socket
import threading
import time
from array import array
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from fleet_worker.errors import (
    ConfigurationError,
    ConnectionFailure,
    FleetError,
    InstanceUnavailable,
    MalformedOutput,
    ProviderError,
    RequestTimeout,
    Unauthorized,
    UnsupportedCapability,
    UnsupportedParameter,
)
from fleet_worker.mlx.client import DEFAULT_URLS
from fleet_worker.mlx.health import Health
from fleet_worker.protocol.reply import Usage
from fleet_worker.simulator import FLAVOURS, Fault, embedding, reply_tokens
from fleet_worker.testing import SimulatedMLX
from tests.brokers import free_port
from tests.mlx_clients import HELLO, KINDS, Client, answering, client_of, said, served, took_less_than

EMBEDDERS = sorted(set(FLAVOURS) - {"mlx_lm"})
WHOLE = "".join(reply_tokens(HELLO, 100))
CALLS = [{"name": "weather", "arguments": {"city": "Zürich"}}, {"name": "time", "arguments": {}}]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "time")]
TEXTS = ["a", "b", "žena", "東京", "last"]


# --- Chats


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_chat_returns_the_whole_answer(flavour):
    with served(flavour) as (_, client):
        answer = client.ask()
        assert (answer.content, answer.reasoning, answer.tool_calls) == (WHOLE, None, [])
        assert answer.finish_reason == "stop"
        assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (32, 4)
        assert answer.usage.total_tokens == 36


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_stream_says_in_pieces_what_a_chat_says_at_once(flavour):
    """vllm-mlx sends the last text in the chunk with the finish_reason. No delta is empty."""
    with served(flavour) as (_, client):
        deltas, whole, answer = client.stream()
        assert whole == {"content": WHOLE, "reasoning": None, "tool_calls": []}
        assert len(deltas) == 32
        assert all(delta.content and not delta.reasoning for delta in deltas)
        assert (answer.content, answer.finish_reason) == (None, "stop")
        assert answer.usage.completion_tokens == 32


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_answer_that_max_tokens_cut_says_length_whatever_its_server_says(flavour):
    """mlx-openai-server and mlx-omni-server report "stop", and the second loses the last token: it is asked for one
    more."""
    with served(flavour) as (_, client):
        answer = client.ask(max_tokens=8)
        assert answer.finish_reason == "length"
        assert answer.content == "".join(reply_tokens(HELLO, 8))
        assert answer.usage.completion_tokens == 8
        assert client.ask(max_tokens=40).finish_reason == "stop"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_answer_in_one_piece_has_a_time_to_its_first_token(flavour):
    with served(flavour, tokens=1) as (_, client):
        answer = client.ask()
        assert 0 < answer.ttft < 10
        assert answer.tokens_per_second is None


def test_times_are_counted_from_the_request():
    with served(ttft=0.1, token_interval=0.01) as (_, client):
        started = time.monotonic()
        answer = client.ask()
        elapsed = time.monotonic() - started
        assert 0.1 <= answer.ttft < elapsed
        assert 31 / elapsed <= answer.tokens_per_second < 200


def test_a_stream_arrives_as_it_is_generated():
    with served(token_interval=0.01, tokens=20) as (_, client), client.open() as stream:
        arrived = [time.monotonic() for _ in stream]
        assert len(arrived) >= 10
        assert arrived[-1] - arrived[0] >= 0.1


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_cached_tokens_are_reported_where_a_server_counts_them(flavour):
    with served(flavour, prefill_rate=100_000) as (_, client):
        asked = [{"role": "user", "content": "one two three four"}]
        client.ask(asked)
        cached = client.ask(asked).usage.cached_tokens
        assert cached == {"mlx_lm": 6, "mlx_openai": 6, "mlx_vlm": 0}.get(flavour)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_separators_of_unicode_are_text(flavour):
    """vllm-mlx sends U+2028 and similar as they are; they do not end a line of an event stream."""
    with served(flavour, separators=True) as (_, client):
        expected = "".join(reply_tokens(HELLO, 100, separators=True))
        assert "\u2028" in expected
        assert client.ask().content == client.stream()[1]["content"] == expected


@pytest.mark.parametrize("fault", ["drip", "split", "join", "crlf", "cr"])
@pytest.mark.parametrize("flavour", ["mlx_lm", "vllm_batched"])
def test_a_stream_may_be_cut_into_segments_anywhere(flavour, fault):
    """It is cut inside events, UTF-8 characters and line ends, with each of the three line ends."""
    with served(flavour, tokens=12) as (server, client):
        server.fail(Fault(fault, seconds=0, times=2))
        expected = "".join(reply_tokens(HELLO, 12))
        assert client.ask().content == client.stream()[1]["content"] == expected
        assert [request.fault for request in server.requests] == [fault, fault]


# --- Reasoning


@pytest.mark.parametrize("flavour", sorted(set(FLAVOURS) - {"omni"}))
def test_reasoning_has_one_name(flavour):
    with served(flavour, reasoning=["Let", " me", " see."], tokens=5) as (_, client):
        content = "".join(reply_tokens(HELLO, 5))
        answer = client.ask()
        assert (answer.content, answer.reasoning) == (content, "Let me see.")
        assert client.stream()[1] == {"content": content, "reasoning": "Let me see.", "tool_calls": []}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_reasoning_in_tags_is_taken_out_of_the_content(flavour):
    with served(flavour, reasoning=["Let", " me", " see."], think_tags=True, tokens=5) as (_, client):
        content = "".join(reply_tokens(HELLO, 5))
        answer = client.ask()
        assert (answer.content, answer.reasoning) == (content, "Let me see.")
        assert client.stream()[1] == {"content": content, "reasoning": "Let me see.", "tool_calls": []}


def test_a_tag_that_is_never_closed_leaves_no_visible_text():
    with served(reasoning=["Let", " me", " see."], think_tags=True) as (_, client):
        answer = client.ask(max_tokens=3)
        assert (answer.content, answer.reasoning, answer.finish_reason) == (None, "Let me", "length")
        assert client.stream(max_tokens=3)[1]["reasoning"] == "Let me"


def test_a_template_that_opens_the_tag_itself():
    """The output then begins with reasoning, and has only the closing tag."""
    with served(client={"model": {"starts_in_reasoning": True}}) as (server, client):
        server.fail(Fault("status", status=200, body=said("Hm", ".</thi", "nk>\n\nYes", "."), times=2))
        answer = client.ask()
        assert (answer.content, answer.reasoning) == ("Yes.", "Hm.")
        assert client.stream()[1] == {"content": "Yes.", "reasoning": "Hm.", "tool_calls": []}
        server.fail(Fault("status", status=200, body=said("Hm", "."), times=2))
        assert client.ask().reasoning == client.stream()[1]["reasoning"] == "Hm."


def test_an_orphan_closing_tag():
    """In a chat, the text before it is reasoning. In a stream, that text was already delivered as visible."""
    with served() as (server, client):
        server.fail(Fault("status", status=200, body=said("Hm", ".</think>", "Yes."), times=2))
        answer = client.ask()
        assert (answer.content, answer.reasoning) == ("Yes.", "Hm.")
        assert client.stream()[1]["content"] == "Hm.Yes."


def test_what_might_have_become_a_tag_is_not_lost_at_the_end():
    with served() as (server, client):
        server.fail(Fault("status", status=200, body=said("a < b <thin"), times=2))
        assert client.ask().content == client.stream()[1]["content"] == "a < b <thin"


# --- Tool calls


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_tool_calls_come_whole_however_they_were_sent(flavour):
    """They come in one delta, in fragments, or in the chunk with the finish_reason."""
    with served(flavour, tool_calls=CALLS) as (_, client):
        answer = client.ask(tools=TOOLS, max_tokens=200)
        assert [call["function"]["name"] for call in answer.tool_calls] == ["weather", "time"]
        assert [call["function"]["arguments"] for call in answer.tool_calls] == ['{"city": "Zürich"}', "{}"]
        assert all(call["id"] and call["type"] == "function" for call in answer.tool_calls)
        assert (answer.finish_reason, answer.content) == ("tool_calls", None)
        deltas, whole, ended = client.stream(tools=TOOLS, max_tokens=200)
        assert [call["function"] for call in whole["tool_calls"]] == [call["function"] for call in answer.tool_calls]
        assert {call["index"] for delta in deltas for call in delta.tool_calls} == {0, 1}
        assert ended.finish_reason == "tool_calls"


# --- What reaches the server

EVERYTHING = {
    "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    "max_completion_tokens": 9,
    "max_tokens": None,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "seed": 7,
    "stop": "###",
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "response_format": {"type": "json_object"},
    "logit_bias": {"5": 1.0},
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": False},
    "n": 1,
    "user": "somebody",
}
COMMON = {"messages", "model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "tools"}
SAMPLING = {"top_k", "min_p", "repetition_penalty"}
PENALTIES = {"presence_penalty", "frequency_penalty", "logit_bias"}
KNOWN = {
    "mlx_lm": {*SAMPLING, *PENALTIES, "seed", "chat_template_kwargs"},
    "vllm_simple": {*SAMPLING, *PENALTIES, "stop", "tool_choice", "response_format", "chat_template_kwargs"}
    - {"frequency_penalty"},
    "mlx_openai": {*SAMPLING, *PENALTIES, "tool_choice", "response_format", "chat_template_kwargs"},
    "omni": {"response_format"},
    "rapid_mlx": {*SAMPLING, *PENALTIES, "stop", "seed", "tool_choice", "response_format", "parallel_tool_calls",
                  "reasoning_effort", "chat_template_kwargs"} - {"logit_bias"},
    "mlx_vlm": {*SAMPLING, *PENALTIES, "seed", "tool_choice", "response_format", "reasoning_effort", "enable_thinking",
                "context_management"},
    "openai": {*PENALTIES, "stop", "seed", "tool_choice", "parallel_tool_calls", "response_format",
               "reasoning_effort"},
}  # fmt: skip
KNOWN["vllm_batched"] = KNOWN["vllm_simple"]
REFUSED = {
    "vllm_simple": {"frequency_penalty"},
    "vllm_batched": {"frequency_penalty"},
    "omni": {*SAMPLING, *PENALTIES, "chat_template_kwargs"},
    "rapid_mlx": {"logit_bias"},
    "openai": {*SAMPLING, "chat_template_kwargs"},
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_server_gets_what_it_knows_and_one_canonical_model(flavour):
    """It gets no null, no string for `stop` and no role that it does not know, and it answers."""
    refused = REFUSED.get(flavour, set())
    with served(flavour) as (server, client):
        client.ask(**{name: value for name, value in EVERYTHING.items() if name not in refused})
        (request,) = server.requests
        assert request.body.keys() == COMMON | KNOWN[flavour]
        assert request.model == "sim-chat"
        assert request.body["stream"] is True
        assert request.body["stream_options"] == {"include_usage": True}
        assert (request.body["max_tokens"], request.body["temperature"]) == (10 if flavour == "omni" else 9, 0)
        assert request.body.get("stop", ["###"]) == ["###"]
        assert [message["role"] for message in request.body["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    ("flavour", "field"), [(flavour, field) for flavour in REFUSED for field in sorted(REFUSED[flavour])]
)
def test_what_a_server_cannot_do_is_refused_by_its_name(flavour, field):
    """In chats and in streams, before anything is sent. Another instance may be able to."""
    with served(flavour) as (server, client):
        for ask in (client.ask, client.stream):
            with pytest.raises(UnsupportedParameter) as raised:
                ask(**{field: EVERYTHING[field]}, temperature=0.5)
            assert raised.value.metadata == {"param": field}
            assert field in raised.value.message
            assert raised.value.retryable
        assert server.requests == []


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_request_names_its_length_and_asks_for_plain_bytes(flavour):
    """mlx_lm.server answers 411 to a chunked upload."""
    with served(flavour, client={"api_key": "sesame"}) as (server, client):
        client.ask()
        headers = server.requests[0].headers
        assert int(headers["content-length"]) > 0
        assert "transfer-encoding" not in headers
        assert headers["content-type"] == "application/json"
        assert headers["accept-encoding"] == "identity"
        assert headers["authorization"] == "Bearer sesame"


def test_a_server_without_a_key_is_asked_without_one():
    with served() as (server, client):
        client.ask()
        assert "authorization" not in server.requests[0].headers


def test_what_a_model_says_when_a_caller_does_not():
    with served(client={"model": {"max_output_tokens": 5, "temperature": 0.25}}) as (server, client):
        client.ask(max_tokens=None, temperature=None)
        assert (server.requests[0].body["max_tokens"], server.requests[0].body["temperature"]) == (5, 0.25)


def test_a_server_that_cannot_be_told_to_leave_its_tools_alone_does_not_get_them():
    with served(tool_calls=CALLS) as (_, client):
        assert client.ask(tools=TOOLS, tool_choice="none").content == WHOLE


# --- Embeddings


@pytest.mark.parametrize("flavour", EMBEDDERS)
def test_vectors_come_in_the_order_of_their_texts(flavour):
    with served(flavour, models=["sim-chat"]) as (server, client):
        embedded = client.vectors(*TEXTS)
        assert [floats(text) for text in embedded.data] == [embedding(text) for text in TEXTS]
        assert embedded.dimensions == 384
        (request,) = server.requests
        assert (request.path, request.body["input"], request.model) == ("/v1/embeddings", TEXTS, "sim-chat")


@pytest.mark.parametrize("flavour", EMBEDDERS)
def test_vectors_are_asked_for_as_base64_where_that_is_known(flavour):
    """vllm-mlx and mlx-omni-server always send numbers."""
    with served(flavour) as (server, client):
        client.vectors("a")
        expected = "base64" if flavour in ("mlx_openai", "rapid_mlx", "openai") else None
        assert server.requests[0].body.get("encoding_format") == expected


@pytest.mark.parametrize("flavour", EMBEDDERS)
def test_usage_of_an_embedding_may_be_missing(flavour):
    """mlx-openai-server sends null."""
    with served(flavour) as (_, client):
        count = None if flavour == "mlx_openai" else 3
        assert client.vectors("one two", "three").usage == Usage(prompt_tokens=count, total_tokens=count)


def test_a_large_embedding_is_asked_for_in_batches():
    with served("vllm_batched", client={"limits": {"embed_batch": 2}}) as (server, client):
        embedded = client.vectors(*TEXTS)
        assert [floats(text) for text in embedded.data] == [embedding(text) for text in TEXTS]
        assert [request.body["input"] for request in server.requests] == [TEXTS[:2], TEXTS[2:4], TEXTS[4:]]
        assert embedded.usage.prompt_tokens == 5


def test_batches_must_have_the_same_dimensions():
    with served("vllm_batched", client={"limits": {"embed_batch": 1}}) as (server, client):
        server.fail(Fault("wrong_dimension", contains='"b"'))
        with pytest.raises(MalformedOutput, match="383 instead of 384"):
            client.vectors("a", "b")


def test_dimensions_that_are_configured_are_held():
    with (
        served("vllm_batched", client={"model": {"dimensions": 256}}) as (_, client),
        pytest.raises(MalformedOutput, match="384 instead of 256"),
    ):
        client.vectors("a")


def test_mlx_lm_has_no_embeddings():
    with served() as (_, client), pytest.raises(UnsupportedCapability, match="no such endpoint"):
        client.vectors("a")


def test_an_embedding_ends_at_its_deadline():
    """Before the headers arrive, and in the middle of a body, however its length is given."""
    with served("vllm_batched") as (server, client):
        server.fail(Fault("slow_headers", seconds=30))
        with took_less_than(5), pytest.raises(RequestTimeout, match="deadline"):
            client.vectors("a", seconds=0.1)


@pytest.mark.parametrize("framing", ["content-length: 999", "x-framed-by: its end"])
def test_half_a_response_is_waited_for_until_the_deadline(framing):
    with answering(half(framing)) as url, closing(Client(url, clocks={"connect": 0.1})) as client:
        for ask in (lambda: client.vectors("a", seconds=0.1), client.health, client.models):
            with took_less_than(5), pytest.raises(RequestTimeout, match="deadline"):
                ask()


# --- Health and models


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_server_shows_what_kind_it_is(flavour):
    """mlx-omni-server has no /health, and cannot be told from any other FastAPI server."""
    with served(flavour, client={"server": "openai"}) as (_, client):
        engine = {"vllm_simple": "simple", "vllm_batched": "batched", "rapid_mlx": "batched"}.get(flavour)
        assert client.health() == Health(True, KINDS[flavour] if flavour != "omni" else "openai", engine)


def test_a_dead_generation_thread_is_told_by_newer_servers_only():
    with served() as (server, client):
        server.engine.die()
        assert client.health() == Health(ready=False, server="mlx_lm")
    with served(old_health=True) as (server, client):
        server.engine.die()
        assert client.health().ready


@pytest.mark.parametrize(
    ("status", "body", "ready"),
    [
        (200, {"status": "ok"}, True),
        (200, {"status": "healthy"}, True),
        (200, {"status": "unhealthy"}, False),
        (200, {"status": "LOADING"}, False),
        (200, {"status": "healthy", "ready": False, "state": "loading"}, False),
        (200, {"status": "healthy", "ready": True, "state": "ready"}, True),
        (200, {"status": "loading"}, False),
        (503, {"status": "unhealthy", "model_status": "no_models"}, False),
        (500, "Internal Server Error", False),
        (404, {"detail": "Not Found"}, True),
        (401, {"detail": "Unauthorized"}, False),
        (200, "fine, thanks", True),
        (200, ["engine_type"], True),
        (200, "", True),
        (200, "<!DOCTYPE html><html>fine, thanks</html>", False),
        (200, "\n<html></html>", False),
        (200, {"status": ["ok"], "engine_type": {"a": 1}}, True),
    ],
)
def test_health_is_the_status_and_the_body(status, body, ready):
    with served("openai") as (server, client):
        server.fail(Fault("status", path="/health", status=status, body=body))
        assert client.health().ready is ready


def test_a_server_that_is_met_for_the_first_time_may_be_another_program():
    """`python -m http.server` listens at port 8000 and answers 404, as a server without `/health` does."""
    with served("openai") as (server, client):
        page, routeless = "<html></html>", Fault("status", path="/health", status=404, body="<html></html>", times=None)
        server.fail(Fault("status", path="/health", status=200, body=page))
        assert not client.identify().ready
        server.fail(routeless)
        assert client.identify() == Health(ready=True, server="openai")
        for status, body in ((404, page), (200, page), (200, "fine"), (501, "")):
            server.fail(Fault("status", path="/v1/models", status=status, body=body))
            with pytest.raises(InstanceUnavailable, match="no MLX server"):
                client.identify()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_server_is_recognised_as_one(flavour):
    with served(flavour, api_key="sesame") as (_, client):
        assert client.identify().ready


def test_a_server_of_web_pages_is_no_server(web_server):
    with closing(Client(web_server)) as client, pytest.raises(InstanceUnavailable, match="no MLX server"):
        client.identify()


@pytest.fixture
def web_server():
    """The URL of what `python -m http.server` runs."""
    handler = partial(SimpleHTTPRequestHandler, directory="/nowhere")
    handler.func.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status):
    """Not even to another path: a request, its prompt and its key are only for the server that was configured."""
    with served("openai", client={"api_key": "sesame"}) as (server, client), served("openai") as (other, _):
        targets = (other.base_url, server.base_url, "//elsewhere", "", "http://[::1")
        for target in targets:
            for path, ask in EACH_PATH.items():
                server.fail(Fault("status", path=path, status=status, headers={"location": target + path}))
                with pytest.raises(ConfigurationError, match="redirect"):
                    ask(client)
        assert other.requests == []
        assert len(server.requests) == len(targets) * len(EACH_PATH)


EACH_PATH = {
    "/health": Client.health,
    "/v1/models": Client.models,
    "/v1/embeddings": lambda client: client.vectors("a"),
    "/v1/chat/completions": Client.ask,
}


def test_a_compressed_answer_is_read_though_nobody_asked_for_it():
    with served("vllm_batched") as (server, client):
        for path, ask in EACH_PATH.items():
            expected = ask(client)
            server.fail(Fault("gzip", path=path))
            answer = ask(client)
            assert getattr(answer, "content", answer) == getattr(expected, "content", expected)
            assert server.requests[-1].fault == "gzip"


@pytest.mark.parametrize("code", [500, "gzip"])
def test_a_flood_is_left_soon(code):
    """Compressed, a thousand bytes of it are a million."""
    with served("openai") as (server, client), took_less_than(10):
        for path, ask in EACH_PATH.items():
            server.fail(Fault("flood", path=path, code=code))
            with pytest.raises(MalformedOutput, match=r"more than|too large"):
                ask(client)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "gzip", "deflate"])
def test_what_cannot_be_decoded_is_malformed(encoding):
    with served("openai") as (server, client):
        for path, ask in EACH_PATH.items():
            server.fail(Fault("status", path=path, status=200, body="oops", headers={"content-encoding": encoding}))
            with pytest.raises(MalformedOutput, match="compress"):
                ask(client)
            server.fail(Fault("status", path=path, status=503, body="oops", headers={"content-encoding": encoding}))
            with pytest.raises(FleetError):
                assert ask(client).ready


def test_no_cookie_is_kept():
    """A server could send new ones with every answer."""
    with served("openai") as (server, client):
        server.fail(Fault("status", path="/health", status=200, body="", headers={"set-cookie": "a=b; Path=/"}))
        client.health()
        client.health()
        assert "cookie" not in server.requests[-1].headers


@pytest.mark.parametrize(
    "head", ["x: " + "y" * 200_000, "HTTP/1.1 100 Continue\r\n\r\n" * 50_000, "\r\n".join(["x: y"] * 50_000)]
)
def test_headers_without_end_are_refused(head):
    with (
        answering(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n{{}}") as url,
        closing(Client(url, clocks={"connect": 1})) as client,
        took_less_than(5),
        pytest.raises(ConnectionFailure, match="valid HTTP"),
    ):
        client.health()


def test_a_body_without_end_is_not_kept():
    class Endless(httpx.SyncByteStream):
        def __iter__(self):
            return iter(lambda: b" " * 65_536, None)

    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Endless()))
    with closing(Client("http://a", transport=transport)) as client:
        for ask in (client.models, client.health, lambda: client.vectors("a")):
            with pytest.raises(MalformedOutput, match="more than"):
                ask()


def test_a_server_that_nobody_can_reach_has_died():
    with served("vllm_batched") as (server, client):
        assert not client.has_died()
        server.kill()
        assert client.has_died()
        server.restart()
        assert not client.has_died()


def test_a_server_that_says_that_it_is_not_ready_has_died_and_one_that_does_not_know_has_not():
    with served() as (server, client), served(old_health=True) as (unaware, of_unaware):
        server.engine.die()
        unaware.engine.die()
        assert client.has_died()
        assert not of_unaware.has_died()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", path="/health", status=302, headers={"location": "/"}),
        Fault("status", path="/health", status=404),
        Fault("status", path="/health", status=200, body="<"),
        Fault("flood", path="/health"),
    ],
    ids=["redirect", "missing", "page", "flood"],
)
def test_a_server_that_answers_health_badly_has_not_died(fault):
    with served("openai") as (server, client):
        server.fail(fault)
        assert client.has_died() is (fault.body == "<")


def test_a_server_that_is_late_is_busy_and_not_dead():
    with served("vllm_batched") as (server, client), took_less_than(1):
        server.fail(Fault("slow_headers", path="/health", seconds=30))
        assert not client.has_died()


def test_a_server_is_dead_if_it_hangs_up_twice():
    """A single refusal may come from a full backlog."""
    with served("vllm_batched") as (server, client):
        server.fail(Fault("empty_reply", path="/health", times=3))
        assert client.has_died()
        assert not client.has_died()


def test_a_request_that_came_to_a_dead_generation_thread_says_that_a_server_died():
    """It may be the request that killed it. A server that only refuses a connection did not die of a request."""
    with served() as (server, client):
        server.engine.die()
        with pytest.raises(InstanceUnavailable) as raised:
            client.ask()
        assert raised.value.metadata == {"instance_died": True}
        server.kill()
        with pytest.raises(InstanceUnavailable) as raised:
            client.ask(seconds=0.1)
        assert raised.value.metadata == {}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_models_are_what_the_server_lists(flavour):
    with served(flavour, models=["one", "/models/two"]) as (_, client):
        assert client.models() == ["one", "/models/two"]


def test_a_server_may_list_nothing_or_an_empty_body():
    with served(listed=[]) as (server, client):
        assert client.models() == []
        server.fail(Fault("empty_body", path="/v1/models"))
        assert client.models() == []


@pytest.mark.parametrize(
    ("body", "models"),
    [
        ({"data": [{"id": "a"}, {"id": 5}, {}, "b", None, {"id": "c"}]}, ["a", "c"]),
        ({"data": [{"id": "a"}, {"id": "a"}, {"id": ""}, {"id": "b" * 257}, {"id": "c\n"}, {"id": ["d"]}]}, ["a"]),
        ({"data": [{"id": str(each)} for each in range(10_000)]}, [str(each) for each in range(10_000)]),
        ({"data": [{}] * 150_000}, MalformedOutput),
        ({"error": "busy"}, ProviderError),
        ({"error": {"code": 401}}, Unauthorized),
        ({"detail": "no"}, ProviderError),
        ([{"id": "a"}], MalformedOutput),
        ({"data": {}}, MalformedOutput),
        ({"data": None}, MalformedOutput),
        ({}, MalformedOutput),
        ([], MalformedOutput),
        ("<html>", MalformedOutput),
    ],
)
def test_a_list_of_models_is_taken_with_care(body, models):
    with served("openai") as (server, client):
        server.fail(Fault("status", path="/v1/models", status=200, body=body))
        if isinstance(models, list):
            assert client.models() == models
        else:
            with pytest.raises(models):
                client.models()


def test_a_wrong_key_is_said_to_be_wrong():
    with served("vllm_batched", api_key="sesame", client={"api_key": "open"}) as (_, client):
        assert client.health().ready
        for ask in (client.models, client.ask, client.vectors):
            with pytest.raises(Unauthorized) as raised:
                ask(*(["a"] if ask == client.vectors else []))
            assert not raised.value.retryable


# --- Connections


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_request_has_a_connection_of_its_own(flavour):
    """After an error too; and none stays open."""
    with served(flavour) as (server, client):
        server.fail(Fault("status", status=500, times=2))
        for ask in (client.ask, client.ask, client.ask, client.stream, client.health, client.models):
            with suppress(ProviderError):
                ask()
        assert server.counters["connections"] == 6
        assert all(request.headers["connection"] == "close" for request in server.requests)
        server.wait_for(lambda it: it.counters["open_connections"] == 0)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_many_threads_share_a_client(flavour):
    with served(flavour, client={"limits": {"concurrency": 16}}, slots=16) as (_, client):
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(client.ask().content)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [WHOLE] * 16


def test_no_delay_is_set_on_both_ends_of_every_connection():
    """If one end collects data before it sends (Nagle), every first token is 40 ms late."""
    with (
        served("vllm_batched", token_interval=0.01) as (server, client),
        client.open(),
        connections_of(server.port) as ends,
    ):
        assert len({end.getsockname() for end in ends}) == 2
        assert all(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for end in ends)


def test_a_server_that_starts_late_is_reached():
    port = free_port()
    with SimulatedMLX(port=port) as server:
        server.kill()
        with client_of(server) as client:
            late = threading.Timer(0.15, server.restart)
            late.start()
            assert client.ask().content == WHOLE
            late.join()
        assert len(server.requests) == 1


def test_nobody_listens():
    with closing(Client(f"http://127.0.0.1:{free_port()}", clocks={"connect": 0.1})) as client:
        for ask in (client.ask, client.stream, lambda: client.vectors("a"), client.health, client.models):
            with took_less_than(5), pytest.raises(InstanceUnavailable) as raised:
                ask()
            assert raised.value.retryable


def test_connecting_ends_when_the_server_is_known_to_be_away():
    with closing(Client(f"http://127.0.0.1:{free_port()}", clocks={"connect": 30})) as client:
        known = threading.Timer(0.1, client.unreachable.set)
        known.start()
        with took_less_than(5), pytest.raises(InstanceUnavailable):
            client.ask()
        known.join()


def test_connecting_ends_at_the_deadline():
    with (
        closing(Client(f"http://127.0.0.1:{free_port()}", clocks={"connect": 30})) as client,
        took_less_than(5),
        pytest.raises(InstanceUnavailable),
    ):
        client.ask(seconds=0.1)


def test_a_probe_says_at_once_that_nobody_listens():
    with (
        closing(Client(f"http://127.0.0.1:{free_port()}", clocks={"connect": 30})) as client,
        took_less_than(5),
        pytest.raises(InstanceUnavailable),
    ):
        client.health()


def test_a_deadline_that_is_over_reaches_no_server():
    with served("openai") as (server, client):
        for ask in (client.ask, client.stream, lambda seconds: client.vectors("a", seconds=seconds)):
            with pytest.raises(RequestTimeout) as raised:
                ask(seconds=-1)
            assert not raised.value.retryable
        assert server.requests == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("empty_reply"),
        Fault("empty_body"),
        Fault("status", status=500),
        Fault("status", status=503),
        Fault("reset"),
        Fault("eof"),
        Fault("early_error"),
    ],
    ids=lambda fault: f"{fault.kind} {fault.status}",
)
@pytest.mark.parametrize("flavour", ["mlx_lm", "vllm_batched"])
def test_a_request_that_has_reached_a_server_is_never_sent_again(flavour, fault):
    with served(flavour) as (server, client):
        server.fail(fault)
        with pytest.raises(ProviderError) as raised:
            client.ask()
        assert raised.value.retryable
        assert len(server.requests) == 1


# --- Wrong configuration


@pytest.mark.parametrize("url", ["http://[::1", "http://a\nb", "http://a..b", "http://" + 64 * "a"])
def test_a_base_url_that_cannot_be_one_is_a_matter_of_configuration(url):
    with pytest.raises(ConfigurationError):
        Client(url)


@pytest.mark.parametrize("key", ["geheim-ß", "secret\nkey"])
def test_a_key_that_no_header_can_carry_is_a_matter_of_configuration(key):
    with pytest.raises(ConfigurationError, match="api_key") as raised:
        Client("http://127.0.0.1:8000", api_key=key)
    assert key not in repr(raised.value)


def test_a_redirect_is_a_matter_of_configuration():
    with served("openai") as (server, client):
        server.fail(Fault("status", status=307, headers={"location": "http://elsewhere/"}))
        with pytest.raises(ConfigurationError, match="redirect"):
            client.ask()


def test_the_default_urls_are_where_mlx_servers_listen():
    assert DEFAULT_URLS == ("http://127.0.0.1:8000", "http://127.0.0.1:8080")


# --- Help


def half(header):
    return f'HTTP/1.1 200 OK\r\n{header}\r\n\r\n{{"data": ['


def floats(text):
    return array("f", base64.b64decode(text)).tolist()


@contextmanager
def connections_of(port):
    """The ends in this process of all TCP connections to a port."""
    with ExitStack() as opened:
        ends = []
        for descriptor in os.listdir("/dev/fd"):
            with suppress(OSError):  # closed meanwhile, no socket, or one that listens
                end = opened.enter_context(socket.socket(fileno=os.dup(int(descriptor))))
                if end.family == socket.AF_INET and port in (end.getsockname()[1], end.getpeername()[1]):
                    ends.append(end)
        yield ends
