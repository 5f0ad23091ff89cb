"""The session key of a chat: what its client calls the conversation, in its body or in a header.

It is a prefix of its own for the router, which sends a conversation where it is warm; see the gateway's manual.

Facts of what clients send: Codex CLI 0.171 (`session-id` and, for each of the session's threads, `thread-id`; earlier
`session_id` and `conversation_id`), Claude Code 2.1.86 (`x-claude-code-session-id`, of sub-agents also
`x-claude-code-agent-id`), opencode and pi (`x-session-affinity`, `x-session-id`), Open WebUI (`x-openwebui-chat-id`),
LiteLLM (`x-litellm-session-id`), xAI (`x-grok-conv-id`), Amp (`x-amp-thread-id`), Mistral Vibe (`x-affinity`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway.accounts.key import Key
from fleet_worker.gateway.dialects.dialect import ChatAsked

OWN = "x-fleet-session"
LONGEST = 256
"""Characters."""
FIRST = ("x-session-affinity", "thread-id", "thread_id", "session-id", "session_id")
"""Headers of clients that come before others: some clients send several, and the first names the smallest part."""
OTHERS = re.compile(
    r"(x-)?([a-z0-9]+-)*(session|thread|conversation|conv|chat)[-_]id|x-([a-z0-9]+-)*(session|affinity)"
)
"""Names of all others, of whichever client."""
AGENT = "x-claude-code-agent-id"
"""A sub-agent has the session of its parent, but another conversation."""


def session_key(asked: ChatAsked, headers: Mapping[str, str], key: Key) -> str | None:
    """Return the session key of a chat, which no caller with another key can have; None if there is none.

    The first of these counts: our own header, the body, a header of a client. What names a user counts for nothing: all
    their conversations have it. It returns a hash: the client's text goes no further.

    Raises:
        InvalidRequest: our own header holds none.
    """
    if (own := headers.get(OWN)) is not None:
        if not _is_usable(own):
            raise InvalidRequest(f"{OWN}: must have 1 to {LONGEST} visible characters", param=OWN)
        return _hash_of(key.name, own)
    found = next(filter(_is_usable, _of_client(asked, headers)), None)
    if found is None:
        return None
    agent = headers.get(AGENT, "")
    return _hash_of(key.name, found, *([agent] if _is_usable(agent) else []))


def _of_client(asked: ChatAsked, headers: Mapping[str, str]) -> Iterator[str]:
    yield asked.session or ""
    for name in (*FIRST, *sorted(filter(OTHERS.fullmatch, headers))):
        if "parent" not in name:
            yield headers.get(name, "")


def _is_usable(text: str) -> bool:
    return 0 < len(text) <= LONGEST and text.isprintable() and not text.isspace()


def _hash_of(*parts: str) -> str:
    """Return the hash of parts, none of which has a line break."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
