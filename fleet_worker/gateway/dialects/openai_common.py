"""What OpenAI's APIs have in common: errors, the usage, and how a stream stays open and ends."""

from __future__ import annotations

from typing import Any

from fleet_worker.gateway.dialects.dialect import given, take_switch
from fleet_worker.gateway.json_text import compact, server_sent
from fleet_worker.gateway.problems import Problem
from fleet_worker.protocol.reply import Usage

HEARTBEAT = b": still at work\n\n"
"""A comment of server-sent events, which clients skip."""
DONE = b"data: [DONE]\n\n"
"""The last event of a stream that ends well."""
_SESSION = ("prompt_cache_key", "session_id", "litellm_session_id")
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}


def problem_body(problem: Problem, request_id: str) -> bytes:
    return compact({"error": error_object(problem)}).encode("ascii")


def late_error(problem: Problem) -> bytes:
    """Return the event that ends a stream of a completion with an error."""
    return server_sent({"error": error_object(problem)})


def error_object(problem: Problem) -> dict[str, Any]:
    """Return the `error` of OpenAI's APIs."""
    kind = _TYPES.get(problem.status) or ("invalid_request_error" if problem.status < 429 else "server_error")
    if problem.status == 429:
        kind = "insufficient_quota" if problem.code == "insufficient_quota" else "rate_limit_error"
    return {"message": problem.message, "type": kind, "param": problem.param, "code": problem.code}


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return the `usage` of OpenAI's APIs. What the server does not report is 0."""
    prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": usage.total_tokens or prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens or 0},
    }


def take_session(body: dict[str, Any]) -> str | None:
    """Remove what a client calls its conversation from the body, and return it: OpenAI's `prompt_cache_key`, or a field
    of OpenRouter or LiteLLM. None if there is none, or it is no text."""
    named = [body.pop(name, None) for name in _SESSION]
    if isinstance(metadata := body.get("metadata"), dict):
        named.append(metadata.get("session_id"))
    return next((each for each in named if isinstance(each, str) and each), None)


def take_with_usage(body: dict[str, Any]) -> bool:
    """Remove `stream_options` from the body, and return whether a stream shall end with the usage."""
    options = given(body, "stream_options", dict) or {}
    body.pop("stream_options", None)
    return take_switch(dict(options), "include_usage")
