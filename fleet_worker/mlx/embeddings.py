"""The vectors in the answer of an MLX server, checked."""

from __future__ import annotations

import math
from array import array
from typing import Any

from fleet_worker.errors import MalformedOutput
from fleet_worker.protocol.vectors import pack_vector, unpack_vector


def vectors_of(answer: dict[str, Any], count: int, dimensions: int | None) -> tuple[list[str], int]:
    """Return the vectors of a server's answer in the order of the input, and their length.

    Raises:
        MalformedOutput: not `count` finite vectors of one length, or of `dimensions` if that is given.
    """
    try:
        entries = answer["data"]
        if len(entries) != count:
            raise MalformedOutput(f"the MLX server sent {len(entries)} vectors for {count} inputs")
        vectors = [_floats(entry["embedding"]) for entry in _in_order(entries)]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        raise MalformedOutput("the MLX server's embeddings are not a list of vectors") from None
    expected = dimensions or len(vectors[0])
    for vector in vectors:
        if len(vector) != expected or not vector:
            raise MalformedOutput(f"the MLX server sent a vector of {len(vector)} instead of {expected} dimensions")
        if not math.isfinite(sum(vector)):
            raise MalformedOutput("the MLX server sent a vector that is not finite")
    return [pack_vector(vector) for vector in vectors], expected


def _in_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries by their `index`; as they come where a server numbers none of them."""
    numbered = {entry.get("index"): entry for entry in entries}
    return entries if numbered.keys() == {None} else [numbered[number] for number in range(len(entries))]


def _floats(embedding: Any) -> array[float]:
    return unpack_vector(embedding) if isinstance(embedding, str) else array("f", embedding)
