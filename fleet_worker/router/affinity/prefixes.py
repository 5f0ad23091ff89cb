"""The ids of the beginnings of a prompt: a chain of keyed hashes over its tools and messages."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Final
from urllib.parse import unquote, urlsplit

from pydantic_core import to_json

from fleet_worker.protocol.openai import ChatParams, ImagePart, Message
from fleet_worker.protocol.prompt_prefixes import MOST_BYTES, MOST_PREFIXES, PromptPrefixes
from fleet_worker.protocol.request import FleetRequest

STEP: Final = 4096
"""Bytes of a message after which a prompt may part from another one inside it."""
FIRST, EVEN, LAST_ENDS, LAST = 8, 12, 28, 16
"""How many boundaries of each kind get an id (`_selected`): together at most `MOST_PREFIXES`."""
IMAGE_REPEATS: Final = 256
"""So that an image counts as 4 KiB, or about a thousand tokens, whatever its file takes."""
assert FIRST + EVEN + LAST_ENDS + LAST <= MOST_PREFIXES  # noqa: S101 - a table above that is wrong


def fleet_key(secret: str | None, broker_url: str) -> bytes:
    """Return the key of all hashes: all routers of a fleet must have the same one.

    It is made of this secret, or of the password in the URL of the broker. Without both it is no secret: whoever reads
    the broker's messages can then test whether a node has a prompt that they can guess.
    """
    secret = secret or unquote(urlsplit(broker_url).password or "")
    return blake2b(secret.encode(), digest_size=32, person=b"fleet affinity").digest()


def prefixes_of(
    request: FleetRequest, key: bytes, session: str | None = None, scope: str | None = None
) -> PromptPrefixes:
    """Return the ids of the beginnings of a chat's prompt. There is a boundary after the tools and after each message,
    and every `STEP` bytes inside one.

    `session` is the session key of the client. Requests of different `scope` have no id in common, and so have those
    for different models.
    """
    params = request.params
    if not isinstance(params, ChatParams):
        return PromptPrefixes()
    owner = to_json([request.model, scope])
    root = owner + to_json(_effort(params))
    messages = [_canonical(message, key) for message in params.messages]
    parts = [*([to_json(params.tools)] if params.tools else []), *messages]
    asked, answered = _first_turn(params.messages)
    return PromptPrefixes(
        session=None if session is None else _id(key, b"session", owner, session.encode()),
        conversation=_id(key, b"conversation", owner, messages[asked], messages[answered]) if answered else None,
        opening=_id(key, b"opening", root, *parts[: len(parts) - len(messages) + answered + 1]) if answered else None,
        chain=_chain(parts, key, root),
    )


def _chain(parts: Sequence[bytes], key: bytes, root: bytes) -> tuple[tuple[str, int], ...]:
    prompt = memoryview(b"".join(parts))
    state = blake2b(root, key=key, digest_size=8, person=b"prompt")
    chain, before = [], 0
    for length in _selected(list(_boundaries(parts))):
        state.update(prompt[before:length])
        chain.append((_text(state.digest()), length))
        before = length
    return tuple(chain)


def _boundaries(parts: Sequence[bytes]) -> Iterator[tuple[int, bool]]:
    """Yield each length at which prompts may part, and whether it is the end of a message."""
    start = 0
    for part in parts:
        end = start + len(part)
        for inside in range(start + STEP, end, STEP):
            yield inside, False
        yield end, True
        start = end


def _selected(boundaries: Sequence[tuple[int, bool]]) -> list[int]:
    """Return the lengths that get an id: all if they are few, else those where prompts are most likely to part.

    That is at the first ones (shared instructions) and at the last ones; a following turn adds messages, so the ends of
    messages count more. Between them they are even, and stay where they are when the prompt grows.
    """
    lengths = [length for length, _ in boundaries if length <= MOST_BYTES]
    if len(lengths) <= MOST_PREFIXES:
        return lengths
    ends = [length for length, is_end in boundaries[: len(lengths)] if is_end]
    stride = next(stride for stride in map((2).__pow__, itertools.count()) if len(lengths) <= stride * EVEN)
    even = lengths[stride - 1 :: stride]
    return sorted({*lengths[:FIRST], *even, *ends[-LAST_ENDS:], *lengths[-LAST:]})


def _canonical(message: Message, key: bytes) -> bytes:
    """Return what a chat template makes a prompt of: two forms of the same message are equal. The ids of tool calls,
    which clients make anew, are left out."""
    role = "system" if message.role == "developer" else message.role
    content = message.content or ""
    if not isinstance(content, str):
        content = "".join(
            _id(key, b"image", part.image_url.url.encode()) * IMAGE_REPEATS
            if isinstance(part, ImagePart)
            else part.text
            for part in content
        )
    calls = [call.get("function") for call in message.tool_calls or ()]
    return to_json([role, content, calls, message.name] if calls or message.name else [role, content])


def _first_turn(messages: Sequence[Message]) -> tuple[int, int]:
    """Return the places of the first user message and of the answer to it: 0 and 0 if there is no answer."""
    roles = [message.role for message in messages]
    asked = roles.index("user") if "user" in roles else len(roles)
    return (asked, roles.index("assistant", asked)) if "assistant" in roles[asked:] else (0, 0)


def _effort(params: ChatParams) -> str | None:
    """Some chat templates write the effort before everything else."""
    kwargs = params.chat_template_kwargs
    return params.reasoning_effort or (kwargs.reasoning_effort if kwargs else None)


def _id(key: bytes, what: bytes, *parts: bytes) -> str:
    return _text(blake2b(b"".join(parts), key=key, digest_size=8, person=what).digest())


def _text(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest)[:-1].decode()
