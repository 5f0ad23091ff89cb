"""How MLX servers differ: what each is sent, and how its answers are recognised."""

from dataclasses import replace
from typing import get_args

import httpx
import pytest

from fleet_worker.errors import (
    ProviderError,
)
from fleet_worker.mlx.chat_templates import ChatTemplate, with_open_last_turn
from fleet_worker.mlx.offering import offerings_of
from fleet_worker.mlx.profiles import PROFILES, chat_body, continued_body, detect_server, normalised_finish_reason
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


def test_done_is_waited_for_where_it_is_known_to_come():
    assert [kind for kind, profile in PROFILES.items() if not profile.sends_done] == ["openai"]


def test_limits_that_a_caller_does_not_name_are_those_of_the_model():
    body = body_for("mlx_lm", model={"max_output_tokens": 77, "temperature": 0.1})
    assert (body["max_tokens"], body["temperature"]) == (77, 0.1)


def test_a_temperature_of_nought_is_a_temperature():
    assert body_for("mlx_lm", temperature=0)["temperature"] == 0


def test_max_tokens_has_two_names_of_which_the_older_wins():
    assert body_for("mlx_lm", max_completion_tokens=7)["max_tokens"] == 7
    assert body_for("mlx_lm", max_completion_tokens=7, max_tokens=8)["max_tokens"] == 8


def test_omni_is_asked_for_one_token_more_than_is_wanted():
    assert body_for("omni", max_tokens=8)["max_tokens"] == 9
    assert body_for("omni")["max_tokens"] == 4097


def test_mlx_vlm_does_not_summarise_a_long_conversation():
    assert body_for("mlx_vlm")["context_management"] == []


def test_mlx_openai_may_call_tools():
    """It takes "none" for the default."""
    assert body_for("mlx_openai", tools=TOOLS)["tool_choice"] == "auto"
    assert "tools" not in body_for("mlx_openai", tools=TOOLS, tool_choice="none")


def test_a_server_of_a_model_that_reasons_is_not_sent_stop_strings():
    """It would find them in the reasoning."""
    assert body_for("openai", stop=["a"])["stop"] == ["a"]
    assert "stop" not in body_for("openai", stop=["a"], model={"starts_in_reasoning": True})
    assert "stop" not in body_for("openai", stop=["a"], model={"features": {"thinking": True}})


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
    assert body_for("mlx_vlm", reasoning_effort="low")["reasoning_effort"] == "low"


def test_mlx_openai_knows_three_efforts():
    assert body_for("mlx_openai", reasoning_effort="high")["chat_template_kwargs"] == {"reasoning_effort": "high"}
    assert body_for("mlx_openai", reasoning_effort="minimal")["chat_template_kwargs"] == {"reasoning_effort": "low"}
    assert body_for("mlx_openai", reasoning_effort="none")["chat_template_kwargs"] == {"enable_thinking": False}


def test_mlx_vlm_is_told_in_fields_of_its_own_what_others_put_into_the_template():
    body = body_for("mlx_vlm", chat_template_kwargs={"enable_thinking": False, "thinking_budget": 9})
    assert (body["enable_thinking"], body["thinking_budget"]) == (False, 9)
    assert "chat_template_kwargs" not in body


def test_what_a_caller_says_to_the_template_itself_wins():
    said = {"reasoning_effort": "high", "enable_thinking": False}
    assert body_for("vllm_mlx", reasoning_effort="low", chat_template_kwargs=said)["chat_template_kwargs"] == said


# --- What is sent to continue an answer


@pytest.mark.parametrize(
    ("kind", "turn", "kwargs"),
    [
        ("vllm_mlx", {}, {"add_generation_prompt": False, "continue_final_message": True}),
        ("mlx_openai", {"partial": True}, {}),
        ("omni", {}, {}),
        ("mlx_lm", {}, {"chat_template": with_open_last_turn("the model's own", before_text=" ")}),
    ],
)
def test_every_server_has_its_way_to_go_on(kind, turn, kwargs):
    body = body_for(kind, **({} if kind == "omni" else {"chat_template_kwargs": {"enable_thinking": False}}))
    known = body.get("chat_template_kwargs", {})
    continued = continued_body(body, "Hi and", offering(TEMPLATE), PROFILES[kind])
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
    continued = continued_body(body_for("mlx_lm", **params), "Hi and", offering(TEMPLATE), PROFILES["mlx_lm"])
    # The space makes a prompt that mlx_lm.server has not cached.
    assert continued["chat_template_kwargs"]["chat_template"] == with_open_last_turn(own, before_text=" ")


