"""The turns of a conversation with Anthropic as messages of OpenAI, such as chat templates of open models accept: the
system text first, then user and assistant in turn."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway.dialects.anthropic_request import (
    DocumentBlock,
    Excerpts,
    ImageBlock,
    SearchResultBlock,
    TextBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from fleet_worker.gateway.dialects.anthropic_tools import call_id_of
from fleet_worker.gateway.dialects.chat_fields import tool_call
from fleet_worker.gateway.dialects.dialect import refused

Part = dict[str, Any]
"""A part of a message of OpenAI: text or an image."""

_BILLING = "x-anthropic-billing-header:"
"""How Claude Code begins a text that is not meant for the model. It differs in every request, so that no server could
use its prompt cache: each turn would cost the time of the whole conversation."""
_BETWEEN = "\n\n"


def messages_of(system: str | Sequence[TextBlock], turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return the messages.

    Raises:
        InvalidRequest: there is nothing to answer, or a block is where it cannot be.
    """
    history = _History()
    history.instruct(_plain(system))
    for at, turn in enumerate(turns):
        match turn.role:
            case "system":
                history.instruct(_plain(_only_text(turn.content, at)))
            case "user":
                history.hear(_blocks(turn.content), at)
            case "assistant":
                history.say(_blocks(turn.content), at)
    return history.messages()


class _History:
    """Turns are put together where two of one role follow each other, as Anthropic does."""

    def __init__(self) -> None:
        self._system: list[str] = []
        self._messages: list[dict[str, Any]] = []
        """The content of each is a list of parts until the end."""

    def instruct(self, text: str) -> None:
        """Add to the system text. Most chat templates refuse one inside of a conversation: that becomes a part of the
        user's turn, marked as Claude Code marks such texts."""
        if not text:
            return
        if self._messages:
            self._turn("user")["content"].append(_text(f"<system-reminder>\n{text}\n</system-reminder>"))
        else:
            self._system.append(text)

    def hear(self, blocks: Iterable[Any], at: int) -> None:
        """Add a turn of the user. Results of tools come first: they follow the calls."""
        seen: list[Part] = []
        for number, block in enumerate(blocks):
            match block:
                case ToolResultBlock():
                    seen += self._result(block)
                case ToolUseBlock():
                    raise _misplaced(at, number, "a tool_use block belongs to an assistant message")
                case _:
                    seen += _parts(block)
        if seen or not self._messages or self._messages[-1]["role"] == "assistant":
            self._turn("user")["content"].extend(seen)

    def say(self, blocks: Iterable[Any], at: int) -> None:
        """Add a turn of the assistant."""
        message = self._turn("assistant")
        for number, block in enumerate(blocks):
            match block:
                case TextBlock():
                    message["content"] += _parts(block)
                case ToolUseBlock():
                    message.setdefault("tool_calls", []).append(_call(block))
                case ToolResultBlock() | ImageBlock() | DocumentBlock() | SearchResultBlock():
                    raise _misplaced(at, number, f"a {block.type} block belongs to a user message")

    def messages(self) -> list[dict[str, Any]]:
        if not self._messages:
            raise refused("messages", "holds no message of the user")
        system = [{"role": "system", "content": _BETWEEN.join(self._system)}] if self._system else []
        return [*system, *({**message, "content": _joined(message)} for message in self._messages)]

    def _turn(self, role: str) -> dict[str, Any]:
        if not self._messages or self._messages[-1]["role"] != role:
            self._messages.append({"role": role, "content": []})
        return self._messages[-1]

    def _result(self, block: ToolResultBlock) -> list[Part]:
        """Add the result of a tool, and return its images: a message of a tool has only text."""
        parts = [part for each in _blocks(block.content or "") for part in _parts(each)]
        texts = [part for part in parts if part["type"] == "text"]
        if block.is_error:
            texts.insert(0, _text("The tool failed:"))
        self._messages.append({"role": "tool", "tool_call_id": call_id_of(block.tool_use_id), "content": texts})
        return [part for part in parts if part["type"] != "text"]


def _plain(system: str | Sequence[TextBlock]) -> str:
    """Return the system text without what is not meant for the model."""
    texts = [system] if isinstance(system, str) else [block.text for block in system]
    return _BETWEEN.join(kept for text in texts if (kept := _without_billing(text)))


def _without_billing(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(_BILLING) else text


def _only_text(content: str | Sequence[Any], at: int) -> list[TextBlock]:
    blocks = _blocks(content)
    for number, block in enumerate(blocks):
        if not isinstance(block, TextBlock):
            raise _misplaced(at, number, "a system message holds only text")
    return list(blocks)


def _blocks(content: str | Sequence[Any]) -> Sequence[Any]:
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else content


def _parts(block: Any) -> list[Part]:
    """Return what the model is shown of a block; nothing of thoughts."""
    match block:
        case TextBlock():
            return [_text(block.text)] if block.text else []
        case ImageBlock(source=source):
            return [{"type": "image_url", "image_url": {"url": f"data:{source.media_type};base64,{source.data}"}}]
        case DocumentBlock():
            return _document(block)
        case SearchResultBlock():
            found = _BETWEEN.join(each.text for each in block.content)
            return [
                _text(f"<search_result{_named(title=block.title, source=block.source)}>\n{found}\n</search_result>")
            ]
        case ToolReferenceBlock():
            return [_text(f"The tool {block.tool_name} can be called.")]
    return []


def _document(block: DocumentBlock) -> list[Part]:
    source = block.source
    if not isinstance(source, Excerpts):
        content = [_text(source.data)]
    elif isinstance(source.content, str):
        content = [_text(source.content)]
    else:
        content = [part for each in source.content for part in _parts(each)]
    return [_text(f"<document{_named(title=block.title, context=block.context)}>"), *content, _text("</document>")]


def _named(**attributes: str | None) -> str:
    return "".join(f' {name}="{escape(value)}"' for name, value in attributes.items() if value)


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _call(block: ToolUseBlock) -> dict[str, Any]:
    return tool_call(call_id_of(block.id), block.name, json.dumps(block.input, ensure_ascii=False))


def _joined(message: dict[str, Any]) -> str | list[Part] | None:
    """Return the content: one text where there are no images, since chat templates of text models expect one."""
    parts: list[Part] = message["content"]
    if any(part["type"] != "text" for part in parts):
        return parts
    if not parts and "tool_calls" in message:
        return None
    return _BETWEEN.join(part["text"] for part in parts)


def _misplaced(at: int, number: int, reason: str) -> InvalidRequest:
    return refused(f"messages.{at}.content.{number}", reason)
