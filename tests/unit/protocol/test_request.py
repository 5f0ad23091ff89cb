import base64
import functools
import json
import math
import re
import struct
import time
import traceback
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import FleetError, InvalidRequest, Overloaded
from fleet_worker.protocol.control import ControlMessage
from fleet_worker.protocol.openai import ChatParams, EmbedParams
from fleet_worker.protocol.reply import (
    Accepted,
    Alive,
    ChatResponse,
    Delta,
    Deltas,
    EmbedResponse,
    Failure,
    Reply,
    Timings,
    Usage,
    join,
)
from fleet_worker.protocol.request import FleetRequest, Resume
from fleet_worker.protocol.vectors import pack_vector, unpack_vector

SECRET = "swordfish"


def packed(vector):
    return pack_vector(array("f", vector))


LARGE = 8 * 1024 * 1024
IMAGE = "data:image/png;base64,iVBORw0KGgo="


def user(content="Hi"):
    return {"role": "user", "content": content}


def envelope(**changes):
    return {
        "protocol_version": 2,
        "request_id": "r-1",
        "correlation_id": "r-1",
        "idempotency_key": "r-1",
        "attempt": 1,
        "operation": "chat",
        "provider": "mlx",
        "provider_instance": "any",
        "model": "qwen3-14b",
        "params": {"messages": [user()]},
        "reply_to": "llm.fleet.reply.mini-7.0123456789ab.120",
        "message_context": {},
        "caller": {},
        "trace_context": {},
        "signed_token": None,
        "timeout_seconds": 300.0,
        "expires_at": 2_000_000_000.0,
        "priority": "normal",
        **changes,
    }


def decode(raw, max_bytes=LARGE):
    return FleetRequest.decode(raw, max_bytes=max_bytes)


def refused(raw):
    """The text of the refusal at the worker."""
    with pytest.raises(InvalidRequest) as caught:
        decode(raw)
    return caught.value.message


def built(operation, params, max_bytes=LARGE):
    """As a router builds it, before anything is sent."""
    request = FleetRequest.build(envelope(operation=operation, params=params))
    request.check_size(max_bytes)
    return request


def refused_params(operation, params):
    """The text of the refusal at the router."""
    with pytest.raises(InvalidRequest) as caught:
        built(operation, params)
    return caught.value.message


# --- What a request may hold

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, values, max_size=3)
contents = texts | st.lists(
    st.builds(lambda text: {"type": "text", "text": text}, texts)
    | st.just({"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}}),
    max_size=2,
)
turns = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["system", "user", "tool"]), contents
)
chat_params = st.builds(
    lambda messages, rest: {"messages": messages, **rest},
    st.lists(turns, min_size=1, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "max_tokens": st.none() | st.integers(1, 1000),
            "temperature": st.none() | st.floats(0, 2),
            "top_k": st.integers(0, 1000),
            "seed": st.integers(0, 2**32 - 1),
            "stop": st.text("ab", min_size=1) | st.lists(st.text("ab", min_size=1), max_size=3),
            "tools": st.lists(objects, max_size=2),
            "response_format": objects,
            "logit_bias": st.dictionaries(st.integers(0, 99).map(str), finite, max_size=2),
            "chat_template_kwargs": st.just({"enable_thinking": False}),
        },
    ),
)
embed_params = st.builds(lambda texts: {"input": texts}, st.lists(texts.filter(bool), min_size=1, max_size=3))
envelopes = st.builds(
    lambda body, caller, context, wait: envelope(
        operation=body[0], params=body[1], caller=caller, message_context=context, timeout_seconds=wait
    ),
    st.tuples(st.sampled_from(["chat", "stream_chat"]), chat_params) | st.tuples(st.just("embed"), embed_params),
    objects,
    objects,
    st.floats(0.001, 3600),
)


@given(envelopes)
def test_an_envelope_is_the_same_after_its_way(raw):
    request = decode(raw)
    assert decode(json.loads(json.dumps(request.encode(), allow_nan=False))) == request


