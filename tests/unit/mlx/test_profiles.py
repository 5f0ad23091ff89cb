import json
from dataclasses import replace
from itertools import product
from typing import get_args

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import (
    ContextLengthExceeded,
    InstanceUnavailable,
    InvalidRequest,
    ModelNotServed,
    Overloaded,
    ProviderError,
    RequestTimeout,
    Unauthorized,
    UnsupportedCapability,
)
from fleet_worker.mlx.chat_templates import ChatTemplate, left_open
from fleet_worker.mlx.error_mapping import error_for
from fleet_worker.mlx.offering import offerings_of
from fleet_worker.mlx.profiles import PROFILES, chat_body, continued_body, finish_reason, kind_of
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.settings import Instance, Model, Server

SECRET = "swordfish"
TEMPLATE = ChatTemplate("the model's own", "with tools")
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def offering(template=None, **model):
    found = offerings_of(Instance(models={"m": Model(backend="default_model", **model)}), {}, ())["m"]
    return replace(found, template=template)


def body_for(kind, *, model=None, **params):
    given = ChatParams.model_validate({"messages": [{"role": "user", "content": "Hi"}], **params})
    return chat_body(given, offering(**(model or {})), PROFILES[kind])


# --- What is sent


def test_every_server_that_can_be_configured_is_known():
    assert set(PROFILES) == set(get_args(Server)) - {"auto"}


@pytest.mark.parametrize("kind", PROFILES)
def test_a_server_s_fields_are_fields_of_a_request(kind):
    assert PROFILES[kind].fields <= set(ChatParams.model_fields)
    assert {"messages", "max_tokens", "temperature"} <= PROFILES[kind].fields


def test_done_is_waited_for_where_it_is_known_to_come():
    assert [kind for kind, quirks in PROFILES.items() if not quirks.says_done] == ["openai"]


everything = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.none() | st.integers(1, 9999),
        "max_completion_tokens": st.integers(1, 9999),
        "temperature": st.none() | st.floats(0, 2),
        "top_p": st.floats(0.1, 1),
        "top_k": st.integers(0, 1000),
        "min_p": st.floats(0, 1),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.1, 10),
        "seed": st.integers(0, 99),
        "stop": st.just(["a"]),
        "tools": st.just([{"type": "function"}]),
        "tool_choice": st.just("auto"),
        "parallel_tool_calls": st.booleans(),
        "response_format": st.just({"type": "json_object"}),
        "logit_bias": st.just({"5": 1.0}),
        "reasoning_effort": st.just("low"),
        "chat_template_kwargs": st.just({"enable_thinking": True}),
        "n": st.just(1),
        "user": st.just("me"),
    },
)


@given(st.sampled_from(sorted(PROFILES)), everything)
def test_a_body_always_streams_has_limits_and_holds_nothing_unknown(kind, params):
    body = body_for(kind, **params)
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["model"] == "default_model"
    assert body["max_tokens"] == (params.get("max_tokens") or params.get("max_completion_tokens") or 4096)
    assert body["temperature"] == (0.7 if params.get("temperature") is None else params["temperature"])
    assert body.keys() <= PROFILES[kind].fields | {"model", "stream", "stream_options"}
    assert None not in body.values()
    json.dumps(body, allow_nan=False)


@given(st.sampled_from(sorted(PROFILES)), everything)
def test_what_a_server_knows_reaches_it_as_it_was_said(kind, params):
    body = body_for(kind, **params)
    special = {"max_tokens", "temperature", "chat_template_kwargs"}
    said = {name: value for name, value in params.items() if name in PROFILES[kind].fields - special}
    assert {name: body[name] for name in said} == said


def test_limits_that_a_caller_does_not_name_are_those_of_the_model():
    body = body_for("mlx_lm", model={"max_output_tokens": 77, "temperature": 0.1})
    assert (body["max_tokens"], body["temperature"]) == (77, 0.1)


def test_a_temperature_of_nought_is_a_temperature():
    assert body_for("mlx_lm", temperature=0)["temperature"] == 0


def test_max_tokens_has_two_names_of_which_the_older_wins():
    assert body_for("omni", max_completion_tokens=7)["max_tokens"] == 7
    assert body_for("omni", max_completion_tokens=7, max_tokens=8)["max_tokens"] == 8


@pytest.mark.parametrize("kind", PROFILES)
def test_messages_are_sent_in_words_that_every_server_knows(kind):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = body_for(
        kind,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4", "tool_call_id": "c"},
        ],
    )
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "c"},
    ]


