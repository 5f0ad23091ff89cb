"""The HTTP of the gateway, over real sockets, without a fleet: a request that is understood gets a 503."""

import asyncio
import contextlib
import gzip
import json
import logging
import socket
import threading
import zlib

import pytest
import zstandard

from fleet_worker.gateway.http import http_protocol
from fleet_worker.gateway.http.browsers import refuse_foreign_pages
from fleet_worker.gateway.http.request import SMALL_BODY, BodyMemory, ClientLeft
from fleet_worker.gateway.http.response import Response
from fleet_worker.gateway.problems import Refused
from tests.gateways import Wire, ask, chunked, get, post, serving

MOST_BYTES = 8 * 1024 * 1024
CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "Hello"}]}'
BOMB = bytes(MOST_BYTES + 1)
UNDERSTOOD = 503
ALWAYS = {"cache-control": "no-cache", "x-accel-buffering": "no", "x-content-type-options": "nosniff"}


@pytest.fixture(scope="module")
def port():
    with serving(body_timeout=0.3, max_connections=50) as port:
        yield port


def told(answer):
    """The code of an error in OpenAI's form, which has all the headers that every answer has."""
    assert answer.headers["content-type"] == "application/json"
    assert {name: answer.headers[name] for name in ALWAYS} == ALWAYS
    assert answer.headers["x-request-id"]
    assert "access-control-allow-origin" not in answer.headers
    return json.loads(answer.body)["error"]["code"]


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(post(CHAT), id="length"),
        pytest.param(chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(CHAT), CHAT)), id="chunks"),
        pytest.param(post(CHAT, path=b"/chat/completions/"), id="without v1"),
        pytest.param(post(CHAT, path=b"http://localhost/v1/chat/completions"), id="absolute form"),
        pytest.param(post(CHAT, path=b"/v1/chat/c%6fmpletions"), id="percent encoding"),
        pytest.param(post(CHAT, b"expect: 100-continue"), id="expect"),
        pytest.param(post(CHAT, b"connection: upgrade, http2-settings", b"upgrade: h2c"), id="Java asks for HTTP/2"),
        pytest.param(post(CHAT, b"upgrade: websocket", b"connection: Upgrade"), id="websocket"),
        pytest.param(post(CHAT, version=b"1.0"), id="HTTP/1.0"),
        pytest.param(b"\r\n\r\n" + post(CHAT), id="empty lines before it"),
        pytest.param(post(gzip.compress(CHAT), b"content-encoding: gzip"), id="gzip"),
        pytest.param(post(zlib.compress(CHAT), b"content-encoding: deflate"), id="deflate"),
        pytest.param(post(zstandard.compress(CHAT), b"content-encoding: zstd"), id="zstd"),
        pytest.param(post(CHAT[:-1] + b', "model": "n"}'), id="a key twice"),
        pytest.param(chunked(b"%x\r\n%b\r\n0\r\nx-fleet-priority: silly\r\n\r\n" % (len(CHAT), CHAT)), id="trailer"),
    ],
)
def test_these_are_understood(port, request_):
    answer = ask(port, request_)
    assert (answer.status, told(answer)) == (UNDERSTOOD, "broker_unavailable")
    assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("2", "true")


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        pytest.param(400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(505, b"GET / HTTP/2.0\r\nhost: a\r\n\r\n", id="a version of the future"),
        pytest.param(505, b"GET /\r\n\r\n", id="a version of the past"),
        pytest.param(400, b"BREW / HTTP/1.1\r\nhost: a\r\n\r\n", id="method"),
        pytest.param(400, b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n", id="connect"),
        pytest.param(400, b"GET / HTTP/1.1\r\n\r\n", id="no host"),
        pytest.param(400, get(b"/", b"host: b"), id="two hosts"),
        pytest.param(400, post(CHAT, b"transfer-encoding: chunked"), id="length and chunks"),
        pytest.param(400, chunked(b"0\r\n\r\n", b"content-length: 5"), id="chunks and length"),
        pytest.param(400, post(CHAT, b"content-length: 1"), id="two lengths"),
        pytest.param(400, post(b"", b"content-length: +5"), id="length with a sign"),
        pytest.param(400, post(b"", b"content-length: 1" + b"0" * 30), id="length beyond all bounds"),
        pytest.param(501, chunked(b"0\r\n\r\n").replace(b": chunked", b": gzip, chunked"), id="unknown coding"),
        pytest.param(501, chunked(b"0\r\n\r\n").replace(b": chunked", b": xchunked"), id="nearly chunked"),
        pytest.param(400, chunked(b"0\r\n\r\n").replace(b": chunked", b" : chunked"), id="a space before a colon"),
        pytest.param(400, get(b"/", b"x-folded: a\r\n b"), id="folded header"),
        pytest.param(400, get(b"/", b"x-nul: a\x00b"), id="NUL in a header"),
        pytest.param(400, b"GET / HTTP/1.1\nhost: a\n\n", id="line feeds alone"),
        pytest.param(400, get("/é".encode()), id="not ASCII"),
        pytest.param(431, get(b"/" + b"a" * 70_000), id="huge path"),
        pytest.param(431, get(b"/", b"x-large: " + b"a" * 70_000), id="huge header"),
        pytest.param(431, get(b"/", b"x-endless: " + b"a" * 1_000_000)[:-4], id="endless header"),
        pytest.param(431, get(b"/", *[b"x-many: a"] * 1000), id="thousand headers"),
    ],
)
def test_what_is_no_http_or_ambiguous_is_refused(port, status, request_):
    with Wire(port) as wire:
        answer = wire.send(request_).answer()
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        assert told(answer) in ("invalid_http", "headers_too_large")


