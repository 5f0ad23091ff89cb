"""The replies and vectors of the simulated models: pure functions of the request, so that a test can compute them."""

from __future__ import annotations

import base64
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from pydantic_core import to_json

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of every simulated model. It is only compared, never rendered."""

# fmt: off
WORDS = (
    "the", "of", "and", "to", "in", "is", "was", "for", "on", "with", "as", "by", "at", "from", "it", "an", "sea",
    "ship", "wind", "wave", "harbour", "light", "night", "stone", "river", "north", "salt", "rope", "sail", "deck",
    "keel", "storm", "calm", "anchor", "shore", "island", "morning", "captain", "crew", "tide", "slowly", "towards",
    "beneath", "between", "another", "größer", "naïve", "café", "mañana", "žena", "șase", "đêm", "Москва", "ветер",
    "φάρος", "東京", "海", "🚢", "🌊", "👩\u200d🚀", "—",
)
# fmt: on
VOCABULARY = (*(f" {word}" for word in WORDS), ",", ".", "!")
"""64 tokens, one for six bits: with a leading space as real ones have, some of them beyond ASCII."""


def reply_tokens(
    messages: Sequence[Mapping[str, Any]], max_tokens: int, *, tokens: int = 32, separators: bool = False
) -> list[str]:
    """Return the tokens of the reply to these messages, always the same for the same messages.

    The reply ends by itself after `tokens` tokens. With `separators` it contains U+2028, U+2029 and U+0085, which
    JSON allows raw and which are not line ends of an event stream.
    """
    conversation = json.dumps([[message.get("role"), message.get("content")] for message in messages])
    digest = hashlib.shake_128(conversation.encode()).digest(max(0, min(max_tokens, tokens)))
    words = [VOCABULARY[byte & 63] for byte in digest]
    if separators:
        words = [word + "\u2028\u2029\x85"[at % 3] if at % 2 else word for at, word in enumerate(words)]
    return [words[0].removeprefix(" "), *words[1:]] if words else []


def json_tokens(response_format: Mapping[str, Any]) -> list[str]:
    """Return the tokens of some JSON that follows this format."""
    schema = (response_format.get("json_schema") or {}).get("schema") or {"type": "object"}
    text = json.dumps(_example(schema))
    return [text[at : at + 4] for at in range(0, len(text), 4)]


def _example(schema: Any) -> Any:
    """Return a value of the simplest schemas: constants, choices, types, and objects of these."""
    schema = schema if isinstance(schema, dict) else {}
    for key in ("const", "default"):
        if key in schema:
            return schema[key]
    if choices := schema.get("enum"):
        return choices[0]
    if choices := schema.get("anyOf"):
        return _example(choices[0])
    kind = schema.get("type")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            return {name: _example(each) for name, each in (schema.get("properties") or {}).items()}
        case "array":
            return [_example(schema.get("items"))]
        case "integer" | "number":
            return 1
        case "boolean":
            return True
        case "null":
            return None
    return "sea"


def first_characters(tokens: Sequence[str], length: int) -> list[str]:
    """Return the tokens of the first characters of a text; the last one may be a part of a token."""
    kept: list[str] = []
    for token in tokens:
        if length <= 0:
            break
        kept.append(token[:length])
        length -= len(token)
    return kept


def first_of(texts: Sequence[str], whole: str) -> int | None:
    """Return where the first of these texts begins in another one."""
    return min((at for text in texts if (at := whole.find(text)) >= 0), default=None)


def whole_tokens(tokens: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return those of the texts that begin and end with a token where they first occur."""
    ends = {0, *accumulate(map(len, tokens))}
    places = {text: "".join(tokens).find(text) for text in texts}
    return [text for text, at in places.items() if at in ends and at + len(text) in ends]


def without(tokens: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return the tokens without these texts, wherever they begin."""
    whole = "".join(tokens)
    places = [(at, at + len(text)) for text in texts if (at := whole.find(text)) >= 0]
    left = [not any(start <= at < end for start, end in places) for at in range(len(whole))]
    ends = list(accumulate(map(len, tokens)))
    spans = zip([0, *ends], ends, strict=False)
    return ["".join(whole[at] for at in range(start, end) if left[at]) for start, end in spans]


def embedding(text: str, dimensions: int = 384) -> list[float]:
    """The unit vector of this text: always the same one, and each number exact as a float32."""
    numbers = array("I", hashlib.shake_128(text.encode()).digest(4 * dimensions))
    centred = [number / 2**31 - 1.0 for number in numbers]
    norm = sum(number * number for number in centred) ** 0.5
    return array("f", [number / norm for number in centred]).tolist()


@lru_cache(maxsize=4096)
def encoded_embedding(text: str, dimensions: int, as_base64: bool) -> bytes:
    """The vector as it stands in a response: a list of numbers, or base64 of little-endian float32."""
    vector = embedding(text, dimensions)
    return to_json(base64.b64encode(array("f", vector).tobytes()).decode() if as_base64 else vector)
