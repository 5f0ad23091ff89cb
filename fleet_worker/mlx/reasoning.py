"""Separates reasoning in `<think>` tags from the visible text, while it streams."""

from __future__ import annotations

import re

_TAG = re.compile(r"<(/?)think(?:ing)?>")
_TAGS = ("<think>", "</think>", "<thinking>", "</thinking>")
_LONGEST = max(map(len, _TAGS))


class ReasoningSplitter:
    """Takes `<think>...</think>` and `<thinking>...</thinking>` out of a text that arrives in pieces.

    A piece that ends in what may become a tag is held back until that is decided. A tag that is never closed makes the
    rest reasoning. A closing tag without an opening one is dropped, and the text before it stays visible: it was sent
    already. With `starts_inside` the text begins with reasoning: the chat template itself opens the tag.
    """

    def __init__(self, *, starts_inside: bool = False) -> None:
        self._inside = starts_inside
        self._held_back = ""
        self._after_tag = False
        """A tag was the last thing read: the line breaks that follow it are dropped."""

    def feed(self, text: str) -> tuple[str, str]:
        """Return the visible text and the reasoning that are certain by now."""
        if "<" not in text and not self._held_back and not self._after_tag:
            return ("", text) if self._inside else (text, "")
        return self._split(self._held_back + text, final=False)

    def end(self) -> tuple[str, str]:
        """Return what was held back and did not become a tag."""
        return self._split(self._held_back, final=True)

    def _split(self, text: str, *, final: bool) -> tuple[str, str]:
        parts: tuple[list[str], list[str]] = ([], [])
        start = 0
        for tag in _TAG.finditer(text):
            self._append(parts, text[start : tag.start()])
            self._inside = not tag.group(1)
            self._after_tag = True
            start = tag.end()
        end = len(text) if final else len(text) - _undecided(text[start:])
        self._append(parts, text[start:end])
        self._held_back = text[end:]
        return "".join(parts[0]), "".join(parts[1])

    def _append(self, parts: tuple[list[str], list[str]], text: str) -> None:
        if self._after_tag:
            text = text.lstrip("\n")
            self._after_tag = not text
        parts[self._inside].append(text)


def split_reasoning(text: str, *, starts_inside: bool = False) -> tuple[str, str]:
    """Return the visible text and the reasoning of a whole text. If its first tag is a closing one, all the text before
    it is reasoning."""
    first = _TAG.search(text)
    starts_inside |= first is not None and first.group(1) == "/"
    splitter = ReasoningSplitter(starts_inside=starts_inside)
    visible, reasoning = splitter.feed(text)
    last_visible, last_reasoning = splitter.end()
    return visible + last_visible, reasoning + last_reasoning


def _undecided(text: str) -> int:
    """Return the length of the end of `text` that may be the beginning of a tag."""
    start = text.rfind("<", max(0, len(text) - _LONGEST + 1))
    if start >= 0 and any(tag.startswith(text[start:]) for tag in _TAGS):
        return len(text) - start
    return 0
