"""The simulated MLX server: what it puts on the wire, flavour by flavour and fault by fault, and what it counts."""

import base64
import contextlib
import json
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from fleet_worker.simulator import CHAT_TEMPLATE, FLAVOURS, Fault, SimulatedMLX, embedding, reply_tokens
from fleet_worker.simulator.__main__ import main

HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = {"name": "weather", "arguments": {"city": "Zürich", "days": 3}}
FASTAPI = ["vllm_simple", "vllm_batched", "mlx_openai", "omni"]
UVICORN = [*FASTAPI, "openai"]
LEFT_OPEN = "{% set all = messages %}{% set messages = all[:-1] %}\n" + CHAT_TEMPLATE + '{{ all[-1]["content"] }}'
OPEN_END = {"chat_template_kwargs": {"add_generation_prompt": False, "continue_final_message": True}}


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Made once: httpx would load certificates for every request."""


def chat_body(**changes: Any) -> dict[str, Any]:
    body = {"model": "sim-chat", "messages": HELLO, "max_tokens": 8, "temperature": 0, "stream": True}
    return {**body, **changes}


def http(method: str, url: str, **options: Any) -> httpx.Response:
    return httpx.request(method, url, verify=NO_TLS, timeout=5, **options)


def post(server: SimulatedMLX, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return http("POST", server.base_url + path, json=body if "input" in body else chat_body(**body))


def payloads(text: str) -> list[Any]:
    """The data of an event stream: objects, and "[DONE]"."""
    data = [event.removeprefix("data: ") for event in text.split("\n\n") if event.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def chunks(server: SimulatedMLX, **body: Any) -> list[dict[str, Any]]:
    return [item for item in payloads(post(server, **body).text) if item != "[DONE]"]


def deltas(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [choice["delta"] for item in items for choice in item["choices"]]


def text_of(items: list[dict[str, Any]], field: str = "content") -> str:
    return "".join(delta.get(field) or "" for delta in deltas(items))


def connect(server: SimulatedMLX, head: str = "", path: str = "/v1/chat/completions", **body: Any) -> socket.socket:
    """A raw connection with one chat request under way."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    data = json.dumps(chat_body(**body)).encode()
    head = head or f"POST {path} HTTP/1.1\r\nHost: sim\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + (data if "Content-Length" in head else b""))
    return connection


