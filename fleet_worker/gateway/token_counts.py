"""How many tokens a prompt has: counted where the tokenizer of its model is on this machine, or else estimated.

An estimate is off by a third at times: good for a first figure, not for refusing a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fleet_worker.gateway.json_text import compact
from fleet_worker.router import context_length

_BYTES_OF_TOKEN = 4
"""Of UTF-8. It fits English and code, and within a factor of two also Chinese, Russian and emoji."""
_TOKENS_OF_MESSAGE = 4
"""What a chat template puts around each."""
_TOKENS_OF_IMAGE = 1000
_TOKENS_OF_ANSWER = 1000
"""If the request sets no limit."""


def counted_tokens(model: str, body: dict[str, Any]) -> int:
    """Return how many tokens the body of an OpenAI chat has for this model. It may take a second for a megabyte."""
    tokens = context_length.counted(model, _texts(body))
    return estimated_tokens(body) if tokens is None else tokens + _beside_texts(body)


def estimated_tokens(body: dict[str, Any]) -> int:
    return sum(map(_bytes, _texts(body))) // _BYTES_OF_TOKEN + _beside_texts(body)


def quick_estimate(body: dict[str, Any], size: int) -> int:
    """Return about how many tokens the prompt of a chat or an embedding has that came in a body of so many bytes. Texts
    are not looked at, and the body need not be valid."""
    images = [len(str(part.get("image_url"))) for part in _parts(body) if part.get("type") == "image_url"]
    return max(0, size - sum(images)) // _BYTES_OF_TOKEN + _TOKENS_OF_IMAGE * len(images)


def most_generated(body: dict[str, Any]) -> int:
    """Return how many tokens the answer may have, which are reserved for it. The body need not be valid."""
    limits = [body.get(name) for name in ("max_completion_tokens", "max_tokens")]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return max(known) if known else _TOKENS_OF_ANSWER if "messages" in body else 0


def _parts(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        yield from (part for part in content if isinstance(part, dict)) if isinstance(content, list) else ()


def _texts(body: dict[str, Any]) -> Iterator[str]:
    if "tools" in body:
        yield compact(body["tools"])
    for message in body["messages"]:
        yield from (
            f"{call['function']['name']} {call['function']['arguments']}" for call in message.get("tool_calls", ())
        )
        content = message["content"] or ""
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content if part["type"] == "text")


def _beside_texts(body: dict[str, Any]) -> int:
    contents = (message["content"] for message in body["messages"])
    parts = (part for content in contents if isinstance(content, list) for part in content)
    images = sum(1 for part in parts if part["type"] != "text")
    return _TOKENS_OF_MESSAGE * len(body["messages"]) + _TOKENS_OF_IMAGE * images


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))
