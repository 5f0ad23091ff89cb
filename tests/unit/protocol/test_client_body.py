"""The body of an OpenAI client: what of it is sent, and that nothing in it is an option of the router."""

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol import openai_fields, openai_older
from fleet_worker.protocol.openai import ChatParams, EmbedParams
from fleet_worker.protocol.request import params_of_client
from fleet_worker.router.options import RequestOptions
from fleet_worker.router.submission import Submission
from fleet_worker.settings import Settings
from tests.envelopes import objects, texts, user, values

LEAST = {"messages": [user()]}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
CHANGING = {"request_id", "correlation_id", "idempotency_key", "expires_at", "reply_to"}
CALL = {"name": "f", "arguments": "{}"}


def asked(body, operation="chat", model=None, **options):
    return Submission.of(Settings(), operation, model, {}, body, options)


def sent(body, operation="chat"):
    return asked({"model": "m", **body}, operation).request.encode()["params"]


def refusal(body, operation="chat", **options):
    with pytest.raises(InvalidRequest) as caught:
        asked({"model": "m", **body}, operation, **options)
    return caught.value


@pytest.mark.parametrize("name", sorted(RequestOptions.__optional_keys__))
def test_no_field_of_a_body_is_an_option(name):
    for value in ("critical", 5, None, {"a": 1}, "local@mini-7"):
        one, other = asked({"model": "m", **LEAST, name: value}), asked({"model": "m", **LEAST})
        assert one.request.encode()["params"] == LEAST
        same = {name: value for name, value in one.request.encode().items() if name not in CHANGING}
        assert same == {name: value for name, value in other.request.encode().items() if name not in CHANGING}
        assert one.request.idempotency_key == one.request.request_id
        assert (one.node, one.on_interrupt, one.queue_timeout) == (None, "resume", other.queue_timeout)


def test_options_stand_beside_a_body():
    request = asked({"model": "m", **LEAST, "timeout": 1}, timeout=7, priority="high", caller={"a": 1}).request
    assert (request.timeout_seconds, request.priority, request.caller) == (7, "high", {"a": 1})


def test_the_model_beside_a_body_counts():
    assert asked({"model": "gpt-4o", **LEAST}, model="m").request.model == "m"
    assert asked(LEAST, model="m").request.model == "m"


def test_a_body_is_not_changed():
    body = {"model": "m", "messages": [user(), {"role": "assistant", "function_call": CALL}], "foo": 1, "user": None}
    before = {**body, "messages": [dict(each) for each in body["messages"]]}
    asked(body)
    assert body == before


@pytest.mark.parametrize("stream", [True, False, None, "yes"])
def test_stream_and_its_options_are_for_whoever_has_read_the_body(stream):
    assert sent({**LEAST, "stream": stream, "stream_options": {"include_usage": True}}) == LEAST


UNKNOWN = ["foo", "keep_alive", "chat_id", "session_id", "transforms", "xtc_probability", "top_a", "models", "x" * 5000]


@pytest.mark.parametrize("name", UNKNOWN, ids=lambda name: name[:20])
@pytest.mark.parametrize("operation", ["chat", "stream_chat", "embed"])
def test_what_nobody_here_knows_is_dropped(name, operation):
    least = {"input": ["a"]} if operation == "embed" else LEAST
    assert sent({**least, name: {"any": ["value"]}}, operation) == least


TYPED = {
    "temprature": "temperature",
    "tempreature": "temperature",
    "temperatuer": "temperature",
    "Temperature": "temperature",
    "max_token": "max_tokens",
    "maxTokens": "max_tokens",
    "max-tokens": "max_tokens",
    "stops": "stop",
    "top-p": "top_p",
    "responseformat": "response_format",
    "resposne_format": "response_format",
    "tool": "tools",
    "message": "messages",
}


@pytest.mark.parametrize("name", TYPED)
def test_a_known_name_with_a_typing_error_is_refused(name):
    error = refusal({**LEAST, name: 1})
    assert (error.param, error.message) == (name, f"{name}: unknown field, the nearest that exists is {TYPED[name]}")


def test_each_known_name_may_have_one_wrong_character():
    for model, operation in ((ChatParams, "chat"), (EmbedParams, "embed")):
        taken = {*model.model_fields, *openai_fields._HANDLED, *openai_older.REPLACED}
        for name in [name for name in model.model_fields if len(name) >= 4]:
            for typed in (name[1:], f"{name}x", f"x{name}", f"{name[:-1]}x", f"{name[1]}{name[0]}{name[2:]}"):
                if typed not in taken:
                    with pytest.raises(InvalidRequest, match="the nearest that exists is"):
                        params_of_client(operation, {typed: 1})


