"""Chat streams that fail: every fault of the simulated server, the timeouts, and readers that stop reading."""

import json
import time
import traceback
from contextlib import closing

import pytest

from fleet_worker.errors import (
    ConnectionFailure,
    FleetError,
    InstanceUnavailable,
    InvalidRequest,
    MalformedOutput,
    Overloaded,
    ProviderError,
    RequestTimeout,
    UnsupportedCapability,
)
from fleet_worker.mlx import chat_stream, error_mapping
from fleet_worker.mlx.chunks import ChunkReader
from fleet_worker.protocol.request import Resume
from fleet_worker.simulator import FLAVOURS, Fault, reply_tokens
from fleet_worker.simulator.manners import EVENTS
from fleet_worker.simulator.replies import TABLES
from tests.mlx_clients import HELLO, Client, answering, cancelled, said, served, took_less_than

SECRET = "swordfish"
PRIVATE = [{"role": "user", "content": f"My password is {SECRET}."}]
UVICORN = sorted(set(FLAVOURS) - {"mlx_lm"})
WHOLE = "".join(reply_tokens(HELLO, 100))
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "time")]
DONE = "data: [DONE]\n\n"
GAP, FIRST, DEADLINE = r"clocks\.gap", r"clocks\.first_content", "the deadline passed"
"""The part of a `RequestTimeout`'s text that names the limit."""


# --- Every fault

BROKEN = {
    "empty_reply": ConnectionFailure,
    "empty_body": ConnectionFailure,
    "status": ProviderError,
    "eof": ConnectionFailure,
    "reset": ConnectionFailure,
    "truncate": ConnectionFailure,
    "error_event": ProviderError,
    "early_error": ProviderError,
    "garbage": MalformedOutput,
    "done_without_finish": ConnectionFailure,
    "finish_without_done": ConnectionFailure,
    "tokenless": ProviderError,
    "flood": MalformedOutput,
}
SILENT = {"slow_headers", "thread_death", "freeze", "heartbeat_only"}
SEGMENTS = {"drip", "split", "join", "crlf", "cr"}
ODD = {
    "unstreamed",
    "gzip",
    "runs_on",
    "empty_data",
    "pings",
    "bom",
    "done_twice",
    "halves",
    "cut_utf8",
    "messages",
    "texts",
    "parts",
    "nulls",
    "two_choices",
    "renumbered",
    "odd_usage",
    "shouted_finish",
}
"""Manners that are not by the book, and clear nevertheless."""
ODD_CALLS = {kind for kind in EVENTS if kind.startswith("calls_")}
OF_VECTORS = {"wrong_count", "wrong_dimension", "nan", "no_vector"}


def test_every_fault_of_the_simulated_server_is_expected_here():
    elsewhere = {"death"}  # it ends the whole server, so no second request is possible
    known = {*BROKEN, *SILENT, *SEGMENTS, *ODD, *ODD_CALLS, *OF_VECTORS, *elsewhere}
    assert {kind for table in TABLES for kind in table} == known


@pytest.mark.parametrize("at_token", [0, 5])
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_broken_answer_is_one_error_for_a_chat_and_a_stream(flavour, kind, at_token):
    """Its text contains nothing of the request, of the server's answer or of the key."""
    if (flavour, kind) == ("openai", "finish_without_done"):
        return
    with served(flavour, api_key=SECRET, client={"api_key": SECRET}) as (server, client):
        server.fail(Fault(kind, at_token=at_token, message=f"cannot say {SECRET}", times=2))
        for ask in (client.ask, client.stream):
            with pytest.raises(FleetError) as raised:
                ask(PRIVATE)
            assert type(raised.value) is BROKEN[kind]
            assert raised.value.retryable is (kind not in ("garbage", "flood"))
            assert SECRET not in told(raised.value)
        assert [request.fault for request in server.requests] == [kind, kind]


@pytest.mark.parametrize("kind", sorted(ODD))
@pytest.mark.parametrize("flavour", ["mlx_lm", "vllm_batched"])
def test_an_odd_manner_changes_nothing_of_the_answer(flavour, kind):
    with served(flavour) as (server, client):
        server.fail(Fault(kind, times=2))
        answer = client.ask()
        _, whole, end = client.stream()
        assert answer.content == whole["content"] == WHOLE
        assert answer.finish_reason == end.finish_reason == "stop"
        assert [request.fault for request in server.requests] == [kind, kind]