def read_all(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


def pieces(connection: socket.socket) -> list[bytes]:
    with connection:
        return list(iter(lambda: connection.recv(65536), b""))


# --- text and vectors


def test_the_same_conversation_gets_the_same_tokens():
    """A shorter limit cuts the same reply, another conversation gets another one."""
    long = reply_tokens(HELLO, 512, tokens=512)
    assert long[:20] == reply_tokens(HELLO, 20)
    assert long[:32] == reply_tokens(HELLO, 512)
    assert long != reply_tokens([{"role": "user", "content": "hello!"}], 512, tokens=512)
    assert not long[0].startswith(" ")
    assert sum(token.startswith(" ") for token in long) > 400
    assert "🚢" in "".join(long)


def test_an_embedding_is_a_unit_vector_of_float32_numbers():
    """The same text gets the same vector, exact in base64 too."""
    vector = embedding("hello", 256)
    assert vector == embedding("hello", 256) != embedding("hallo", 256)
    assert sum(number * number for number in vector) == pytest.approx(1.0)
    assert array("f", vector).tolist() == vector
    assert len(embedding("")) == 384


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_flavour_streams_the_text_of_reply_tokens(flavour):
    """Only omni loses its last token when max_tokens cuts."""
    with SimulatedMLX(flavour=flavour) as server:
        assert text_of(chunks(server, max_tokens=512)) == "".join(reply_tokens(HELLO, 512))
        cut = reply_tokens(HELLO, 8)[: 7 if flavour == "omni" else 8]
        assert text_of(chunks(server)) == "".join(cut)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_flavour_answers_without_a_stream(flavour):
    """The reply has the same text, a finish reason and usage."""
    with SimulatedMLX(flavour=flavour) as server:
        response = post(server, stream=False, max_tokens=512)
        choice = response.json()["choices"][0]
        assert choice["message"]["content"] == "".join(reply_tokens(HELLO, 512))
        assert choice["finish_reason"] == "stop"
        assert response.json()["usage"]["completion_tokens"] == 32
        assert response.headers["content-length"]


# --- framing


def test_mlx_lm_ends_a_stream_by_closing_the_connection():
    """HTTP/1.0, no length, no chunking: the end of the stream is the end of the connection."""
    with SimulatedMLX() as server:
        head, _, body = read_all(connect(server, "")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 200 OK\r\n")
        assert b"content-length" not in head.lower()
        assert b"chunked" not in head
        assert body.startswith(b": keepalive 3/4\n\n: keepalive 4/4\n\ndata: {")
        assert body.endswith(b"\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("flavour", UVICORN)
def test_the_others_send_chunks_and_keep_the_connection(flavour):
    """Two streams over one connection."""
    with SimulatedMLX(flavour=flavour) as server, httpx.Client(base_url=server.base_url, verify=False) as client:
        for _ in range(2):
            response = client.post("/v1/chat/completions", json=chat_body())
            assert response.http_version == "HTTP/1.1"
            assert response.headers["transfer-encoding"] == "chunked"
            assert response.text.endswith("data: [DONE]\n\n")
        assert server.counters["connections"] == 1


def test_an_idle_connection_is_closed():
    """As uvicorn does after five seconds, here sooner."""
    with SimulatedMLX(flavour="openai", keep_alive=0.05) as server:
        connection = connect(server, "GET /health HTTP/1.1\r\nHost: sim\r\n\r\n")
        assert read_all(connection).endswith(b'{"status": "ok"}')


def test_mlx_lm_matches_paths_exactly_and_wants_a_length():
    """Errors of its HTTP layer have no length, and are called JSON whatever they are."""
    with SimulatedMLX() as server:
        for path in ("/v1/chat/completions/", "/v1/chat/completions?a=1", "/v1/embeddings"):
            response = post(server, path)
            assert (response.status_code, response.text) == (404, "Not Found")
            assert response.headers["content-type"] == "application/json"
            assert "content-length" not in response.headers
        bare = connect(server, "POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert bare.recv(4096).startswith(b"HTTP/1.0 411 Length Required\r\n")
        bare.close()
        assert http("PUT", server.base_url + "/v1/models").status_code == 501
        assert http("GET", server.base_url + "/v1/models/anything").status_code == 200
        assert post(server, "/chat/completions").status_code == 200


def test_a_fastapi_server_knows_its_routes_and_reads_chunked_bodies():
    """A query string does no harm; a wrong method and a wrong path are told apart."""
    with SimulatedMLX(flavour="vllm_batched") as server:
        assert post(server, "/v1/chat/completions?a=1").status_code == 200
        assert http("GET", server.base_url + "/v1/chat/completions").status_code == 405
        assert http("GET", server.base_url + "/v1/nothing").json() == {"detail": "Not Found"}
        body = json.dumps(chat_body()).encode()
        assert http("POST", server.base_url + "/v1/chat/completions", content=iter([body[:9], body[9:]])).is_success


# --- chunks


def test_chunk_shapes_differ_as_they_do():
    """The role in every delta or once, finish_reason null or missing, ASCII or UTF-8."""
    first: dict[str, dict[str, Any]] = {}
    for flavour in FLAVOURS:
        with SimulatedMLX(flavour=flavour) as server:
            first[flavour] = chunks(server)[0]
    assert {name for name, chunk in first.items() if deltas([chunk]) == [{"role": "assistant"}]} == {
        *UVICORN, "rapid_mlx",
    } - {"omni"}  # fmt: skip
    assert {name for name, chunk in first.items() if "finish_reason" in chunk["choices"][0]} == {
        "mlx_lm", "vllm_simple", "vllm_batched", "mlx_vlm", "openai",
    }  # fmt: skip
    assert {name for name, chunk in first.items() if "usage" in chunk} == {"vllm_simple", "vllm_batched", "mlx_vlm"}
    assert deltas([first["mlx_lm"]])[0].keys() == {"role", "content"}


@pytest.mark.parametrize(("flavour", "raw"), [("mlx_lm", False), ("vllm_batched", True), ("mlx_openai", False)])
def test_only_vllm_streams_raw_utf8(flavour, raw):
    """The others escape; line separators of Unicode are among what is raw."""
    with SimulatedMLX(flavour=flavour, tokens=200, separators=True) as server:
        body = read_all(connect(server, max_tokens=500))
        assert ("\u2028".encode() in body) is raw
        assert ("größer".encode() in body) is raw
        assert text_of(chunks(server, max_tokens=500)) == "".join(reply_tokens(HELLO, 500, tokens=200, separators=True))


@pytest.mark.parametrize(
    ("flavour", "cut", "usage_of_finish", "extra"),
    [
        ("mlx_lm", "length", False, "chat.completion"),
        ("vllm_batched", "length", True, "chat.completion.chunk"),
        ("mlx_openai", "stop", True, None),
        ("omni", "stop", False, "finish"),
        ("openai", "length", False, "chat.completion.chunk"),
    ],
)
def test_finish_reason_and_usage_of_every_flavour(flavour, cut, usage_of_finish, extra):
    """Who says "length", who reports usage on the finish chunk, and who in a chunk of its own if asked."""
    with SimulatedMLX(flavour=flavour) as server:
        *_, finish = chunks(server)
        assert finish["choices"][0]["finish_reason"] == cut
        assert bool(finish.get("usage")) is usage_of_finish
        assert chunks(server, max_tokens=33)[-1]["choices"][0]["finish_reason"] == "stop"
        *_, before, last = chunks(server, stream_options={"include_usage": True})
        if extra is None:
            assert "finish_reason" not in before["choices"][0]
            return
        assert last["usage"]["completion_tokens"] == (7 if flavour == "omni" else 8)
        assert before["choices"][0]["finish_reason"] == cut
        if extra == "finish":
            assert last["choices"][0]["finish_reason"] == cut
        else:
            assert (last["choices"], last["object"]) == ([], extra)


def test_vllm_sends_the_last_token_with_the_finish_reason():
    """A client that ignores the content of the finish chunk loses it."""
    with SimulatedMLX(flavour="vllm_batched") as server:
        assert deltas(chunks(server))[-1] == {"content": reply_tokens(HELLO, 8)[-1]}


def test_mlx_lm_breaks_off_when_stream_options_are_incomplete():
    """`stream_options: {}` gets the finish chunk and no [DONE]."""
    with SimulatedMLX() as server:
        items = payloads(post(server, stream_options={}).text)
        assert items[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("flavour", "field"),
    [("mlx_lm", "reasoning"), ("vllm_batched", "reasoning_content"), ("mlx_openai", "reasoning_content")],
)
def test_reasoning_has_a_field_of_its_own(flavour, field):
    """Named differently by the servers."""
    with SimulatedMLX(flavour=flavour, reasoning=["Let", " me", " see."]) as server:
        items = chunks(server)
        assert text_of(items, field) == "Let me see."
        assert text_of(items) == "".join(reply_tokens(HELLO, 5))
        assert post(server, stream=False).json()["choices"][0]["message"][field] == "Let me see."
        assert text_of(chunks(server, max_tokens=2), field) == "Let me"


def test_reasoning_may_be_in_the_content():
    """In think tags where no parser is configured; and without any when omni streams."""
    with SimulatedMLX(flavour="vllm_batched", reasoning=["Hm."], think_tags=True) as server:
        assert text_of(chunks(server)).startswith("<think>Hm.</think>")
    with SimulatedMLX(flavour="omni", reasoning=["Hm."]) as server:
        assert text_of(chunks(server)) == "Hm." + "".join(reply_tokens(HELLO, 6))
        assert post(server, stream=False).json()["choices"][0]["message"]["reasoning"] == "Hm."


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_tool_calls_arrive_in_the_pieces_of_the_flavour(flavour):
    """Whole in one delta, in fragments, or on the finish chunk; joined they are the same."""
    with SimulatedMLX(flavour=flavour, tool_calls=[CALL]) as server:
        items = chunks(server, tools=TOOLS, max_tokens=100)
        carriers = [item["choices"][0] for item in items if item["choices"][0]["delta"].get("tool_calls")]
        parts = [call for carrier in carriers for call in carrier["delta"]["tool_calls"]]
        assert json.loads("".join(part["function"]["arguments"] for part in parts)) == CALL["arguments"]
        assert parts[0]["function"]["name"] == "weather"
        assert (len(parts) > 1) is (flavour in ("vllm_simple", "vllm_batched", "rapid_mlx", "openai"))
        assert (carriers[-1].get("finish_reason") == "tool_calls") is (flavour in ("omni", "mlx_vlm"))
        assert items[-1]["choices"][0]["finish_reason"] == "tool_calls"
        assert post(server, stream=False, tools=TOOLS, max_tokens=100).json()["choices"][0]["message"]["tool_calls"]


def test_a_tool_call_cut_by_max_tokens_vanishes():
    """Without tools in the request there is none in the first place."""
    with SimulatedMLX(tool_calls=[CALL]) as server:
        items = chunks(server, tools=TOOLS, max_tokens=3)
        assert deltas(items) == [{"role": "assistant"}]
        assert items[-1]["choices"][0]["finish_reason"] == "length"
        assert text_of(chunks(server)) == "".join(reply_tokens(HELLO, 8))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_stop_string_does_what_it_does_there(flavour):
    """In the middle of a token, and as a whole token."""
    tokens = reply_tokens(HELLO, 8)
    whole, inside = "".join(tokens), tokens[4][1:]
    before = [whole[: whole.index(stop)] for stop in (inside, tokens[4])]
    expected = {
        "mlx_lm": [whole.replace(inside, "", 1), before[1]],
        "mlx_openai": [whole, before[1]],
        "omni": [whole] * 2,
        "mlx_vlm": [whole] * 2,
    }.get(flavour, before)
    with SimulatedMLX(flavour=flavour) as server:
        got = [
            text_of(chunks(server, stop=[stop], max_tokens=9 if flavour == "omni" else 8))
            for stop in (inside, tokens[4])
        ]
    assert got == expected


CONTINUING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mlx_lm": ({"chat_template_kwargs": {"chat_template": LEFT_OPEN}}, {}),
    "vllm_simple": (OPEN_END, {}),
    "vllm_batched": (OPEN_END, {}),
    "mlx_openai": ({}, {"partial": True}),
    "omni": ({}, {}),
}


@pytest.mark.parametrize("flavour", CONTINUING)
def test_a_partial_reply_is_continued_if_asked_for_in_the_right_way(flavour):
    """Cut at any character, the rest joins, but for a leading space that only the batched vllm-mlx keeps.

    And where transformers renders the partial reply, a template that trims takes white space from its end.
    """
    wish, mark = CONTINUING[flavour]
    whole = "".join(reply_tokens(HELLO, 12))
    with SimulatedMLX(flavour=flavour, tokens=12, reasoning=["Hm", "."]) as server:
        for cut in range(1, len(whole) + 1):
            said = {"role": "assistant", "content": whole[:cut], **mark}
            items = chunks(server, messages=[*HELLO, said], max_tokens=100, **wish)
            kept = cut if flavour == "mlx_lm" else len(whole[:cut].rstrip())
            rest = whole[kept:] if flavour == "vllm_batched" else whole[kept:].removeprefix(" ")
            assert text_of(items) == rest
            assert not text_of(items, "reasoning")


def test_mlx_lm_dies_of_a_prompt_that_it_has_cached():
    """That is an answer which max_tokens ended. Anything in front of it makes another prompt."""
    wish, _ = CONTINUING["mlx_lm"]
    spaced = {"chat_template_kwargs": {"chat_template": LEFT_OPEN.replace("{{ all[-1]", '{{ " " + all[-1]')}}
    said = {"role": "assistant", "content": "".join(reply_tokens(HELLO, 8))}
    with SimulatedMLX() as server:
        assert text_of(chunks(server)) == said["content"]
        for options, status in ((spaced, 200), (wish, 404)):
            assert post(server, messages=[*HELLO, said], **options).status_code == status
        assert http("GET", server.base_url + "/health").status_code == 503


@pytest.mark.parametrize("flavour", CONTINUING)
def test_max_tokens_of_a_continuation_counts_the_continuation(flavour):
    wish, mark = CONTINUING[flavour]
    tokens = reply_tokens(HELLO, 32)
    said = {"role": "assistant", "content": "".join(tokens[:10]), **mark}
    with SimulatedMLX(flavour=flavour) as server:
        items = chunks(server, messages=[*HELLO, said], max_tokens=5, stream_options={"include_usage": True}, **wish)
        rest = "".join(tokens[10 : 14 if flavour == "omni" else 15])
        assert text_of(items) == (rest if flavour == "vllm_batched" else rest.removeprefix(" "))


@pytest.mark.parametrize(
    ("flavour", "wish", "mark"),
    [
        ("mlx_lm", {}, {"partial": True}),
        ("mlx_lm", {"chat_template_kwargs": {"chat_template": CHAT_TEMPLATE}}, {}),
        ("mlx_lm", {"chat_template_kwargs": {"chat_template": LEFT_OPEN.replace("im_start", "start")}}, {}),
        ("vllm_simple", OPEN_END["chat_template_kwargs"], {}),
        ("vllm_batched", {"chat_template_kwargs": {"continue_final_message": True}}, {}),
        ("mlx_openai", OPEN_END, {}),
        ("openai", OPEN_END, {"partial": True}),
    ],
)
def test_a_partial_reply_is_a_turn_that_is_over_if_nothing_says_otherwise(flavour, wish, mark):
    said = {"role": "assistant", "content": reply_tokens(HELLO, 32)[0], **mark}
    with SimulatedMLX(flavour=flavour) as server:
        messages = [*HELLO, said]
        assert text_of(chunks(server, messages=messages, max_tokens=100, **wish)) == "".join(reply_tokens(messages, 32))


@pytest.mark.parametrize("kwargs", [OPEN_END["chat_template_kwargs"], {"continue_final_message": True}])
def test_mlx_lm_refuses_the_flags_that_others_continue_by(kwargs):
    with SimulatedMLX() as server:
        assert post(server, chat_template_kwargs=kwargs).status_code == 404


# --- refusals


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": None}, {"max_tokens": 0}, {"max_tokens": 5.0}, {"max_tokens": "5"}, {"model": None},
        {"stream": None}, {"temperature": None}, {"temperature": -1}, {"top_p": 2}, {"seed": "x"}, {"logit_bias": []},
        {"max_completion_tokens": "5"}, {"messages": "hello"},
    ],
)  # fmt: skip
def test_mlx_lm_refuses_nulls_and_wrong_types(wrong):
    """400, and the error is a string."""
    with SimulatedMLX() as server:
        response = post(server, **wrong)
        assert response.status_code == 400
        assert isinstance(response.json()["error"], str)
        assert "content-length" not in response.headers


@pytest.mark.parametrize("flavour", FASTAPI)
def test_fastapi_servers_answer_422_with_a_list(flavour):
    """`detail` is a list of what does not fit."""
    with SimulatedMLX(flavour=flavour) as server:
        for wrong in ({"messages": "hello"}, {"max_tokens": "many"}):
            response = post(server, **wrong)
            assert (response.status_code, type(response.json()["detail"])) == (422, list)
        assert post(server, stop="string").status_code == (200 if flavour == "omni" else 422)
        assert post(server, max_tokens=None).status_code == 200
        url = server.base_url + "/v1/chat/completions"
        assert http("POST", url, content=b"no json").status_code == 422


def test_particular_refusals():
    """Roles of mlx-openai, image objects of omni, the missing model of vllm-mlx."""
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:..."}}]}]
    with SimulatedMLX(flavour="mlx_openai") as server:
        assert post(server, messages=[{"role": "developer", "content": "x"}]).status_code == 422
        assert post(server, model=None).status_code == 200
        assert post(server, messages=image).status_code == 200
    with SimulatedMLX(flavour="omni") as server:
        assert post(server, messages=image).status_code == 422
    with SimulatedMLX(flavour="vllm_batched") as server:
        assert post(server, model=None).status_code == 422
        assert post(server, max_tokens=0).status_code == 422
    with SimulatedMLX(flavour="openai") as server:
        assert post(server, model=None).json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("flavour", "unknown", "empty"),
    [
        ("mlx_lm", (404, "Cannot find an appropriate cached snapshot"), 404),
        ("vllm_batched", (404, '{"detail": "The model `gpt`'), 500),
        ("mlx_openai", (404, "model_not_found"), 500),
        ("omni", (500, "Internal Server Error"), 500),
        ("openai", (404, "does not exist"), 400),
    ],
)
def test_an_unknown_model_and_an_empty_conversation(flavour, unknown, empty):
    """Each server has an answer of its own; mlx_lm and omni have dropped their resident model by then."""
    with SimulatedMLX(flavour=flavour) as server:
        response = post(server, model="gpt")
        assert (response.status_code, unknown[1] in response.text) == (unknown[0], True)
        assert server.counters["evictions"] == (flavour in ("mlx_lm", "omni"))
        assert post(server).status_code == 200
        assert server.counters["loads"] == (flavour in ("mlx_lm", "omni"))
        assert post(server, messages=[]).status_code == empty