def test_the_table_does_not_contradict_itself():
    passed = {*ChatParams.model_fields, *EmbedParams.model_fields} - openai_fields._UNSET.keys()
    handled = openai_fields._HANDLED - openai_fields._UNSET.keys()
    assert not passed & handled
    assert not passed & openai_older.REPLACED.keys()
    assert openai_fields._UNSET.keys() <= ChatParams.model_fields.keys()


def test_any_number_of_unknown_fields_is_answered_at_once():
    began = time.monotonic()
    error = refusal({**LEAST, **{f"x{number}": 1 for number in range(100_000)}})
    assert "more than 100 unknown fields" in error.message
    assert time.monotonic() - began < 1
    assert sent({**LEAST, **{f"x{number}": 1 for number in range(100)}}) == LEAST


OLDER = {
    "functions": ({"functions": [FUNCTION]}, {"tools": [{"type": "function", "function": FUNCTION}]}),
    "a function by name": (
        {"functions": [FUNCTION], "function_call": {"name": "f"}},
        {
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
    ),
    "no functions": ({"functions": [], "function_call": "none"}, {"tools": [], "tool_choice": "none"}),
    "a length": ({"max_new_tokens": 5}, {"max_tokens": 5}),
    "a length as the Responses have it": ({"max_output_tokens": 5}, {"max_tokens": 5}),
    "no length": ({"n_predict": -1}, {}),
    "two lengths": ({"n_predict": 5, "max_tokens": 6}, {"max_tokens": 6}),
    "ends": ({"stop_sequences": ["a"]}, {"stop": ["a"]}),
    "a penalty": ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
    "an effort": ({"reasoning": {"effort": "low"}}, {"reasoning_effort": "low"}),
    "no reasoning": ({"reasoning": {"enabled": False}}, {"chat_template_kwargs": {"enable_thinking": False}}),
    "reasoning of which nothing is said": ({"reasoning": {"exclude": True}}, {}),
    "thinking": ({"thinking": {"type": "adaptive"}}, {"chat_template_kwargs": {"enable_thinking": True}}),
    "no thinking": ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False}}),
    "no thinking, of Qwen": ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
    "thinking, of Ollama": ({"think": True}, {"chat_template_kwargs": {"enable_thinking": True}}),
    "two ways to say so": (
        {"think": True, "thinking_budget": 9, "chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False, "thinking_budget": 9}},
    ),
}


@pytest.mark.parametrize(("said", "meant"), OLDER.values(), ids=OLDER)
def test_what_older_clients_say_is_understood(said, meant):
    assert sent({**LEAST, **said}) == {**LEAST, **meant}


def test_a_conversation_with_functions_is_one_with_tools():
    turns = [
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "function", "name": "f", "content": "42"},
        {"role": "assistant", "content": "a", "function_call": None},
    ]
    call = {"id": "call_1", "type": "function", "function": CALL}
    assert sent({"messages": [user(), *turns]})["messages"] == [
        user(),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "42", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "a"},
    ]


REFUSED = {
    "logprobs": True,
    "prompt_logprobs": 3,
    "audio": {},
    "web_search_options": {},
    "best_of": 2,
    "adapters": "/tmp/evil",
    "chat_template": "{{ x }}",
    "draft_model": "m",
    "guided_json": {},
    "grammar": "root ::= x",
    "echo": True,
    "functions": "f",
    "function_call": "any",
    "thinking": "much",
    "think": {"type": 5},
    "reasoning": "low",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_answer_is_refused(name):
    error = refusal({**LEAST, name: REFUSED[name]})
    assert error.param == name
    assert error.message.startswith(f"{name}: is not ")
    assert sent({**LEAST, name: None}) == LEAST


def test_token_ids_are_refused_with_what_to_do():
    for ids in ([1, 2], [[1, 2]]):
        error = refusal({"input": ids}, "embed")
        assert "check_embedding_ctx_length=False" in error.message
        assert error.param == "input.0"


def test_a_body_is_an_object_beside_which_there_are_only_options():
    for body in ([], "{}", 5):
        with pytest.raises(InvalidRequest, match="body: must be an object"):
            asked(body)
    assert refusal(LEAST, temperature=0.5).param == "temperature"
    assert refusal(LEAST, foo=0.5).param == "foo"
    assert refusal({"model": None, **LEAST}).param == "model"
    assert refusal({"model": ["m"], **LEAST}).param == "model"


@given(objects, st.dictionaries(st.sampled_from([*ChatParams.model_fields, *openai_older.REPLACED]) | texts, values))
def test_any_object_is_a_request_or_refused(one, other):
    for operation in ("chat", "embed"):
        with contextlib.suppress(InvalidRequest):
            asked({"model": "m", **LEAST, **one, **other}, operation)
