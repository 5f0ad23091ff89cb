"""Notices conversations whose prompt begins differently in each turn: no cache can help them."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from fleet_worker.protocol.prompt_prefixes import PromptPrefixes

REMEMBERED = 200
"""Conversations, and as many sessions: the last ones."""
USUAL_BEGINNINGS = 4
"""Different first beginnings that one session has for good reasons: an agent's helpers have prompts of their own."""


@dataclass(slots=True)
class _Session:
    turns: int = 0
    new: int = 0
    """Turns whose first beginning was none of the last few ones."""
    beginnings: deque[str] = field(default_factory=lambda: deque(maxlen=2 * USUAL_BEGINNINGS))


class Conversations:
    """Remembers how the last prompt of each conversation began, as far as this node has seen it."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, PromptPrefixes] = OrderedDict()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    def changes(self, prefixes: PromptPrefixes) -> bool | None:
        """Return whether this prompt begins differently from the earlier ones of its conversation or session.

        None if there was no earlier one, as far as is known.
        """
        if not prefixes.chain:
            return None
        found = (self._differs_from_last(prefixes), self._differs_in_session(prefixes))
        return None if found == (None, None) else any(found)

    def _differs_from_last(self, prefixes: PromptPrefixes) -> bool | None:
        """The first user message and the answer to it are the same: what is before them must have changed if less than
        half of the last prompt comes again."""
        if prefixes.conversation is None:
            return None
        last = self._last.get(prefixes.conversation)
        _remember(self._last, prefixes.conversation, prefixes)
        if last is None:
            return None
        before = {id_ for id_, _ in last.chain}
        same = next((length for id_, length in reversed(prefixes.chain) if id_ in before), 0)
        return 2 * same < min(last.size, prefixes.size)

    def _differs_in_session(self, prefixes: PromptPrefixes) -> bool | None:
        """Many first beginnings in one session, and nearly each turn a new one."""
        if prefixes.session is None:
            return None
        session = self._sessions.get(prefixes.session) or _Session()
        _remember(self._sessions, prefixes.session, session)
        session.turns += 1
        first = prefixes.chain[0][0]
        if first in session.beginnings:
            return False
        session.beginnings.append(first)
        session.new += 1
        return None if session.turns == 1 else session.new > max(USUAL_BEGINNINGS, session.turns / 2)


def _remember(memory: OrderedDict[str, Any], key: str, value: Any) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)