@pytest.mark.parametrize(
    ("status", "code", "request_"),
    [
        pytest.param(413, "request_too_large", post(b"", length=MOST_BYTES + 1), id="announced"),
        pytest.param(413, "request_too_large", chunked(b"900000\r\n" + b"a" * 0x900000), id="in chunks"),
        pytest.param(413, "request_too_large", post(b"", b"expect: 100-continue", length=10**12), id="asks before"),
        pytest.param(408, "timeout", post(CHAT, length=1000), id="does not come"),
        pytest.param(400, "invalid_http", chunked(b"zz\r\n"), id="chunk without a size"),
        pytest.param(400, "invalid_http", chunked(b"-1\r\n"), id="chunk with a sign"),
        pytest.param(400, "invalid_http", chunked(b"f" * 20 + b"\r\n"), id="chunk beyond all bounds"),
        pytest.param(431, "headers_too_large", chunked(b"1;" + b"a" * 1_000_000), id="endless extension"),
        pytest.param(431, "headers_too_large", chunked(b"0\r\na: " + b"a" * 1_000_000), id="endless trailer"),
        pytest.param(431, "headers_too_large", chunked(b"1\r\na\r\n" * 200_000), id="crumbs"),
        pytest.param(413, "request_too_large", post(gzip.compress(BOMB), b"content-encoding: gzip"), id="gzip"),
        pytest.param(413, "request_too_large", post(zstandard.compress(BOMB), b"content-encoding: zstd"), id="zstd"),
        pytest.param(400, "invalid_encoding", post(CHAT, b"content-encoding: gzip"), id="no gzip"),
        pytest.param(400, "invalid_encoding", post(CHAT, b"content-encoding: zstd"), id="no zstd"),
        pytest.param(400, "invalid_encoding", post(gzip.compress(CHAT)[:-9], b"content-encoding: gzip"), id="cut gzip"),
        pytest.param(415, "unsupported_encoding", post(CHAT, b"content-encoding: br"), id="unknown encoding"),
        pytest.param(415, "unsupported_encoding", post(CHAT, b"content-encoding: gzip, gzip"), id="two encodings"),
        pytest.param(400, "invalid_json", post(b""), id="empty"),
        pytest.param(400, "invalid_json", post(CHAT[:-1]), id="cut JSON"),
        pytest.param(400, "invalid_json", post(b"[]"), id="a list"),
        pytest.param(400, "invalid_json", post(b'{"model": "\xff"}'), id="not UTF-8"),
        pytest.param(400, "invalid_json", post('{"model": "a"}'.encode("utf-16")), id="UTF-16"),
        pytest.param(400, "invalid_json", post(b'{"temperature": NaN}'), id="NaN"),
        pytest.param(400, "invalid_json", post(b'{"seed": 1' + b"0" * 5000 + b"}"), id="huge integer"),
        pytest.param(400, "invalid_request", post(b'{"temperature": 1e999}'), id="huge number"),
        pytest.param(400, "invalid_request", post(b'{"a": "\\ud800"}'), id="half a character"),
        pytest.param(400, "invalid_request", post(b'{"a":' * 200 + b"1" + b"}" * 200), id="deep"),
        pytest.param(400, "invalid_request", post(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), id="very deep"),
        pytest.param(400, "invalid_request", post(b'{"a": [' + b"1," * 100_000 + b"1]}"), id="many values"),
        pytest.param(404, "not_found", post(CHAT, path=b"/v1/nothing"), id="nothing there"),
        pytest.param(404, "not_found", get(b"/v1/%00/..//"), id="odd path"),
        pytest.param(405, "method_not_allowed", get(b"/v1/chat/completions"), id="get"),
        pytest.param(405, "method_not_allowed", post(CHAT, path=b"/v1/models"), id="post"),
        pytest.param(405, "method_not_allowed", get(b"/v1/embeddings").replace(b"GET", b"OPTIONS"), id="preflight"),
    ],
)  # fmt: skip
def test_a_body_that_is_too_large_too_slow_or_wrong_is_refused(port, status, code, request_):
    answer = ask(port, request_)
    assert (answer.status, told(answer)) == (status, code)
    assert (answer.headers["allow"] is not None) == (status == 405)


