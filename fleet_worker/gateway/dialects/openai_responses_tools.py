"""The tools of a Responses request: as functions of a chat, and what the model calls as items of the response."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fleet_worker.gateway.dialects.dialect import given, refused

_DROPPED = ("web_search", "image_generation", "tool_search")
"""Tools that coding agents add to each request, and that OpenAI's own servers carry out. Models are not told of them,
and the `tools` of a response are without them. Of `web_search` there are dated and preview versions."""
_HOSTED = "nothing here carries out this tool: leave it out, or offer a function that your own program carries out"
_ITEMS = {"function": "function_call", "custom": "custom_tool_call", "local_shell": "local_shell_call"}
_PREFIXES = {"function": "fc", "custom": "ctc", "local_shell": "lsh"}
_SHELL = {
    "name": "local_shell",
    "description": "Runs a command on the user's machine and returns its output.",
    "parameters": {
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"type": "string"}, "description": "The command and its arguments"},
            "working_directory": {"type": "string"},
            "timeout_ms": {"type": "integer"},
        },
        "required": ["command"],
    },
}


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as the client names it."""

    kind: Literal["function", "custom", "local_shell"]
    name: str
    namespace: str | None = None

    @property
    def prefix(self) -> str:
        """How the ids of its calls begin, as OpenAI's do."""
        return _PREFIXES[self.kind]

    def item(self, item_id: str, call_id: str, arguments: str, status: str) -> dict[str, Any]:
        """Return the item of a call. `arguments` are those of the model: a JSON object, if it is as it should be."""
        item: dict[str, Any] = {"type": _ITEMS[self.kind], "id": item_id, "call_id": call_id, "status": status}
        if self.kind == "local_shell":
            return {**item, "action": _shell_action(arguments)}
        item |= {"name": self.name, **({"namespace": self.namespace} if self.namespace else {})}
        if self.kind == "custom":
            return {**item, "input": custom_input(arguments)}
        return {**item, "arguments": arguments}


class Tools:
    """All tools of a request. Models see flat names: a tool `list` of the namespace `crm` is `crm__list`."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.offered: list[dict[str, Any]] = []
        """As the client wrote them, with null for what it left out: what a response repeats."""
        self._functions: list[dict[str, Any]] = []
        self._by_name: dict[str, Tool] = {}
        self._add_all(given(body, "tools", list) or (), "tools", None)
        items = body.get("input")
        for at, item in enumerate(items if isinstance(items, list) else ()):
            if isinstance(item, dict) and item.get("type") == "additional_tools":
                self._add_all(given(item, "tools", list, f"input.{at}.") or (), f"input.{at}.tools", None)

    def named(self, name: str) -> Tool:
        """Return the tool that a model calls so: a function of that name, if there is none."""
        return self._by_name.get(name) or Tool("function", name)

    def chat_fields(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return `tools` and `tool_choice` of the chat, if it has any."""
        choice, functions = body.get("tool_choice"), self._functions
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            allowed = {self._chosen(each) for each in given(choice, "tools", list, "tool_choice.") or ()}
            functions = [each for each in functions if each["function"]["name"] in allowed]
            choice = choice.get("mode", "auto")
        elif isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": self._chosen(choice)}}
        chat: dict[str, Any] = {"tools": functions} if functions else {}
        if choice is not None and (functions or choice not in ("auto", "none")):
            chat["tool_choice"] = choice
        return chat

    def _chosen(self, choice: Any) -> str:
        """Return the name that a model sees of the tool of a `tool_choice`."""
        kind = choice.get("type") if isinstance(choice, dict) else None
        name = (
            "local_shell" if kind == "local_shell" else choice.get("name") if kind in ("function", "custom") else None
        )
        if isinstance(name, str) and name:
            return flat(name, choice.get("namespace"))
        raise refused("tool_choice", 'it is "auto", "none", "required" or {"type": "function", "name": "..."}')

    def _add_all(self, tools: Iterable[Any], at: str, namespace: str | None) -> list[dict[str, Any]]:
        """Add these tools; return those that are not dropped."""
        kept = [self._add(tool, f"{at}.{index}", namespace) for index, tool in enumerate(tools)]
        offered = [tool for tool in kept if tool]
        if namespace is None:
            self.offered += offered
        return offered

    def _add(self, tool: Any, at: str, namespace: str | None) -> dict[str, Any] | None:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind == "function":
            return self._add_function(tool, at, namespace)
        if kind == "custom":
            self._see(Tool("custom", _name(tool, at), namespace), _custom_function(tool))
        elif kind == "local_shell":
            self._see(Tool("local_shell", "local_shell"), _SHELL)
        elif kind == "namespace" and namespace is None:
            inner = self._add_all(given(tool, "tools", list, f"{at}.") or (), f"{at}.tools", _name(tool, at))
            return {"description": "", **tool, "tools": inner}
        elif isinstance(kind, str) and kind.startswith(_DROPPED):
            return None
        else:
            raise refused(f"{at}.type", _HOSTED)
        return dict(tool)

    def _add_function(self, tool: dict[str, Any], at: str, namespace: str | None) -> dict[str, Any]:
        wrapped = given(tool, "function", dict, f"{at}.")  # of a client that mixes this API up with chat completions
        tool = {"type": "function", **wrapped} if wrapped else tool
        known = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in known if tool.get(name) is not None}
        self._see(Tool("function", _name(tool, at), namespace), function)
        return {"description": None, "parameters": None, "strict": None, **tool}

    def _see(self, tool: Tool, function: dict[str, Any]) -> None:
        name = flat(tool.name, tool.namespace)
        self._by_name[name] = tool
        self._functions.append({"type": "function", "function": {**function, "name": name}})


def flat(name: str, namespace: Any) -> str:
    """Return the name that a model sees."""
    return f"{namespace.rstrip('_')}__{name}" if isinstance(namespace, str) and namespace else name


def custom_arguments(text: str) -> str:
    """Return the arguments of the function that a custom tool is for a model."""
    return json.dumps({"input": text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """Return the text for a custom tool. A model that does not write JSON may have written the text itself."""
    text = _object(arguments).get("input")
    return text if isinstance(text, str) else arguments


def _custom_function(tool: dict[str, Any]) -> dict[str, Any]:
    form = tool.get("format") or {}
    grammar = form.get("definition") if isinstance(form, dict) else None
    rule = f"\n\nThe input follows this grammar ({form.get('syntax')}):\n{grammar}" if grammar else ""
    text = {"type": "string", "description": "The whole input of the tool, as plain text"}
    parameters = {"type": "object", "properties": {"input": text}, "required": ["input"]}
    return {"description": f"{tool.get('description') or ''}{rule}".strip(), "parameters": parameters}


def _shell_action(arguments: str) -> dict[str, Any]:
    told = _object(arguments)
    command = told.get("command")
    words = ["bash", "-lc", command] if isinstance(command, str) else command if isinstance(command, list) else []
    others = {name: told[name] for name in ("timeout_ms", "working_directory") if told.get(name) is not None}
    return {"type": "exec", "command": [str(word) for word in words], "env": {}, **others}


def _object(arguments: str) -> dict[str, Any]:
    try:
        told = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _name(tool: dict[str, Any], at: str) -> str:
    if name := given(tool, "name", str, f"{at}."):
        return name
    raise refused(f"{at}.name", "is missing")
