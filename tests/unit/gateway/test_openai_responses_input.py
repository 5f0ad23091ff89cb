"""The items and tools of a Responses request, as the messages and functions of a chat."""

import json

import pytest

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway.dialects import openai_responses
from fleet_worker.protocol.openai import ChatParams

IMAGE = "data:image/png;base64,iVBORw0KGgo="


def chat(items, **fields):
    """The body of the chat. A node can read it."""
    body = openai_responses.asked({"model": "qwen3", "input": items, **fields}, "0f8fad5b", 0).body
    ChatParams.model_validate(body)
    return body


def messages(*items, **fields):
    return chat(list(items), **fields)["messages"]


def said(role, content, **fields):
    return {"type": "message", "role": role, "content": content, **fields}


def called(call_id, name="weather", arguments="{}"):
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def output(call_id, told="sunny", kind="function_call_output"):
    return {"type": kind, "call_id": call_id, "output": told}


def tool_call(call_id, name="weather", arguments="{}"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_text():
    assert chat("Hi")["messages"] == [{"role": "user", "content": "Hi"}]


def test_roles_and_parts():
    sent = messages(
        {"role": "user", "content": "without a type"},
        said("assistant", [{"type": "output_text", "text": "Hi", "annotations": []}], id="msg_1", status="completed"),
        said("user", [{"type": "input_text", "text": "What is it?"}, {"type": "input_image", "image_url": IMAGE}]),
        said("assistant", [{"type": "refusal", "refusal": "No."}]),
        said("user", [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]),
    )
    assert sent == [
        {"role": "user", "content": "without a type"},
        {"role": "assistant", "content": "Hi"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": IMAGE}}],
        },
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]


def test_what_the_system_says_first_is_one_message():
    """Chat templates of many models take one only."""
    sent = messages(
        said("developer", [{"type": "input_text", "text": "Use tools."}]),
        said("system", "Be kind."),
        said("user", "Hi"),
        said("developer", "Be brief."),
        instructions="You are a bot.",
    )
    assert sent == [
        {"role": "system", "content": "You are a bot.\n\nUse tools.\n\nBe kind."},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Be brief."},
    ]


def test_one_turn_of_the_assistant_is_one_message():
    sent = messages(
        said("user", "Weather?"),
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
        said("assistant", "Let me look."),
        called("a", arguments='{"city": "Oslo"}'),
        called("b"),
        output("a"),
        output("b", [{"type": "input_text", "text": "rain"}]),
        called("c"),
        said("assistant", "One more."),
        output("c"),
        said("assistant", "Done."),
    )
    assert sent == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [tool_call("a", arguments='{"city": "Oslo"}'), tool_call("b")],
        },
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        {"role": "tool", "tool_call_id": "b", "content": "rain"},
        {"role": "assistant", "content": "One more.", "tool_calls": [tool_call("c")]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        {"role": "assistant", "content": "Done."},
    ]