def test_head_has_no_body(port):
    with Wire(port) as wire:
        wire.send(get(b"/").replace(b"GET", b"HEAD") + get(b"/nothing", b"connection: close"))
        head, _, rest = wire.rest().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"content-length: 18" in head
    assert rest.startswith(b"HTTP/1.1 404")


def test_a_body_that_was_answered_early_is_read_to_its_end(port):
    request = post(b"a" * 300_000, path=b"/nothing")
    with Wire(port) as wire:
        assert wire.send(request[:200_000]).answer().status == 404
        wire.send(request[200_000:])
        assert wire.send(get(b"/")).answer().status == 200


def test_a_client_that_sends_its_body_only_if_it_may_can_use_no_connection_on_which_it_may_not(port):
    with Wire(port) as wire:
        answer = wire.send(post(b"", b"expect: 100-continue", path=b"/nothing", length=1000)).answer()
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        assert wire.is_closed


@pytest.mark.parametrize(
    ("bound", "sent", "status"),
    [
        pytest.param("HEAD_WITHIN", get(b"/")[:-2], 408, id="head"),
        pytest.param("REST_WITHIN", post(b"a", path=b"/nothing", length=1_000_000), 404, id="body that nobody needs"),
    ],
)
def test_who_does_not_finish_is_disconnected(port, monkeypatch, bound, sent, status):
    monkeypatch.setattr(http_protocol, bound, 0.05)
    with Wire(port) as wire:
        assert wire.send(sent).answer().status == status
        assert wire.is_closed


@pytest.mark.rest
def test_who_asks_nothing_is_disconnected():
    with serving(keep_alive=1) as port, Wire(port) as silent, Wire(port) as answered, Wire(port) as empty:
        answered.send(get(b"/")).answer()
        answered.send(b"\r\n")
        empty.send(b"\r\n")
        assert silent.is_closed
        assert answered.is_closed
        assert empty.is_closed


def test_more_connections_than_allowed_are_closed_at_once(port):
    wires = [Wire(port) for _ in range(60)]
    for wire in wires:
        wire.socket.settimeout(0.2)
    assert wires[-1].is_closed
    for wire in wires:
        wire.socket.close()


def test_requests_that_come_together_are_answered_in_their_order(port):
    last = get(b"/v1/models", b"connection: close")
    with Wire(port) as wire:
        answers = wire.send(get(b"/") + post(CHAT) + get(b"/nothing") + last).rest()
    assert [part[:3] for part in answers.split(b"HTTP/1.1 ")[1:]] == [b"200", b"503", b"404", b"503"]


@pytest.mark.parametrize("more", [b"garbage\r\n\r\n", get(b"/") * 20, post(b"a" * 500_000)])
def test_what_is_wrong_after_a_request_does_not_cost_its_answer(port, more):
    with Wire(port) as wire:
        answers = wire.send(get(b"/") + more).rest()
    assert answers.startswith(b"HTTP/1.1 200")
    assert answers.count(b"HTTP/1.1 ") == 1