@pytest.mark.parametrize("kind", sorted(ODD_CALLS))
@pytest.mark.parametrize("flavour", ["mlx_lm", "vllm_batched", "omni"])
def test_an_odd_manner_changes_nothing_of_a_tool_call(flavour, kind):
    calls = [
        {"name": "weather", "arguments": {"city": "Zürich"}},
        {"name": "weather", "arguments": {"city": "東京"}},
        {"name": "time", "arguments": {}},
    ]
    with served(flavour, tool_calls=calls) as (server, client):
        server.fail(Fault(kind, times=2))
        for asked in (client.ask(tools=TOOLS).tool_calls, client.stream(tools=TOOLS)[1]["tool_calls"]):
            assert [call["function"]["name"] for call in asked] == [call["name"] for call in calls]
            assert [json.loads(call["function"]["arguments"]) for call in asked] == [
                call["arguments"] for call in calls
            ]


def test_a_plain_openai_server_need_not_say_done():
    with served("openai") as (server, client):
        server.fail(Fault("finish_without_done", times=2))
        assert client.ask().content == client.stream()[1]["content"] == WHOLE


def test_an_answer_that_its_server_gave_up_is_not_whole():
    aborted = said("and").replace('"stop"', '"abort"')
    with served("vllm_batched") as (server, client):
        server.fail(Fault("status", status=200, body=aborted, times=2))
        with pytest.raises(ProviderError) as raised:
            client.ask()
        assert raised.value.retryable
        with client.open() as stream:
            arrived = iter(stream)
            assert [delta.content for delta in next(arrived)] == ["and"]
            with pytest.raises(ProviderError):
                next(arrived)


def test_what_arrived_before_a_failure_is_delivered():
    with served("vllm_batched") as (server, client):
        server.fail(Fault("eof", at_token=5))
        arrived = []
        with client.open() as stream, pytest.raises(ConnectionFailure):
            arrived.extend(delta for deltas in stream for delta in deltas)
        assert [delta.content for delta in arrived] == reply_tokens(HELLO, 5)


def test_what_arrived_together_with_an_error_is_delivered_before_it():
    error, good = b'{"error": "out of memory"}', b'{"choices": [{"index": 0, "delta": {"content": "a"}}]}'
    chunks = ChunkReader()
    assert [delta.content for delta in chunks.read([good, error, good])] == ["a"]
    assert isinstance(chunks.failure, FleetError)
    with pytest.raises(FleetError):
        ChunkReader().read([error, good])
    body = "HTTP/1.1 200 OK\r\n\r\n" + "".join(f"data: {event.decode()}\n\n" for event in (good, error))
    with answering(body) as url, closing(Client(url)) as client, client.open() as stream:
        arrived = iter(stream)
        assert [delta.content for delta in next(arrived)] == ["a"]
        with pytest.raises(FleetError):
            next(arrived)


def test_a_dead_generation_thread_is_an_instance_that_is_gone():
    with served() as (server, client):
        server.fail(Fault("thread_death"))
        for _ in range(2):
            with pytest.raises(InstanceUnavailable, match="restart"):
                client.ask()


@pytest.mark.parametrize(
    ("code", "expected", "retryable"),
    [
        (500, ProviderError, True),
        ("500", ProviderError, True),
        (429, Overloaded, True),
        ("429", Overloaded, True),
        (503, InstanceUnavailable, True),
        (400, InvalidRequest, False),
        ("generation_failed", ProviderError, True),
    ],
)
@pytest.mark.parametrize("flavour", ["mlx_lm", "vllm_batched", "mlx_openai"])
def test_an_error_inside_a_stream_says_by_its_code_what_to_do(flavour, code, expected, retryable):
    """Even if a finish_reason and [DONE] follow, as they do from mlx-openai-server."""
    with served(flavour) as (server, client):
        server.fail(Fault("error_event", at_token=3, code=code, times=2))
        for ask in (client.ask, client.stream):
            with pytest.raises(FleetError) as raised:
                ask()
            assert (type(raised.value), raised.value.retryable) == (expected, retryable)


def test_a_busy_server_may_say_so_in_a_stream():
    """The simple engine of vllm-mlx sends status 200, a role, and then an error."""
    with served("vllm_simple", token_interval=0.02) as (_, client), client.open() as stream:
        next(iter(stream))
        with pytest.raises(ProviderError) as raised:
            client.ask()
        assert raised.value.retryable


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (429, {"retry-after": "7"}, {"retry_after": 7.0}),
        (503, {"retry-after": "0.5"}, {"retry_after": 0.5}),
        (429, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, {}),
        (429, {"retry-after": "nan"}, {}),
        (429, {"retry-after": "inf"}, {}),
        (429, {"retry-after": "1e300"}, {"retry_after": 3600.0}),
        (429, {"retry-after": "-1"}, {}),
        (429, {}, {}),
    ],
)
def test_a_busy_server_may_say_when_to_come_back(status, headers, expected):
    with served("vllm_batched") as (server, client):
        server.fail(Fault("status", status=status, headers=headers))
        with pytest.raises(Overloaded) as raised:
            client.ask()
        assert raised.value.metadata == expected


