"""About how many tokens a prompt has, where no tokenizer can tell. It is off by a third at times: good for a first
figure, not for refusing a request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fleet_worker.gateway.json_text import compact

_BYTES_OF_TOKEN = 4
"""Of UTF-8. It fits English and code, and within a factor of two also Chinese, Russian and emoji."""
_TOKENS_OF_MESSAGE = 4
"""What a chat template puts around each."""
_TOKENS_OF_IMAGE = 1000
_TOKENS_OF_ANSWER = 1000
"""If the request sets no limit."""


def estimated_tokens(body: dict[str, Any]) -> int:
    """Return the estimate for the body of an OpenAI chat."""
    tools = len(compact(body["tools"])) if "tools" in body else 0
    size, images = tools, 0
    for message in body["messages"]:
        size += sum(len(str(call["function"])) for call in message.get("tool_calls", ()))
        content = message["content"] or ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                size += _bytes(part["text"])
            else:
                images += 1
    return size // _BYTES_OF_TOKEN + _TOKENS_OF_MESSAGE * len(body["messages"]) + _TOKENS_OF_IMAGE * images


def prompt_tokens(body: dict[str, Any], size: int) -> int:
    """Return the estimate for a chat or an embedding that came in a body of so many bytes. It takes no time for each
    character, and the body need not be valid."""
    images = [len(str(part.get("image_url"))) for part in _parts(body) if part.get("type") == "image_url"]
    return max(0, size - sum(images)) // _BYTES_OF_TOKEN + _TOKENS_OF_IMAGE * len(images)


def _parts(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        yield from (part for part in content if isinstance(part, dict)) if isinstance(content, list) else ()


def most_generated(body: dict[str, Any]) -> int:
    """Return how many tokens an answer may have, which are reserved for it. The body need not be valid."""
    limits = [body.get(name) for name in ("max_completion_tokens", "max_tokens")]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return known[0] if known else _TOKENS_OF_ANSWER if "messages" in body else 0


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))
