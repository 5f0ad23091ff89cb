"""The Responses API: what a stream consists of, and that it builds what its last event says."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway.dialects import openai_responses
from fleet_worker.gateway.problems import Problem
from fleet_worker.protocol.reply import ChatResponse, Delta, Timings, Usage, join
from tests.open_responses import check_events, check_response, read_events

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": {"type": "text"}}
SHELL = {"type": "local_shell"}
CRM = {"type": "namespace", "name": "crm", "description": "Customers", "tools": [{"type": "function", "name": "list"}]}


def asked(**fields):
    return openai_responses.asked({"model": "qwen3", "input": "Hello", **fields}, ID, 1_700_000_000)


def response(deltas=(), finish_reason="stop", **fields):
    """The end of a chat: all that a router knows of it."""
    return ChatResponse(
        id=ID,
        attempt=1,
        seq=9,
        node="local@mini",
        instance="local",
        model="mlx-community/Qwen3-4bit",
        usage=Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=4),
        timings=Timings(queue_wait=0, duration=1),
        finish_reason=finish_reason,
        **{**join(deltas), **fields},
    )


def streamed(deltas, finish_reason="stop", openai_only=False, **fields):
    """The events of a stream of these deltas, checked, and the response at its end."""
    writer = asked(stream=True, **fields).writer
    end = response(deltas, finish_reason)
    events = read_events(writer.begin() + writer.deltas(deltas[:1]) + writer.deltas(deltas[1:]) + writer.end(end))
    return [event["type"] for event in events], check_events(events, openai_only=openai_only)


def whole(deltas, finish_reason="stop", openai_only=False, **fields):
    body = asked(**fields).writer.whole(response(deltas, finish_reason))
    return check_response(json.loads(body), openai_only=openai_only)


def call(index, name=None, arguments="", call_id=None):
    """A delta with a fragment of a tool call."""
    fragment = {"index": index, "function": {"arguments": arguments, **({"name": name} if name else {})}}
    return Delta(tool_calls=[{**fragment, **({"id": call_id, "type": "function"} if call_id else {})}])


def text_of(response):
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def test_a_text():
    kinds, end = streamed([Delta(content="Hi"), Delta(content=" you\u2028\0🚢")])
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert text_of(end) == "Hi you\u2028\0🚢"
    assert end["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 12,
    }
    assert (end["status"], end["model"], end["id"]) == ("completed", "qwen3", f"resp_{ID.replace('-', '')}")
    assert end["completed_at"] >= end["created_at"] == 1_700_000_000


def test_thoughts_come_first_and_as_what_clients_show():
    kinds, end = streamed([Delta(reasoning="Hm"), Delta(reasoning=", yes"), Delta(content="Yes")])
    assert kinds[2:9] == [
        "response.output_item.added",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "response.output_item.done",
    ]
    assert [item["type"] for item in end["output"]] == ["reasoning", "message"]
    assert end["output"][0]["summary"] == [{"type": "summary_text", "text": "Hm, yes"}]


def test_calls_one_after_the_other():
    deltas = [
        Delta(content="Let me look."),
        call(0, "weather", call_id="a"),
        call(0, arguments='{"city": '),
        call(0, arguments='"Oslo"}'),
        Delta(content="\n"),
        call(1, "weather", "{}", call_id="b"),
    ]
    kinds, end = streamed(deltas, "tool_calls", tools=[WEATHER])
    assert [kind.removeprefix("response.") for kind in kinds[8:16]] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
    ]
    calls = [(item["call_id"], item["name"], item["arguments"]) for item in end["output"][1:]]
    assert calls == [("a", "weather", '{"city": "Oslo"}'), ("b", "weather", "{}")]


def test_calls_that_servers_write_at_once():
    deltas = [
        call(0, "weather", '{"city"', call_id="a"),
        call(1, "weather", '{"city"', call_id="b"),
        call(0, arguments=': "Oslo"}'),
        call(1, arguments=': "Bergen"}'),
        Delta(content="Now wait."),
    ]
    _, end = streamed(deltas, tools=[WEATHER])
    assert [item.get("arguments") for item in end["output"]] == ['{"city": "Oslo"}', '{"city": "Bergen"}', None]


@pytest.mark.parametrize("call_id", [None, "call_0"])
def test_each_call_has_an_id_of_its_own(call_id):
    """openai-python raises an error if two have the same."""
    deltas = [call(0, "weather", "{}", call_id), call(1, "weather", "{}", call_id)]
    for end in (streamed(deltas, tools=[WEATHER])[1], whole(deltas, tools=[WEATHER])):
        assert len({item["call_id"] for item in end["output"]} | {None, ""}) == 4


def test_a_call_without_arguments_has_an_empty_object():
    _, end = streamed([call(0, "weather", call_id="a")], tools=[WEATHER])
    assert end["output"][0]["arguments"] == "{}"


def test_a_tool_of_a_namespace_is_called_by_both_of_its_names():
    _, end = streamed([call(0, "crm__list", "{}", call_id="a")], tools=[CRM], openai_only=True)
    assert (end["output"][0]["name"], end["output"][0]["namespace"]) == ("list", "crm")


@pytest.mark.parametrize("written", ['{"input": "*** Begin Patch"}', "*** Begin Patch"])
def test_a_custom_tool_gets_text(written):
    """Also from a model that writes no JSON."""
    kinds, end = streamed([call(0, "apply_patch", written, call_id="a")], tools=[PATCH], openai_only=True)
    assert "response.custom_tool_call_input.done" in kinds
    assert (end["output"][0]["type"], end["output"][0]["input"]) == ("custom_tool_call", "*** Begin Patch")


@pytest.mark.parametrize("command", [["ls", "-l"], "ls -l"])
def test_a_local_shell_gets_a_command(command):
    written = json.dumps({"command": command, "timeout_ms": 1000})
    _, end = streamed([call(0, "local_shell", written, call_id="a")], tools=[SHELL], openai_only=True)
    assert end["output"][0]["type"] == "local_shell_call"
    words = ["ls", "-l"] if isinstance(command, list) else ["bash", "-lc", "ls -l"]
    assert end["output"][0]["action"] == {"type": "exec", "command": words, "env": {}, "timeout_ms": 1000}


@pytest.mark.parametrize(
    ("deltas", "last"),
    [
        ([Delta(content="Hi")], "message"),
        ([Delta(reasoning="Hm")], "reasoning"),
        ([Delta(content="Hi"), call(0, "weather", '{"ci', call_id="a")], "function_call"),
        ([Delta(reasoning="Hm"), call(0, "weather", "", call_id="a")], "function_call"),
        ([], None),
    ],
)
def test_an_answer_that_is_cut_off(deltas, last):
    for end in (streamed(deltas, "length", tools=[WEATHER])[1], whole(deltas, "length", tools=[WEATHER])):
        assert (end["status"], end["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert end["completed_at"] is None
        assert [item["status"] for item in end["output"][:-1]] == ["completed"] * (len(deltas) - 1)
        assert not last or (end["output"][-1]["type"], end["output"][-1]["status"]) == (last, "incomplete")


def test_white_space_between_calls_is_no_message():
    _, end = streamed([Delta(content="\n"), call(0, "weather", "{}", call_id="a"), Delta(content="\n\n")])
    assert [item["type"] for item in end["output"]] == ["function_call"]
    assert text_of(streamed([Delta(content="\n"), Delta(content=" \n"), Delta(content="a")])[1]) == "\n \na"
    assert text_of(streamed([Delta(content="\n"), Delta(reasoning="\n"), Delta(content=" ")])[1]) == "\n "


def test_a_resumed_stream_looks_like_any_other():
    cut = [Delta(content="Hi"), Delta(resumed=True), Delta(content=" you")]
    assert streamed(cut)[0] == streamed([cut[0], cut[2]])[0]


def test_a_late_error():
    writer = asked(stream=True).writer
    stream = writer.begin() + writer.deltas([Delta(reasoning="Hm"), Delta(content="Hi")])
    problem = Problem(status=502, code="node_lost", message="The node is gone.")
    events = read_events(stream + writer.failed(problem))
    end = check_events(events)
    assert (events[-1]["type"], end["status"]) == ("response.failed", "failed")
    assert end["error"] == {"code": "server_error", "message": "The node is gone."}
    assert [item["status"] for item in end["output"]] == ["completed", "incomplete"]


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (Problem(status=400, code="invalid_request", message="-"), "invalid_prompt"),
        (Problem(status=400, code="context_length_exceeded", message="-"), "context_length_exceeded"),
        (Problem(status=429, code="rate_limit_exceeded", message="-", retry_after=1.5), "rate_limit_exceeded"),
        (Problem(status=429, code="insufficient_quota", message="-"), "insufficient_quota"),
        (Problem(status=503, code="no_capacity", message="-"), "server_error"),
    ],
)
def test_a_late_error_has_a_code_that_clients_know(problem, code):
    error = read_events(asked().writer.failed(problem))[0]["response"]["error"]
    assert error == {"code": code, "message": "- Try again in 1.5s." if problem.retry_after else "-"}


PIECES = st.one_of(
    st.builds(Delta, content=st.text(min_size=1)),
    st.builds(Delta, reasoning=st.text(min_size=1)),
    st.builds(Delta, content=st.none() | st.just(" "), reasoning=st.none() | st.just("Hm")),
    st.builds(
        call, st.integers(0, 2), st.none() | st.sampled_from(["weather", "crm__list"]), st.sampled_from('{}[]"1 ')
    ),
)


@given(st.lists(PIECES, max_size=12), st.sampled_from(["stop", "length", "tool_calls", "content_filter"]))
def test_any_stream_builds_its_response(deltas, finish_reason):
    _, end = streamed(deltas, finish_reason, tools=[WEATHER])
    thoughts = "".join(part["text"] for item in end["output"] for part in item.get("summary", ()))
    said = join(deltas)
    assert text_of(end).split() == (said["content"] or "").split()
    assert thoughts.split() == (said["reasoning"] or "").split()


@given(st.lists(PIECES, max_size=12))
def test_a_whole_answer_is_a_response(deltas):
    whole(deltas, tools=[WEATHER])


# --- what a response repeats of its request ---------------------------------------------------------------------------


def test_all_that_clients_read_is_there():
    end = whole(
        [Delta(content="{}")],
        instructions="Be brief.",
        max_output_tokens=100,
        metadata={"a": "b"},
        parallel_tool_calls=False,
        prompt_cache_key="conversation 1",
        reasoning={"effort": "low", "summary": "auto"},
        safety_identifier="c",
        store=True,
        temperature=0.5,
        text={"format": {"type": "json_schema", "name": "answer", "schema": {"type": "object"}}, "verbosity": "low"},
        tools=[WEATHER],
        tool_choice="auto",
        top_p=0.9,
        truncation="auto",
        user="d",
    )
    repeated = {
        "instructions": "Be brief.",
        "max_output_tokens": 100,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "conversation 1",
        "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "c",
        "temperature": 0.5,
        "tools": [{"description": None, "strict": None, **WEATHER}],
        "tool_choice": "auto",
        "top_p": 0.9,
        "user": "d",
        # what is not done here is not said to be done
        "background": False,
        "previous_response_id": None,
        "store": False,
        "truncation": "disabled",
    }
    assert {name: end[name] for name in repeated} == repeated
    assert end["text"]["format"]["schema"] == {"type": "object"}
    assert end["text"]["verbosity"] == "low"


def test_tools_that_nobody_here_carries_out_are_not_said_to_be_there():
    end = whole(
        [Delta(content="Hi")], tools=[{"type": "web_search"}, WEATHER, {"type": "web_search_preview_2025_03_11"}]
    )
    assert [tool["type"] for tool in end["tools"]] == ["function"]


def test_an_early_error_names_the_field_as_the_client_does():
    for param, own in [
        ("max_tokens", "max_output_tokens"),
        ("messages.1.content", "input"),
        ("tools.0.function", "tools.0.function"),
        ("reasoning_effort", "reasoning.effort"),
        (None, None),
    ]:
        problem = Problem(status=400, code="invalid_request", message="No.", param=param)
        body = json.loads(openai_responses.problem_body(problem, ID))
        assert body == {
            "error": {"message": "No.", "type": "invalid_request_error", "param": own, "code": "invalid_request"}
        }


# --- what is refused, and what has no effect --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 1}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"background": 1}, "background"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"include": "reasoning"}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"instructions": ["a"]}, "instructions"),
        ({"metadata": []}, "metadata"),
        ({"max_output_tokens": "1"}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"max_tool_calls": "1"}, "max_tool_calls"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"reasoning": "high"}, "reasoning"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort"),
        ({"text": "json"}, "text"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": ["text"]}}}, "text.format"),
        ({"prompt_cache_key": 1}, "prompt_cache_key"),
        ({"tools": {}}, "tools"),
        ({"tools": ["weather"]}, "tools.0.type"),
        ({"tools": [WEATHER, {"type": "file_search", "vector_store_ids": []}]}, "tools.1.type"),
        ({"tools": [{"type": ["function"]}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [{"type": "custom", "name": 1}]}, "tools.0.name"),
        ({"tools": [{"type": "namespace", "name": "crm", "tools": [{"type": "mcp"}]}]}, "tools.0.tools.0.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": []}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "tools": ["weather"]}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "tools": "weather"}}, "tool_choice.tools"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(fields, param):
    with pytest.raises(InvalidRequest) as refusal:
        asked(**fields)
    assert refusal.value.param == param
    assert str(refusal.value).startswith(f"{param}: ")


RICH = {
    "instructions": "Be brief.",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {
            "role": "user",
            "content": [{"type": "input_image", "image_url": "data:image/png;base64,a", "detail": "low"}],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}", "namespace": "crm"},
        {"type": "custom_tool_call", "call_id": "b", "name": "apply_patch", "input": "x"},
        {"type": "local_shell_call", "call_id": "c", "action": {"type": "exec", "command": ["ls"], "env": {}}},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "sunny"}]},
        {"type": "additional_tools", "role": "developer", "tools": [{**CRM, "name": "erp"}]},
    ],
    "tools": [WEATHER, {"type": "function", "function": {"name": "clock"}}, PATCH, SHELL, CRM],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]},
    "text": {"format": {"type": "json_schema", "name": "a", "schema": {}, "strict": True}, "verbosity": "low"},
    "reasoning": {"effort": "low", "summary": "auto"},
    "metadata": {"a": "b"},
    "include": ["reasoning.encrypted_content"],
    "max_output_tokens": 9,
    "parallel_tool_calls": True,
    "prompt_cache_key": "d",
    "top_logprobs": 0,
    "stream": True,
}
"""A body with everything."""
WORDS = st.sampled_from(["", "message", "function", "custom", "namespace", "user", "input_text", "allowed_tools", "e"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS | st.just("type"), inner, max_size=2),
    max_leaves=5,
)


def paths(value, path=()):
    """The path of each part of this value."""
    yield path
    for name, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(part, (*path, name))


def changed(value, path, to):
    """This value with another part at this path."""
    if not path:
        return to
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], to)
    return copy


@given(st.sampled_from([path for path in paths(RICH) if path]), ANYTHING)
def test_any_body_is_read_or_refused(path, to):
    try:
        chat = asked(**changed(RICH, path, to))
    except InvalidRequest:
        return
    json.loads(chat.writer.whole(response([Delta(content="Hi"), call(0, "erp__list", "{}")])))


def test_what_has_no_effect_is_accepted():
    chat = asked(
        stream=False,
        store=True,
        include=["reasoning.encrypted_content"],
        client_metadata={"thread": "a"},
        service_tier="flex",
        stream_options={"include_obfuscation": True},
        top_logprobs=0,
        background=False,
        previous_response_id=None,
        text={"verbosity": "low", "format": {"type": "text"}},
        tools=[],
        tool_choice="auto",
        max_tool_calls=3,
        context_management=[{"type": "compaction"}],
    )
    assert chat.body == {"messages": [{"role": "user", "content": "Hello"}]}


def test_what_a_chat_calls_otherwise():
    schema = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    chat = asked(
        max_output_tokens=9,
        reasoning={"effort": "high"},
        text={"format": {"type": "json_schema", **schema}},
        temperature=0,
        seed=1,
        prompt_cache_key="conversation 1",
    )
    assert chat.session == "conversation 1"
    assert chat.body == {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 9,
        "reasoning_effort": "high",
        "response_format": {"type": "json_schema", "json_schema": schema},
        "temperature": 0,
        "seed": 1,
    }
    assert asked(text={"format": {"type": "json_object"}}).body["response_format"] == {"type": "json_object"}
