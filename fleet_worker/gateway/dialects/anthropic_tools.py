"""Tools as Anthropic and OpenAI write them: what may be called, what must be, and the ids of calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fleet_worker.gateway.dialects.anthropic_request import Choice, Tool
from fleet_worker.gateway.dialects.dialect import refused

_RUN_BY_ANTHROPIC = re.compile(r"(web_search|web_fetch|code_execution|tool_search_tool|mcp_toolset|advisor)(_|$)")
"""The types of tools that no client carries out, without their versions."""
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_PREFIX = "toolu_"
_ODD = re.compile(r"[^A-Za-z0-9_-]")
_ESCAPED = re.compile(r"_x([0-9a-f]{1,6})_")


def functions(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the tools that the client carries out, as OpenAI writes them.

    Those that run at Anthropic are left out, as a model that does not need them would do; but not if there is no other
    one: then the request is about them.

    Raises:
        InvalidRequest: there is no other one, or a tool has no schema.
    """
    own = [_function(tool, f"tools.{at}") for at, tool in enumerate(tools) if not _is_run_by_anthropic(tool)]
    if tools and not own:
        raise refused("tools.0.type", "runs at Anthropic, not here: give a tool of your own, or leave it out")
    return own


def choice(chosen: Choice | None, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of OpenAI that say the same. `tools` are those that `functions` returned."""
    if chosen is None or (not tools and chosen.type in ("auto", "none")):
        return {}
    parallel = {"parallel_tool_calls": False} if chosen.disable_parallel_tool_use else {}
    if chosen.type != "tool":
        if not tools:
            raise refused("tool_choice", "asks for a tool, but the request has none: add tools, or leave it out")
        return {"tool_choice": _CHOICES[chosen.type], **parallel}
    if not chosen.name:
        raise refused("tool_choice.name", "is missing: use the name of one of the tools")
    if chosen.name not in [tool["function"]["name"] for tool in tools]:
        raise refused("tool_choice.name", "names no tool that can be called here: use the name of one of the tools")
    return {"tool_choice": {"type": "function", "function": {"name": chosen.name}}, **parallel}


def tool_use_id(call_id: str) -> str:
    """Return the id of a call as Anthropic's clients expect it. `call_id_of` is the inverse."""
    return _PREFIX + _ODD.sub(lambda odd: f"_x{ord(odd[0]):x}_", call_id)


def call_id_of(tool_use_id: str) -> str:
    """Return the id that the server gave to a call. Some chat templates show it to the model."""
    if not tool_use_id.startswith(_PREFIX):
        return tool_use_id
    own = tool_use_id[len(_PREFIX) :]
    return _ESCAPED.sub(_unescaped, own) or tool_use_id


def _unescaped(escaped: re.Match[str]) -> str:
    code = int(escaped[1], 16)
    is_character = code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF
    return chr(code) if is_character else escaped[0]


def _is_run_by_anthropic(tool: Tool) -> bool:
    return bool(tool.type and _RUN_BY_ANTHROPIC.match(tool.type))


def _function(tool: Tool, place: str) -> dict[str, Any]:
    if tool.name is None:
        raise refused(f"{place}.name", "is missing")
    if tool.input_schema is None:
        known = "" if tool.type in (None, "custom") else ", since no model here knows the tools of Anthropic by heart"
        raise refused(f"{place}.input_schema", f"is missing: describe what the tool takes{known}")
    described = {"description": tool.description} if tool.description else {}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.input_schema}}
