"""A gateway that is started, stopped, told to read its keys again, and kept busy by slow and idle clients."""

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import ssl
import struct
import time
from pathlib import Path
from urllib.parse import urlsplit

import anthropic
import httpx
import openai
import pytest

from fleet_worker import exit_codes
from fleet_worker.gateway.accounts.keys import new_key
from fleet_worker.host.child_process import ChildFailed
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import Valkey
from tests.fleets import until
from tests.flow.gateway.conftest import CHAT, EMBED
from tests.gateways import Wire, get, post, running_gateway
from tests.tls import Certificates

pytestmark = pytest.mark.rest

HELLO = [{"role": "user", "content": "Hello"}]


def asked(tokens=20, stream=True, **fields):
    return {"model": CHAT, "messages": HELLO, "max_tokens": tokens, "stream": stream, **fields}


def port_of(gateway):
    return urlsplit(gateway.url).port


def begun(gateway, **fields):
    """A stream of which something has arrived."""
    wire = Wire(port_of(gateway)).send(post(json.dumps(asked(**fields)).encode()))
    return wire, wire.socket.recv(65536)


# --- Silence


def wait_for_heartbeats(gateway):
    """Until a stream beside that of a test, which is silent as well, has got several."""
    wire, events = begun(gateway)
    with wire:
        while events.count(b": still at work") < 3:
            events += wire.socket.recv(65536)


def test_a_stream_that_waits_for_its_first_token_is_kept_open(fleet, mlx):
    with running_gateway(fleet, heartbeat=0.1) as gateway, mlx.held(at_token=0):
        wire, first = begun(gateway)
        with wire:
            head, _, events = first.partition(b"\r\n\r\n")
            while events.count(b": still at work") < 3:
                events += wire.socket.recv(65536)
            mlx.release()
            while not events.endswith(b"0\r\n\r\n"):
                events += wire.socket.recv(65536)
    assert head.startswith(b"HTTP/1.1 200")
    assert events.count(b'"role":"assistant"') == 1
    assert events.index(b'"role":"assistant"') < events.index(b": still")


@pytest.fixture
def hasty(fleet):
    """A gateway that sends heartbeats all the time."""
    with running_gateway(fleet, heartbeat=0.05) as gateway:
        yield gateway


def test_the_sdk_of_openai_does_not_notice_heartbeats(hasty, mlx):
    with openai.OpenAI(base_url=f"{hasty.url}/v1", api_key="any", max_retries=0) as client, mlx.held(at_token=3):
        stream = client.chat.completions.create(**asked(6))
        text = next(stream).choices[0].delta.content
        wait_for_heartbeats(hasty)
        mlx.release()
        text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "".join(reply_tokens(HELLO, 6))


def test_the_sdk_of_anthropic_does_not_notice_them(hasty, mlx):
    said = {"model": CHAT, "messages": HELLO, "max_tokens": 6}
    with (
        mlx.held(at_token=0),
        anthropic.Anthropic(base_url=hasty.url, api_key="any", max_retries=0) as client,
        client.messages.stream(**said) as stream,
    ):
        wait_for_heartbeats(hasty)
        mlx.release()
        assert stream.get_final_text() == "".join(reply_tokens(HELLO, 6))


# --- The end


@pytest.fixture
def ending(fleet, mlx):
    """A gateway with a stream that was held while the gateway was asked to end."""
    with running_gateway(fleet, drain_grace=30) as gateway, mlx.held(at_token=5):
        wire, first = begun(gateway)
        with wire:
            gateway.signal(signal.SIGTERM)
            gateway.wait_for("ends: no new requests", 5)
            yield gateway, wire, first


def test_a_gateway_that_ends_takes_no_more_requests_and_finishes_those_that_run(ending, mlx):
    gateway, wire, first = ending
    assert httpx.get(f"{gateway.url}/health/readiness").status_code == 503
    assert httpx.get(f"{gateway.url}/health").status_code == 200
    refused = httpx.post(f"{gateway.url}/v1/chat/completions", json=asked())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert (refused.headers["connection"], refused.headers["x-should-retry"]) == ("close", "true")
    mlx.release()
    events = first + wire.rest()
    assert events.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert gateway.wait(5) == 0


def test_a_second_signal_ends_it_at_once(ending):
    gateway, wire, _ = ending
    gateway.signal(signal.SIGTERM)
    assert b'"code":"shutting_down"' in wire.rest()
    assert gateway.wait(3) == 0


def test_what_runs_too_long_ends_with_an_error(fleet, mlx):
    with running_gateway(fleet, drain_grace=0.2) as gateway, mlx.held(at_token=5):
        wire, first = begun(gateway)
        other = Wire(port_of(gateway)).send(post(json.dumps(asked(stream=False)).encode()))
        mlx.wait_for(lambda mlx: mlx.counters["running"] == 2)
        with wire, other:
            gateway.signal(signal.SIGTERM)
            events = wire.rest()
            assert b'data: {"error":{' in events
            assert b'"code":"shutting_down"' in events
            assert b"[DONE]" not in first + events
            assert other.answer().status == 503
        assert gateway.wait(5) == 0
        mlx.wait_for(lambda mlx: mlx.counters["running"] == 0, timeout=1)


