"""Notices conversations whose prompt begins differently in each turn: no cache can help them."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from fleet_worker.protocol.prompt_prefixes import PromptPrefixes

REMEMBERED = 200
"""Conversations and sessions: the last ones."""
HELPERS = 4
"""How many beginnings one session may have for good reasons: the helpers of an agent have prompts of their own."""
SHARE = 0.6
"""The share of its turns that begin anew, above which a conversation counts as changing. With fewer, several
conversations have the same first question and answer, or a prompt was edited."""
LAST = 8
"""How many beginnings of each conversation are remembered."""


@dataclass(slots=True)
class _Seen:
    turns: int = 0
    new: int = 0
    """Turns whose beginning was none of the last ones."""
    beginnings: deque[str] = field(default_factory=lambda: deque(maxlen=LAST))


class Conversations:
    """Remembers how the last prompts of each conversation began, as far as this node has seen it."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str | None, str | None], _Seen] = OrderedDict()

    def changes(self, prefixes: PromptPrefixes) -> bool | None:
        """Return whether this prompt begins differently from the earlier ones of its conversation, or of its session.

        None if there was no earlier one, as far as is known.
        """
        found: list[bool | None] = []
        if prefixes.conversation and prefixes.opening:
            found.append(self._is_new((prefixes.session, prefixes.conversation), prefixes.opening, usual=1))
        if prefixes.session and prefixes.chain:
            found.append(self._is_new((prefixes.session, None), prefixes.chain[0][0], usual=HELPERS))
        return any(found) if found and found != [None] * len(found) else None

    def _is_new(self, conversation: tuple[str | None, str | None], beginning: str, *, usual: int) -> bool | None:
        """Return whether this beginning is new, as most of this conversation were, and more than the usual ones."""
        seen = self._remembered(conversation)
        seen.turns += 1
        if beginning in seen.beginnings:
            return False
        seen.beginnings.append(beginning)
        seen.new += 1
        return None if seen.turns == 1 else seen.new > max(usual, SHARE * seen.turns)

    def _remembered(self, conversation: tuple[str | None, str | None]) -> _Seen:
        seen = self._seen.setdefault(conversation, _Seen())
        self._seen.move_to_end(conversation)
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return seen