@given(chat_params)
def test_nothing_a_caller_said_is_lost_on_the_way(params):
    sent = decode(envelope(params=params)).encode()["params"]
    said = {key: value for key, value in params.items() if value is not None}
    if isinstance(said.get("stop"), str):
        said["stop"] = [said["stop"]]
    assert sent == said


def test_a_tool_keeps_its_nulls():
    """In a JSON schema null is a value."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"enum": ["a", None], "default": None}}}
    assert decode(envelope(params={"messages": [user()], "tools": [tool]})).encode()["params"]["tools"] == [tool]


def test_stream_is_another_word_for_stream_chat():
    assert decode(envelope(operation="stream")).operation == "stream_chat"


def test_the_operation_decides_what_the_params_are():
    assert isinstance(decode(envelope()).params, ChatParams)
    assert isinstance(decode(envelope(operation="stream_chat")).params, ChatParams)
    assert isinstance(decode(envelope(operation="embed", params={"input": ["a"]})).params, EmbedParams)


def test_a_text_is_a_list_of_one_text():
    assert built("embed", {"input": "a"}).params.input == ["a"]
    assert built("chat", {"messages": [user()], "stop": "a"}).params.stop == ["a"]


def test_nulls_say_nothing():
    nulls = dict.fromkeys(set(ChatParams.model_fields) - {"messages"})
    assert built("chat", {"messages": [user()], **nulls}).params == ChatParams.model_validate({"messages": [user()]})


def test_what_openai_clients_echo_in_a_message_is_dropped():
    turn = {"role": "assistant", "content": "4", "refusal": None, "audio": None, "annotations": [], "partial": False}
    assert decode(envelope(params={"messages": [turn]})).encode()["params"]["messages"] == [
        {"role": "assistant", "content": "4"}
    ]


def test_a_call_for_tools_and_its_result_are_turns():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        user(),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    sent = decode(envelope(params={"messages": turns})).encode()["params"]["messages"]
    assert sent == [turns[0], {"role": "assistant", "tool_calls": [call]}, turns[2]]


def test_images_are_noticed():
    image = {"type": "image_url", "image_url": {"url": IMAGE}}
    assert decode(
        envelope(params={"messages": [user(), user([{"type": "text", "text": "?"}, image])]})
    ).params.has_images
    assert not decode(
        envelope(params={"messages": [user("image_url"), user([{"type": "text", "text": IMAGE}])]})
    ).params.has_images


# --- What is refused, at the router and at the worker alike

DEEP_NAN = [{"type": "function", "function": {"parameters": {"properties": {"x": {"minimum": math.nan}}}}}]
BAD_CHATS = {
    "no messages": {},
    "messages that are nothing": {"messages": []},
    "messages that are null": {"messages": None},
    "messages as one text": {"messages": "Hi"},
    "messages as one object": {"messages": user()},
    "a message that is a text": {"messages": ["Hi"]},
    "a message that is null": {"messages": [None]},
    "a message without role": {"messages": [{"content": "Hi"}]},
    "a message of an unknown role": {"messages": [{"role": "wizard", "content": "Hi"}]},
    "a message without content": {"messages": [{"role": "user"}]},
    "a message whose content is null": {"messages": [user(None)]},
    "an assistant that says and calls nothing": {"messages": [{"role": "assistant", "tool_calls": []}]},
    "content that is a number": {"messages": [user(5)]},
    "content that is an object": {"messages": [user({"type": "text", "text": "Hi"})]},
    "content in parts that are texts": {"messages": [user(["Hi"])]},
    "content of an unknown type": {"messages": [user([{"type": "video", "text": "Hi"}])]},
    "content without type": {"messages": [user([{"text": "Hi"}])]},
    "a text part that is a number": {"messages": [user([{"type": "text", "text": 5}])]},
    "an image by http": {"messages": [user([{"type": "image_url", "image_url": {"url": "http://10.0.0.1/a.png"}}])]},
    "an image by https": {"messages": [user([{"type": "image_url", "image_url": {"url": "https://h/a.png"}}])]},
    "an image of the host's disk": {
        "messages": [user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])]
    },
    "an image that is a page": {"messages": [user([{"type": "image_url", "image_url": {"url": "data:text/html,Hi"}}])]},
    "an image by http after a good one": {
        "messages": [
            user(
                [
                    {"type": "image_url", "image_url": {"url": IMAGE}},
                    {"type": "image_url", "image_url": {"url": "http://h"}},
                ]
            )
        ]
    },
    "an image that is a text": {"messages": [user([{"type": "image_url", "image_url": IMAGE}])]},
    "tool calls that are a text": {"messages": [{"role": "assistant", "content": "", "tool_calls": "f()"}]},
    "half a character": {"messages": [user("\ud83d")]},
    "bytes": {"messages": [user(b"Hi")]},
    "a set": {"messages": [user()], "stop": {"a"}},
    "a stop that is a number": {"messages": [user()], "stop": 5},
    "a stop with a number in it": {"messages": [user()], "stop": ["a", 5]},
    "a stop that is null in a list": {"messages": [user()], "stop": [None]},
    "a stop that is empty": {"messages": [user()], "stop": ""},
    "a stop with an empty text in it": {"messages": [user()], "stop": ["a", ""]},
    "too many stops": {"messages": [user()], "stop": ["a"] * 17},
    "top_k as large as a vocabulary": {"messages": [user()], "top_k": 151_936},
    "top_k just too large": {"messages": [user()], "top_k": 1001},
    "top_k below nothing": {"messages": [user()], "top_k": -1},
    "top_k that is a fraction": {"messages": [user()], "top_k": 1.5},
    "top_k that is true": {"messages": [user()], "top_k": True},
    "max_tokens of nothing": {"messages": [user()], "max_tokens": 0},
    "max_tokens below nothing": {"messages": [user()], "max_tokens": -1},
    "max_tokens without end": {"messages": [user()], "max_tokens": 10**30},
    "max_tokens as a text": {"messages": [user()], "max_tokens": "5"},
    "max_tokens as a float": {"messages": [user()], "max_tokens": 5.0},
    "max_completion_tokens of nothing": {"messages": [user()], "max_completion_tokens": 0},
    "a temperature that is no number": {"messages": [user()], "temperature": math.nan},
    "an infinite temperature": {"messages": [user()], "temperature": math.inf},
    "a temperature below nothing": {"messages": [user()], "temperature": -0.1},
    "a temperature too high": {"messages": [user()], "temperature": 2.1},
    "a temperature as a text": {"messages": [user()], "temperature": "hot"},
    "a top_p of nothing": {"messages": [user()], "top_p": 0},
    "a top_p above all": {"messages": [user()], "top_p": 1.1},
    "an infinite penalty": {"messages": [user()], "repetition_penalty": math.inf},
    "a seed below nothing": {"messages": [user()], "seed": -1},
    "a seed too large": {"messages": [user()], "seed": 2**32},
    "two answers": {"messages": [user()], "n": 2},
    "stream": {"messages": [user()], "stream": True},
    "model": {"messages": [user()], "model": "gpt-4o"},
    "adapters": {"messages": [user()], "adapters": "/tmp/evil"},
    "draft_model": {"messages": [user()], "draft_model": "org/model"},
    "role_mapping": {"messages": [user()], "role_mapping": {"bos": "<s>"}},
    "chat_template": {"messages": [user()], "chat_template": "{{ messages }}"},
    "a chat_template among its arguments": {"messages": [user()], "chat_template_kwargs": {"chat_template": "{{ x }}"}},
    "return_tensors": {"messages": [user()], "chat_template_kwargs": {"return_tensors": "pt"}},
    "a wrong reasoning effort": {"messages": [user()], "reasoning_effort": "enormous"},
    "a logit bias that is a list": {"messages": [user()], "logit_bias": [1]},
    "a logit bias that is no number": {"messages": [user()], "logit_bias": {"5": math.nan}},
    "tools that are a text": {"messages": [user()], "tools": "search"},
    "tools that are texts": {"messages": [user()], "tools": ["search"]},
    "a number that is none deep inside a tool": {"messages": [user()], "tools": DEEP_NAN},
    "infinity deep inside a tool": {"messages": [user()], "tools": [{"a": [{"b": -math.inf}]}]},
    "bytes deep inside a tool": {"messages": [user()], "tools": [{"a": [{"b": b"x"}]}]},
    "a response format that is a text": {"messages": [user()], "response_format": "json"},
    "a number that is none in a response format": {"messages": [user()], "response_format": {"schema": [math.nan]}},
}
BAD_EMBEDDINGS = {
    "no input": {},
    "an embedding of nothing": {"input": []},
    "an embedding of null": {"input": None},
    "an embedding of an empty text": {"input": ""},
    "an empty text among others": {"input": ["a", ""]},
    "token ids": {"input": [1, 2, 3]},
    "lists of token ids": {"input": [[1, 2], [3]]},
    "token ids among texts": {"input": ["a", [1]]},
    "a number": {"input": 5},
    "an object": {"input": {"text": "a"}},
    "a null among texts": {"input": ["a", None]},
    "half a character": {"input": "\ud83d"},
    "too many texts": {"input": ["a"] * 2049},
    "messages": {"input": "a", "messages": [user()]},
}
BAD = [("chat", name, params) for name, params in BAD_CHATS.items()] + [
    ("embed", name, params) for name, params in BAD_EMBEDDINGS.items()
]


@pytest.mark.parametrize(("operation", "params"), [pytest.param(kind, params, id=name) for kind, name, params in BAD])
def test_bad_params_are_refused_at_the_router_and_again_at_the_worker(operation, params):
    refused_params(operation, params)
    refused(envelope(operation=operation, params=params))
    if operation == "chat":
        refused_params("stream_chat", params)
        refused(envelope(operation="stream_chat", params=params))


GOOD_CHATS = {
    "the least": {"messages": [user()]},
    "an empty text": {"messages": [user("")]},
    "every role": {
        "messages": [{"role": role, "content": "a"} for role in ("system", "developer", "user", "assistant", "tool")]
    },
    "bounds below": {"messages": [user()], "max_tokens": 1, "temperature": 0, "top_k": 0, "min_p": 0, "seed": 0},
    "bounds above": {"messages": [user()], "temperature": 2, "top_p": 1, "top_k": 1000, "seed": 2**32 - 1},
    "sixteen stops": {"messages": [user()], "stop": ["a"] * 16},
    "one answer": {"messages": [user()], "n": 1},
    "a tool by name": {"messages": [user()], "tool_choice": {"type": "function", "function": {"name": "f"}}},
}


@pytest.mark.parametrize("params", GOOD_CHATS.values(), ids=GOOD_CHATS)
def test_good_params_pass(params):
    assert decode(envelope(params=params)).params == built("chat", params).params


def test_as_many_texts_as_allowed_are_embedded():
    assert len(built("embed", {"input": ["a"] * 2048}).params.input) == 2048


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
    """As its refusal says it."""
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


# --- The texts of refusals


@pytest.mark.parametrize(
    ("params", "where"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [user(), user(5)]}, "messages.1.content"),
        ({"messages": [user(["Hi"])]}, "messages.0.content"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "http://h"}}])]}, "messages.0.content"),
        ({"messages": [user()], "temprature": 1}, "temprature"),
        ({"messages": [user()], "chat_template_kwargs": {"return_tensors": 1}}, "chat_template_kwargs.return_tensors"),
        ({"messages": [user()], "logit_bias": {"5": "x"}}, "logit_bias"),
        ({"messages": [user()], "tool_choice": 5}, "tool_choice"),
    ],
)
def test_a_refusal_says_where_in_the_words_of_openai(params, where):
    message = refused_params("chat", params)
    assert where in message
    assert not [word for word in ("tagged-union", "Value error", "list[", "dict[", "literal[") if word in message]


def test_a_refusal_is_short_whatever_was_sent():
    unknown = {f"{'x' * 5000}{number}": 1 for number in range(50)}
    assert len(refused_params("chat", {"messages": [user()], **unknown})) < 2000
    assert "more" in refused_params("chat", {"messages": [user()], **{f"x{number}": 1 for number in range(50)}})


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
        "tools": [{"a": "a"}],
        "tool_choice": {"a": "a"},
        "parallel_tool_calls": True,
        "response_format": {"a": "a"},
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
    """Whether it is taken as text where text belongs, or refused where it does not."""
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
    before = time.time()
    submitted = request.addressed_to("llm.fleet.reply.other.0123456789ab.120")
    assert before + 30 <= submitted.expires_at <= time.time() + 30
    assert submitted.reply_to == "llm.fleet.reply.other.0123456789ab.120"
    assert submitted.model_copy(update={"reply_to": request.reply_to, "expires_at": 1.0}) == request
    assert submitted.remaining == pytest.approx(30, abs=1)
    assert submitted.queue_wait == pytest.approx(0, abs=1)


@given(st.floats(0.001, 3600), st.floats(-1e9, 1e9))
def test_a_wrong_clock_never_gives_more_time_than_the_caller_did(timeout, skew):
    request = decode(envelope(timeout_seconds=timeout, expires_at=time.time() + skew))
    assert request.remaining <= timeout
    assert request.remaining <= skew + 0.001
    assert request.queue_wait >= 0


def test_a_request_that_waited_knows_how_long():
    request = decode(envelope(timeout_seconds=30, expires_at=time.time() + 10))
    assert request.queue_wait == pytest.approx(20, abs=1)
    assert request.remaining == pytest.approx(10, abs=1)
    assert decode(envelope(timeout_seconds=30, expires_at=time.time() - 10)).remaining < 0


# --- Replies

USAGE = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
TIMINGS = Timings(queue_wait=0.1, ttft=0.2, duration=0.3, tokens_per_second=9.5)
ends = {"node": "local@mini-7", "instance": "local", "model": "m", "usage": USAGE, "timings": TIMINGS}
heads = st.fixed_dictionaries({"id": texts, "attempt": st.integers(1, 99), "seq": st.integers(0, 2**40)})
deltas = st.builds(
    Delta,
    content=st.none() | texts,
    reasoning=st.none() | texts,
    tool_calls=st.none() | st.lists(objects, max_size=2),
)
frames = st.one_of(
    st.builds(lambda head, wait: Accepted(**head, instance="local", queue_wait=wait), heads, finite),
    st.builds(
        lambda head, pieces: Deltas(**head, deltas=pieces, tokens=len(pieces)), heads, st.lists(deltas, max_size=3)
    ),
    st.builds(
        lambda head, text, calls: ChatResponse(**head, **ends, content=text, tool_calls=calls, finish_reason="stop"),
        heads,
        st.none() | texts,
        st.lists(objects, max_size=2),
    ),
    st.builds(
        lambda head, vectors: EmbedResponse(**head, **ends, data=[packed(each) for each in vectors], dimensions=2),
        heads,
        st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=2), max_size=2),
    ),
    st.builds(
        lambda head, metadata: Failure(
            **head, code="overloaded", message="busy", error_class="Overloaded", retryable=True, metadata=metadata
        ),
        heads,
        objects,
    ),
    st.builds(lambda head: Alive(**head), heads),
)


@given(st.lists(frames, max_size=4))
def test_a_reply_is_the_same_after_its_way(sent):
    reply = Reply(v=2, node="local@mini-7", frames=sent)
    body = reply.encode()
    assert json.loads(body)["v"] == 2
    assert Reply.decode(body) == reply
    assert Reply.decode(body.decode()) == reply


def test_what_a_newer_node_adds_to_a_reply_is_not_heard():
    deltas = Deltas(id="r-1", attempt=1, seq=1, deltas=[Delta(content="Hi")], tokens=1)
    ended = {"usage": Usage(total_tokens=2), "timings": Timings(queue_wait=0, duration=1), "finish_reason": "stop"}
    end = ChatResponse(id="r-1", attempt=1, seq=2, node="n", instance="i", model="m", **ended)
    reply = Reply(v=2, node="n", frames=[deltas, end])
    assert Reply.decode(json.dumps(with_novelties(json.loads(reply.encode())))) == reply


def test_what_a_newer_router_adds_to_a_notice_is_not_heard():
    assert ControlMessage.decode(b'{"missed":"a","novelty":1}') == ControlMessage(missed="a")


def with_novelties(said):
    """A field more in each object."""
    if isinstance(said, dict):
        return {**{key: with_novelties(value) for key, value in said.items()}, "novelty": SECRET}
    return [with_novelties(each) for each in said] if isinstance(said, list) else said


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"Hi",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"v":2,"node":"n"}',
        b'{"v":1,"node":"n","frames":[]}',
        b'{"v":3,"node":"n","frames":[]}',
        b'{"v":"2","node":"n","frames":[]}',
        b'{"v":2,"node":"n","frames":[{"id":"a","attempt":1,"seq":0}]}',
        b'{"v":2,"node":"n","frames":[{"kind":"song","id":"a","attempt":1,"seq":0}]}',
        b'{"v":2,"node":"n","frames":[{"kind":"alive","id":"a","attempt":1,"seq":"0"}]}',
        b'{"v":2,"node":"n","frames":[{"kind":"alive","id":"a","attempt":1,"seq":0.5}]}',
        b'{"v":2,"node":"n","frames":[{"kind":"accepted","id":"a","attempt":1,"seq":0,"instance":"i","queue_wait":NaN}]}',
        b'{"v":2,"node":"n","frames":[{"kind":"deltas","id":"a","attempt":1,"seq":1,"deltas":[{"content":5}]}]}',
    ],
)
def test_what_is_no_reply_of_this_version_is_refused(body):
    with pytest.raises(InvalidRequest, match="not a valid Reply"):
        Reply.decode(body)


def test_a_notice_travels_whole():
    for said in (ControlMessage(node="n@h", cancelled=[("a", 1), ("b", 2)]), ControlMessage(cancelled=[("c", 3)])):
        assert ControlMessage.decode(said.encode()) == said
    with pytest.raises(InvalidRequest, match="not a valid ControlMessage"):
        ControlMessage.decode(b'{"cancelled": [1]}')


@pytest.mark.parametrize(
    "frame",
    [
        {"kind": SECRET},
        {"kind": "deltas", "deltas": SECRET},
        {"kind": "deltas", "deltas": [SECRET]},
        {"kind": "deltas", "deltas": [{"content": [SECRET]}]},
        {"kind": "response", "content": [SECRET], "finish_reason": SECRET},
        {"kind": "embedding", "data": SECRET},
        {"kind": "error", "metadata": SECRET},
        SECRET,
    ],
    ids=repr,
)
def test_a_refused_reply_is_not_repeated(frame):
    body = json.dumps({"v": 2, "node": "n", "frames": [frame]})
    for broken in (body, body[:-2], f"{SECRET} {body}"):
        with pytest.raises(InvalidRequest) as caught:
            Reply.decode(broken)
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_frames_show_no_completion_and_no_vector():
    head = {"id": "r-1", "attempt": 1, "seq": 1}
    call = {"function": {"name": SECRET, "arguments": SECRET}}
    vector = packed([0.25, 0.5])
    embedded = EmbedResponse(**head, **ends, data=[vector], dimensions=2)
    delta = Delta(content=SECRET, reasoning=SECRET, tool_calls=[call])
    answer = ChatResponse(**head, **ends, content=SECRET, reasoning=SECRET, tool_calls=[call], finish_reason="stop")
    assert embedded.vectors == [[0.25, 0.5]]
    sent = [
        delta,
        Deltas(**head, deltas=[delta], tokens=1),
        answer,
        embedded,
        Reply(v=2, node="n", frames=[answer, embedded]),
    ]
    shown = " ".join(f"{each!r} {each}" for each in sent)
    assert SECRET not in shown
    assert vector not in shown
    assert "0.25" not in shown
    assert "r-1" in shown


def test_a_failure_is_rebuilt_as_the_error_it_was():
    failure = Failure(
        id="r-1",
        attempt=1,
        seq=1,
        code="overloaded",
        message="busy",
        error_class="Overloaded",
        retryable=False,
        metadata={"retry_after": 2.0},
    )
    error = failure.error()
    assert type(error) is Overloaded
    assert (error.message, error.retryable, error.metadata) == ("busy", False, {"retry_after": 2.0})
    assert type(failure.model_copy(update={"code": "of tomorrow"}).error()) is FleetError


def test_a_response_knows_its_request():
    assert ChatResponse(id="r-1", attempt=1, seq=1, finish_reason="stop", **ends).request_id == "r-1"
    assert EmbedResponse(id="r-2", attempt=1, seq=1, data=[], dimensions=2, **ends).request_id == "r-2"


def test_reading_the_vectors_does_not_change_a_response():
    first, second = (EmbedResponse(id="r", attempt=1, seq=1, data=[packed([1.5])], dimensions=1, **ends) for _ in "ab")
    assert first.vectors == [[1.5]]
    assert first == second
    assert first.model_dump_json() == second.model_dump_json()


@pytest.mark.parametrize("message", [Delta(content="a"), USAGE, TIMINGS, Alive(id="r", attempt=1, seq=0)])
def test_messages_do_not_change(message):
    name = next(iter(type(message).model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(message, name, None)


# --- Vectors


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_a_vector_of_float32_travels_exactly(vector):
    there = unpack_vector(packed(vector)).tolist()
    assert struct.pack(f"{len(vector)}d", *there) == struct.pack(f"{len(vector)}d", *vector)


@given(st.lists(st.floats(-1, 1)))
def test_a_vector_travels_as_little_endian_float32(vector):
    assert base64.b64decode(packed(vector)) == struct.pack(f"<{len(vector)}f", *vector)


# --- Pieces and the whole


@st.composite
def fragments(draw):
    """Tool calls, and the deltas that bring their arguments in pieces, one call after the other or in turn."""
    calls = [
        {"id": f"call-{number}", "type": "function", "function": {"name": f"f{number}", "arguments": draw(texts)}}
        for number in range(draw(st.integers(0, 3)))
    ]
    pieces = []
    for index, call in enumerate(calls):
        function = call["function"]
        cut = draw(st.integers(0, len(function["arguments"])))
        head = {
            **call,
            "index": index,
            "function": {"name": function["name"], "arguments": function["arguments"][:cut]},
        }
        tail = [{"index": index, "function": {"arguments": letter}} for letter in function["arguments"][cut:]]
        pieces.append([head, *tail])
    deltas = []
    while any(pieces):
        queue = draw(st.sampled_from([queue for queue in pieces if queue]))
        deltas.append(Delta(tool_calls=[queue.pop(0)]))
    return calls, deltas


@given(fragments())
def test_tool_calls_are_whole_again(case):
    calls, pieces = case
    assert join(pieces)["tool_calls"] == calls


@given(st.lists(st.tuples(st.none() | texts, st.none() | texts)))
def test_text_and_reasoning_are_joined_apart(sides):
    whole = join(Delta(content=content, reasoning=reasoning) for content, reasoning in sides)
    assert (whole["content"] or "") == "".join(content or "" for content, _ in sides)
    assert (whole["reasoning"] or "") == "".join(reasoning or "" for _, reasoning in sides)


def test_of_nothing_comes_nothing():
    assert join([]) == {"content": None, "reasoning": None, "tool_calls": []}
    assert join([Delta(), Delta(content="")]) == {"content": None, "reasoning": None, "tool_calls": []}


def test_whole_calls_without_numbers_stay_apart():
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in "ab"]
    assert join([Delta(tool_calls=calls)])["tool_calls"] == calls
    assert join([Delta(tool_calls=[call]) for call in calls])["tool_calls"] == calls


def test_a_call_may_come_without_arguments():
    pieces = [{"index": 0, "id": "a", "type": "function", "function": {"name": "now", "arguments": None}}]
    assert join([Delta(tool_calls=pieces)])["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "now", "arguments": ""}}
    ]