def test_a_key_is_asked_for_everywhere_but_at_health():
    """401 without it, and with a wrong one."""
    with SimulatedMLX(flavour="vllm_batched", api_key="secret") as server:
        assert post(server).json() == {"detail": "API key required"}
        for key, status in (("wrong", 401), ("secret", 200)):
            headers = {"authorization": f"Bearer {key}"}
            assert http("GET", server.base_url + "/v1/models", headers=headers).status_code == status
        assert http("GET", server.base_url + "/health").status_code == 200


# --- health and models


def test_health_and_models_of_every_flavour():
    """omni has no health route; /v1/models need not name what is served."""
    status = {}
    for flavour in FLAVOURS:
        with SimulatedMLX(flavour=flavour, models=["a", "b"]) as server:
            response = http("GET", server.base_url + "/health")
            status[flavour] = response.json().get("status") if response.is_success else response.status_code
            assert [model["id"] for model in http("GET", server.base_url + "/v1/models").json()["data"]] == ["a", "b"]
    assert status == {
        "mlx_lm": "ok", "vllm_simple": "healthy", "vllm_batched": "healthy", "mlx_openai": "ok", "omni": 404,
        "rapid_mlx": "healthy", "mlx_vlm": "healthy", "openai": "ok",
    }  # fmt: skip
    with SimulatedMLX(listed=[], faults=[Fault("empty_body", path="/v1/models")]) as server:
        assert http("GET", server.base_url + "/v1/models").content == b""
        assert http("GET", server.base_url + "/v1/models").json()["data"] == []