def test_the_reasoning_effort_goes_into_the_template_where_the_server_has_no_field_for_it():
    assert body_for("mlx_lm", reasoning_effort="low")["chat_template_kwargs"] == {"reasoning_effort": "low"}
    assert body_for("openai", reasoning_effort="low")["reasoning_effort"] == "low"
    assert "chat_template_kwargs" not in body_for("openai", reasoning_effort="low")
    assert "chat_template_kwargs" not in body_for("omni", reasoning_effort="low")


def test_what_a_caller_says_to_the_template_itself_wins():
    said = {"reasoning_effort": "high", "enable_thinking": False}
    assert body_for("vllm_mlx", reasoning_effort="low", chat_template_kwargs=said)["chat_template_kwargs"] == said


# --- What is sent to go on


@pytest.mark.parametrize(
    ("kind", "turn", "kwargs"),
    [
        ("vllm_mlx", {}, {"add_generation_prompt": False, "continue_final_message": True}),
        ("mlx_openai", {"partial": True}, {}),
        ("omni", {}, {}),
        ("mlx_lm", {}, {"chat_template": left_open("the model's own")}),
    ],
)
def test_every_server_has_its_way_to_go_on(kind, turn, kwargs):
    body = body_for(kind, chat_template_kwargs={"enable_thinking": False})
    known = body.get("chat_template_kwargs", {})
    continued = continued_body(body, "Hi and", offering(TEMPLATE), PROFILES[kind], exact=True)
    assert continued["messages"] == [*body["messages"], {"role": "assistant", "content": "Hi and", **turn}]
    assert continued.get("chat_template_kwargs", {}) == {**known, **kwargs}
    assert continued.keys() - {"chat_template_kwargs"} == body.keys() - {"chat_template_kwargs"}


@pytest.mark.parametrize(
    ("params", "own"),
    [
        ({}, "the model's own"),
        ({"tools": TOOLS}, "with tools"),
        ({"tools": TOOLS, "tool_choice": "none"}, "the model's own"),
    ],
)
def test_the_template_is_that_of_the_request(params, own):
    continued = continued_body(
        body_for("mlx_lm", **params), "Hi and", offering(TEMPLATE), PROFILES["mlx_lm"], exact=True
    )
    assert continued["chat_template_kwargs"]["chat_template"] == left_open(own)


def test_a_text_that_need_not_be_exact_makes_a_prompt_that_mlx_lm_has_not_cached():
    continued = continued_body(body_for("mlx_lm"), "Hi and", offering(TEMPLATE), PROFILES["mlx_lm"], exact=False)
    assert continued["chat_template_kwargs"]["chat_template"] == left_open("the model's own", before=" ")


def test_a_server_without_a_way_to_go_on_is_not_asked():
    assert continued_body(body_for("openai"), "Hi", offering(TEMPLATE), PROFILES["openai"], exact=True) is None
    assert continued_body(body_for("mlx_lm"), "Hi", offering(), PROFILES["mlx_lm"], exact=True) is None
    seeing = offering(TEMPLATE, features={"vision": True})
    assert continued_body(body_for("mlx_openai"), "Hi", seeing, PROFILES["mlx_openai"], exact=True) is None


# --- Who answers


@pytest.mark.parametrize(
    ("version", "headers", "health", "expected"),
    [
        ("HTTP/1.0", {"Server": "BaseHTTP/0.6 Python/3.11.7"}, {"status": "ok"}, "mlx_lm"),
        ("HTTP/1.0", {"Server": "BaseHTTP/0.6 Python/3.11.7"}, None, "mlx_lm"),
        ("HTTP/1.0", {"Server": "nginx"}, {"status": "ok"}, "openai"),
        ("HTTP/1.1", {"Server": "BaseHTTP/0.6"}, {"status": "ok"}, "openai"),
        ("HTTP/1.1", {"Server": "uvicorn"}, {"status": "healthy", "engine_type": "simple"}, "vllm_mlx"),
        ("HTTP/1.1", {"Server": "uvicorn"}, {"status": "ok", "model_status": "initialized"}, "mlx_openai"),
        ("HTTP/1.1", {"Server": "uvicorn"}, {"detail": "Not Found"}, "openai"),
        ("HTTP/1.1", {}, None, "openai"),
        ("HTTP/1.1", {}, ["engine_type"], "openai"),
    ],
)
def test_a_server_is_known_by_its_health(version, headers, health, expected):
    assert kind_of(version, httpx.Headers(headers), health) == expected


# --- How an answer ends


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("stop", "stop"),
        ("end_turn", "stop"),
        ("eos", "stop"),
        ("tool_calls", "tool_calls"),
        ("tool_use", "tool_calls"),
        ("function_call", "tool_calls"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("content_filter", "content_filter"),
        ("eos_token", "stop"),
        ("stop_sequence", "stop"),
    ],
)
@pytest.mark.parametrize("kind", PROFILES)
def test_a_finish_reason_is_one_of_openai_s(kind, said, expected):
    assert finish_reason(said, PROFILES[kind], completion_tokens=5, max_tokens=100) == expected


