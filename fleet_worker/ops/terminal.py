"""What may be written to a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return it on one line: names of nodes and models were written by others, and must not move a cursor here."""
    return "".join(character if character.isprintable() else "?" for character in text)
