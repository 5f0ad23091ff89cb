"""The ids of the beginnings of a prompt, as they travel from a router to a node: one header of a message.

Equal ids mean equal beginnings. They are keyed hashes (`router.affinity.prefixes`): nobody without the key can guess a
prompt from them.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any, Final

from fleet_worker.errors import InvalidRequest

HEADER: Final = "fleet_prefixes"
"""The name of the message header."""
MOST_PREFIXES: Final = 64
ID_LENGTH: Final = 11
"""Characters of an id: 64 bits in base64url."""
ID: Final = f"[A-Za-z0-9_-]{{{ID_LENGTH}}}"
"""Regular expression of an id."""
MOST_BYTES: Final = 2**24 - 1
"""Bytes of a prompt up to which its beginnings have ids."""
USUAL_TOKENS_PER_BYTE: Final = 0.25
"""Of canonical JSON, until answers have told more."""
MOST_TOKENS_PER_BYTE: Final = 2.0
"""That are believed: what servers say of tokens is not always sensible."""

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_VALUES = {digit: value for value, digit in enumerate(_DIGITS)}
_RECORD = ID_LENGTH + 4
_HEADER = re.compile(rf"({ID})?\.(?:({ID})({ID})?)?\.((?:[A-Za-z0-9_-]{{{_RECORD}}}){{0,{MOST_PREFIXES}}})")
"""It has at most 995 characters: headers of more than 1,000 are dropped on the way (`broker.door`)."""


@dataclass(frozen=True, slots=True)
class PromptPrefixes:
    """The ids of one prompt. Without any, nothing is known about it."""

    session: str | None = None
    """The id of the session key that the client sent."""
    conversation: str | None = None
    """The id of the first user message together with the answer to it: it stays the same when only the messages before
    them change. None in the first turn of a conversation."""
    chain: tuple[tuple[str, int], ...] = ()
    """The ids of growing beginnings, each with its length: bytes of the prompt as canonical JSON. The last one is the
    whole prompt. At most `MOST_PREFIXES`."""
    opening: str | None = None
    """The id of the beginning up to the end of that first answer: another one in the same conversation shows that the
    tools, or the messages before the first user message, have changed."""

    @property
    def size(self) -> int:
        """Bytes of the whole prompt, as canonical JSON."""
        return self.chain[-1][1] if self.chain else 0

    def encode(self) -> str:
        """Return the text of the header: session, conversation with its opening, and for each beginning its id and its
        length in four digits of base64url."""
        records = "".join(id_ + _encode_length(length) for id_, length in self.chain)
        return f"{self.session or ''}.{self.conversation or ''}{self.opening or ''}.{records}"

    @classmethod
    def decode(cls, text: Any) -> PromptPrefixes:
        """Return what `encode` made this text of; raises `InvalidRequest` if it is something else."""
        found = _HEADER.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise InvalidRequest(f"not a valid header {HEADER}: it is made by a router")
        session, conversation, opening, records = found.groups()
        starts = range(0, len(records), _RECORD)
        chain = tuple((records[at : at + ID_LENGTH], _decode_length(records[at + ID_LENGTH :][:4])) for at in starts)
        lengths = [0, *(length for _, length in chain)]
        if any(after <= before for before, after in itertools.pairwise(lengths)):
            raise InvalidRequest(f"not a valid header {HEADER}: its prefixes do not grow")
        return cls(session, conversation, chain, opening)


def _encode_length(length: int) -> str:
    return "".join(_DIGITS[length >> shift & 63] for shift in (18, 12, 6, 0))


def _decode_length(text: str) -> int:
    value = 0
    for digit in text:
        value = value << 6 | _VALUES[digit]
    return value