@pytest.mark.parametrize(("body", "seconds"), [("x" * 70_000, 30), ('{"error": ', 30), ('{"error": ', 0.1)])
def test_an_error_whose_body_never_ends_is_told_by_its_status(body, seconds, monkeypatch):
    monkeypatch.setattr(error_mapping, "_BODY_SECONDS", 0.2)
    with (
        answering("HTTP/1.1 404 Not Found\r\ncontent-length: 999999\r\n\r\n" + body) as url,
        closing(Client(url)) as client,
        took_less_than(4),
        pytest.raises(InvalidRequest),
    ):
        client.ask(seconds=seconds)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_route_that_is_not_there_is_a_capability_that_is_not_there(flavour):
    with (
        served(flavour) as (server, _),
        closing(Client(f"{server.base_url}/nowhere")) as client,
        pytest.raises(UnsupportedCapability),
    ):
        client.ask()


@pytest.mark.parametrize("body", [{"error": {"message": "Not Found", "code": "not_found"}}, "404 page not found\n"])
def test_a_missing_route_has_several_names(body):
    """The first is what our own embedding server answers to a chat."""
    with served("openai") as (server, client):
        server.fail(Fault("status", status=404, body=body))
        with pytest.raises(UnsupportedCapability):
            client.ask()


# --- Timeouts and the deadline


@pytest.mark.parametrize("kind", sorted(SILENT))
@pytest.mark.parametrize("flavour", ["mlx_lm", "vllm_batched"])
def test_silence_before_the_first_content_may_be_tried_elsewhere(flavour, kind):
    """Neither heartbeats nor a role count as content."""
    clocks = {"first_content": 0.1, "gap": 0.1}
    with served(flavour, old_health=True, heartbeat=0.02, client={"clocks": clocks}) as (server, client):
        server.fail(Fault(kind, seconds=0.02 if kind == "heartbeat_only" else 30))
        with took_less_than(5), pytest.raises(RequestTimeout, match=FIRST) as raised:
            client.stream()
        assert raised.value.retryable


def test_a_server_that_answers_nobody_is_a_silent_one():
    """The process is stopped, but its kernel still accepts connections."""
    with answering("") as url, closing(Client(url, clocks={"first_content": 0.1, "gap": 0.1})) as client:
        with took_less_than(5), pytest.raises(RequestTimeout, match=FIRST) as raised:
            client.ask()
        assert raised.value.retryable


