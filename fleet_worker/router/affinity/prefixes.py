"""The ids of the beginnings of a prompt: a chain of keyed hashes over its tools and messages."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final, NamedTuple
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


class _Boundary(NamedTuple):
    """Where prompts may part. The id is that of the first `end` bytes."""

    end: int
    length: int
    """Bytes up to the end of the answer, if one follows here: a server that has read the prompt up to `end` has its own
    answer in the cache, too. Otherwise as `end`."""
    ends_message: bool


def prefixes_of(
    request: FleetRequest, key: bytes, session: str | None = None, scope: str | None = None
) -> PromptPrefixes:
    """Return the ids of the beginnings of a chat's prompt. There is a boundary after the tools and after each message,
    and every `STEP` bytes inside one.

    A server that was asked has its answer in its cache, too, and nobody but the client can say later what the answer
    was. So there is no boundary after an answer: it adds to the length of the beginning before it.

    `session` is the session key of the client. Requests of different `scope` have no id in common, and so have those
    for different models.
    """
    params = request.params
    if not isinstance(params, ChatParams):
        return PromptPrefixes()
    owner = to_json([request.model, scope])
    root = owner + to_json(_effort(params))
    messages = [_canonical(message, key) for message in params.messages]
    tools = [to_json(params.tools)] if params.tools else []
    are_answers = [message.role == "assistant" for message in params.messages]
    parts = [*((part, False) for part in tools), *zip(messages, are_answers, strict=True)]
    asked, answered = _first_turn(params.messages)
    return PromptPrefixes(
        session=None if session is None else _id(key, b"session", owner, session.encode()),
        conversation=_id(key, b"conversation", owner, messages[asked], messages[answered]) if answered else None,
        opening=_id(key, b"opening", root, *tools, *messages[: answered + 1]) if answered else None,
        chain=_chain(parts, key, root),
    )


def _chain(parts: Sequence[tuple[bytes, bool]], key: bytes, root: bytes) -> tuple[tuple[str, int], ...]:
    prompt = memoryview(b"".join(part for part, _ in parts))
    state = blake2b(root, key=key, digest_size=8, person=b"prompt")
    chain, hashed = [], 0
    for end, length, _ in _selected(_boundaries(parts)):
        state.update(prompt[hashed:end])
        chain.append((_text(state.digest()), length))
        hashed = end
    return tuple(chain)


def _boundaries(parts: Sequence[tuple[bytes, bool]]) -> list[_Boundary]:
    """Return all boundaries of these messages, of which some are answers."""
    boundaries: list[_Boundary] = []
    start = 0
    for part, is_answer in parts:
        end = start + len(part)
        if is_answer and boundaries:
            boundaries[-1] = boundaries[-1]._replace(length=end)
        else:
            boundaries += [_Boundary(inside, inside, False) for inside in range(start + STEP, end, STEP)]
            boundaries.append(_Boundary(end, end, True))
        start = end
    return boundaries


def _selected(boundaries: Sequence[_Boundary]) -> Sequence[_Boundary]:
    """Return the boundaries that get an id: all if they are few, else those where prompts are most likely to part.

    That is at the first ones (shared instructions) and at the last ones; a following turn adds messages, so the ends of
    messages count more. Between them they are even, and stay where they are when the prompt grows.
    """
    boundaries = [boundary for boundary in boundaries if boundary.length <= MOST_BYTES]
    if len(boundaries) <= MOST_PREFIXES:
        return boundaries
    stride = next(stride for stride in map((2).__pow__, itertools.count()) if len(boundaries) <= stride * EVEN)
    ends = [boundary for boundary in boundaries if boundary.ends_message][-LAST_ENDS:]
    return sorted({*boundaries[:FIRST], *boundaries[stride - 1 :: stride], *ends, *boundaries[-LAST:]})


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
