"""The request envelope: encoding, refusals, size, privacy, deadline."""

import functools
import json
import math
import re
import time
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol import clock
from fleet_worker.protocol.openai import ChatParams, EmbedParams
from fleet_worker.protocol.request import ControlMessage, FleetRequest, Resume
from tests.envelopes import IMAGE, LARGE, built, decode, envelope, envelopes, refused, refused_params, user

SECRET = "swordfish"


@given(envelopes)
def test_an_envelope_is_the_same_after_its_way(raw):
    request = decode(raw)
    assert decode(json.loads(json.dumps(request.encode(), allow_nan=False))) == request


def test_stream_is_another_word_for_stream_chat():
    assert decode(envelope(operation="stream")).operation == "stream_chat"


def test_the_operation_decides_what_the_params_are():
    assert isinstance(decode(envelope()).params, ChatParams)
    assert isinstance(decode(envelope(operation="stream_chat")).params, ChatParams)
    assert isinstance(decode(envelope(operation="embed", params={"input": ["a"]})).params, EmbedParams)


@pytest.mark.parametrize("name", sorted(FleetRequest.model_fields.keys() - {"resume"}))
def test_an_envelope_without_one_of_its_fields_is_refused_by_its_name(name):
    raw = envelope()
    del raw[name]
    assert name in refused(raw)


def test_only_a_stream_can_be_resumed():
    resume = {"content": f"{SECRET} and", "reasoning": "", "tokens": 3}
    request = decode(envelope(operation="stream_chat", resume=resume))
    assert request.resume == Resume(content=f"{SECRET} and", tokens=3)
    assert SECRET not in repr(request)
    assert "only a stream_chat" in refused(envelope(resume=resume))


BAD_ENVELOPES = {
    "an earlier version": {"protocol_version": 1},
    "a later version": {"protocol_version": 3},
    "a version as a text": {"protocol_version": "2"},
    "no version": {"protocol_version": None},
    "an unknown operation": {"operation": "delete"},
    "no operation": {"operation": None},
    "an operation that is a list": {"operation": ["chat"]},
    "an operation that is an object": {"operation": {"name": "chat"}},
    "another provider": {"provider": "openai"},
    "a provider by another case": {"provider": "MLX"},
    "params of another operation": {"operation": "embed"},
    "no params": {"params": None},
    "params that are a text": {"params": "Hi"},
    "params that are a list": {"params": [user()]},
    "attempt nought": {"attempt": 0},
    "an attempt that is true": {"attempt": True},
    "an attempt as a text": {"attempt": "1"},
    "no name": {"request_id": ""},
    "an endless name": {"request_id": "r" * 201},
    "no model": {"model": ""},
    "a model that is a list": {"model": ["a"]},
    "an endless model": {"model": "m" * 501},
    "no instance": {"provider_instance": ""},
    "a reply queue without expiry": {"reply_to": "llm.fleet.reply.mini-7.0123456789ab"},
    "a reply queue that expires at once": {"reply_to": "llm.fleet.reply.mini-7.0123456789ab.0"},
    "a lane as reply queue": {"reply_to": "llm.fleet.chat.qwen3-14b"},
    "somebody else's queue": {"reply_to": "celery"},
    "a reply queue of two lines": {"reply_to": "llm.fleet.reply.mini-7.0123456789ab.120\n"},
    "a reply queue inside another name": {"reply_to": "amq.llm.fleet.reply.mini-7.120"},
    "a reply queue with a space": {"reply_to": "llm.fleet.reply.mini 7.120"},
    "an endless reply queue": {"reply_to": f"llm.fleet.reply.{'m' * 300}.120"},
    "a caller that is a text": {"caller": "me"},
    "a context that is a list": {"message_context": []},
    "a number that is none in a context": {"trace_context": {"a": [math.nan]}},
    "a token that is a number": {"signed_token": 5},
    "no time": {"timeout_seconds": 0},
    "less than no time": {"timeout_seconds": -1},
    "all the time": {"timeout_seconds": math.inf},
    "a time that is none": {"timeout_seconds": math.nan},
    "a time as a text": {"timeout_seconds": "300"},
    "an end that is none": {"expires_at": math.nan},
    "no end": {"expires_at": math.inf},
    "an unknown priority": {"priority": "urgent"},
    "a priority as a number": {"priority": 0},
    "a field of tomorrow": {"colour": "blue"},
    "a key that is a number": {"params": {"messages": [user()], "tools": [{"function": {"a": 1, 2: 3}}]}},
    "many levels": {"params": {"messages": [user()], "tools": [functools.reduce(lambda a, _: {"a": a}, range(101))]}},
    "more levels": {"message_context": functools.reduce(lambda a, _: {"a": a}, range(2000), {})},
    "legacy schema_version": {"schema_version": 1},
    "legacy request_type": {"request_type": "chat"},
    "legacy fleet_correlation_id": {"fleet_correlation_id": "r-1"},
}


@pytest.mark.parametrize("changes", BAD_ENVELOPES.values(), ids=BAD_ENVELOPES)
def test_a_bad_envelope_is_refused(changes):
    refused(envelope(**changes))
    with pytest.raises(InvalidRequest):
        FleetRequest.build(envelope(**changes))