def test_keys_are_read_again_while_streams_run(fleet, mlx, tmp_path):
    file, alice, bob = tmp_path / "keys.toml", new_key("alice"), new_key("bob")
    file.touch(0o600)
    file.write_text(alice.table)
    with running_gateway(fleet, keys=file) as gateway, mlx.held(at_token=5):
        body = post(json.dumps(asked()).encode(), b"authorization: Bearer " + alice.secret.encode())
        with Wire(port_of(gateway)) as wire:
            first = wire.send(body).socket.recv(65536)
            file.write_text(bob.table)
            gateway.signal(signal.SIGHUP)
            gateway.wait_for("keys were read", 5)
            models = f"{gateway.url}/v1/models"
            assert httpx.get(models, headers={"x-api-key": bob.secret}).status_code == 200
            assert httpx.get(models, headers={"x-api-key": alice.secret}).status_code == 401
            mlx.release()
            events = first
            while not events.endswith(b"0\r\n\r\n"):
                events += wire.socket.recv(65536)
            assert b"[DONE]" in events
        file.write_text("nonsense")
        gateway.signal(signal.SIGHUP)
        gateway.wait_for("the keys stay as they were", 5)
        assert httpx.get(models, headers={"x-api-key": bob.secret}).status_code == 200
    assert not any(secret in gateway.output for secret in (alice.secret, bob.secret))


# --- Where it listens


def test_an_address_that_is_taken_is_an_error_of_the_configuration(gateway, fleet):
    with pytest.raises(ChildFailed) as failure, running_gateway(fleet, port=port_of(gateway)):
        pass
    assert f"exit code {exit_codes.CONFIGURATION}" in str(failure.value)
    assert "choose another one" in str(failure.value)


def test_a_unix_socket_is_for_its_user_only_and_replaced_when_nobody_listens(fleet, tmp_path):
    path = tmp_path / "gateway.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with running_gateway(fleet, socket=path) as gateway:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://anything.example") as http:
            assert http.post("/v1/chat/completions", json=asked(3, stream=False)).status_code == 200
        assert oct(path.stat().st_mode)[-3:] == "600"
        with pytest.raises(ChildFailed), running_gateway(fleet, socket=path):
            pass
        assert path.is_socket()
        assert gateway.stop() == 0
    assert not path.exists()


def test_https(fleet, tmp_path):
    certificates = Certificates(tmp_path)
    cert, key = certificates.server
    with running_gateway(fleet, cert=cert, key=key) as gateway:
        assert gateway.url.startswith("https://")
        with httpx.Client(
            verify=ssl.create_default_context(cafile=certificates.ca), base_url=f"https://localhost:{port_of(gateway)}"
        ) as http:
            assert http.post("/v1/chat/completions", json=asked(3, stream=False)).status_code == 200
        with Wire(port_of(gateway)) as plain:
            plain.send(get(b"/"))
            assert plain.is_closed


def test_several_gateways_serve_one_fleet(gateway, fleet):
    with running_gateway(fleet) as other:
        texts = [httpx.post(f"{each.url}/v1/chat/completions", json=asked(9)).text for each in (gateway, other) * 2]
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)


def test_an_old_client_gets_a_stream_that_ends_with_its_connection(gateway):
    with Wire(port_of(gateway)) as wire:
        head, _, events = wire.send(post(json.dumps(asked(5)).encode(), version=b"1.0")).rest().partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


def test_files_that_are_no_pair_are_an_error_of_the_configuration(fleet, tmp_path):
    certificates = Certificates(tmp_path)
    with pytest.raises(ChildFailed) as failure:
        running_gateway(fleet, cert=certificates.server.cert, key=certificates.client.key).__enter__()
    assert f"exit code {exit_codes.CONFIGURATION}" in str(failure.value)


# --- Refusals


def test_without_a_broker_all_is_refused_until_it_comes(mlx, monkeypatch):
    monkeypatch.setenv("FLEET_ROUTER__CONNECT_TIMEOUT", "1")
    with Valkey() as broker:
        broker.stop()
        with running_gateway(broker.url, connected=False) as gateway:
            gateway.wait_for("no broker yet", 10)
            for path, body in (("/v1/chat/completions", asked()), ("/v1/models", None)):
                reply = httpx.request("POST" if body else "GET", gateway.url + path, json=body)
                assert (reply.status_code, reply.headers["x-should-retry"]) == (503, "true")
                assert int(reply.headers["retry-after"]) > 0
            assert httpx.get(f"{gateway.url}/health/readiness").status_code == 503
            assert httpx.get(f"{gateway.url}/health").status_code == 200
            broker.start()
            with running_host(broker.url, {"sim": {"base_url": mlx.base_url, "models": {CHAT: {}}}}):
                until(lambda: httpx.get(f"{gateway.url}/health/readiness").status_code == 200, 15)
                assert httpx.post(f"{gateway.url}/v1/chat/completions", json=asked(3)).text.endswith("[DONE]\n\n")
            broker.stop()
            started = time.monotonic()
            reply = httpx.post(f"{gateway.url}/v1/chat/completions", json=asked(3), timeout=60)
            assert (reply.status_code, reply.headers["x-should-retry"]) == (503, "true")
            assert time.monotonic() - started < 3
            assert gateway.stop() == 0


