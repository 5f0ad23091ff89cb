"""Finds stop strings in a text that arrives in pieces."""

from __future__ import annotations

from array import array
from collections.abc import Sequence


class StopStrings:
    """Passes a text on up to the first stop string in it, and holds back only what may be the beginning of one.

    The stop string that is complete first counts; of two that are complete at once, the longer one. So the result does
    not depend on how the text is cut into pieces. `delivered` is the text before the first piece, which may end in the
    beginning of a stop string.

    The time for a piece is proportional to its length, whatever the stop strings are.
    """

    def __init__(self, stop: Sequence[str], *, delivered: str = "") -> None:
        self.found: str | None = None
        """The stop string that is complete. Nothing that follows it belongs to the answer."""
        self._searches = [_Search(text) for text in stop]
        self._held_back = ""
        if delivered:
            longest = max(map(len, stop), default=0)
            for search in self._searches:
                search.skip(delivered[-longest:])

    @property
    def holds_back(self) -> bool:
        return bool(self._held_back)

    def feed(self, piece: str) -> str:
        """Return the text that is certain by now: empty once a stop string was found."""
        if self.found:
            return ""
        text = self._held_back + piece
        ends = [(end, -len(search.text), search.text) for search in self._searches if (end := search.feed(piece))]
        if ends:
            end, length, self.found = min(ends)
            return text[: max(0, len(self._held_back) + end + length)]
        certain = len(text) - max((search.matched for search in self._searches), default=0)
        self._held_back = text[max(0, certain) :]
        return text[: max(0, certain)]

    def end(self) -> str:
        """Return what was held back and did not become a stop string."""
        text, self._held_back = "" if self.found else self._held_back, ""
        return text


class _Search:
    """The search for one text (Knuth, Morris and Pratt): `matched` is how many characters of it the input ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._shorter = array("I", bytes(4 * len(text)))
        """For each number of matched characters, less one: how many of them are the end of the match, too."""
        length = 0
        for at in range(1, len(text)):
            length = self._next(length, text[at])
            self._shorter[at] = length

    def feed(self, piece: str) -> int:
        """Return how many characters of this piece complete the text; 0 if it is not complete."""
        if not self.matched and self.text[0] not in piece:
            return 0
        for at, character in enumerate(piece, 1):
            self.matched = self._next(self.matched, character)
            if self.matched == len(self.text):
                return at
        return 0

    def skip(self, piece: str) -> None:
        """Search on after this piece, whatever is complete in it."""
        for character in piece:
            self.matched = self._next(self.matched, character)

    def _next(self, matched: int, character: str) -> int:
        while matched and (matched == len(self.text) or self.text[matched] != character):
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)