@pytest.mark.parametrize("kind", ["openai", "rapid_mlx", "mlx_vlm"])
def test_a_server_without_a_way_to_go_on_is_not_asked(kind):
    assert continued_body(body_for(kind), "Hi", offering(TEMPLATE), PROFILES[kind]) is None
    assert continued_body(body_for("mlx_lm"), "Hi", offering(), PROFILES["mlx_lm"]) is None
    seeing = offering(TEMPLATE, features={"vision": True})
    assert continued_body(body_for("mlx_openai"), "Hi", seeing, PROFILES["mlx_openai"]) is None


# --- Which server it is


@pytest.mark.parametrize(
    ("version", "headers", "report", "expected"),
    [
        ("HTTP/1.0", {"Server": "BaseHTTP/0.6 Python/3.11.7"}, {"status": "ok"}, "mlx_lm"),
        ("HTTP/1.0", {"Server": "BaseHTTP/0.6 Python/3.11.7"}, {}, "mlx_lm"),
        ("HTTP/1.0", {"Server": "nginx"}, {"status": "ok"}, "openai"),
        ("HTTP/1.1", {"Server": "BaseHTTP/0.6"}, {"status": "ok"}, "openai"),
        ("HTTP/1.1", {"Server": "uvicorn"}, {"status": "healthy", "engine_type": "simple"}, "vllm_mlx"),
        ("HTTP/1.1", {"Server": "uvicorn"}, {"status": "healthy", "engine_type": "unknown", "mcp": None}, "vllm_mlx"),
        ("HTTP/1.1", {"Server": "uvicorn"}, {"engine_type": "batched", "ready": True, "state": "ready"}, "rapid_mlx"),
        ("HTTP/1.1", {"Server": "uvicorn"}, {"engine_type": "batched", "update_available": False}, "rapid_mlx"),
        ("HTTP/1.1", {"Server": "uvicorn"}, {"status": "ok", "engine_type": "turbo"}, "openai"),
        ("HTTP/1.1", {"Server": "uvicorn"}, {"status": "ok", "engine_type": ["batched"]}, "openai"),
        ("HTTP/1.1", {"Server": "mlx_vlm/0.7.10"}, {"status": "healthy", "loaded_model": "a"}, "mlx_vlm"),
        ("HTTP/1.1", {"Server": "mlx_vlm/0.7.10"}, {}, "mlx_vlm"),
        ("HTTP/1.1", {"Server": "uvicorn"}, {"status": "ok", "model_status": "initialized"}, "mlx_openai"),
        ("HTTP/1.1", {"Server": "uvicorn"}, {"detail": "Not Found"}, "openai"),
        ("HTTP/1.1", {}, {}, "openai"),
    ],
)
def test_a_server_is_known_by_its_health(version, headers, report, expected):
    assert detect_server(version, httpx.Headers(headers), report) == expected


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
    assert normalised_finish_reason(said, PROFILES[kind], tokens=5, max_tokens=100) == expected


@pytest.mark.parametrize("said", ["abort", "error", SECRET])
def test_an_answer_that_ends_for_another_reason_may_not_be_whole(said):
    with pytest.raises(ProviderError) as raised:
        normalised_finish_reason(said, PROFILES["vllm_mlx"], tokens=5, max_tokens=100)
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
    assert normalised_finish_reason("stop", PROFILES[kind], tokens=tokens, max_tokens=10) == expected


def test_a_tool_call_at_the_limit_is_a_tool_call():
    assert normalised_finish_reason("tool_calls", PROFILES["omni"], tokens=10, max_tokens=10) == "tool_calls"