@pytest.mark.parametrize("kind", ["freeze", "heartbeat_only"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_silence_in_mid_answer_is_the_end_of_it(flavour, kind):
    with served(flavour, client={"clocks": {"gap": 0.05}}) as (server, client):
        server.fail(Fault(kind, at_token=5, seconds=0.02))
        with took_less_than(5), pytest.raises(RequestTimeout, match=GAP) as raised:
            client.stream()
        assert raised.value.retryable
        server.wait_for(lambda it: it.counters["disconnected"] == 1)


@pytest.mark.parametrize("flavour", ["mlx_lm", "vllm_batched"])
def test_bytes_that_never_become_an_event_are_no_progress(flavour):
    with served(flavour, client={"clocks": {"first_content": 0.1, "gap": 0.1}}) as (server, client):
        server.fail(Fault("drip", seconds=0.05))
        with took_less_than(5), pytest.raises(RequestTimeout):
            client.stream()


def test_a_slow_stream_is_no_silent_one():
    with served(token_interval=0.06, tokens=8, client={"clocks": {"first_content": 0.4, "gap": 0.3}}) as (_, client):
        assert client.ask().content == "".join(reply_tokens(HELLO, 8))


def test_a_reader_that_takes_its_time_is_not_the_server_s_silence():
    """The gap timeout does not run while the reader is busy: here it asks another server, for longer than the gap."""
    with (
        served("vllm_batched", token_interval=0.01, tokens=40, client={"clocks": {"gap": 0.15}}) as (_, client),
        served(ttft=0.3, tokens=1) as (_, elsewhere),
        client.open() as stream,
    ):
        arrived = iter(stream)
        pieces = next(arrived) + next(arrived)
        elsewhere.ask()
        pieces += [delta for deltas in arrived for delta in deltas]
        assert [delta.content for delta in pieces] == reply_tokens(HELLO, 40, tokens=40)


def test_the_gap_is_watched_again_after_a_slow_reader():
    with (
        served("vllm_batched", client={"clocks": {"gap": 0.1}}) as (server, client),
        served(ttft=0.25, tokens=1) as (_, elsewhere),
    ):
        server.fail(Fault("freeze", at_token=1))
        with took_less_than(5), client.open() as stream:
            arrived = iter(stream)
            next(arrived)
            elsewhere.ask()
            with pytest.raises(RequestTimeout, match=GAP):
                next(arrived)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_stream_ends_at_its_deadline(flavour):
    with served(flavour, token_interval=0.02, tokens=1000) as (server, client):
        with took_less_than(5), pytest.raises(RequestTimeout, match=DEADLINE) as raised:
            client.stream(seconds=0.15, max_tokens=1000)
        assert not raised.value.retryable
        server.wait_for(lambda it: it.counters["disconnected"] == 1)
        assert server.generated_after_leave < 10


def test_a_silent_stream_ends_at_its_deadline():
    with served("vllm_batched") as (server, client):
        faults = [Fault("freeze", at_token=3), Fault("heartbeat_only"), Fault("slow_headers", seconds=30)]
        server.fail(*faults)
        for _ in faults:
            with took_less_than(5), pytest.raises(RequestTimeout, match=DEADLINE):
                client.stream(seconds=0.1)


def test_a_reader_that_takes_too_much_time_meets_the_deadline():
    """It raises at once, even if more of the stream has arrived."""
    with (
        served("vllm_batched", token_interval=0.01, tokens=1000) as (_, client),
        served(ttft=0.3, tokens=1) as (_, elsewhere),
        client.open(seconds=0.2, max_tokens=1000) as stream,
    ):
        arrived = iter(stream)
        next(arrived)
        elsewhere.ask()
        with pytest.raises(RequestTimeout, match=DEADLINE):
            next(arrived)


# --- The end


def test_a_server_that_is_done_and_does_not_close_is_left():
    stream = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n{said('Hi')}"
    with answering(stream) as url, closing(Client(url)) as client, took_less_than(10):
        assert client.ask().content == "Hi"


def test_what_comes_after_done_is_not_read():
    with served() as (server, client):
        late = 'data: {"error": "late"}\n\n'
        server.fail(Fault("status", status=200, body=said("Hi") + late + said("more"), times=2))
        assert client.ask().content == client.stream()[1]["content"] == "Hi"


def test_a_blank_line_after_the_last_event_may_be_missing():
    with served() as (server, client):
        server.fail(Fault("status", status=200, body=said("Hi").rstrip("\n"), times=2))
        assert client.ask().content == client.stream()[1]["content"] == "Hi"


@pytest.mark.parametrize("after", ["", ": heartbeat\n\n", 'data: {"choices": [{"delta": {}}]}\n\n'])
@pytest.mark.parametrize("kind", ["mlx_lm", "openai"])
def test_a_server_that_says_that_it_has_finished_and_does_not_end_is_left(kind, after, monkeypatch):
    monkeypatch.setattr(chat_stream, "_FINISH_SECONDS", 0.1)
    stream = f"HTTP/1.1 200 OK\r\n\r\n{said('Hi').removesuffix(DONE)}{after}"
    with answering(stream) as url, closing(Client(url, server=kind)) as client, took_less_than(5):
        assert client.ask().content == client.stream()[1]["content"] == "Hi"


def test_a_server_that_finishes_just_before_the_deadline_is_in_time():
    stream = f"HTTP/1.1 200 OK\r\n\r\n{said('Hi').removesuffix(DONE)}"
    with answering(stream) as url, closing(Client(url)) as client, took_less_than(5):
        assert client.ask(seconds=0.3).content == "Hi"


def test_a_request_that_is_cancelled_after_the_finish_reason_is_cancelled():
    stream = f"HTTP/1.1 200 OK\r\n\r\n{said('Hi').removesuffix(DONE)}"
    with answering(stream) as url, closing(Client(url)) as client, cancelled(client.ask):
        time.sleep(0.1)


@pytest.mark.rest
def test_an_answer_of_a_hundred_thousand_pieces():
    with served("openai") as (server, client):
        server.fail(Fault("status", status=200, body=said(*"ab" * 50_000)))
        assert client.ask().content == "ab" * 50_000


@pytest.mark.parametrize(
    "piece", [": c\n\n", "data:\n\n", "event: ping\ndata: {}\n\n", 'data: {"choices": []}\n\n', "\n", "x\n"]
)
def test_heartbeats_without_end_are_no_answer(piece, monkeypatch):
    monkeypatch.setattr(chat_stream, "_MOST_IDLE_BYTES", 200_000)
    with served("openai") as (server, client):
        server.fail(Fault("flood", body=piece))
        with pytest.raises(MalformedOutput, match="heartbeats"):
            client.ask()


@pytest.mark.parametrize(
    "delta",
    [{"content": "x" * 9000}, {"reasoning": "x" * 9000}, {"tool_calls": [{"function": {"arguments": "x" * 9000}}]}],
)
def test_text_without_end_is_no_answer(delta):
    with served("openai") as (server, client):
        server.fail(Fault("flood", body=f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n"))
        with pytest.raises(MalformedOutput, match="too large"):
            client.ask()


def test_pieces_without_end_are_no_answer(monkeypatch):
    monkeypatch.setattr(chat_stream, "_MOST_TOKENS", 10_000)
    with served("openai") as (server, client):
        server.fail(Fault("flood", body=said("a").split("\n\n")[0] + "\n\n"))
        with pytest.raises(MalformedOutput, match="too large"):
            client.ask()


def test_json_that_breaks_off_is_a_connection_that_broke():
    whole = json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": "Hi"}}]})
    with served("openai") as (server, client):
        server.fail(*(Fault("status", status=200, body=whole[:size]) for size in (1, 20, len(whole) - 1)))
        for _ in range(3):
            with pytest.raises(ConnectionFailure):
                client.ask()
        server.fail(Fault("status", status=200, body=f"\ufeff\n{whole}\n"))
        assert client.ask().content == "Hi"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"error": {"message": "no", "code": 400}}, InvalidRequest),
        ({"detail": "no"}, ProviderError),
        ({"object": "error", "message": "full", "code": 429}, Overloaded),
        ({"hello": 1}, MalformedOutput),
        ("<html></html>", MalformedOutput),
    ],
)
def test_what_comes_instead_of_a_stream_is_what_it_says(body, expected):
    with served("mlx_openai") as (server, client):
        server.fail(Fault("status", status=200, body=body, times=2))
        for ask in (client.ask, client.stream):
            with pytest.raises(FleetError) as raised:
                ask()
            assert type(raised.value) is expected