# --- embeddings


@pytest.mark.parametrize("flavour", UVICORN)
def test_embeddings_are_the_vectors_of_the_texts_in_order(flavour):
    """One text or several; token ids are refused everywhere."""
    with SimulatedMLX(flavour=flavour, dimensions=16) as server:
        reply = post(server, "/v1/embeddings", model="sim-chat", input=["eins", "zwei"]).json()
        assert [row["embedding"] for row in reply["data"]] == [embedding("eins", 16), embedding("zwei", 16)]
        assert [row["index"] for row in reply["data"]] == [0, 1]
        assert (reply["usage"] is None) is (flavour == "mlx_openai")
        assert post(server, "/v1/embeddings", model="sim-chat", input="eins").json()["data"][0] == reply["data"][0]
        assert post(server, "/v1/embeddings", model="sim-chat", input=[1, 2]).status_code == 422
        unknown = post(server, "/v1/embeddings", model="other", input="eins").status_code
        assert unknown == {"vllm_simple": 400, "vllm_batched": 400, "omni": 500}.get(flavour, 404)


def test_embeddings_as_base64_and_of_nothing():
    """mlx-openai packs float32 if asked, and breaks on an empty list; vllm-mlx knows only numbers."""
    with SimulatedMLX(flavour="mlx_openai", dimensions=16) as server:
        reply = post(server, "/v1/embeddings", model="sim-chat", input="eins", encoding_format="base64").json()
        packed = base64.b64decode(reply["data"][0]["embedding"])
        assert list(struct.unpack("<16f", packed)) == embedding("eins", 16)
        assert post(server, "/v1/embeddings", model="sim-chat", input="x", encoding_format="no").status_code == 422
        assert post(server, "/v1/embeddings", model="sim-chat", input=[]).status_code == 500
    with SimulatedMLX(flavour="vllm_batched") as server:
        assert post(server, "/v1/embeddings", model="sim-chat", input=[]).status_code == 400
        reply = post(server, "/v1/embeddings", model="sim-chat", input="eins", encoding_format="base64").json()
        assert reply["data"][0]["embedding"] == embedding("eins")