@pytest.mark.parametrize("raw", [None, 5, "Hi", [], [envelope()], {}, b"{}", {1: 2}, object], ids=repr)
def test_what_is_no_envelope_at_all_is_refused(raw):
    refused(raw)


@pytest.mark.parametrize("name", ["schema_version", "request_type", "fleet_correlation_id"])
def test_a_legacy_envelope_is_told_so(name):
    assert name in refused(envelope(**{name: None}))
    assert "legacy" in refused(envelope(**{name: None}))


def size_of(request):
    """The size that the error text names."""
    with pytest.raises(InvalidRequest, match="max_body_bytes") as caught:
        request.check_size(0)
    return int(re.search(r"is ([\d,]+) bytes", caught.value.message)[1].replace(",", ""))


@given(st.text('aé€😀\n"\\', max_size=20))
def test_the_size_of_a_request_is_that_of_its_json_in_bytes(content):
    least, params = {"messages": [user("")]}, {"messages": [user(content)]}
    bytes_of = len(json.dumps(content, ensure_ascii=False).encode())
    assert size_of(built("chat", params)) - size_of(built("chat", least)) == bytes_of - len('""')


@given(envelopes)
def test_what_a_router_does_not_find_too_large_no_node_does_at_no_attempt(raw):
    request = FleetRequest.build(raw)
    size = size_of(request)
    again = {"attempt": 1000, "reply_to": f"llm.fleet.reply.{'x' * 200}.1", "expires_at": 1.23456789012345}
    for changes in ({}, again):
        sent = json.loads(json.dumps(request.model_copy(update=changes).encode()))
        decode(sent, max_bytes=size)
        with pytest.raises(InvalidRequest, match="max_body_bytes"):
            decode(sent, max_bytes=size - 1)


def test_what_was_delivered_of_an_answer_does_not_make_its_request_too_large():
    begun = envelope(operation="stream_chat", resume={"content": "x" * 2000, "reasoning": "", "tokens": 500})
    assert decode(begun, max_bytes=1000).resume.tokens == 500


def test_too_large_an_envelope_is_refused_before_it_is_looked_at():
    with pytest.raises(InvalidRequest, match="max_body_bytes"):
        decode({"nonsense": "x" * 2000}, max_bytes=2000)


def test_too_deep_a_body_is_refused():
    deep = {}
    for _ in range(100_000):
        deep = {"a": deep}
    assert "100 levels deep" in refused_params("chat", {"messages": [user()], "tools": [deep]})


# --- Privacy

WHOLE = envelope(
    params={
        "messages": [
            {"role": "user", "name": "a", "content": "a"},
            user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}}]),
            {
                "role": "assistant",
                "tool_calls": [{"id": "a", "type": "function", "function": {"name": "a", "arguments": "a"}}],
            },
            {"role": "tool", "content": "a", "tool_call_id": "a"},
        ],
        "max_tokens": 1,
        "temperature": 1.0,
        "top_k": 1,
        "seed": 1,
        "stop": ["a"],
        "tools": [{"type": "function", "function": {"name": "a"}}],
        "tool_choice": {"type": "function", "function": {"name": "a"}},
        "parallel_tool_calls": True,
        "response_format": {"type": "json_schema", "json_schema": {"a": "a"}},
        "logit_bias": {"5": 1.0},
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": True},
        "n": 1,
        "user": "a",
    },
    message_context={"a": "a"},
    caller={"a": "a"},
    trace_context={"a": "a"},
    signed_token="a",
)
WHOLE_EMBEDDING = envelope(operation="embed", params={"input": ["a", "a"], "user": "a"})
PUBLIC = {"request_id", "correlation_id", "idempotency_key", "provider_instance", "model", "priority", "reply_to"}
WRONG = [
    SECRET,
    [SECRET],
    [[SECRET]],
    {"text": SECRET},
    {"type": SECRET},
    [{"type": SECRET}],
    [{"type": "text", "text": [SECRET]}],
    {"role": SECRET, "content": SECRET},
    [{"role": SECRET, "content": 5}],
    [{"role": "user", "content": [{"type": SECRET, "text": SECRET}]}],
    {"url": SECRET},
    SECRET.encode(),
    {SECRET},
    {"a": {"b": [math.nan, SECRET]}},
    f"data:image/{SECRET}\ud83d",
]


def places(value, path=()):
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(value, path, other):
    if not path:
        return other
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], other)
    return copy


def everything_shown(request):
    yield from (repr(request), str(request), repr(request.params), repr([request]))
    yield from (repr(message) for message in getattr(request.params, "messages", ()))
    for message in getattr(request.params, "messages", ()):
        yield from (repr(part) for part in message.content or () if not isinstance(part, str))


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize("whole", [WHOLE, WHOLE_EMBEDDING], ids=["chat", "embed"])
def test_a_secret_at_any_place_of_an_envelope_is_shown_by_nothing(whole, wrong):
    """It may be accepted, where text is allowed, or refused."""
    leaks = set()
    for path in places(whole):
        try:
            shown = list(everything_shown(decode(replaced(whole, path, wrong)))) if path[0] not in PUBLIC else []
        except Exception as error:
            shown = [str(error), repr(error), *traceback.format_exception(error)]
        leaks |= {(path, text) for text in shown if SECRET in text}
    assert not leaks


