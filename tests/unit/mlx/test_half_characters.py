"""Characters that arrive in halves."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.mlx.half_characters import CharacterJoiner, parse_odd_json

WHOLE = "a😀é€💀\U0010ffffz"


def joined(*events):
    joiner = CharacterJoiner()
    texts = [joiner.joined(parse_odd_json(event))["text"] for event in events]
    return "".join([*texts, joiner.end().get("text", "")])


def of_bytes(text):
    return b'{"text": "' + text + b'"}'


@pytest.mark.parametrize("cut", range(len(WHOLE.encode()) + 1))
def test_a_character_may_be_cut_between_its_bytes(cut):
    text = WHOLE.encode()
    assert joined(of_bytes(text[:cut]), of_bytes(text[cut:])) == WHOLE


def test_it_may_be_cut_twice_and_more():
    assert joined(*(of_bytes(bytes([byte])) for byte in WHOLE.encode())) == WHOLE


def test_a_surrogate_pair_may_be_cut():
    """`json.dumps` of 💀 is a pair whose second half also stands for a byte in Python's `surrogateescape`."""
    for character in "😀💀\U0010ffff":
        pair = json.dumps(character)[1:-1].encode()
        assert joined(of_bytes(b"hi " + pair[:6]), of_bytes(pair[6:] + b" yo")) == f"hi {character} yo"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([rb"a\ud83d"], "a�"),
        ([rb"a\ud83d", b"b"], "a�b"),
        ([rb"\ude00b"], "�b"),
        ([rb"a\ud83db"], "a�b"),
        ([rb"\ud83d\ud83d", rb"\ude00"], "�😀"),
        ([b"a\xff"], "a�"),
        ([b"a\xf0\x9f"], "a�"),
        ([b"a\xf0\x9f", b"b"], "a�b"),
        ([b"\x98\x80b"], "��b"),
        ([b"a\xf0\x9f", b"", b"\x98\x80"], "a😀"),
        ([b"a\tb"], "a\tb"),
    ],
)
def test_what_never_becomes_a_character_is_replaced(texts, expected):
    assert joined(*map(of_bytes, texts)) == expected


def test_each_text_of_a_chunk_waits_for_its_own_half():
    joiner = CharacterJoiner()
    first = joiner.joined(parse_odd_json(rb'{"a": ["\ud83d", 1, null], "b": {"c": "\ud83d"}}'))
    assert first == {"a": ["", 1, None], "b": {"c": ""}}
    assert joiner.joined(parse_odd_json(rb'{"b": {"c": "\ude01"}}')) == {"b": {"c": "😁"}}
    assert joiner.joined(parse_odd_json(rb'{"a": ["\ude00"]}')) == {"a": ["😀"]}
    assert not joiner.waiting


def test_keys_have_no_halves_either():
    joined = CharacterJoiner().joined(parse_odd_json(b'{"\xff": {"\\ud83d": 1}}'))
    assert joined == {"�": {"�": 1}}


@given(st.lists(st.binary(max_size=6), max_size=5))
def test_whatever_the_bytes_are_the_text_can_be_sent(pieces):
    kept = [piece.translate(None, b'"\\') for piece in pieces]
    joined(*map(of_bytes, kept)).encode()


def test_a_number_of_thousands_of_digits_is_read():
    assert parse_odd_json(b'{"n": ' + b"9" * 5000 + b"}")["n"] > 10**20


@pytest.mark.parametrize("text", [b"{", b"x", b"[" * 100_000])
def test_what_is_no_json_is_none(text):
    with pytest.raises((ValueError, RecursionError)):
        parse_odd_json(text)