def test_faults_of_vectors():
    """One too few, one too short, and not a number."""
    faults = [Fault("wrong_count"), Fault("wrong_dimension"), Fault("nan")]
    with SimulatedMLX(flavour="openai", dimensions=4, faults=faults) as server:
        rows = [post(server, "/v1/embeddings", model="sim-chat", input=["a", "b"]).json()["data"] for _ in range(4)]
        assert [len(row) for row in rows] == [1, 2, 2, 2]
        assert len(rows[1][1]["embedding"]) == 3
        assert rows[2][1]["embedding"][0] != rows[2][1]["embedding"][0]
        assert rows[3][1]["embedding"] == embedding("b", 4)


# --- the clock and the queue


def test_tokens_come_when_they_are_due():
    """The first after ttft, the others at their interval."""
    with SimulatedMLX(ttft=0.05, token_interval=0.01) as server:
        start = time.perf_counter()
        connection = connect(server)
        times = []
        while piece := connection.recv(65536):
            times.append((time.perf_counter() - start, piece))
        connection.close()
        first = next(at for at, piece in times if b'"content"' in piece)
        assert first >= 0.05
        assert times[-1][0] >= 0.05 + 7 * 0.01
        assert len(times) > 5


def test_a_full_mlx_lm_sends_no_headers_while_a_request_waits():
    """vllm-mlx has sent the headers and the role by then."""
    for flavour, opening in (("mlx_lm", b""), ("vllm_batched", b"assistant")):
        with SimulatedMLX(flavour=flavour, slots=1, token_interval=0.02) as server:
            first = connect(server)
            server.wait_for(lambda s: s.counters["running"] == 1)
            second = connect(server)
            server.wait_for(lambda s: len(s.requests) == 2)
            second.settimeout(0.05)
            if opening:
                received = b""
                while opening not in received:
                    received += second.recv(65536)
            else:
                with pytest.raises(TimeoutError):
                    second.recv(1)
            second.settimeout(5)
            assert read_all(first).count(b"data: ") >= 9
            assert read_all(second).count(b"data: ") >= 9


@pytest.mark.parametrize("change", [{"seed": 1}, {"model": "default_model"}])
def test_mlx_lm_serves_a_seed_or_another_model_string_alone(change):
    """Even a name for the same weights; nothing is sent until the others are done."""
    with SimulatedMLX(token_interval=0.02) as server:
        first = connect(server)
        server.wait_for(lambda s: s.counters["running"] == 1)
        second = connect(server, **change)
        server.wait_for(lambda s: len(s.requests) == 2)
        third = connect(server)
        server.wait_for(lambda s: s.counters["generated"] == 7)
        assert [request.generated for request in server.requests][:2] == [7, 0]
        read_all(first)
        server.wait_for(lambda s: s.counters["generated"] == 15)
        assert [request.generated for request in server.requests] == [8, 7, 0]
        assert read_all(second).endswith(b"[DONE]\n\n")
        assert read_all(third).endswith(b"[DONE]\n\n")
        assert server.counters["loads"] == 0


def test_vllm_simple_refuses_a_second_request():
    """A stream is a 200 with the role, an error event and [DONE]; without streaming it is a 503."""
    with SimulatedMLX(flavour="vllm_simple", token_interval=0.02) as server:
        first = connect(server)
        server.wait_for(lambda s: s.counters["running"] == 1)
        opening, error, done = payloads(post(server).text)
        assert deltas([opening]) == [{"role": "assistant"}]
        assert error == {"error": {"message": "Internal server error", "code": 500}}
        assert done == "[DONE]"
        refused = post(server, stream=False)
        assert (refused.status_code, refused.json()["detail"]["error"]) == (503, "text_generation_busy")
        assert read_all(first).endswith(b"0\r\n\r\n")


def test_prefill_is_commented_step_by_step():
    """mlx_lm does it, and then for the last token. What is cached is not counted, and costs nothing."""
    long = [{"role": "user", "content": "word " * 5000}]
    with SimulatedMLX(prefill_rate=25_000, token_interval=0.001, tokens=400) as server:
        other = connect(server, max_tokens=400)
        server.wait_for(lambda s: s.counters["generated"] > 5)
        response = post(server, messages=long, stream_options={"include_usage": True})
        steps = re.findall(": keepalive (.*)\n", response.text)
        assert steps == ["2048/5002", "4096/5002", "5001/5002", "5002/5002"]
        other.close()
        start = time.perf_counter()
        again = post(server, messages=long, stream_options={"include_usage": True})
        assert time.perf_counter() - start < 0.15
        assert again.text.startswith(": keepalive 1/1\n\ndata: {")
        assert payloads(again.text)[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 5002}


