"""The prompt cache of an MLX server: whole sequences of tokens, as `LRUPromptCache` of mlx_lm 0.32 keeps them.

A sequence is the prompt of a request together with its answer, or a beginning of a prompt. The oldest insertion goes
first; a hit refreshes nothing. Nothing is copied or computed here: only lengths matter to a simulated server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

Kind = Literal["assistant", "user", "system"]
Tokens = tuple[str, ...]


class PromptCache:
    """At most `size` sequences; 0 keeps none.

    `trimmable`: any beginning of a kept sequence can be used, and a sequence that is a beginning of a newer one is
    dropped. Hybrid and sliding-window models are not trimmable: only a whole kept sequence can be used.
    """

    def __init__(self, size: int = 10, *, trimmable: bool = True) -> None:
        self._size, self._trimmable = size, trimmable
        self._kept: dict[Kind, dict[tuple[str, Tokens], None]] = {"assistant": {}, "user": {}, "system": {}}

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def match(self, model: str, tokens: Tokens) -> int:
        """Return how many tokens of this prompt need no prefill: all of them only if exactly this sequence is kept."""
        longest = 0
        for kept in self._of(model):
            shared = common(kept, tokens)
            if shared == len(kept) == len(tokens):
                return shared
            if self._trimmable:
                longest = max(longest, min(shared, len(tokens) - 1))
            elif shared == len(kept) > 1:  # mlx_lm 0.32 does not find a sequence of one token
                longest = max(longest, shared)
        return longest

    def insert(self, model: str, tokens: Tokens, kind: Kind = "assistant") -> None:
        """Keep a sequence as the newest of its kind."""
        for kept in self._kept.values():
            kept.pop((model, tokens), None)
        self._kept[kind][model, tokens] = None
        if self._trimmable:
            for each in list(self._of(model)):
                if len(each) < len(tokens) and tokens[: len(each)] == each:
                    self._remove(model, each)
        if len(self) > self._size:
            self._remove(*self._first_to_go())

    def _of(self, model: str) -> Iterator[Tokens]:
        return (tokens for kept in self._kept.values() for of, tokens in kept if of == model)

    def _remove(self, model: str, tokens: Tokens) -> None:
        for kept in self._kept.values():
            kept.pop((model, tokens), None)

    def _first_to_go(self) -> tuple[str, Tokens]:
        """Return the oldest answer, if there are as many as prompts; else the oldest prompt, if there are as many as
        system prompts; else the oldest system prompt."""
        answers, prompts, systems = self._kept.values()
        if answers and len(answers) >= len(prompts):
            return next(iter(answers))
        return next(iter(prompts if prompts and len(prompts) >= len(systems) else systems))


def common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the beginning that both share, by bisection: comparing slices is fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
