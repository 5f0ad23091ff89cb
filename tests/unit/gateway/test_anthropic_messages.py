"""What Anthropic's clients ask for, in the words of the fleet."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway.dialects import anthropic_count, anthropic_messages
from fleet_worker.gateway.dialects.anthropic_tools import call_id_of, tool_use_id
from fleet_worker.gateway.problems import Problem
from fleet_worker.protocol.openai import ChatParams

PIXEL = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}}
TOOL = {"name": "look", "description": "Look at it.", "input_schema": {"type": "object", "properties": {}}}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}


def asked(**fields):
    """Return what a request asks for. A field that is `...` is left out."""
    body = {"model": "sea", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}], **fields}
    request = anthropic_messages.asked({name: value for name, value in body.items() if value is not ...}, "1-2", 0)
    ChatParams.model_validate(request.body)
    return request


def messages(*turns, **fields):
    turns = [{"role": role, "content": content} for role, content in turns]
    return asked(messages=turns, **fields).body["messages"]


def refused(**fields):
    with pytest.raises(InvalidRequest) as refusal:
        asked(**fields)
    return refusal.value


def text(text):
    return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}


def result(content, tool_use_id="toolu_1", **fields):
    return {"type": "tool_result", "tool_use_id": tool_use_id, "content": content, **fields}


def test_a_plain_request_is_a_chat():
    request = asked(stream=True, temperature=0.5, top_p=0.9, top_k=40, stop_sequences=["END"], system="Be kind.")
    assert (request.model, request.stream) == ("sea", True)
    assert request.body == {
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}],
        "max_tokens": 100,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "stop": ["END"],
    }


def test_fields_of_betas_and_nulls_change_nothing():
    plain = asked().body
    extra = {
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "thinking": {"type": "adaptive"},
        "service_tier": "auto",
        "container": None,
        "tools": None,
        "stream": None,
        "unknown_beta": [1],
    }
    assert asked(**extra).body == plain


def test_blocks_of_text_are_one_text():
    assert messages(("user", [text("one"), text(""), text("two")])) == [{"role": "user", "content": "one\n\ntwo"}]


def test_turns_of_one_role_are_put_together():
    turns = messages(
        ("user", "one"), ("user", "two"), ("assistant", "a"), ("assistant", [text("b")]), ("user", "three")
    )
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("user", "one\n\ntwo"),
        ("assistant", "a\n\nb"),
        ("user", "three"),
    ]


def test_the_billing_header_of_claude_code_is_left_out():
    """It differs in each request: no prompt cache would work."""
    header = "x-anthropic-billing-header: cc_version=2.1.197; cch=0aaa9;"
    own = {"role": "system", "content": "You help."}
    assert messages(("user", "hi"), system=[text(header), text("You help.")])[0] == own
    assert messages(("user", "hi"), system=f"{header}\nYou help.")[0] == own


def test_a_system_message_inside_becomes_a_part_of_the_users_turn():
    turns = messages(("system", "First."), ("user", "hi"), ("system", "Agents: none."), ("assistant", "a"), system="S")
    assert turns == [
        {"role": "system", "content": "S\n\nFirst."},
        {"role": "user", "content": "hi\n\n<system-reminder>\nAgents: none.\n</system-reminder>"},
        {"role": "assistant", "content": "a"},
    ]


def test_images_are_data_urls():
    turns = messages(("user", [text("what is it?"), PIXEL]))
    assert turns[0]["content"][1] == {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}}


def test_calls_and_results_are_messages_of_their_own():
    calls = [{"type": "tool_use", "id": f"toolu_{at}", "name": "look", "input": {"at": at}} for at in "ab"]
    results = [text("and now?"), result("seen a", "toolu_a"), result([text("seen"), text("b")], "toolu_b")]
    thoughts = {"type": "thinking", "thinking": "hm", "signature": "x"}
    turns = messages(
        ("user", "go"), ("assistant", [thoughts, text("I look."), *calls]), ("user", results), tools=[TOOL]
    )
    assert turns[1:] == [
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"id": at, "type": "function", "function": {"name": "look", "arguments": json.dumps({"at": at})}}
                for at in "ab"
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "seen a"},
        {"role": "tool", "tool_call_id": "b", "content": "seen\n\nb"},
        {"role": "user", "content": "and now?"},
    ]


def test_a_failed_tool_is_told_as_failed_and_its_image_follows():
    turns = messages(("user", [result([text("no"), PIXEL], is_error=True)]))
    assert turns[0] == {"role": "tool", "tool_call_id": "1", "content": "The tool failed:\n\nno"}
    assert turns[1]["role"] == "user"
    assert turns[1]["content"][0]["type"] == "image_url"


def test_a_result_without_content_is_empty():
    turns = messages(("user", [{"type": "tool_result", "tool_use_id": "toolu_1"}]))
    assert turns == [{"role": "tool", "tool_call_id": "1", "content": ""}]


def test_thoughts_are_not_sent_back_to_the_model():
    thoughts = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "redacted_thinking", "data": "y"}]
    assert messages(("user", "hi"), ("assistant", thoughts), ("user", "go"))[1] == {"role": "assistant", "content": ""}


def test_documents_of_text_are_shown():
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Tides."}}
    cited = document | {"title": 'The "sea"', "citations": {"enabled": True}}
    assert messages(("user", [cited, text("why?")]))[0]["content"] == (
        '<document title="The &quot;sea&quot;">\n\nTides.\n\n</document>\n\nwhy?'
    )


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"type": "image", "source": {"type": "url", "url": "http://secret"}}, "put the content itself"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "none are kept here"),
        ({"type": "document", "source": {"type": "base64", "data": "secret"}}, "send its text"),
        ({"type": "document", "source": {"type": "url", "url": "http://secret"}}, "put the content itself"),
    ],
)
def test_what_nobody_here_can_read_is_refused_with_what_to_do(block, said):
    refusal = refused(messages=[{"role": "user", "content": [text("see"), block]}])
    assert refusal.param == "messages.0.content.1.source"
    assert said in refusal.message
    assert "secret" not in refusal.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": ...}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"model": ...}, "model"),
        ({"messages": ...}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [result("x") | {"type": "tool_use"}]}]}, "messages.0.content.0.id"),
        ({"messages": [{"role": "assistant", "content": [result("x")]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "system", "content": [PIXEL]}]}, "messages.0.content.0"),
        ({"temperature": 1.5}, "temperature"),
        ({"stream": "yes"}, "stream"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"tools": [{"name": "look"}]}, "tools.0.input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools.0.name"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.input_schema"),
        ({"tools": [SEARCH]}, "tools.0.type"),
        ({"tools": [TOOL, SEARCH], "tool_choice": {"type": "tool", "name": "web_search"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ],
)
def test_a_wrong_field_is_named_as_the_client_wrote_it(fields, param):
    assert refused(**fields).param == param


def test_tools_are_functions_and_those_of_anthropic_are_left_out():
    described = {"name": "look", "description": "Look at it.", "parameters": TOOL["input_schema"]}
    tools = asked(tools=[TOOL | {"cache_control": {"type": "ephemeral"}}, SEARCH]).body["tools"]
    assert tools == [{"type": "function", "function": described}]
    assert asked(tools=[TOOL | {"type": "custom"}]).body["tools"] == tools


@pytest.mark.parametrize(
    ("choice", "fields"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "look"}, {"tool_choice": {"type": "function", "function": {"name": "look"}}}),
        (
            {"type": "auto", "disable_parallel_tool_use": True},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
    ],
)
def test_the_choice_of_a_tool(choice, fields):
    body = asked(tools=[TOOL], tool_choice=choice).body
    assert {name: value for name, value in body.items() if name in ("tool_choice", "parallel_tool_calls")} == fields


def test_a_choice_without_tools_asks_for_nothing():
    assert asked(tool_choice={"type": "auto"}).body == asked().body


@pytest.mark.parametrize("thinks", [True, False])
def test_thinking_is_turned_on_and_off(thinks):
    thinking = {"type": "enabled", "budget_tokens": 2000} if thinks else {"type": "disabled"}
    assert asked(thinking=thinking).body["chat_template_kwargs"] == {"enable_thinking": thinks}


def test_effort_and_format():
    schema = {"type": "object", "properties": {"tide": {"type": "string"}}}
    wanted = {"type": "json_schema", "schema": schema}
    body = asked(output_config={"effort": "xhigh", "format": wanted}).body
    assert body["reasoning_effort"] == "xhigh"
    assert body["response_format"]["json_schema"] == {"name": "answer", "schema": schema, "strict": True}
    assert asked(output_format=wanted).body["response_format"] == body["response_format"]


def test_the_session_is_the_one_that_claude_code_writes_into_its_user():
    assert asked().session is asked(metadata={"user_id": "u1"}).session is None
    assert asked(metadata={"user_id": '{"device_id": "d", "session_id": "s1"}'}).session == "s1"


@given(st.text(min_size=1).filter(lambda text: not text.startswith("toolu_")))
def test_the_id_of_a_call_comes_back(call_id):
    shown = tool_use_id(call_id)
    assert shown.startswith("toolu_")
    assert shown.removeprefix("toolu_").replace("_", "").replace("-", "").isascii()
    if "_x" not in call_id:
        assert call_id_of(shown) == call_id


def test_an_id_of_another_api_stays():
    assert call_id_of("call_1") == "call_1"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "source"]), inner),
    max_leaves=5,
)
blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "document", "tool_use", "tool_result", "thinking", "search_result"])},
    optional={
        name: json_values | st.just("x")
        for name in ("text", "source", "id", "name", "input", "tool_use_id", "content", "title")
    },
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text() | st.lists(blocks, max_size=3)}
)


@given(st.lists(turns | json_values, max_size=3), st.dictionaries(st.sampled_from(["system", "tools"]), json_values))
def test_any_json_is_understood_or_refused(given_turns, fields):
    with suppress(InvalidRequest):
        asked(messages=given_turns, **fields)


def test_tokens_are_counted_of_what_the_model_reads():
    body = {"model": "sea", "messages": [{"role": "user", "content": "hello"}], "system": "Be kind.", "tools": [TOOL]}
    count = anthropic_count.asked(body, "r", 0)
    assert count.model == "sea"
    assert [message["role"] for message in count.body["messages"]] == ["system", "user"]
    assert count.body["tools"][0]["function"]["name"] == "look"
    assert json.loads(count.answer(7)) == {"input_tokens": 7}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_an_error_has_the_type_of_its_status(status, kind):
    problem = Problem(status=status, code="x", message="no")
    assert json.loads(anthropic_messages.problem_body(problem, "r1")) == {
        "type": "error",
        "error": {"type": kind, "message": "no"},
        "request_id": "r1",
    }