def test_a_client_that_leaves_is_noticed_whatever_it_has_sent():
    begun, left = threading.Event(), threading.Event()

    async def app(scope, receive, send):
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    with serving(app) as port:
        for more in (b"", get(b"/"), get(b"/") * 5, post(b"a" * 50_000), get(b"/")[:-2]):
            with Wire(port) as wire:
                wire.send(get(b"/"))
                assert begun.wait(5)
                wire.send(more)
            assert left.wait(5)
            begun.clear()
            left.clear()


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_client_that_reads_nothing_is_disconnected(has_ended):
    """Also if its answer has ended, and is kept for it."""
    gone = threading.Event()

    async def app(scope, receive, send):
        connection = scope["extensions"]["fleet"]
        response = Response(scope, send, "id", 0.2)
        await response.begin([(b"connection", b"close")], b"text/plain")
        with contextlib.suppress(ClientLeft):
            while not connection.transport.get_write_buffer_size():
                await response.write(bytes(10_000))
            if has_ended:
                await response.end(b"")
            while not has_ended:
                await response.write(bytes(10_000))
        while connection in connection.connections:
            await asyncio.sleep(0.01)
        gone.set()

    with serving(app, write_timeout=0.2) as port, Wire(port, SO_RCVBUF=4096) as wire:
        wire.send(get(b"/"))
        assert gone.wait(5)


def test_large_bodies_have_so_much_memory_and_no_more():
    memory = BodyMemory(1_000_000, 0)
    for _ in range(4):
        memory.hold(0, 1_000_000)
    with pytest.raises(Refused) as refusal:
        memory.hold(SMALL_BODY, 900_000)
    assert (refusal.value.problem.status, refusal.value.problem.may_retry) == (503, True)
    memory.hold(0, SMALL_BODY)
    memory.release(1_000_000)
    memory.hold(SMALL_BODY, 900_000)


SECRET = "sk-fleet-0123abcd-" + "5e" * 32


def test_no_log_line_has_a_key_or_a_text_of_the_client(port, caplog):
    caplog.set_level(logging.DEBUG)
    key, chat = SECRET.encode(), CHAT.replace(b'"m"', b'"sk-fleet-5e5e5e5e, a secret"')
    ask(port, post(chat, b"authorization: Bearer " + key, b"x-request-id: " + key))
    ask(port, get(b"/v1/models/" + key + b"?api_key=" + key))
    ask(port, get(b"/%0d%0a" + key, b"x-api-key: " + key))
    ask(port, get(b"/", key + b": " + key) + key + b"\r\n\r\n")
    assert len(caplog.records) >= 3
    assert "5e5e" not in caplog.text
    assert "a secret" not in caplog.text
    assert all("\r" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "localhost:4000"},
        {"host": "LOCALHOST"},
        {"host": "127.0.0.1:4000"},
        {"host": "[::1]:4000"},
        {"host": "192.168.1.7"},
        {"host": "fleet.localhost"},
        {"host": "host.docker.internal:4000"},
        {"host": f"{socket.gethostname()}:4000"},
        {"host": "mini-1.local"},
        {"host": "localhost", "origin": "http://localhost:3000"},
        {"host": "localhost", "origin": "https://127.0.0.1"},
        {"host": "localhost", "origin": "vscode-webview://0b1k"},
        {"host": "localhost", "origin": "app://obsidian.md"},
    ],
)
def test_programs_of_this_machine_may_ask(headers):
    refuse_foreign_pages(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "localhost.evil.example:4000"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "user@evil.example"},
        {"host": "localhost@evil.example"},
        {"host": "evil.example#.localhost"},
        {"host": "[::1"},
        {"host": "localhost", "origin": "https://evil.example"},
        {"host": "localhost", "origin": "HTTP://evil.example"},
        {"host": "localhost", "origin": "http://localhost@evil.example"},
        {"host": "localhost", "origin": "null"},
        {"host": "localhost", "origin": "http://"},
    ],
)
def test_pages_of_other_machines_may_not(headers):
    with pytest.raises(Refused) as refusal:
        refuse_foreign_pages(headers)
    assert refusal.value.problem.status == 403


def test_they_may_not_over_http(port):
    answer = ask(port, post(CHAT, b"origin: https://evil.example"))
    assert (answer.status, told(answer)) == (403, "not_allowed")
    answer = ask(port, get(b"/v1/models").replace(b"localhost", b"evil.example"))
    assert (answer.status, told(answer)) == (403, "not_allowed")
