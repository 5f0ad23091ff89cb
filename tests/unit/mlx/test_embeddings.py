"""Embeddings as servers send them, valid and invalid."""

import base64
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import FleetError, InvalidRequest, MalformedOutput, Overloaded, ProviderError
from fleet_worker.mlx.embeddings import answer_of, parse_vectors


def answer(*embeddings):
    return {"data": [{"index": index, "embedding": embedding} for index, embedding in enumerate(embeddings)]}


def packed(*numbers):
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def test_numbers_and_base64_come_out_alike():
    """Both become base64 of little-endian float32."""
    assert parse_vectors(answer([1, 0.5], [-2.0, 0]), 2, None) == ([packed(1, 0.5), packed(-2, 0)], 2)
    assert parse_vectors(answer(packed(1, 0.5), packed(-2, 0)), 2, 2) == ([packed(1, 0.5), packed(-2, 0)], 2)
    assert parse_vectors(answer([1, 0.5], packed(-2, 0)), 2, None) == ([packed(1, 0.5), packed(-2, 0)], 2)


def test_the_index_gives_the_order():
    shuffled = {
        "data": [{"index": 2, "embedding": [3]}, {"index": 0, "embedding": [1]}, {"index": 1, "embedding": [2]}]
    }
    assert parse_vectors(shuffled, 3, None) == ([packed(1), packed(2), packed(3)], 1)


def test_without_any_index_they_are_in_order():
    assert parse_vectors({"data": [{"embedding": [1]}, {"embedding": [2]}]}, 2, None) == ([packed(1), packed(2)], 1)
    nulls = {"data": [{"index": None, "embedding": [1]}, {"index": None, "embedding": [2]}]}
    assert parse_vectors(nulls, 2, None) == ([packed(1), packed(2)], 1)


@pytest.mark.parametrize("indexes", [(0, 0), (1, 2), (0, None), (0, 5), (-1, 0), ("0", "1"), (0, [1]), (0, 0.5)])
def test_an_order_that_is_none_is_refused(indexes):
    """Otherwise a text might get the vector of another, unnoticed."""
    with pytest.raises(MalformedOutput):
        parse_vectors({"data": [{"index": index, "embedding": [1]} for index in indexes]}, 2, None)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_vectors_is_refused(count):
    with pytest.raises(MalformedOutput, match=f"2 vectors for {count} inputs"):
        parse_vectors(answer([1], [2]), count, None)


def test_another_length_is_refused():
    with pytest.raises(MalformedOutput, match="1 instead of 2 dimensions"):
        parse_vectors(answer([1, 2], [1]), 2, None)
    with pytest.raises(MalformedOutput, match="2 instead of 3 dimensions"):
        parse_vectors(answer([1, 2]), 1, 3)
    with pytest.raises(MalformedOutput, match="0 instead"):
        parse_vectors(answer([]), 1, None)
    with pytest.raises(MalformedOutput, match="0 instead"):
        parse_vectors(answer(""), 1, None)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "embedding",
    [
        [1, NAN],
        [INF, 0],
        [INF, -INF],
        [1e39, 0],  # finite, but not as a float32
        packed(1, NAN),
        packed(INF, 0),
        packed(INF, -INF),
    ],
)
def test_a_vector_that_is_not_finite_is_refused(embedding):
    with pytest.raises(MalformedOutput, match="not finite"):
        parse_vectors(answer([1, 2], embedding), 2, None)


@pytest.mark.parametrize(
    "embedding",
    [
        None,
        5,
        True,
        {},
        {"a": 1},
        ["a", "b"],
        [None, 1],
        [[1, 2]],
        {"0": 1, "1": 2},
        "!!!!",
        "AAA",
        "AAAA",
        packed(1, 2)[:3] + "!" + packed(1, 2)[3:],
        "é",
        [10**400, 1],
    ],
)
def test_what_is_no_vector_is_refused(embedding):
    with pytest.raises(MalformedOutput):
        parse_vectors(answer([1, 2], embedding), 2, None)


@pytest.mark.parametrize(
    "reply", [{}, {"data": None}, {"data": 5}, {"data": "a"}, {"data": [5]}, {"data": [{}]}, {"data": {"a": 1}}]
)
def test_an_answer_that_is_none_is_refused(reply):
    with pytest.raises(MalformedOutput):
        parse_vectors(reply, 1, None)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", MalformedOutput),
        (b"<html>", MalformedOutput),
        (b"[]", MalformedOutput),
        (b'{"error": "busy"}', ProviderError),
        (b'{"error": {"code": 429}}', Overloaded),
        (b'{"detail": [{"loc": ["input"]}]}', InvalidRequest),
    ],
)
def test_an_answer_with_status_200_may_be_an_error(body, expected):
    with pytest.raises(FleetError) as raised:
        answer_of(body)
    assert type(raised.value) is expected


def test_what_is_said_beside_the_vectors_does_not_matter():
    assert answer_of(b'{"data": [], "error": null, "detail": "fast"}')["data"] == []


floats = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3)


@given(st.lists(floats, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_every_vector_arrives_bit_for_bit_under_its_text(vectors, random):
    reply = answer(*(random.choice([vector, packed(*vector)]) for vector in vectors))
    random.shuffle(reply["data"])
    assert parse_vectors(reply, len(vectors), 3) == ([packed(*vector) for vector in vectors], 3)