def test_a_stream_stands_still_while_another_prompt_is_read():
    """No token of anybody for the time of the prefill."""
    long = [{"role": "user", "content": "word " * 3000}]
    with (
        SimulatedMLX(prefill_rate=10_000, token_interval=0.001, tokens=4000) as server,
        connect(server, max_tokens=4000),
    ):
        server.wait_for(lambda s: s.counters["generated"] > 5)
        with connect(server, messages=long):
            server.wait_for(lambda s: len(s.requests) == 2)
            before = server.requests[0].generated
            time.sleep(0.15)
            assert server.requests[0].generated - before <= 2


def test_vllm_sends_heartbeats_while_it_is_silent():
    """They say nothing about progress."""
    with SimulatedMLX(flavour="vllm_batched", ttft=0.1, heartbeat=0.03) as server:
        assert post(server).text.count(": heartbeat\n\n") >= 2


def test_omni_stands_still_during_a_reply_that_is_not_streamed():
    """Its event loop generates, so that nobody is served meanwhile."""
    with SimulatedMLX(flavour="omni", ttft=0.2) as server:
        whole = connect(server, stream=False)
        server.wait_for(lambda s: s.counters["running"] == 1)
        start = time.perf_counter()
        http("GET", server.base_url + "/v1/models")
        assert time.perf_counter() - start > 0.1
        read_all(whole)


# --- death


@pytest.mark.parametrize("poison", [{"stop": 5}, {"stop": ["a", 5]}, {"top_k": 100_000, "temperature": 1.0}])
def test_a_poison_request_kills_mlx_lm_until_it_is_restarted(poison):
    """Every later request fails, health says so, and running streams just end."""
    with SimulatedMLX(token_interval=0.01, tokens=400) as server:
        running = connect(server, max_tokens=400)
        server.wait_for(lambda s: s.counters["generated"] > 2)
        died = post(server, **poison)
        assert (died.status_code, died.json()) == (404, {"error": "generation thread died"})
        assert b"[DONE]" not in read_all(running)
        assert post(server).status_code == 404
        assert http("GET", server.base_url + "/health").status_code == 503
        server.kill()
        server.restart()
        assert post(server).status_code == 200


def test_an_old_mlx_lm_is_healthy_and_silent_when_its_thread_has_died():
    """The only sign is that nothing comes."""
    with SimulatedMLX(old_health=True, faults=[Fault("thread_death")]) as server:
        for _ in range(2):
            with connect(server) as connection:
                connection.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
        assert http("GET", server.base_url + "/health").json() == {"status": "ok"}


def test_a_kill_closes_the_connections_that_have_just_come_too():
    """Nobody but the garbage collector would say that one was left open."""
    with SimulatedMLX() as server:
        for _ in range(50):
            clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
            server.kill()
            for client in clients:
                client.settimeout(5)
                with client, contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
            server.restart()


def test_kill_and_restart_on_the_same_port():
    """A killed mlx_lm ends its streams silently, a chunked server visibly; then connections are refused."""
    for flavour in ("mlx_lm", "openai"):
        with SimulatedMLX(flavour=flavour, token_interval=0.01, tokens=400) as server:
            running = connect(server, max_tokens=400)
            server.wait_for(lambda s: s.counters["generated"] > 2)
            address = server.base_url
            server.kill()
            server.kill()
            rest = read_all(running)
            assert b"[DONE]" not in rest
            assert not rest.endswith(b"0\r\n\r\n")
            with pytest.raises(httpx.ConnectError):
                http("GET", address + "/health")
            server.restart()
            assert server.base_url == address
            assert post(server).status_code == 200


# --- faults


def first_items(server: SimulatedMLX, **body: Any) -> tuple[list[Any], Exception | None]:
    """What a client gets of a stream, and how it ends for it."""
    text, failure = b"", None
    try:
        with httpx.stream(
            "POST", server.base_url + "/v1/chat/completions", json=chat_body(**body), timeout=0.2
        ) as reply:
            for piece in reply.iter_bytes():
                text += piece
    except httpx.TransportError as error:
        failure = error
    return payloads(text.decode().rpartition("\n\n")[0]), failure


@pytest.mark.parametrize(
    ("fault", "flavour", "failure"),
    [
        (Fault("eof", at_token=5), "mlx_lm", None),
        (Fault("eof", at_token=5), "openai", None),
        (Fault("reset", at_token=5), "mlx_lm", httpx.ReadError),
        (Fault("truncate", at_token=5), "mlx_lm", None),
        (Fault("truncate", at_token=5), "openai", httpx.RemoteProtocolError),
        (Fault("freeze", at_token=5), "openai", httpx.ReadTimeout),
    ],
)
def test_a_stream_that_breaks_at_a_token(fault, flavour, failure):
    """Nothing after the fifth token; the next request is served."""
    with SimulatedMLX(flavour=flavour, token_interval=0.002, faults=[fault]) as server:
        items, error = first_items(server)
        assert text_of(items) == "".join(reply_tokens(HELLO, 5))
        assert isinstance(error, failure or type(None))
        server.wait_for(lambda s: s.counters["running"] == 0)
        assert (server.requests[0].fault, server.requests[0].finished) == (fault.kind, False)
        assert text_of(chunks(server)) == "".join(reply_tokens(HELLO, 8))


@pytest.mark.parametrize(
    ("flavour", "after"), [("mlx_lm", []), ("vllm_batched", ["[DONE]"]), ("mlx_openai", ["stop", "[DONE]"])]
)
def test_an_error_event_and_what_follows_it(flavour, after):
    """mlx-openai even says "stop"; unstreamed it is a plain error."""
    fault = Fault("error_event", at_token=3, message="boom", code="429", times=2)
    with SimulatedMLX(flavour=flavour, faults=[fault]) as server:
        items, error = first_items(server)
        at = next(at for at, item in enumerate(items) if "error" in item)
        assert items[at]["error"] == {"message": "boom", "code": "429"}
        assert text_of(items[:at]) == "".join(reply_tokens(HELLO, 3))
        rest = [item if item == "[DONE]" else item["choices"][0]["finish_reason"] for item in items[at + 1 :]]
        assert (rest, error) == (after, None)
        assert post(server, stream=False).status_code == 500


