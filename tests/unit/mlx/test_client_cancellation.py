"""A request is cancelled in each of its phases, against the simulated server, over real sockets."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress

import pytest

from fleet_worker.errors import Cancelled, FleetError, InvalidRequest
from fleet_worker.mlx import client as mlx
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.simulator import FLAVOURS, Fault, chats, reply_tokens
from tests.brokers import free_port
from tests.mlx_clients import (
    HELLO,
    SOON,
    WHY,
    Client,
    answering,
    cancelled,
    client_of,
    said,
    served,
    took_less_than,
    until,
)

ASKING = {"chat": Client.ask, "stream_chat": Client.stream}
UVICORN = sorted(set(FLAVOURS) - {"mlx_lm"})


# --- Before it is sent


@pytest.mark.parametrize("ask", [*ASKING.values(), lambda client, token: client.vectors("a", token=token)])
def test_a_request_that_was_cancelled_before_is_not_sent(ask):
    token = CancelToken()
    token.cancel(WHY)
    with served("vllm_batched") as (server, client), pytest.raises(Cancelled) as raised:
        ask(client, token=token)
    assert raised.value is WHY
    assert server.counters["connections"] == 0


def test_a_canary_can_be_cancelled_too():
    with served("vllm_batched", ttft=30) as (server, client):
        deadline = time.monotonic() + 30
        with cancelled(lambda token: client.canary(client.offering, deadline=deadline, cancel_token=token)):
            server.wait_for(lambda it: it.counters["running"] == 1)
        server.wait_for(lambda it: it.counters["disconnected"] == 1)


# --- While it is connecting


def test_a_server_whose_backlog_is_full():
    """The kernel repeats its first packet: it must not become a connection later."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as opened:
        for _ in range(4):
            knocking = opened.enter_context(socket.socket())
            knocking.setblocking(False)
            knocking.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with closing(Client(url, clocks={"connect": 20})) as client, cancelled(client.ask):
            time.sleep(0.1)


def test_a_server_that_is_not_there_is_not_tried_again():
    """It is not asked even if it comes back at that moment."""
    port = free_port()
    tries = []
    with closing(Client(f"http://127.0.0.1:{port}", clocks={"connect": 20})) as client, ExitStack() as opened:
        connect = client._transport.handle_request
        client._transport.handle_request = lambda request: (tries.append(request), connect(request))[1]
        with cancelled(client.ask, within=0.25):
            until(lambda: len(tries) == 4)  # the next try comes 0.4 s later
            time.sleep(0.05)
            listener = opened.enter_context(socket.create_server(("127.0.0.1", port)))
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):  # the thread that could try again has ended
            listener.accept()


def test_a_server_that_never_answers_a_tls_handshake():
    with (
        answering("") as url,
        closing(Client(url.replace("http", "https"), clocks={"connect": 20})) as client,
        cancelled(client.ask),
    ):
        time.sleep(0.1)


# --- While it waits for the answer


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_a_server_that_never_accepts(ask):
    """Its kernel accepts. When the server takes the connection, it is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with closing(Client(f"http://127.0.0.1:{listener.getsockname()[1]}")) as client, cancelled(ask, client):
            time.sleep(0.1)
        listener.settimeout(10)
        accepted, _ = listener.accept()
        accepted.settimeout(10)
        with accepted, suppress(ConnectionResetError):
            while accepted.recv(65536):
                pass


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_server_in_its_prefill(flavour, ask, monkeypatch):
    """The prefill takes two seconds. mlx_lm.server notices when it writes its next comment, every 2,048 tokens."""
    monkeypatch.setattr(chats, "CLIENT_CHECK", 0.01)
    prompt = [{"role": "user", "content": "word " * 20_000}]
    with served(flavour, prefill_rate=10_000) as (server, client):
        with cancelled(ask, client, prompt):
            server.wait_for(lambda it: it.counters["running"] == 1)
        server.wait_for(lambda it: it.counters["disconnected"] == 1 and it.counters["running"] == 0)
        assert (server.counters["generated"], server.counters["finished"]) == (0, 0)


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize("flavour", ["mlx_lm", "vllm_batched"])
def test_a_server_in_which_it_is_queueing(flavour, ask):
    """mlx_lm.server sends no headers before it is a request's turn. The request that runs is not disturbed."""
    with served(flavour, slots=1, token_interval=0.01, tokens=10) as (server, client), client.open() as first:
        arrived = iter(first)
        with server.held(at_token=1):
            received = len(next(arrived))
            with cancelled(ask, client):
                server.wait_for(lambda it: it.counters["requests"] == 2)
        assert received + sum(map(len, arrived)) == 10
        server.wait_for(lambda it: it.counters["disconnected"] == 1)
        assert server.requests[1].generated == 0


@pytest.mark.parametrize("flavour", UVICORN)
def test_a_server_that_embeds(flavour):
    with served(flavour, ttft=2) as (server, client), cancelled(client.vectors, "a"):
        server.wait_for(lambda it: it.counters["requests"] == 1)


