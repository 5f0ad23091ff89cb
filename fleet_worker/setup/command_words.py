"""Reads the command line of a server."""

from __future__ import annotations

from collections.abc import Sequence


def option_of(name: str, words: Sequence[str], default: str = "") -> str:
    """Return the value of an option, as in `--port 8080` or `--port=8080`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return default