def test_calls_of_other_tools_are_what_the_model_wrote():
    sent = messages(
        said("user", "Go"),
        {"type": "custom_tool_call", "call_id": "a", "name": "apply_patch", "input": '"x"\n'},
        {**called("b", "list"), "namespace": "crm"},
        {
            "type": "local_shell_call",
            "id": "l",
            "call_id": "c",
            "action": {"type": "exec", "command": ["ls"], "env": {}},
        },
        output("a", "ok", "custom_tool_call_output"),
        output("b", ""),
        {"type": "local_shell_call_output", "id": "c", "output": "files"},
        tools=[{"type": "local_shell"}],
    )
    assert sent[1]["tool_calls"] == [
        tool_call("a", "apply_patch", json.dumps({"input": '"x"\n'})),
        tool_call("b", "crm__list"),
        tool_call("c", "local_shell", '{"command": ["ls"]}'),
    ]
    assert [(each["tool_call_id"], each["content"]) for each in sent[2:]] == [("a", "ok"), ("b", ""), ("c", "files")]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ("text", "input.1"),
        (None, "input.1"),
        ({"type": "item_reference", "id": "msg_1"}, "input.1.type"),
        ({"type": "compaction", "encrypted_content": "x"}, "input.1.type"),
        ({"type": "magic"}, "input.1.type"),
        ({"type": ["message"]}, "input.1.type"),
        (said("tool", "x"), "input.1.role"),
        (said(None, "x"), "input.1.role"),
        (said("user", 1), "input.1.content"),
        (said("user", ["x"]), "input.1.content.0.type"),
        (said("user", [{"type": ["input_text"]}]), "input.1.content.0.type"),
        (said("user", [{"type": "input_text", "text": 1}]), "input.1.content.0.text"),
        (said("user", [{"type": "input_audio"}]), "input.1.content.0.type"),
        (said("user", [{"type": "input_file", "file_id": "f"}]), "input.1.content.0"),
        (said("user", [{"type": "input_image", "file_id": "f"}]), "input.1.content.0.image_url"),
        (said("user", [{"type": "input_image", "image_url": "https://a/b.png"}]), "input.1.content.0.image_url"),
        (said("system", [{"type": "input_image", "image_url": IMAGE}] * 2), "input.1.content.0"),
        (called("", "weather"), "input.1.call_id"),
        (called("a", ""), "input.1.name"),
        ({**called("a"), "arguments": {}}, "input.1.arguments"),
        ({"type": "function_call_output", "output": "x"}, "input.1.call_id"),
        (output("a", {"type": "computer_screenshot"}, "computer_call_output"), "input.1.output"),
        ({"type": "local_shell_call", "call_id": "a", "action": "ls"}, "input.1.action"),
        ({"type": "additional_tools", "tools": [{"type": "mcp"}]}, "input.1.tools.0.type"),
    ],
)
def test_an_item_that_cannot_be_sent_to_a_model_is_named(item, param):
    with pytest.raises(InvalidRequest) as refusal:
        messages(said("user", "Hi"), item)
    assert refusal.value.param == param


@pytest.mark.parametrize("items", [None, [], {}, 1, [{"type": "reasoning", "summary": []}]])
def test_an_input_without_a_message(items):
    with pytest.raises(InvalidRequest) as refusal:
        chat(items)
    assert refusal.value.param == "input"


# --- tools ------------------------------------------------------------------------------------------------------------

WEATHER = {"type": "function", "name": "weather", "description": "Looks out.", "strict": True}
LIST = {"type": "function", "name": "list", "parameters": {"type": "object"}}
CRM = {"type": "namespace", "name": "crm__", "tools": [LIST, {"type": "custom", "name": "note"}]}
PATCH = {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}}


def functions(**fields):
    return {each["function"]["name"]: each["function"] for each in chat("Hi", **fields).get("tools", ())}


def test_tools_are_functions_of_a_chat():
    offered = functions(tools=[WEATHER, CRM, PATCH, {"type": "local_shell"}, {"type": "web_search"}])
    assert list(offered) == ["weather", "crm__list", "crm__note", "patch", "local_shell"]
    assert offered["weather"] == {"name": "weather", "description": "Looks out.", "strict": True}
    assert offered["crm__list"] == {"name": "crm__list", "parameters": {"type": "object"}}
    assert "start: x" in offered["patch"]["description"]
    assert offered["patch"]["parameters"]["required"] == ["input"]


def test_a_tool_may_be_written_as_in_a_chat():
    assert list(functions(tools=[{"type": "function", "function": {"name": "weather"}}])) == ["weather"]


def test_tools_may_come_with_the_input():
    items = [{"type": "additional_tools", "role": "developer", "tools": [WEATHER]}, said("user", "Hi")]
    assert [each["function"]["name"] for each in chat(items, tools=[LIST])["tools"]] == ["list", "weather"]


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
        ({"type": "custom", "name": "patch"}, {"type": "function", "function": {"name": "patch"}}),
        (
            {"type": "function", "name": "list", "namespace": "crm__"},
            {"type": "function", "function": {"name": "crm__list"}},
        ),
    ],
)
def test_the_choice_of_a_tool(choice, sent):
    assert chat("Hi", tools=[WEATHER, CRM, PATCH], tool_choice=choice)["tool_choice"] == sent


def test_only_allowed_tools_are_shown_to_the_model():
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "list"}]}
    body = chat("Hi", tools=[WEATHER, LIST], tool_choice=allowed)
    assert [each["function"]["name"] for each in body["tools"]] == ["list"]
    assert body["tool_choice"] == "required"


def test_without_tools_no_choice_is_left():
    assert "tool_choice" not in chat("Hi", tools=[{"type": "web_search"}], tool_choice="auto")
