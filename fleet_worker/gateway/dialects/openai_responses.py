"""`/v1/responses`: OpenAI's Responses API, of which nothing is stored: each request has the whole conversation.

Facts of openai-python 3.57, of the Open Responses specification of April 2026, and of Codex CLI 0.171.
"""

from __future__ import annotations

from typing import Any

from fleet_worker.gateway.dialects.chat_fields import NO_LOGPROBS
from fleet_worker.gateway.dialects.dialect import ChatAsked, given, refused, take_model, take_switch
from fleet_worker.gateway.dialects.openai_common import error_object, take_session
from fleet_worker.gateway.dialects.openai_responses_input import messages_of
from fleet_worker.gateway.dialects.openai_responses_tools import Tools
from fleet_worker.gateway.dialects.openai_responses_writer import ResponsesWriter
from fleet_worker.gateway.json_text import compact
from fleet_worker.gateway.problems import Problem

_PASSED = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "parallel_tool_calls",
    "user",
    # not of OpenAI's API, but clients of MLX servers and of vLLM send them
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "logit_bias",
    "chat_template_kwargs",
)
"""Fields that mean the same in a chat completion. What is not named in this module has no effect, and is dropped."""
_STORED = {
    "previous_response_id": "no response is stored here: send the whole conversation as input",
    "conversation": "no conversation is stored here: send all of it as input",
    "prompt": "no prompt is stored here: send its text as instructions, or as input",
}
_LOGPROBS = "message.output_text.logprobs"
_OWN_NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""What a field of a chat completion is called here."""


def asked(body: dict[str, Any], request_id: str, created: int) -> ChatAsked:
    body = {name: value for name, value in body.items() if value is not None}
    model, stream = take_model(body), take_switch(body, "stream")
    _refuse_unavailable(body)
    tools = Tools(body)
    chat = {name: body[name] for name in _PASSED if name in body}
    chat |= tools.chat_fields(body)
    chat |= _limits(body)
    chat["messages"] = messages_of(body, tools)
    writer = ResponsesWriter(request_id, created, {"model": model, **_echo(body, tools)}, tools)
    given(body, "prompt_cache_key", str)
    return ChatAsked(model, chat, stream, writer, take_session(dict(body)))


def problem_body(problem: Problem, request_id: str) -> bytes:
    error = error_object(problem)
    if problem.param:
        head, dot, rest = problem.param.partition(".")
        own = _OWN_NAMES.get(head)
        error["param"] = own or f"{head}{dot}{rest}"
    return compact({"error": error}).encode("ascii")


def _refuse_unavailable(body: dict[str, Any]) -> None:
    for name, way_out in _STORED.items():
        if name in body:
            raise refused(name, way_out)
    if given(body, "background", bool):
        raise refused("background", "answers come at once: leave it out")
    if _LOGPROBS in (given(body, "include", list) or ()):
        raise refused("include", NO_LOGPROBS)
    if given(body, "top_logprobs", int):
        raise refused("top_logprobs", NO_LOGPROBS)


def _limits(body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a chat that bound the answer and its form, and how much the model thinks."""
    chat: dict[str, Any] = {}
    if (tokens := given(body, "max_output_tokens", int)) is not None:
        chat["max_tokens"] = tokens
    if effort := given(given(body, "reasoning", dict) or {}, "effort", str, "reasoning."):
        chat["reasoning_effort"] = effort
    form = _format(body)
    if form["type"] == "json_schema":
        schema = {name: value for name, value in form.items() if name != "type"}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif form["type"] != "text":
        chat["response_format"] = form
    return chat


def _format(body: dict[str, Any]) -> dict[str, Any]:
    given_format = given(given(body, "text", dict) or {}, "format", dict, "text.") or {"type": "text"}
    if given_format.get("type") not in ("text", "json_object", "json_schema"):
        raise refused("text.format", 'its type is "text", "json_object" or "json_schema"')
    return {name: value for name, value in given_format.items() if value is not None}


def _echo(body: dict[str, Any], tools: Tools) -> dict[str, Any]:
    """Return what a response repeats of its request: all that SDKs and the specification need, if only as null."""
    form, text = _format(body), given(body, "text", dict) or {}
    if form["type"] == "json_schema":
        form = {"description": None, "strict": False, **form}
    reasoning = given(body, "reasoning", dict) or {}
    return {
        "background": False,
        "frequency_penalty": body.get("frequency_penalty", 0.0),
        "instructions": given(body, "instructions", str),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": given(body, "max_tool_calls", int),
        "metadata": given(body, "metadata", dict) or {},
        "parallel_tool_calls": take_switch(dict(body), "parallel_tool_calls", default=True),
        "presence_penalty": body.get("presence_penalty", 0.0),
        "previous_response_id": None,
        "prompt_cache_key": body.get("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "safety_identifier": given(body, "safety_identifier", str),
        "service_tier": "default",
        "store": False,
        "temperature": body.get("temperature", 1.0),
        "text": {"format": form, **({"verbosity": text["verbosity"]} if text.get("verbosity") else {})},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": tools.offered,
        "top_logprobs": 0,
        "top_p": body.get("top_p", 1.0),
        "truncation": "disabled",
        "user": given(body, "user", str),
    }
