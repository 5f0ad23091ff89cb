"""Refuses a prompt that surely does not fit into its model's context window, before anything is sent.

How many tokens a text has is known only to the tokenizer of its model. With the package `tokenizers`, and the model in
the Hugging Face cache of this machine, they are counted. Otherwise only what no tokenizer makes of a text is refused:
tokenizers of models split text at white space, and longer words into parts.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from fleet_worker.errors import ContextLengthExceeded
from fleet_worker.mlx.model_folder import cached_folder_of
from fleet_worker.protocol.openai import ChatParams, Message, TextPart
from fleet_worker.protocol.request import FleetRequest

WORDS_PER_TOKEN = 1.33
"""Words that one token may stand for. Nearly all tokenizers make at least one of each word, a few join some words."""
CHARACTERS_PER_TOKEN = 16
"""Characters of words that one token may stand for on average: the usual number is 3 to 5."""
LONG = 64
"""Characters of a word, in whose neighbourhood runs of one character count as one: a line of dashes is one token."""
_RUN = re.compile(r"(.)\1+", re.DOTALL)
PIECE = 65_536
"""Characters that are read at once, so that a text of megabytes needs no memory for all of its words."""
TOKENIZERS = 4
"""That are kept: one takes up to 100 MB."""


def require_fits(request: FleetRequest, window: int | None) -> None:
    """Raise `ContextLengthExceeded` if the messages of a chat have surely more tokens than `window`, None if unknown.

    Neither the template nor tools and images are counted. It may take a second for a text of a megabyte.
    """
    if window is None or not isinstance(request.params, ChatParams):
        return
    texts = list(_texts(request.params.messages))
    if sum(len(text) if text.isascii() else len(text.encode()) for text in texts) <= window:
        return  # a token is at least a byte
    tokens = at_least(texts)
    if tokens <= window and (tokenizer := _tokenizer(request.model)):
        tokens = _count(tokenizer, texts, window)
    if tokens > window:
        text = f"messages: they have more than {window} tokens, which is all that the model can read: shorten them"
        raise ContextLengthExceeded(text, param="messages", context_window=window)


def counted(model: str, texts: Iterable[str]) -> int | None:
    """Return how many tokens these texts have, None if no tokenizer of the model is here. It may take a second for a
    megabyte."""
    tokenizer = _tokenizer(model)
    if tokenizer is None:
        return None
    pieces = (piece for text in texts for piece in _pieces(text))
    return sum(len(tokenizer.encode(piece, add_special_tokens=False).ids) for piece in pieces)


def characters(request: FleetRequest) -> int:
    """Return how many characters the messages of a chat have; 0 for an embedding."""
    params = request.params
    return sum(map(len, _texts(params.messages))) if isinstance(params, ChatParams) else 0


def at_least(texts: Iterable[str]) -> int:
    """Return a number of tokens that every tokenizer makes of these texts, and most make more."""
    words = letters = 0
    for text in texts:
        for piece in _pieces(text):
            found = piece.split()
            words += max(0, len(found) - 1)  # the first one may have begun in the piece before
            longest = max(map(len, found), default=0)
            letters += len("".join(found)) if longest < LONG else len(_RUN.sub(r"\1", "".join(found)))
    return max(int(words / WORDS_PER_TOKEN), letters // CHARACTERS_PER_TOKEN)


def _texts(messages: Iterable[Message]) -> Iterator[str]:
    """Yield what a template surely renders. Some leave out the reasoning of earlier answers."""
    for message in messages:
        content = message.content or ""
        parts = [content] if isinstance(content, str) else [part.text for part in content if isinstance(part, TextPart)]
        yield from (part.rpartition("</think>")[2] for part in parts) if message.role == "assistant" else parts


def _pieces(text: str) -> Iterator[str]:
    return (text[first : first + PIECE] for first in range(0, len(text), PIECE))


def _count(tokenizer: Any, texts: Iterable[str], enough: int) -> int:
    """Return how many tokens the texts have; no more are counted as soon as there are more than `enough`. Where a text
    is cut into pieces, one token may become two."""
    tokens = 0
    for text in texts:
        for piece in _pieces(text):
            tokens += max(0, len(tokenizer.encode(piece, add_special_tokens=False).ids) - 1)
            if tokens > enough:
                return tokens
    return tokens


def _tokenizer(model: str) -> Any:
    """Return the tokenizer of this model, None if this machine has not both the package and the model."""
    path = cached_folder_of(model) / "tokenizer.json"
    return _loaded(str(path)) if path.is_file() else None


@functools.lru_cache(TOKENIZERS)
def _loaded(path: str) -> Any:
    try:
        tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(path)
    except Exception:  # the package raises Exception itself for a file that it cannot read
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
