"""Stop strings, JSON and single tool calls hold for every kind of server, in chats and in streams."""

import json
import time

import pytest

from fleet_worker.errors import InvalidOutput
from fleet_worker.mlx.json_schema import fits_schema
from fleet_worker.simulator import FLAVOURS, Fault, reply_tokens
from tests.mlx_clients import HELLO, said, served

WHOLE = "".join(reply_tokens(HELLO, 100))
EACH = pytest.mark.parametrize("flavour", FLAVOURS)
JSON = {"type": "json_object"}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALLS = [{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}]


def answered(client, **params):
    """Content, reasoning and finish_reason of a chat, which are those of a stream."""
    answer = client.ask(**params)
    _, streamed, ended = client.stream(**params)
    assert (streamed["content"], streamed["reasoning"]) == (answer.content, answer.reasoning)
    assert (ended.finish_reason, ended.stop_string) == (answer.finish_reason, answer.stop_string)
    return answer.content, answer.reasoning, answer.finish_reason


# --- Stop strings


REST = pytest.mark.rest


@EACH
@pytest.mark.parametrize("start", [17, *(pytest.param(start, marks=REST) for start in (0, 3, 40))])
@pytest.mark.parametrize("length", [4, *(pytest.param(length, marks=REST) for length in (1, 11))])
def test_an_answer_ends_before_its_stop_string(flavour, start, length):
    """In the middle of tokens, and over several of them. (mlx_lm.server cuts the text out, and goes on.)"""
    stop = WHOLE[start : start + length]
    with served(flavour) as (_, client):
        content, _, finish_reason = answered(client, stop=["not in it", stop])
        assert (content or "") == WHOLE[: WHOLE.index(stop)]
        assert finish_reason == "stop"


@EACH
def test_a_stop_string_that_does_not_come_changes_nothing(flavour):
    """Not even if a part of it comes, at the very end, too."""
    with served(flavour) as (_, client):
        for stop in (["never"], [WHOLE[20:30] + "?"], [WHOLE[-3:] + "!!"]):
            assert answered(client, stop=stop) == (WHOLE, None, "stop")


@EACH
def test_a_stop_string_of_which_max_tokens_cuts_the_end_is_text(flavour):
    tokens = reply_tokens(HELLO, 8)
    stop = "".join(tokens[6:]) + " and more"
    with served(flavour) as (_, client):
        assert answered(client, stop=[stop], max_tokens=8) == ("".join(tokens), None, "length")


@EACH
def test_generation_ends_at_the_stop_string(flavour):
    with served(flavour, token_interval=0.01, tokens=1000) as (server, client):
        whole = "".join(reply_tokens(HELLO, 1000, tokens=1000))
        _, streamed, answer = client.stream(stop=[whole[30:40]], max_tokens=1000)
        assert streamed["content"] == whole[:30]
        assert answer.stop_string in (whole[30:40], None if FLAVOURS[flavour].stop == "ends" else "")
        assert 0 < answer.usage.completion_tokens < 30
        server.wait_for(lambda server: server.counters["running"] == 0, timeout=1)
        assert server.requests[0].generated < 100


@pytest.mark.parametrize("flavour", sorted(set(FLAVOURS) - {"omni"}))
@pytest.mark.parametrize("tags", [False, True])
def test_a_stop_string_inside_reasoning_is_none(flavour, tags):
    """A caller does not see the reasoning as a part of the answer."""
    model = {"features": {"thinking": True}}
    with served(flavour, reasoning=["Let", " me", " see."], think_tags=tags, client={"model": model}) as (_, client):
        assert answered(client, stop=["me"]) == (
            WHOLE[: WHOLE.find("me")] if "me" in WHOLE else WHOLE,
            "Let me see.",
            "stop",
        )
        assert answered(client, stop=[WHOLE[10:15]]) == (WHOLE[:10], "Let me see.", "stop")


def test_reasoning_before_a_closing_tag_alone_stays_reasoning_in_a_chat():
    with served("openai") as (server, client):
        server.fail(Fault("status", status=200, body=said("Hm, so", "</think>", "Hello you")))
        answer = client.ask(stop=["you"])
        assert (answer.content, answer.reasoning, answer.finish_reason) == ("Hello ", "Hm, so", "stop")


# --- JSON


@EACH
def test_what_is_no_json_is_an_error_and_none_of_the_server(flavour):
    """It ends the stream that it came in; a node does not count it."""
    with served(flavour) as (server, client):
        server.fail(Fault("status", status=200, body=said("It is ", '{"a": 1}'), times=2))
        for ask in (client.ask, client.stream):
            with pytest.raises(InvalidOutput) as raised:
                ask(response_format=JSON)
            assert not raised.value.retryable
            assert (raised.value.code, raised.value.metadata) == ("invalid_output", {"param": "response_format"})
            assert "It is" not in raised.value.message


@EACH
def test_json_mode_of_a_server_that_has_it(flavour):
    """mlx_lm.server has none, mlx-openai-server and mlx-omni-server only know schemas."""
    with served(flavour) as (server, client):
        if "json_object" in server.behaviour.json_formats:
            assert answered(client, response_format=JSON)[0] == "{}"
        else:
            with pytest.raises(InvalidOutput):
                client.ask(response_format=JSON)
        if "json_schema" in server.behaviour.json_formats:
            assert answered(client, response_format=SCHEMA)[0] == '{"a": 1}'


@EACH
@pytest.mark.parametrize("text", [' {"a": {"b": [1, null, "\\u00e9"]}}\n', pytest.param("{}", marks=REST)])
def test_json_is_json(flavour, text):
    with served(flavour) as (server, client):
        server.fail(Fault("status", status=200, body=said(text[:3], text[3:]), times=2))
        assert answered(client, response_format=JSON)[0] == text


