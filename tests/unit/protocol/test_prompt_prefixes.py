"""The header with the ids of a prompt's beginnings."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.broker.door import SHORT
from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.prompt_prefixes import MOST_BYTES, MOST_PREFIXES, PromptPrefixes

IDS = st.text("ABCXYZabcxyz0189-_", min_size=11, max_size=11)
LENGTHS = st.lists(st.integers(1, MOST_BYTES), max_size=MOST_PREFIXES, unique=True).map(sorted)


@st.composite
def _prefixes(draw: st.DrawFn) -> PromptPrefixes:
    chain = tuple((draw(IDS), length) for length in draw(LENGTHS))
    conversation = draw(st.none() | IDS)
    return PromptPrefixes(draw(st.none() | IDS), conversation, chain, draw(st.none() | IDS) if conversation else None)


@given(_prefixes())
def test_what_was_encoded_is_decoded(prefixes: PromptPrefixes) -> None:
    assert PromptPrefixes.decode(prefixes.encode()) == prefixes


def test_the_longest_header_is_let_in() -> None:
    """Headers of more than `SHORT` characters are dropped on the way."""
    chain = tuple(("A" * 11, MOST_BYTES - 64 + n) for n in range(MOST_PREFIXES))
    assert len(PromptPrefixes("s" * 11, "c" * 11, chain, "o" * 11).encode()) <= SHORT


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        "",
        "..\n",
        "short..",
        "..AAAAAAAAAAA",
        ".." + "AAAAAAAAAAAAAAB" * 65,
        ".." + "ÄÄÄÄÄÄÄÄÄÄÄAAAB",
        ".." + "AAAAAAAAAAAAAAA",
        ".." + "AAAAAAAAAAAAAAC" + "BBBBBBBBBBBAAAC",
        ".." + "AAAAAAAAAAAAAAC" + "BBBBBBBBBBBAAAB",
    ],
    ids=["None", "int", "empty", "newline", "id", "no length", "too many", "foreign", "0 bytes", "equal", "shrinking"],
)
def test_anything_else_is_refused_and_not_quoted(text: object) -> None:
    with pytest.raises(InvalidRequest, match="not a valid header fleet_prefixes") as refused:
        PromptPrefixes.decode(text)
    assert "AAA" not in str(refused.value)


@given(st.text(max_size=1_200))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    with contextlib.suppress(InvalidRequest):
        assert PromptPrefixes.decode(text).encode() == text


def test_a_prompt_is_as_long_as_its_longest_beginning() -> None:
    assert PromptPrefixes().size == 0
    assert PromptPrefixes(chain=(("A" * 11, 5), ("B" * 11, 9))).size == 9
