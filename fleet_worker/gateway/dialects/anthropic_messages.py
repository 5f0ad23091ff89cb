"""`/v1/messages`: Anthropic's Messages. Its parts: `anthropic_request`, `anthropic_history`, `anthropic_tools`, and
`anthropic_answer` for the other direction."""

from __future__ import annotations

import json
import re
from typing import Any

from fleet_worker.gateway.dialects import anthropic_tools
from fleet_worker.gateway.dialects.anthropic_answer import MessageWriter, error_object
from fleet_worker.gateway.dialects.anthropic_history import messages_of
from fleet_worker.gateway.dialects.anthropic_request import WAYS_OUT, MessagesRequest, Prompt
from fleet_worker.gateway.dialects.chat_fields import schema_format, thinking_switch
from fleet_worker.gateway.dialects.client_body import read
from fleet_worker.gateway.dialects.dialect import ChatAsked, refused
from fleet_worker.gateway.json_text import compact
from fleet_worker.gateway.problems import Problem
from fleet_worker.gateway.token_counts import estimated_tokens

LONGEST_USER = 1000
"""Characters of the id of a user that is searched for a session: that of Claude Code has about 200."""


def asked(body: dict[str, Any], request_id: str, created: int) -> ChatAsked:
    given = read(MessagesRequest, body, WAYS_OUT)
    if given.mcp_servers:
        raise refused("mcp_servers", "nothing here connects to one: call it in your client")
    wanted = {**prompt(given), **_sampling(given), **_thinking(given), **_format(given)}
    writer = MessageWriter(
        given.model,
        request_id,
        input_tokens=estimated_tokens(wanted) if given.stream else 0,
        thinking=_shown(given),
    )
    user = given.metadata.user_id if given.metadata else None
    return ChatAsked(given.model, wanted, given.stream, writer, _session_in(user or ""))


def problem_body(problem: Problem, request_id: str) -> bytes:
    return compact(error_object(problem, request_id)).encode("ascii")


def prompt(given: Prompt) -> dict[str, Any]:
    """Return what the model is given to read, as OpenAI writes it."""
    tools = anthropic_tools.functions(given.tools)
    fields = {"messages": messages_of(given.system, given.messages), **anthropic_tools.choice(given.tool_choice, tools)}
    return {**fields, "tools": tools} if tools else fields


def _sampling(given: MessagesRequest) -> dict[str, Any]:
    fields = {
        "max_tokens": given.max_tokens,
        "temperature": given.temperature,
        "top_p": given.top_p,
        "top_k": given.top_k,
        "stop": given.stop_sequences or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _thinking(given: MessagesRequest) -> dict[str, Any]:
    """Whether to think, and how much: where the client leaves that to the model, so do we. No server keeps to a budget,
    which is not a promise of Anthropic's either."""
    fields: dict[str, Any] = {}
    if given.thinking and given.thinking.type in ("enabled", "disabled"):
        fields |= thinking_switch(given.thinking.type == "enabled")
    if given.output_config and given.output_config.effort:
        fields["reasoning_effort"] = given.output_config.effort
    return fields


def _session_in(user: str) -> str | None:
    """Return the session that Claude Code writes into the id of its user: into JSON, or until 2.1.77 at the end."""
    if len(user) > LONGEST_USER:
        return None
    if at_end := re.search(r"_session_([A-Za-z0-9-]+)$", user):
        return at_end[1]
    try:
        named = json.loads(user)
    except (ValueError, RecursionError):
        return None
    session = named.get("session_id") if isinstance(named, dict) else None
    return session if isinstance(session, str) else None


def _shown(given: MessagesRequest) -> bool | None:
    """Return whether thoughts are shown; None if the client wants to know only that there were some."""
    if given.thinking and given.thinking.type == "disabled":
        return False
    return None if given.thinking and given.thinking.display == "omitted" else True


def _format(given: MessagesRequest) -> dict[str, Any]:
    wanted = (given.output_config and given.output_config.format) or given.output_format
    if not wanted:
        return {}
    return schema_format(wanted.schema_)
