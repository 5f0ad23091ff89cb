"""The vectors that an MLX server returns, checked."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any

from fleet_worker.errors import MalformedOutput
from fleet_worker.mlx.body import json_object
from fleet_worker.mlx.error_mapping import error_in
from fleet_worker.protocol.reply import Usage, pack_vector, unpack_vector


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each text, in their order: base64 of little-endian float32, as they travel."""

    data: list[str]
    dimensions: int
    usage: Usage


def answer_of(content: bytes | bytearray) -> dict[str, Any]:
    """Return the body of a server's answer.

    Raises:
        MalformedOutput: it is not a JSON object.
        FleetError: it is an error with status 200.
    """
    answer = json_object(content)
    if answer is None:
        raise MalformedOutput("the MLX server's answer is not a JSON object")
    if "data" not in answer and (error := error_in(answer)):
        raise error
    return answer


def parse_vectors(answer: dict[str, Any], count: int, dimensions: int | None) -> tuple[list[str], int]:
    """Return the vectors of a server's answer in the order of the input, and their number of dimensions.

    Raises:
        MalformedOutput: not `count` finite vectors with the same number of dimensions (`dimensions`, if given).
    """
    try:
        entries = answer["data"]
        if len(entries) != count:
            raise MalformedOutput(f"the MLX server sent {len(entries)} vectors for {count} inputs")
        embeddings = [entry["embedding"] for entry in _in_order(entries)]
        vectors = [unpack_vector(each) if isinstance(each, str) else _vector(each) for each in embeddings]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        raise MalformedOutput("the MLX server's embeddings are not a list of vectors") from None
    expected = dimensions or len(vectors[0])
    for vector in vectors:
        if len(vector) != expected or not vector:
            raise MalformedOutput(f"the MLX server sent a vector of {len(vector)} instead of {expected} dimensions")
        if not math.isfinite(sum(vector)):
            raise MalformedOutput("the MLX server sent a vector that is not finite")
    return [pack_vector(vector) for vector in vectors], expected


def _vector(numbers: list[float]) -> array[float]:
    if type(numbers) is not list:
        raise TypeError("a vector is a list of numbers")
    return array("f", numbers)


def _in_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries by their `index`, or as they are if none has one."""
    by_index = {entry.get("index"): entry for entry in entries}
    return entries if by_index.keys() == {None} else [by_index[index] for index in range(len(entries))]