def test_an_early_error_follows_the_role():
    """Before any content, so that the request can still go elsewhere."""
    for flavour in ("mlx_lm", "vllm_batched"):
        with SimulatedMLX(flavour=flavour, faults=[Fault("early_error")]) as server:
            opening, error, *_ = first_items(server)[0]
            assert deltas([opening]) == [{"role": "assistant"}]
            assert error["error"]["code"] == 500


def test_finish_chunk_and_done_may_each_be_missing():
    """The stream ends well otherwise."""
    with SimulatedMLX(faults=[Fault("done_without_finish"), Fault("finish_without_done")]) as server:
        items = payloads(post(server).text)
        assert (text_of(items[:-1]), items[-1]) == ("".join(reply_tokens(HELLO, 8)), "[DONE]")
        assert not any(item["choices"][0]["finish_reason"] for item in items[:-1])
        items = payloads(post(server).text)
        assert items[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("kind", ["split", "drip", "join"])
@pytest.mark.parametrize("flavour", ["mlx_lm", "vllm_batched"])
def test_faults_of_writes_change_pieces_and_not_the_text(kind, flavour):
    """Cut through characters, in drops, or two events at a time."""
    with SimulatedMLX(flavour=flavour, faults=[Fault(kind, seconds=0.0005)], token_interval=0.001) as server:
        received = pieces(connect(server, max_tokens=4))
        assert text_of(chunks(server, max_tokens=4)) == "".join(reply_tokens(HELLO, 4))
        if kind == "drip":
            assert len(received) > 100
        if kind == "join":
            assert max(piece.count(b'"content"') for piece in received) == 2


def test_an_event_can_be_cut_inside_a_character():
    """A decoder that is not incremental fails on it."""
    messages = next(
        m for m in ([{"role": "user", "content": str(n)}] for n in range(99)) if "🚢" in reply_tokens(m, 1)[0]
    )
    with SimulatedMLX(flavour="openai", faults=[Fault("split", seconds=0.01)]) as server:
        received = pieces(connect(server, messages=messages, max_tokens=1))
        assert any(piece.endswith(b"\xf0") for piece in received)
        assert "🚢".encode() in b"".join(received)


@pytest.mark.parametrize(("kind", "end"), [("crlf", b"\r\n\r\n"), ("cr", b"\r\r")])
def test_lines_may_end_in_other_ways(kind, end):
    """Carriage returns, with or without line feeds."""
    with SimulatedMLX(faults=[Fault(kind)]) as server:
        body = read_all(connect(server)).partition(b"\r\n\r\n")[2]
        assert body.endswith(b"data: [DONE]" + end)
        assert b"\n\n" not in body


def test_garbage_and_endless_comments():
    """A data line that is no JSON, after which all is well; and a stream that only lives."""
    with SimulatedMLX(faults=[Fault("garbage", at_token=2), Fault("heartbeat_only", at_token=2)]) as server:
        text = post(server).text
        assert 'data: {"choices": [{"delta"\n\n' in text
        assert text.endswith("[DONE]\n\n")
        with connect(server) as connection:
            received = b""
            while received.count(b": heartbeat\n\n") < 5:
                received += connection.recv(65536)
            assert received.count(b'"content"') == 2
        server.wait_for(lambda s: s.requests[-1].disconnected)


def test_replies_that_are_none():
    """No response, an empty one, a late one, and any status."""
    slow = Fault("status", status=429, body={"error": "slow"}, headers={"Retry-After": "2"})
    broken = Fault("status", status=502, body="Bad Gateway")
    faults = [Fault("empty_reply"), Fault("empty_body"), Fault("slow_headers", seconds=0.1), slow, broken]
    with SimulatedMLX(flavour="openai", faults=[*faults, Fault("status")]) as server:
        with pytest.raises(httpx.RemoteProtocolError):
            post(server)
        assert (post(server).status_code, server.requests[-1].finished) == (200, True)
        assert post(server).elapsed.total_seconds() > 0.1
        response = post(server)
        assert (response.status_code, response.headers["retry-after"], response.json()) == (429, "2", {"error": "slow"})
        response = post(server)
        assert (response.status_code, response.text) == (502, "Bad Gateway")
        assert response.headers["content-type"].startswith("text/plain")
        assert (post(server).status_code, post(server).status_code) == (500, 200)


def test_a_fault_strikes_the_requests_it_fits_as_often_as_it_should():
    """By path, by what the body contains, once, n times or always, in the order of the plan."""
    with SimulatedMLX(flavour="openai") as server:
        server.fail(Fault("status", status=418, contains="teapot", times=None), Fault("status", status=503, times=2))
        tea = [{"role": "user", "content": "a teapot"}]
        status = [post(server, messages=m).status_code for m in (HELLO, tea, HELLO, HELLO, tea)]
        assert status == [503, 418, 503, 200, 418]
        server.fail(Fault("status", path="/health", status=503), Fault("nan"))
        assert post(server).status_code == 200
        assert http("GET", server.base_url + "/health").status_code == 503
    with pytest.raises(ValueError, match="no such fault"):
        Fault("surprise")


# --- accounts


def test_a_request_is_on_record_with_what_became_of_it():
    """Method, path, headers, body, tokens and outcome."""
    with SimulatedMLX() as server:
        http("POST", server.base_url + "/v1/chat/completions", json=chat_body(), headers={"X-Tag": "t"})
        (request,) = server.requests
        assert (request.method, request.path, request.model) == ("POST", "/v1/chat/completions", "sim-chat")
        assert (request.headers["x-tag"], request.body["max_tokens"]) == ("t", 8)
        assert (request.generated, request.generated_after_leave, request.disconnected) == (8, 0, False)
        assert server.counters["generated"] == 8
        with pytest.raises(TimeoutError):
            server.wait_for(lambda s: len(s.requests) == 2, timeout=0.01)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_stream_stops_soon_after_its_client_left(flavour):
    """No zombie generation, and the slot is free again."""
    with SimulatedMLX(flavour=flavour, token_interval=0.005, tokens=5000) as server:
        connection = connect(server, max_tokens=5000)
        server.wait_for(lambda s: s.counters["generated"] > 3)
        connection.close()
        server.wait_for(lambda s: s.counters["disconnected"] == 1 and s.counters["running"] == 0)
        assert server.generated_after_leave <= 5
        assert server.requests[0].finished is False


@pytest.mark.parametrize(("flavour", "stops"), [("mlx_lm", False), ("mlx_openai", False), ("vllm_batched", True)])
def test_a_reply_that_is_not_streamed_may_go_on_for_nobody(flavour, stops):
    """Most servers do not notice, and generate to max_tokens."""
    with SimulatedMLX(flavour=flavour, token_interval=0.005, tokens=40) as server:
        connection = connect(server, stream=False, max_tokens=40)
        server.wait_for(lambda s: s.counters["generated"] > 3)
        connection.close()
        server.wait_for(lambda s: s.counters["running"] == 0)
        assert (server.requests[0].generated == 40) is not stops
        assert (server.generated_after_leave > 20) is not stops


def test_a_long_silence_is_cut_short_when_the_client_leaves():
    """A chunked server notices within the first token's time."""
    with SimulatedMLX(flavour="vllm_batched", ttft=60) as server:
        connection = connect(server)
        server.wait_for(lambda s: s.counters["running"] == 1)
        connection.close()
        server.wait_for(lambda s: s.counters["running"] == 0)
        assert server.counters["generated"] == 0


def test_a_held_reply_goes_on_at_its_pace_when_it_is_released():
    paced = SimulatedMLX(flavour="vllm_batched", token_interval=0.01, tokens=40)
    with paced as server, server.held(at_token=3), ThreadPoolExecutor(1) as pool:
        held = pool.submit(chunks, server, max_tokens=20)
        server.wait_for(lambda s: s.counters["generated"] == 3)
        assert text_of(chunks(server, max_tokens=3)) == "".join(reply_tokens(HELLO, 3, tokens=40))
        time.sleep(0.05)
        assert not held.done()
        released = time.monotonic()
        server.release()
        assert text_of(held.result(5)) == "".join(reply_tokens(HELLO, 20, tokens=40))
        assert time.monotonic() - released > 0.15


def test_a_held_reply_ends_when_its_client_leaves():
    with SimulatedMLX(flavour="vllm_batched") as server, server.held(at_token=1):
        connection = connect(server)
        server.wait_for(lambda s: s.counters["running"] == 1)
        connection.close()
        server.wait_for(lambda s: s.counters["running"] == 0)


def test_old_requests_are_forgotten():
    """The history is bounded; the totals go on."""
    with SimulatedMLX(history=2) as server:
        for _ in range(3):
            post(server)
        assert len(server.requests) == 2
        assert server.counters["requests"] == 3


# --- as a process


def test_the_simulator_runs_as_a_process():
    """One line tells its address; faults and accounts go over HTTP; SIGTERM ends it with 0."""
    command = [
        sys.executable,
        "-m",
        "fleet_worker.simulator",
        "--flavour",
        "openai",
        "--model",
        "one",
        "--model",
        "two",
    ]
    options = ["--tokens", "5", "--token-interval", "0.001", "--faults", '[{"kind": "status", "status": 503}]']
    options += ["--prompt-cache-size", "0", "--no-trimmable"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        hello = json.loads(process.stdout.readline())
        assert hello["pid"] == process.pid
        with httpx.Client(base_url=hello["base_url"], verify=False) as client:
            chat = chat_body(model="two", max_tokens=50)
            assert client.post("/v1/chat/completions", json=chat).status_code == 503
            assert client.post("/simulated/faults", json={"kind": "surprise"}).status_code == 400
            client.post("/simulated/faults", json={"kind": "eof", "at_token": 2}).raise_for_status()
            for expected in (2, 5):
                items = payloads(client.post("/v1/chat/completions", json=chat).text)
                assert text_of([item for item in items if item != "[DONE]"]) == "".join(reply_tokens(HELLO, expected))
            requests = client.get("/simulated/requests").json()
            assert [request["generated"] for request in requests] == [0, 2, 5]
            assert [request["fault"] for request in requests] == ["status", "eof", None]
            assert requests[0]["model"] is None
            assert requests[1]["model"] == "two"
            assert [request["cached_tokens"] for request in requests] == [0, 0, 0]
            assert client.get("/simulated/counters").json()["requests"] == 3
            client.post("/simulated/held", json={"at_token": 1}).raise_for_status()
            with client.stream("POST", "/v1/chat/completions", json={**chat, "stream": True}) as held:
                client.post("/simulated/held", json={"at_token": None}).raise_for_status()
                items = payloads("".join(held.iter_text()))
                assert text_of([item for item in items if item != "[DONE]"]) == "".join(reply_tokens(HELLO, 5))
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


def test_a_request_can_be_the_death_of_the_whole_process():
    """At a token of its own; a second stream breaks off with it."""
    deadly = '[{"kind": "death", "at_token": 3, "contains": "poison"}]'
    command = [sys.executable, "-m", "fleet_worker.simulator", "--token-interval", "0.01", "--faults", deadly]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        base_url = json.loads(process.stdout.readline())["base_url"]
        with httpx.Client(base_url=base_url, verify=False) as client:
            with client.stream("POST", "/v1/chat/completions", json=chat_body(max_tokens=500)) as other:
                poison = [{"role": "user", "content": "poison"}]
                text = client.post("/v1/chat/completions", json=chat_body(messages=poison)).text
                assert text_of(payloads(text)) == "".join(reply_tokens(poison, 3))
                assert "[DONE]" not in "".join(other.iter_text())
            assert process.wait(5) == 137
            with pytest.raises(httpx.ConnectError):
                client.get("/health")


def test_a_flavour_that_does_not_exist_is_told_with_those_that_do(capsys):
    with pytest.raises(SystemExit):
        main(["--flavour", "bogus"])
    error = capsys.readouterr().err
    assert all(flavour in error for flavour in FLAVOURS)
