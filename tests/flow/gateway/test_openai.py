"""What clients of OpenAI rely on, over real HTTP, through a real node."""

import contextlib
import json
import re
import time
from urllib.parse import urlsplit

import pytest

from fleet_worker.simulator import reply_tokens
from tests.flow.gateway.conftest import CHAT, EMBED
from tests.gateways import Wire, post

HELLO = [{"role": "user", "content": "Hello"}]


def answer(max_tokens):
    return "".join(reply_tokens(HELLO, max_tokens))


def test_the_sdk_gets_a_whole_answer(client):
    completion = client.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=7)
    assert completion.choices[0].message.content == answer(7)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 7
    assert completion._request_id == completion.id.removeprefix("chatcmpl-")


def test_the_sdk_gets_a_stream(client):
    with client.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=7, stream=True) as stream:
        chunks = list(stream)
    first, *middle, last = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert all(chunk.choices[0].delta.role is None for chunk in middle)
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == answer(7)
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "length")
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_tells_its_usage_if_asked(http):
    body = {"model": CHAT, "messages": HELLO, "max_tokens": 3, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream_options": {"include_usage": True}}) as reply:
        *chunks, done = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert done == "[DONE]"
    *others, last = map(json.loads, chunks)
    assert all(chunk["usage"] is None for chunk in others)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)


def test_the_headers_tell_what_was_asked_and_what_answers(http):
    reply = http.post("/v1/chat/completions", json={"model": CHAT, "messages": HELLO, "max_tokens": 1})
    told = {name: reply.headers[f"x-fleet-{name}"] for name in ("requested-model", "model", "node", "attempts")}
    assert told == {"requested-model": CHAT, "model": CHAT, "node": "sim@test", "attempts": "1"}
    assert reply.headers["x-accel-buffering"] == "no"
    assert "queue;dur=" in reply.headers["server-timing"]


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_in_both_forms(client, form):
    texts = ["one", "two"]
    reply = client.embeddings.create(model=EMBED, input=texts, encoding_format=form)
    assert [each.index for each in reply.data] == [0, 1]
    assert reply.usage.prompt_tokens > 0
    length = 384 if form == "float" else len(reply.data[0].embedding)
    assert all(len(each.embedding) == length for each in reply.data)


def test_what_was_used_is_told(http):
    body = {"model": CHAT, "messages": HELLO, "max_tokens": 4}
    usage = http.post("/v1/chat/completions", json=body, headers={"x-fleet-tags": "a, b"}).json()["usage"]
    counted = re.search(r'fleet_gateway_tokens_total{key="anyone",kind="completion"} (.*)', http.get("/metrics").text)
    assert float(counted[1]) >= usage["completion_tokens"] == 4
    for _ in range(100):  # the ledger is written once a second
        told = http.get("/v1/usage?since=1h").json()
        if told["requests"]:
            break
        time.sleep(0.05)
    assert told["models"][0]["model"] == CHAT
    assert told["completion_tokens"] >= 4


@pytest.mark.parametrize("at_token", [0, 3], ids=["before the first token", "while it is generated"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_stops_its_answer(gateway, mlx, stream, at_token):
    body = json.dumps({"model": CHAT, "messages": HELLO, "max_tokens": 30, "stream": stream}).encode()
    with mlx.held(at_token=at_token):
        for _ in range(3):
            with Wire(urlsplit(gateway.url).port) as wire:
                wire.send(post(body))
                mlx.wait_for(lambda mlx: mlx.counters["running"] == 1)
            mlx.wait_for(lambda mlx: mlx.counters["running"] == 0, timeout=1)


def test_a_client_that_leaves_while_it_waits_never_reaches_a_server(gateway, mlx, http):
    body = {"model": CHAT, "messages": HELLO, "max_tokens": 3}
    waiting = {**body, "messages": [{"role": "user", "content": "Nobody waits for this"}]}
    port = urlsplit(gateway.url).port
    with contextlib.ExitStack() as stack, mlx.held(at_token=0):
        for _ in range(8):
            stack.enter_context(Wire(port)).send(post(json.dumps(body).encode()))
        mlx.wait_for(lambda mlx: mlx.counters["running"] == 8)
        with Wire(port) as wire:
            wire.send(post(json.dumps(waiting).encode(), b"x-request-id: waiting"))
        gateway.wait_for("error=client_left id=waiting", 5)
    assert http.post("/v1/chat/completions", json=body).is_success
    assert waiting["messages"] not in [each.body.get("messages") for each in mlx.requests if each.body]