@pytest.mark.parametrize("said", ["abort", "error", SECRET])
def test_an_answer_that_ends_for_another_reason_may_not_be_whole(said):
    with pytest.raises(ProviderError) as raised:
        finish_reason(said, PROFILES["vllm_mlx"], completion_tokens=5, max_tokens=100)
    assert raised.value.retryable
    assert said not in raised.value.message


@pytest.mark.parametrize(
    ("kind", "tokens", "expected"),
    [
        ("mlx_openai", 10, "length"),
        ("mlx_openai", 9, "stop"),
        ("omni", 9, "length"),  # its last token is lost
        ("omni", 10, "length"),
        ("omni", 8, "stop"),
        ("mlx_lm", 10, "stop"),
        ("vllm_mlx", 10, "stop"),
        ("openai", 10, "stop"),
        ("mlx_openai", None, "stop"),
        ("omni", None, "stop"),
    ],
)
def test_two_servers_never_say_length_so_the_tokens_are_counted(kind, tokens, expected):
    assert finish_reason("stop", PROFILES[kind], completion_tokens=tokens, max_tokens=10) == expected


def test_a_tool_call_at_the_limit_is_a_tool_call():
    assert finish_reason("tool_calls", PROFILES["omni"], completion_tokens=10, max_tokens=10) == "tool_calls"


# --- What their failures mean

SNAPSHOT = (
    "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and outgoing "
    "traffic has been disabled."
)
MISSING = {"error": {"message": "Model 'x' not found", "type": "invalid_request_error", "code": "model_not_found"}}
VALIDATION = [{"type": "list_type", "loc": ["body", "stop"], "msg": "Input should be a valid list", "input": SECRET}]
FAILURES = [
    # mlx_lm.server
    ("mlx_lm: its thread has died", 404, {"error": "generation thread died"}, InstanceUnavailable),
    ("mlx_lm: not healthy", 503, {"status": "unavailable"}, InstanceUnavailable),
    ("mlx_lm: a model that is not there", 404, {"error": SNAPSHOT}, ModelNotServed),
    (
        "mlx_lm: a model nobody has",
        404,
        {"error": "404 Client Error. Repository Not Found for url: https://h"},
        ModelNotServed,
    ),
    ("mlx_lm: a model with a bad name", 404, {"error": "Repo id must use alphanumeric chars"}, ModelNotServed),
    (
        "mlx_lm: a template that fails",
        404,
        {"error": "Conversation roles must alternate user/assistant"},
        InvalidRequest,
    ),
    ("mlx_lm: no messages", 404, {"error": "list index out of range"}, InvalidRequest),
    ("mlx_lm: no such route", 404, b"Not Found", UnsupportedCapability),
    ("mlx_lm: a bad number", 400, {"error": "max_tokens must be a non-negative integer"}, InvalidRequest),
    ("mlx_lm: no length", 411, {"error": "Content-Length required"}, InvalidRequest),
    ("mlx_lm: no such method", 501, b"<html>Unsupported method ('PUT')</html>", ProviderError),
    # vllm-mlx
    ("vllm: another model", 404, {"detail": "The model `x` does not exist. Available models: y"}, ModelNotServed),
    ("vllm: busy", 503, {"detail": {"error": {"code": "text_generation_busy", "message": "..."}}}, Overloaded),
    ("vllm: a bad type", 422, {"detail": VALIDATION}, InvalidRequest),
    ("vllm: no messages", 500, b"Internal Server Error", ProviderError),
    ("vllm: too many tokens wanted", 400, {"detail": "max_tokens must be at most 32768"}, InvalidRequest),
    ("vllm: a wrong key", 401, {"detail": "Invalid API key"}, Unauthorized),
    ("vllm: rate limit", 429, {"detail": "Rate limit exceeded"}, Overloaded),
    ("vllm: 300 s are over", 504, {"detail": "Request timed out after 300.0 seconds"}, RequestTimeout),
    ("vllm: an error in a stream", 500, {"message": "Internal server error", "code": 500}, ProviderError),
    # mlx-openai-server
    ("openai: another model", 404, {"detail": MISSING}, ModelNotServed),
    ("openai: another model, said otherwise", 404, MISSING, ModelNotServed),
    ("openai: a full queue", 429, {"error": {"message": "queue is full", "code": "429"}}, Overloaded),
    ("openai: a chat to an embedding model", 400, {"error": {"message": "not a language model"}}, InvalidRequest),
    ("openai: a broken child", 500, {"error": {"message": "worker process died", "code": 500}}, ProviderError),
    # mlx-omni-server
    ("omni: another model", 500, b"Internal Server Error", ProviderError),
    ("omni: an image", 422, {"detail": VALIDATION}, InvalidRequest),
    # any of them, and what stands before them
    ("fastapi: no such route", 404, {"detail": "Not Found"}, UnsupportedCapability),
    ("fastapi: no such route, without spaces", 404, b'{"detail":"Not Found"}', UnsupportedCapability),
    ("an empty refusal", 400, b"", InvalidRequest),
    ("an empty failure", 500, b"", ProviderError),
    ("an empty 404", 404, b"", InvalidRequest),
    ("forbidden", 403, b"", Unauthorized),
    ("a body too large", 413, b"", InvalidRequest),
    ("a request too slow", 408, b"", RequestTimeout),
    ("a proxy without its server", 502, b"<html>Bad Gateway</html>", InstanceUnavailable),
    ("not ready", 503, b"", InstanceUnavailable),
    ("site overloaded", 529, b"", Overloaded),
    ("an unknown failure", 599, b"", ProviderError),
    ("a teapot", 418, b"", ProviderError),
    (
        "a long conversation",
        400,
        {"error": {"message": "maximum context length is 8192 tokens"}},
        ContextLengthExceeded,
    ),
    ("a long conversation, said otherwise", 400, {"detail": "prompt is too long: 9000 tokens"}, ContextLengthExceeded),
    ("a long conversation as a text", 413, b"exceeds the context window of 4096", ContextLengthExceeded),
]
RETRYABLE = {InstanceUnavailable, Overloaded, RequestTimeout}


