"""Hides what is secret in what is shown: passwords in URLs, keys in the command lines of servers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator

HIDDEN = "(set)"
_PASSWORD = re.compile(r"(://[^/?#\s:@]*):\S*@")
_SECRET = re.compile(r"key|token|passw|secret|credential|auth", re.IGNORECASE)
_HARMLESS = re.compile(r"tokenizer|token-interval|(?:max|min|num)[\w-]*tokens?", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"""([\w-]+)["']?\s*[=:]\s*""")
"""As in `--api-key=...`, `HF_TOKEN=...` of `env`, `Authorization: ...`, `{"api_key": ...}`."""


def redacted_url(url: str) -> str:
    """Return a URL without its password."""
    return _PASSWORD.sub(rf"\1:{HIDDEN}@", url)


def redacted_command(command: str | Iterable[str]) -> str:
    """Return a command line without passwords in URLs, and without the values of what is named like a secret."""
    words = shlex.split(command) if isinstance(command, str) else command
    return " ".join(word if re.fullmatch(r"[\w@%+=:,./{}()-]+", word) else shlex.quote(word) for word in _shown(words))


def secret_values(words: Iterable[str]) -> Iterator[str]:
    """Yield what `redacted_command` hides of the words of a command line, as its program may print it."""
    for word, shown in _pairs(words):
        if word != shown:
            hidden = word[len(shown.partition(HIDDEN)[0]) :]
            password = hidden.rpartition("@")[0] if "://" in word else ""
            yield (password or hidden).strip("\"'{}[], ").removeprefix("Bearer ")


def _shown(words: Iterable[str]) -> Iterator[str]:
    return (shown for _, shown in _pairs(words))


def _pairs(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each word, and what is shown of it."""
    hides_next = False
    for word in words:
        is_value = hides_next and not word.startswith("--")
        yield word, HIDDEN if is_value else _without_values(redacted_url(word))
        hides_next = word.startswith("-") and not re.search(r"[=:\s]", word) and is_secret(word)


def _without_values(word: str) -> str:
    """Return a word up to the first value of a secret in it."""
    ends = [found.end() for found in _ASSIGNMENT.finditer(word) if is_secret(found[1])]
    return f"{word[: ends[0]]}{HIDDEN}" if ends and word[ends[0] :] else word


def is_secret(name: str) -> bool:
    """Return whether an option or a variable of this name holds a secret."""
    return bool(_SECRET.search(_HARMLESS.sub("", name)))
