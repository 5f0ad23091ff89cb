"""The input of a Responses request, a text or a list of items, as the messages of a chat.

What one turn of the assistant consists of, a text and any number of calls, becomes one message: models are trained on
that, and a server finds the beginning of the conversation in its cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fleet_worker.gateway.dialects.chat_fields import tool_call
from fleet_worker.gateway.dialects.dialect import given, refused
from fleet_worker.gateway.dialects.openai_responses_tools import Tools, custom_arguments, flat

_IGNORED = {
    "reasoning",
    "additional_tools",
    "web_search_call",
    "file_search_call",
    "image_generation_call",
    "code_interpreter_call",
    "computer_call",
    "tool_search_call",
    "tool_search_output",
    "mcp_list_tools",
    "mcp_approval_request",
    "mcp_approval_response",
}
"""Items that say nothing to a model: its earlier thoughts, and notes on what OpenAI's own servers did."""
_STORED = {
    "item_reference": "no item is stored here: send the item itself, as clients do with store: false",
    "compaction": "it can be read by the server that made it only: send the conversation itself",
    "compaction_summary": "it can be read by the server that made it only: send the conversation itself",
}
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "summary_text": "text", "refusal": "refusal"}
"""The parts that are text, and which field has it."""


def messages_of(body: Mapping[str, Any], tools: Tools) -> list[dict[str, Any]]:
    """Return the messages of the chat.

    Raises:
        InvalidRequest: an item cannot be sent to a model. `param` is its path.
    """
    chat = _Chat()
    if instructions := given(body, "instructions", str):
        chat.say_system(instructions)
    told = body.get("input")
    if isinstance(told, str):
        chat.messages.append({"role": "user", "content": told})
    elif isinstance(told, list) and told:
        for index, item in enumerate(told):
            chat.add(item, f"input.{index}")
    else:
        raise refused("input", "must be a text, or a list of items that is not empty")
    if not chat.messages:
        raise refused("input", "has no message: add one with the role user")
    return chat.messages


class _Chat:
    """The messages so far. An item adds one, or goes on with the last one."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def add(self, item: Any, at: str) -> None:
        if not isinstance(item, dict):
            raise refused(at, "must be an object")
        kind = item.get("type", "message")
        if kind == "message" or (kind is None and "role" in item):
            self._add_message(item, at)
        elif kind in ("function_call", "custom_tool_call", "local_shell_call"):
            self._add_call(item, at)
        elif isinstance(kind, str) and kind.endswith("_call_output"):
            self._add_output(item, at)
        elif isinstance(kind, str) and kind in _STORED:
            raise refused(f"{at}.type", _STORED[kind])
        elif not isinstance(kind, str) or kind not in _IGNORED:
            raise refused(f"{at}.type", "is no kind of item that is known here: leave it out")

    def say_system(self, text: str) -> None:
        """Add what the system says. Chat templates of many models take one such message only, at the beginning."""
        if self.messages and self.messages[-1]["role"] == "system":
            self.messages[-1]["content"] += f"\n\n{text}"
        else:
            self.messages.append({"role": "system", "content": text})

    def _add_message(self, item: dict[str, Any], at: str) -> None:
        role = item.get("role")
        if role == "user":
            self.messages.append({"role": "user", "content": _content(item.get("content"), f"{at}.content")})
        elif role in ("system", "developer"):
            self.say_system(_text(item.get("content"), f"{at}.content"))
        elif role == "assistant":
            text = _text(item.get("content"), f"{at}.content")
            if self._assistant_speaks and self.messages[-1]["content"] is None:
                self.messages[-1]["content"] = text
            else:
                self.messages.append({"role": "assistant", "content": text})
        else:
            raise refused(f"{at}.role", f"must be one of {', '.join(_ROLES)}")

    def _add_call(self, item: dict[str, Any], at: str) -> None:
        if not self._assistant_speaks:
            self.messages.append({"role": "assistant", "content": None})
        name, arguments = _called(item, at)
        call = tool_call(_call_id(item, at), name, arguments)
        self.messages[-1].setdefault("tool_calls", []).append(call)

    def _add_output(self, item: dict[str, Any], at: str) -> None:
        content = _content(item.get("output"), f"{at}.output")
        self.messages.append({"role": "tool", "tool_call_id": _call_id(item, at), "content": content})

    @property
    def _assistant_speaks(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"


def _called(item: dict[str, Any], at: str) -> tuple[str, str]:
    """Return name and arguments of a call as the model wrote it."""
    if item["type"] == "local_shell_call":
        action = given(item, "action", dict, f"{at}.") or {}
        told = {name: value for name, value in action.items() if name not in ("type", "env") and value is not None}
        return "local_shell", json.dumps(told, ensure_ascii=False)
    name = given(item, "name", str, f"{at}.")
    if not name:
        raise refused(f"{at}.name", "is missing")
    if item["type"] == "custom_tool_call":
        arguments = custom_arguments(given(item, "input", str, f"{at}.") or "")
    else:
        arguments = given(item, "arguments", str, f"{at}.") or "{}"
    return flat(name, item.get("namespace")), arguments


def _call_id(item: dict[str, Any], at: str) -> str:
    """Return the id of a call. The output of a local shell has it as its own id, in the first version of the API."""
    call_id = given(item, "call_id", str, f"{at}.") or given(item, "id", str, f"{at}.")
    if not call_id:
        raise refused(f"{at}.call_id", "is missing")
    return call_id


def _content(value: Any, at: str) -> str | list[dict[str, Any]]:
    """Return the content of a message: a text, or parts if there is more than one."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refused(at, "must be a text or a list of parts")
    parts = [_part(part, f"{at}.{index}") for index, part in enumerate(value)]
    if len(parts) == 1 and parts[0]["type"] == "text":
        return str(parts[0]["text"])
    return parts or ""


def _text(value: Any, at: str) -> str:
    """Return the content of a message that is nothing but text."""
    content = _content(value, at)
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part["type"] != "text":
            raise refused(f"{at}.{index}", "only a message of the user may have images")
    return "\n".join(part["text"] for part in content)


def _part(part: Any, at: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in _TEXTS:
        return {"type": "text", "text": given(part, _TEXTS[kind], str, f"{at}.") or ""}
    if kind in ("input_image", "image_url"):
        return {"type": "image_url", "image_url": _image(part, at)}
    if kind == "input_file":
        raise refused(at, "files are not read here: put the text of the file into a part of the type input_text")
    raise refused(f"{at}.type", 'must be "input_text" or "input_image"')


def _image(part: dict[str, Any], at: str) -> dict[str, Any]:
    told = part.get("image_url")
    url = told.get("url") if isinstance(told, dict) else told
    if not isinstance(url, str):
        raise refused(f"{at}.image_url", "is missing: an image is a data:image/... URL, in base64")
    if not url.startswith("data:image/"):
        raise refused(f"{at}.image_url", "is an address: put the image itself into a data:image/... URL, in base64")
    detail = part.get("detail")
    return {"url": url, **({"detail": detail} if detail in ("auto", "low", "high") else {})}
