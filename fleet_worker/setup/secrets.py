"""Hides what is secret in a configuration: passwords in URLs, keys, variables and options of servers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from urllib.parse import urlsplit

HIDDEN = "(set)"
_OPTION = re.compile(r"-{1,2}[\w-]*(?:key|token|password|passwd|secret|credential|auth)[\w-]*", re.IGNORECASE)


def hidden_url(url: str) -> str:
    """Return a URL without its password."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    return parts._replace(netloc=f"{name}:{HIDDEN}@{host}").geturl() if at and colon else url


def hidden_command(words: str | Iterable[str]) -> str:
    """Return a command line without the values of options that hold a secret, as --api-key."""
    shown: list[str] = []
    is_secret = False
    for word in shlex.split(words) if isinstance(words, str) else words:
        option, equals, _ = word.partition("=")
        hides = bool(_OPTION.fullmatch(option))
        shown.append(
            HIDDEN if is_secret and not word.startswith("-") else f"{option}={HIDDEN}" if hides and equals else word
        )
        is_secret = hides and not equals
    return " ".join(word if re.fullmatch(r"[\w@%+=:,./{}()-]+", word) else shlex.quote(word) for word in shown)