def test_a_full_lane_is_a_429_that_tells_when_to_come_back(fleet, mlx, monkeypatch):
    monkeypatch.setenv("FLEET_ROUTER__MAX_WAITING", "1")
    body = post(json.dumps(asked(stream=False)).encode())
    with running_gateway(fleet) as gateway, contextlib.ExitStack() as stack, mlx.held(at_token=0):
        for number in range(9):
            stack.enter_context(Wire(port_of(gateway))).send(body)
            mlx.wait_for(lambda mlx, number=number: mlx.counters["running"] == min(number + 1, 8))
        until(lambda: httpx.get(f"{gateway.url}/health").is_success)
        until(lambda: refused(gateway).status_code == 429, 5)
        reply = refused(gateway)
        assert reply.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(reply.headers["retry-after"]) <= 120
        assert 0 < int(reply.headers["retry-after-ms"]) <= 120_000
        assert reply.headers["x-should-retry"] == "true"
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as failure:
                client.chat.completions.create(**asked())
            assert failure.value.request_id


def refused(gateway):
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=asked(), headers={"x-fleet-queue-timeout": "0.1"})


def test_an_unknown_model_is_answered_with_the_nearest_one(gateway):
    reply = httpx.post(f"{gateway.url}/v1/chat/completions", json={**asked(), "model": "sim-chad"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert CHAT in reply.json()["error"]["message"]


# --- Many clients, and bad ones


@pytest.mark.timeout(180)
def test_two_hundred_clients_that_leave_at_random_moments_leave_nothing_behind(gateway, mlx):
    draw = random.Random(7)
    for number in range(200):
        kind = draw.choice(["stream", "whole", "embed", "pipelined"])
        body = asked(2000, kind != "whole") if kind != "embed" else {"model": EMBED, "input": ["text"] * 300}
        with Wire(port_of(gateway)) as wire:
            path = b"/v1/embeddings" if kind == "embed" else b"/v1/chat/completions"
            wire.send(post(json.dumps(body).encode(), path=path) + get(b"/") * (kind == "pipelined"))
            if kind != "embed" and draw.random() < 0.7:
                mlx.wait_for(lambda mlx: mlx.counters["running"] == 1)
            time.sleep(draw.choice([0.0, 0.001, 0.01, 0.05]))
            if draw.random() < 0.5:  # it vanishes instead of saying goodbye
                wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        left = time.monotonic()
        mlx.wait_for(lambda mlx: mlx.counters["running"] == 0, timeout=1)
        assert time.monotonic() - left < 1, f"client {number}: {kind}"
    time.sleep(0.3)  # those that left at once may still come
    mlx.wait_for(lambda mlx: mlx.counters["running"] == 0, timeout=1)
    assert httpx.post(f"{gateway.url}/v1/chat/completions", json=asked(3)).text.endswith("[DONE]\n\n")


@pytest.mark.timeout(180)
def test_idle_and_slow_clients_cost_little_memory_and_nobody_else():
    """A hundred streams are read by nobody, a thousand connections send nothing; others get their answers."""
    with SimulatedMLX(flavour="vllm_batched", models=[CHAT], token_interval=0.05, tokens=100_000, slots=110) as mlx:
        instance = {"base_url": mlx.base_url, "limits": {"concurrency": 110}, "models": {CHAT: {}}}
        with Valkey() as broker, running_host(broker.url, {"sim": instance}), running_gateway(broker.url) as gateway:
            before = memory(gateway.pid)
            idle = [Wire(port_of(gateway)) for _ in range(300)]
            slow = [begun_slowly(gateway) for _ in range(100)]
            until(lambda: mlx.counters["generated"] > 10_000, 60)
            gaps = gaps_of(gateway, 40)
            grown = memory(gateway.pid) - before
            for wire in idle + slow:
                wire.socket.close()
            until(lambda: mlx.counters["running"] == 0, 5)
    assert grown < 25, f"{grown} MB"
    assert max(gaps) < 1


def begun_slowly(gateway):
    return Wire(port_of(gateway), SO_RCVBUF=4096).send(post(json.dumps(asked(100_000)).encode()))


def memory(pid):
    """The memory of a process, in megabytes."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE") / 1e6


def gaps_of(gateway, tokens):
    """Read one stream; return the seconds between its pieces."""
    times = []
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=asked(tokens)) as reply:
        for _ in reply.iter_raw():
            times.append(time.monotonic())
    return [later - earlier for earlier, later in itertools.pairwise(times)]
