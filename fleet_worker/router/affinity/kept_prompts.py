"""The latest prompt of each recent conversation, in memory only: to be run again on a server that lost its cache."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel

from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.protocol.request import FleetRequest

KEPT_FOR: Final = 900.0
"""Seconds after which a conversation is taken for ended."""
LEAST_SIZE: Final = 1_000
"""Bytes of a prompt that is worth to be kept: a server reads fewer in less than a second."""
OWN_MEMORY: Final = 8_000
"""Bytes of memory that one prompt takes beside its messages: its envelope, and up to 64 ids."""
MODEL_MEMORY: Final = 400
"""Bytes of memory that a message takes beside what is in it."""
_BESIDE_THE_PROMPT: Final = frozenset({"messages", "tools", "reasoning_effort", "chat_template_kwargs"})
"""The parameters that become a part of the prompt. All others only shape the answer."""


@dataclass(slots=True, eq=False)
class KeptPrompt:
    """The prompt of one answered request. It shares the messages of that request, and is their last owner."""

    request: FleetRequest = field(repr=False)
    """Without what only shapes the answer; it asks for one token."""
    prefixes: PromptPrefixes
    tokens: int
    node: str
    """The one that answered it."""
    epoch: int | None
    """That of the cache of its server at that time (`CacheDigest.epoch`); None if it was not known."""
    answered_at: float
    memory: int
    """Bytes, estimated."""


class KeptPrompts:
    """At most `most_bytes` of memory: beyond it the oldest go. Thread-safe. Times are those of one monotonic clock.

    A later turn of a conversation replaces the earlier one: that is its beginning, or both have the same session and
    the same first question with its answer, and only the instructions before have changed.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._prompts: OrderedDict[str, KeptPrompt] = OrderedDict()
        """By the id of the whole prompt, the oldest answer first."""
        self._conversations: dict[tuple[str, str], str] = {}
        """By session and conversation: the id of the whole prompt."""
        self._nodes: dict[str, set[str]] = {}
        """By node: the ids of the whole prompts that it answered."""
        self.memory = 0

    def __len__(self) -> int:
        return len(self._prompts)

    def keep(
        self, request: FleetRequest, prefixes: PromptPrefixes, *, tokens: int, node: str, epoch: int | None, now: float
    ) -> None:
        """Keep the prompt of a request that was answered `now`, if it is long enough. Images are not kept: no server
        has them in its cache."""
        params, is_short = request.params, prefixes.size < LEAST_SIZE
        if self._most_bytes < OWN_MEMORY or not isinstance(params, ChatParams) or is_short or params.has_images:
            return
        prompt = KeptPrompt(_bare(request, params), prefixes, tokens, node, epoch, now, 0)
        prompt.memory = OWN_MEMORY + memory_of(prompt.request.params)
        with self._lock:
            for earlier in self._earlier_turns(prefixes):
                self._drop(earlier)
            self._add(prompt)
            while self.memory > self._most_bytes:
                self._drop(next(iter(self._prompts)))

    def answered_by(self, node: str) -> list[KeptPrompt]:
        """Return the prompts that this node answered last."""
        with self._lock:
            return [self._prompts[id_] for id_ in self._nodes.get(node, ())]

    def has_any_of(self, node: str) -> bool:
        return node in self._nodes

    def forget(self, prompt: KeptPrompt) -> None:
        """Keep it no longer, unless a later turn has taken its place already."""
        with self._lock:
            if self._prompts.get(_id_of(prompt)) is prompt:
                self._drop(_id_of(prompt))

    def forget_old(self, now: float) -> None:
        """Keep no prompt longer than `KEPT_FOR` seconds."""
        with self._lock:
            while self._prompts and next(iter(self._prompts.values())).answered_at <= now - KEPT_FOR:
                self._drop(next(iter(self._prompts)))

    def _earlier_turns(self, prefixes: PromptPrefixes) -> Iterator[str]:
        yield from (id_ for id_, _ in prefixes.chain if id_ in self._prompts)
        if (of := _conversation_of(prefixes)) and of in self._conversations:
            yield self._conversations[of]

    def _add(self, prompt: KeptPrompt) -> None:
        id_ = _id_of(prompt)
        self._prompts[id_] = prompt
        self._nodes.setdefault(prompt.node, set()).add(id_)
        if of := _conversation_of(prompt.prefixes):
            self._conversations[of] = id_
        self.memory += prompt.memory

    def _drop(self, id_: str) -> None:
        prompt = self._prompts.pop(id_, None)
        if prompt is None:
            return
        self.memory -= prompt.memory
        of_node = self._nodes[prompt.node]
        of_node.discard(id_)
        if not of_node:
            del self._nodes[prompt.node]
        of = _conversation_of(prompt.prefixes)
        if of and self._conversations.get(of) == id_:
            del self._conversations[of]


def _id_of(prompt: KeptPrompt) -> str:
    return prompt.prefixes.chain[-1][0]


def _conversation_of(prefixes: PromptPrefixes) -> tuple[str, str] | None:
    """Without a session, equal first questions and answers may well be of different people."""
    return (prefixes.session, prefixes.conversation) if prefixes.session and prefixes.conversation else None


def _bare(request: FleetRequest, params: ChatParams) -> FleetRequest:
    """Return the request without what only shapes the answer, and without what names its caller. The messages and tools
    are shared, not copied."""
    given = {name: getattr(params, name) for name in _BESIDE_THE_PROMPT & params.model_fields_set}
    if params.tool_choice == "none":  # a node may leave out the tools then
        given["tool_choice"] = "none"
    bare = ChatParams.model_construct(**given, max_tokens=1, temperature=0.0)
    nobody: dict[str, Any] = {"message_context": {}, "caller": {}, "trace_context": {}, "signed_token": None}
    return request.model_copy(update={"params": bare, "priority": "low", "attempt": 1, "resume": None, **nobody})


def memory_of(value: Any) -> int:
    """Estimate the bytes of memory that the text in a JSON value, or in params, takes."""
    if isinstance(value, BaseModel):
        return MODEL_MEMORY + sum(memory_of(each) for each in value.__dict__.values() if each)
    if isinstance(value, dict):
        return sys.getsizeof(value) + sum(memory_of(key) + memory_of(each) for key, each in value.items())
    if isinstance(value, list):
        return sys.getsizeof(value) + sum(memory_of(each) for each in value)
    return sys.getsizeof(value) if isinstance(value, str) else 0