def test_the_whole_envelopes_of_these_tests_are_good():
    assert len(list(places(decode(WHOLE).encode()))) > 60
    assert decode(WHOLE_EMBEDDING)


def test_a_secret_as_a_key_where_keys_are_data_is_not_repeated():
    message = refused_params("chat", {"messages": [user()], "logit_bias": {SECRET: "x"}})
    assert SECRET not in message


def test_a_secret_in_too_large_a_request_is_not_repeated():
    with pytest.raises(InvalidRequest) as caught:
        built("chat", {"messages": [user(SECRET * 100)]}, max_bytes=100)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


# --- Time


def test_the_time_of_a_request_runs_from_its_submission():
    request = decode(envelope(timeout_seconds=30, expires_at=1.0))
    before = clock.now()
    submitted = request.addressed_to("llm.fleet.reply.other.0123456789ab.120")
    assert before + 30 <= submitted.expires_at <= clock.now() + 30
    assert submitted.reply_to == "llm.fleet.reply.other.0123456789ab.120"
    assert submitted.model_copy(update={"reply_to": request.reply_to, "expires_at": 1.0}) == request
    assert submitted.remaining == pytest.approx(30, abs=1)
    assert submitted.submitted_at == pytest.approx(clock.now(), abs=1)


@given(st.floats(0.001, 3600), st.floats(-1e9, 1e9))
def test_an_envelope_never_gives_more_time_than_the_caller_did(timeout, skew):
    request = decode(envelope(timeout_seconds=timeout, expires_at=clock.now() + skew))
    assert request.remaining <= timeout
    assert request.remaining <= skew + 0.001


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_a_correction_of_the_clock_of_the_host_moves_no_deadline(monkeypatch, step):
    request = decode(envelope(timeout_seconds=30)).addressed_to("llm.fleet.reply.other.0123456789ab.120")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + step)
    assert request.remaining == pytest.approx(30, abs=1)
    assert request.addressed_to(request.reply_to).expires_at == pytest.approx(request.expires_at, abs=1)


# --- Control messages


def test_a_control_message_travels_whole():
    for said in (ControlMessage(node="n@h", cancelled=[("a", 1), ("b", 2)]), ControlMessage(cancelled=[("c", 3)])):
        assert ControlMessage.decode(said.encode()) == said
    with pytest.raises(InvalidRequest, match="not a valid ControlMessage"):
        ControlMessage.decode(b'{"cancelled": [1]}')


def test_what_a_newer_router_adds_is_ignored():
    assert ControlMessage.decode(b'{"node":"a","novelty":1}') == ControlMessage(node="a")


def chat_refused(**params):
    with pytest.raises(InvalidRequest) as caught:
        FleetRequest.build(envelope(params={"messages": [{"role": "user", "content": "hello"}], **params}))
    return caught.value.message


def test_an_unknown_field_is_told_with_the_nearest_that_exists():
    assert chat_refused(max_token=3) == "max_token: unknown field, the nearest that exists is max_tokens"
    assert chat_refused(xyzzy=3) == "xyzzy: unknown field"
    assert chat_refused(input=3) == "input: unknown field"  # a field of another message


def test_an_image_that_is_not_inline_is_told_once():
    content = [{"type": "image_url", "image_url": {"url": "http://images/hush.png"}}]
    refusal = chat_refused(messages=[{"role": "user", "content": content}])
    assert refusal == (
        "messages.0.content.0.image_url.url: is an address: put the image itself into a data:image/... URL, in base64"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", [1] * 20_000),
        ("messages", [{}] * 20_000),
        ("messages", [{**user(), "content": [{}] * 20_000}]),
        ("tools", [1] * 20_000),
        ("stop", [1] * 20_000),
    ],
)
def test_of_a_list_of_wrong_values_the_first_is_named(field, value):
    """pydantic describes each, which for a megabyte of them takes seconds and a gigabyte."""
    error = refused_params("chat", {"messages": [user()], field: value})
    assert error.startswith(field)
    assert "; " not in error
    assert "more" not in error


def test_very_many_unknown_fields_are_counted():
    error = refused_params("chat", {"messages": [user()], **{f"field{number}": 1 for number in range(5_000)}})
    assert error == "5,000 of its fields are wrong"


@pytest.mark.parametrize("value", [[1] * 60_000, [{}] * 60_000, {str(number): 1 for number in range(60_000)}])
def test_a_request_of_very_many_values_is_refused_by_router_and_node_alike(value):
    """A node could check it only with a second of work; before, it dropped some of these without an answer."""
    request = envelope(caller={"values": value})
    text = "the request has more than 50,000 numbers, strings, lists and objects: split it"
    assert refused(request) == text
    with pytest.raises(InvalidRequest, match=text):
        FleetRequest.build(request).check_size(LARGE)
