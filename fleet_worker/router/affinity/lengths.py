"""How long prompts and answers of a model are: guessed before, learned from the usage that servers report."""

from __future__ import annotations

from fleet_worker.protocol.prompt_prefixes import MOST_TOKENS_PER_BYTE, USUAL_TOKENS_PER_BYTE
from fleet_worker.protocol.reply import Usage

LEAST_PER_BYTE = 0.02
ANSWER_TOKENS = 250.0
ANSWER_SECONDS = 5.0
"""From the first token of an answer to its end."""
WEIGHT = 0.1
"""Of the newest answer."""
KNOWN_BYTES = 4_000.0
"""Bytes of prompts that the first guess counts for."""
LONGEST_ANSWER = 1_000_000


class Lengths:
    """What was learned of one model. Not thread-safe."""

    def __init__(self) -> None:
        self.answer_tokens = ANSWER_TOKENS
        self.answer_seconds = ANSWER_SECONDS
        self._bytes = KNOWN_BYTES
        self._tokens = KNOWN_BYTES * USUAL_TOKENS_PER_BYTE

    @property
    def tokens_per_byte(self) -> float:
        return min(max(self._tokens / self._bytes, LEAST_PER_BYTE), MOST_TOKENS_PER_BYTE)

    def tokens(self, size: int) -> int:
        """Return how many tokens a prompt of so many bytes probably has."""
        return round(size * self.tokens_per_byte)

    def learn(self, size: int, usage: Usage, seconds: float | None) -> None:
        """Learn from the answer to a prompt of `size` bytes. It took so many seconds from its first token; None if that
        is unknown."""
        if size and usage.prompt_tokens and usage.prompt_tokens > 0:
            self._bytes += size - WEIGHT * self._bytes
            self._tokens += min(usage.prompt_tokens, MOST_TOKENS_PER_BYTE * size) - WEIGHT * self._tokens
        if usage.completion_tokens and 0 < usage.completion_tokens <= LONGEST_ANSWER:
            self.answer_tokens += WEIGHT * (usage.completion_tokens - self.answer_tokens)
        if seconds is not None:
            self.answer_seconds += WEIGHT * (seconds - self.answer_seconds)