def test_tokens_that_are_no_text_are_tokens_nevertheless():
    """mlx_lm.server drops a tool call that max_tokens cut, and sends half a character as nothing."""
    stream = said().replace('"choices"', '"usage": {"completion_tokens": 3}, "choices"')
    with served() as (server, client):
        server.fail(Fault("status", status=200, body=stream, times=2))
        assert client.ask().content is None
        assert client.stream()[1]["content"] is None


def test_nothing_may_be_left_of_an_answer_that_is_continued():
    """Its last frame was lost."""
    with served("vllm_batched") as (server, client):
        resume = Resume(content=WHOLE, tokens=32)
        server.fail(Fault("status", status=200, body=said()))
        assert client.stream(resume=resume, temperature=1)[1]["content"] is None


# --- Readers that leave


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_stream_that_is_left_stops_its_server(flavour):
    with served(flavour, token_interval=0.01, tokens=5000) as (server, client):
        with client.open(max_tokens=5000) as stream:
            next(iter(stream))
        server.wait_for(lambda it: it.counters["disconnected"] == 1 and it.counters["running"] == 0)
        assert server.generated_after_leave < 10
        assert server.requests[0].generated < 100


@pytest.mark.parametrize("flavour", UVICORN)
def test_a_stream_may_be_left_before_it_is_read(flavour):
    with served(flavour, token_interval=0.01, tokens=5000) as (server, client):
        with client.open(max_tokens=5000):
            pass
        server.wait_for(lambda it: it.counters["disconnected"] == 1 and it.counters["running"] == 0)


def test_a_reader_that_fails_leaves_too():
    """Its own error is raised."""
    with served("vllm_batched", token_interval=0.01, tokens=5000) as (server, client):
        with pytest.raises(ZeroDivisionError), client.open(max_tokens=5000):
            raise ZeroDivisionError
        server.wait_for(lambda it: it.counters["disconnected"] == 1)


def test_a_client_goes_on_after_a_stream_was_left():
    with served("vllm_batched", token_interval=0.005) as (server, client):
        for _ in range(3):
            with client.open() as stream:
                next(iter(stream))
        assert client.ask().content == WHOLE
        server.wait_for(lambda it: it.counters["disconnected"] == 3)
        assert server.counters["connections"] == 4


def told(error):
    """All text of an exception that a log could show."""
    return "".join(traceback.format_exception(error)) + repr(error) + str(error.metadata)
