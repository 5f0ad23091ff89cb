"""Separates reasoning from visible text, while it streams."""

from __future__ import annotations

import re

_TAG = re.compile(r"<(/?)think(?:ing)?>")
_TAGS = ("<think>", "</think>", "<thinking>", "</thinking>")
_LONGEST = max(map(len, _TAGS))


class ReasoningSplitter:
    """Cuts `<think>...</think>` and `<thinking>...</thinking>` out of a text that arrives in pieces.

    A piece that ends inside of what may become a tag is held back until it is decided. A tag that stays open makes
    the rest reasoning. A closing tag without an opening one is dropped; what came before it was shown already, so it
    stays visible, unless `starts_inside` says that the chat template opens the tag itself.
    """

    def __init__(self, *, starts_inside: bool = False) -> None:
        self._inside = starts_inside
        self._held = ""
        self._seam = ""
        """Which side swallows the line breaks that surround the tags: the one that begins next."""

    def feed(self, text: str) -> tuple[str, str]:
        """Return the visible text and the reasoning that are certain by now."""
        if "<" not in text and not self._held and not self._seam:
            return ("", text) if self._inside else (text, "")
        return self._split(self._held + text, final=False)

    def end(self) -> tuple[str, str]:
        """Return what was held back: no tag came of it."""
        return self._split(self._held, final=True)

    def _split(self, text: str, *, final: bool) -> tuple[str, str]:
        sides: tuple[list[str], list[str]] = ([], [])
        at = 0
        for tag in _TAG.finditer(text):
            self._put(sides, text[at : tag.start()])
            self._inside = not tag.group(1)
            self._seam = "\n"
            at = tag.end()
        keep = len(text) if final else len(text) - _undecided(text[at:])
        self._put(sides, text[at:keep])
        self._held = text[keep:]
        return "".join(sides[0]), "".join(sides[1])

    def _put(self, sides: tuple[list[str], list[str]], text: str) -> None:
        if self._seam:
            text = text.lstrip("\n")
            if text:
                self._seam = ""
        sides[self._inside].append(text)


def split_reasoning(text: str, *, starts_inside: bool = False) -> tuple[str, str]:
    """Split a whole text. Here an orphan closing tag makes all before it reasoning: nothing was shown yet."""
    first = _TAG.search(text)
    orphan = first is not None and first.group(1) == "/"
    splitter = ReasoningSplitter(starts_inside=starts_inside or orphan)
    visible, reasoning = splitter.feed(text)
    last_visible, last_reasoning = splitter.end()
    return visible + last_visible, reasoning + last_reasoning


def _undecided(text: str) -> int:
    """Length of the end of `text` that may be the beginning of a tag."""
    at = text.rfind("<", max(0, len(text) - _LONGEST + 1))
    if at >= 0 and any(tag.startswith(text[at:]) for tag in _TAGS):
        return len(text) - at
    return 0