def test_a_server_that_has_half_an_answer_or_half_an_error():
    for head in ("200 OK", "404 Not Found"):
        half = f"HTTP/1.1 {head}\r\ncontent-length: 999\r\n\r\n{{"
        for ask in (Client.ask, lambda client, token: client.vectors("a", token=token)):
            with answering(half) as url, closing(Client(url)) as client, cancelled(ask, client):
                time.sleep(0.05)


# --- In the middle of the answer


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_stream_that_flows(flavour, ask):
    with served(flavour, token_interval=0.01, tokens=5000) as (server, client):
        with cancelled(ask, client, max_tokens=5000):
            server.wait_for(lambda it: it.counters["generated"] > 5)
        server.wait_for(lambda it: it.counters["disconnected"] == 1 and it.counters["running"] == 0)
        assert server.generated_after_leave < 10
        assert server.requests[0].generated < 200


@pytest.mark.parametrize("fault", ["freeze", "heartbeat_only"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_stream_that_has_fallen_silent(flavour, fault):
    with served(flavour) as (server, client):
        server.fail(Fault(fault, at_token=5, seconds=0.02))
        with cancelled(client.stream):
            server.wait_for(lambda it: it.counters["generated"] == 5)
        server.wait_for(lambda it: it.counters["disconnected"] == 1)


def test_a_stream_whose_reader_is_busy_elsewhere():
    """The error is raised when it reads again, even if more has arrived. What it has read is valid."""
    with served("vllm_batched", token_interval=0.005, tokens=500) as (server, client):
        token = CancelToken()
        with client.open(max_tokens=500, token=token) as stream:
            arrived = iter(stream)
            got = next(arrived)
            server.wait_for(lambda it: it.counters["generated"] > 20)
            token.cancel(WHY)
            server.wait_for(lambda it: it.counters["disconnected"] == 1)
            with pytest.raises(Cancelled) as raised:
                next(arrived)
        assert raised.value is WHY
        assert [delta.content for delta in got] == reply_tokens(HELLO, 500, tokens=500)[: len(got)]


def test_one_request_of_many_is_cancelled_and_no_other():
    with (
        served("vllm_batched", token_interval=0.01, tokens=40) as (server, client),
        ThreadPoolExecutor(4) as pool,
    ):
        others = [pool.submit(client.ask) for _ in range(4)]
        with cancelled(client.ask):
            server.wait_for(lambda it: it.counters["running"] == 5 and it.counters["generated"] > 10)
        assert {other.result(10).content for other in others} == {"".join(reply_tokens(HELLO, 40, tokens=40))}


# --- Between two batches of an embedding


def test_the_next_batch_is_not_sent(monkeypatch):
    token, read = CancelToken(), mlx.parse_vectors

    def read_and_cancel(*arguments):
        token.cancel(WHY)
        return read(*arguments)

    monkeypatch.setattr(mlx, "parse_vectors", read_and_cancel)
    with served("vllm_batched", client={"limits": {"embed_batch": 1}}) as (server, client):
        with pytest.raises(Cancelled) as raised:
            client.vectors("a", "b", "c", token=token)
        assert raised.value is WHY
        assert len(server.requests) == 1


def test_an_embedding_of_many_batches_ends_in_the_middle():
    with served("vllm_batched", ttft=0.02, client={"limits": {"embed_batch": 1}}) as (server, client):
        with cancelled(client.vectors, *map(str, range(500))):
            server.wait_for(lambda it: it.counters["requests"] == 4)
        assert server.counters["requests"] < 50


# --- At the end


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_cancel_changes_nothing_when_the_answer_is_whole(flavour):
    with served(flavour, tokens=5) as (server, client):
        token = CancelToken()
        with client.open(token=token) as stream:
            whole = [delta.content for deltas in stream for delta in deltas]
            token.cancel(WHY)
            assert stream.answer().finish_reason == "stop"
        assert whole == reply_tokens(HELLO, 5)
        server.wait_for(lambda it: it.counters["finished"] == 1)


def test_an_answer_that_is_whole_is_not_waited_for():
    """The server sends [DONE] and does not close: all deltas have arrived, and the cancel comes too late."""
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    with answering(head + said("Hi")) as url, closing(Client(url)) as client, took_less_than(SOON):
        token = CancelToken()
        with client.open(token=token) as stream:
            arrived = iter(stream)
            assert [delta.content for delta in next(arrived)] == ["Hi"]
            token.cancel(WHY)
            assert list(arrived) == []
            assert stream.answer().finish_reason == "stop"


def test_an_error_that_came_before_the_cancel_stays():
    with served("vllm_batched") as (server, client):
        server.fail(Fault("status", status=400))
        token = CancelToken()
        with pytest.raises(InvalidRequest):
            client.ask(token=token)
        token.cancel(WHY)


def test_a_client_goes_on_after_a_cancel():
    with served("vllm_batched", token_interval=0.002) as (server, client), client_of(server) as other:
        for _ in range(5):
            with cancelled(client.ask, max_tokens=100):
                server.wait_for(lambda it: it.counters["running"] == 1)
        assert client.ask().content == other.ask().content
        assert issubclass(Cancelled, FleetError)