@pytest.mark.parametrize("text", ["[1]", "1", '"a"', "null", '{"a": NaN}', '{"a": 1', '```json\n{"a": 1}\n```', " "])
def test_what_is_no_json_object_is_refused(text):
    with served("mlx_lm") as (server, client):
        server.fail(Fault("status", status=200, body=said(text), times=2))
        for ask in (client.ask, client.stream):
            with pytest.raises(InvalidOutput):
                ask(response_format=JSON)


@pytest.mark.parametrize("flavour", sorted(set(FLAVOURS) - {"mlx_lm"}))
def test_json_follows_its_schema(flavour):
    with served(flavour) as (server, client):
        server.fail(Fault("status", status=200, body=said('{"a": 1}'), times=2))
        assert answered(client, response_format=SCHEMA)[0] == '{"a": 1}'
        server.fail(Fault("status", status=200, body=said('{"a": "1"}'), times=2))
        for ask in (client.ask, client.stream):
            with pytest.raises(InvalidOutput):
                ask(response_format=SCHEMA)


@pytest.mark.parametrize("named", [None, [], {}, "a", {"schema": None}, {"schema": []}, {"schema": True}, {"name": 5}])
def test_what_is_no_schema_asks_for_json_only(named):
    with served("openai") as (server, client):
        server.fail(Fault("status", status=200, body=said("[1]"), times=2))
        wanted = {"type": "json_schema", **({} if named is None else {"json_schema": named})}
        assert answered(client, response_format=wanted)[0] == "[1]"


@EACH
def test_json_that_max_tokens_cut_says_so(flavour):
    wanted = JSON if flavour == "mlx_lm" else SCHEMA
    with served(flavour) as (_, client):
        assert answered(client, response_format=wanted, max_tokens=1)[2] == "length"


def test_json_that_a_stop_string_cut_is_the_callers_wish():
    with served("mlx_lm") as (server, client):
        server.fail(Fault("status", status=200, body=said('{"a": ', "1}"), times=2))
        assert answered(client, response_format=JSON, stop=["1"]) == ('{"a": ', None, "stop")


def test_a_tool_call_need_not_be_json():
    with served("openai", tool_calls=CALLS) as (_, client):
        assert client.ask(tools=TOOLS, response_format=JSON, max_tokens=200).finish_reason == "tool_calls"
    with served("openai") as (server, client):  # some servers say "stop" at its end
        call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
        chunks = [{"delta": {"tool_calls": [call]}}, {"delta": {}, "finish_reason": "stop"}]
        body = "".join(f"data: {json.dumps({'choices': [chunk]})}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        server.fail(Fault("status", status=200, body=body, times=2))
        assert client.ask(tools=TOOLS, response_format=JSON).tool_calls
        assert client.stream(tools=TOOLS, response_format=JSON)[1]["tool_calls"]


@pytest.mark.parametrize(
    ("value", "schema", "fits"),
    [
        (1, {"type": "integer"}, True),
        (1.0, {"type": "integer"}, True),
        (1.5, {"type": "integer"}, False),
        (True, {"type": "integer"}, False),
        (True, {"type": ["integer", "boolean"]}, True),
        (None, {"type": "null"}, True),
        ("a", {"enum": ["a", "b"]}, True),
        ("c", {"enum": ["a", "b"]}, False),
        ("c", {"const": "a"}, False),
        ({}, {"required": ["a"]}, False),
        ({"a": 1}, {"required": ["a"]}, True),
        ({"a": 1}, {"properties": {}, "additionalProperties": False}, False),
        ({"a": 1}, {"additionalProperties": {"type": "string"}}, False),
        ([1, "a"], {"items": {"type": "integer"}}, False),
        ([1, "a"], {"prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, True),
        (1, {"anyOf": [{"type": "string"}, {"type": "integer"}]}, True),
        (1, {"anyOf": [{"type": "string"}, {"type": "null"}]}, False),
        (1, {"allOf": [{"type": "integer"}, {"const": 2}]}, False),
        ({"a": {"a": 1}}, {"$defs": {"n": {"type": "object"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}, True),
        ({"a": 1}, {"$defs": {"n": {"type": "object"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}, False),
        (1, {"$ref": "#"}, True),
        (1, {"$ref": "https://example.org/schema"}, True),
        (1, {"type": "nothing", "enum": 5, "required": "a", "anyOf": {}, "properties": []}, True),
        ({"a": 1}, {"required": [["a"]], "properties": [], "type": [[]]}, True),
        (1, False, False),
        (1, "no schema", True),
    ],
)
def test_a_schema_describes_the_shape_of_json(value, schema, fits):
    assert fits_schema(value, schema) is fits


def test_no_schema_makes_a_node_slow():
    bomb = {
        "$defs": {f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(40)},
        "$ref": "#/$defs/d0",
    }
    started = time.process_time()
    assert fits_schema(1, bomb)
    assert fits_schema(["a"] * 1000, {"items": {"enum": list(range(5000))}}) in (True, False)
    assert fits_schema("a" * 100, {"pattern": "(a+)+$"})
    assert time.process_time() - started < 1.0


# --- Tool calls


@EACH
def test_one_tool_call_is_the_first_one(flavour):
    with served(flavour, tool_calls=CALLS) as (_, client):
        calls = client.ask(tools=TOOLS, parallel_tool_calls=False, max_tokens=200).tool_calls
        assert [call["function"]["arguments"] for call in calls] == ['{"a": 1}']
        _, streamed, ended = client.stream(tools=TOOLS, parallel_tool_calls=False, max_tokens=200)
        assert [call["function"] for call in streamed["tool_calls"]] == [call["function"] for call in calls]
        assert ended.finish_reason == "tool_calls"