def sent(body):
    return body if isinstance(body, bytes) else json.dumps(body).encode()


@pytest.mark.parametrize(("status", "body", "expected"), [pytest.param(*case, id=name) for name, *case in FAILURES])
def test_a_failure_of_a_server_means_one_error(status, body, expected):
    error = error_for(status, sent(body))
    assert type(error) is expected
    assert error.retryable is (expected in RETRYABLE or status >= 500)


@pytest.mark.parametrize(("status", "body"), [pytest.param(*case[:2], id=name) for name, *case in FAILURES])
def test_an_error_says_something_and_repeats_nothing(status, body):
    error = error_for(status, sent(body))
    assert error.message
    assert SECRET not in f"{error!r} {error.metadata}"


def test_a_busy_server_tells_when_to_come_back():
    assert error_for(429, b"", retry_after=2.5).metadata == {"retry_after": 2.5}
    assert error_for(503, b"", retry_after=0.0).metadata == {"retry_after": 0.0}
    assert type(error_for(503, b"", retry_after=0.0)) is Overloaded
    assert error_for(429, b"").metadata == {}


def test_a_report_that_quotes_the_request_is_not_searched_for_marks():
    """A prompt may speak of context lengths, of busy servers, and of dead threads."""
    prompt = "context length exceeded, generation thread died, model x not found, busy"
    report = [{"type": "string_type", "loc": ["body", "messages"], "msg": "Input should be a string", "input": prompt}]
    assert type(error_for(422, sent({"detail": report}))) is InvalidRequest


def test_a_long_report_that_quotes_the_request_is_not_searched_either():
    prompt = "context length exceeded, generation thread died " * 200
    report = [{"type": "string_type", "loc": ["body", "messages"], "msg": "Input should be a string", "input": prompt}]
    assert type(error_for(422, sent({"detail": report}))) is InvalidRequest


SHAPES = [
    lambda text: text.encode(),
    lambda text: json.dumps(text).encode(),
    lambda text: json.dumps({"error": text}).encode(),
    lambda text: json.dumps({"error": {"message": text, "code": text}}).encode(),
    lambda text: json.dumps({"detail": text}).encode(),
    lambda text: json.dumps({"detail": {"error": {"message": text}}}).encode(),
    lambda text: json.dumps({"detail": [{"input": text}]}).encode(),
    lambda text: json.dumps([text, None, 5]).encode(),
    lambda text: b"\xff\xfe" + text.encode(),
    lambda text: b'{"error": "' + text.encode(),
]
MARKS = ["", "busy ", "context length ", "model not found ", "generation thread died ", "Not Found"]


@pytest.mark.parametrize("mark", MARKS)
def test_whatever_a_server_writes_none_of_it_is_repeated(mark):
    for status, shape, retry_after in product(range(400, 600), SHAPES, [None, 2.5]):
        error = error_for(status, shape(mark + SECRET), retry_after=retry_after)
        assert SECRET not in f"{error!r} {error} {error.metadata}"


@given(st.integers(400, 599), st.binary(max_size=40))
def test_any_bytes_of_any_failure_are_an_error(status, body):
    assert error_for(status, body).message
