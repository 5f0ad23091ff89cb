"""A text ends at the first stop string, however it comes, and nothing is held back without need."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleet_worker.mlx.stop_strings import StopStrings

texts = st.text("ab #", max_size=40)
stops = st.lists(st.text("ab #", min_size=1, max_size=5), min_size=1, max_size=4)
sizes = st.lists(st.integers(1, 5), min_size=1)


def pieces(text, lengths):
    at, found = 0, []
    while at < len(text):
        found.append(text[at : at + lengths[len(found) % len(lengths)]])
        at += len(found[-1])
    return found


def fed(text, stop, lengths=(1,), delivered=""):
    """What is let through of a text that comes in pieces, and the stop string that was found."""
    filter_ = StopStrings(stop, delivered=delivered)
    passed = [filter_.feed(piece) for piece in pieces(text, lengths)]
    return "".join([*passed, filter_.end()]), filter_.found


def expected(text, stop, delivered=""):
    """The text before the first stop string to be complete, and that."""
    whole = delivered + text
    for end in range(len(delivered) + 1, len(whole) + 1):
        if found := max((each for each in stop if whole[:end].endswith(each)), key=len, default=None):
            return whole[len(delivered) : max(len(delivered), end - len(found))], found
    return text, None


@given(text=texts, stop=stops, lengths=sizes, delivered=texts)
@example(text="abcd", stop=["abcd", "bc"], lengths=[1], delivered="")
@example(text="aaab", stop=["aab"], lengths=[1], delivered="")
@example(text="ab", stop=["aaab"], lengths=[1], delivered="aa")
@example(text="#", stop=["##", "aaa"], lengths=[1], delivered="##a")
def test_a_text_ends_before_the_stop_string_that_is_complete_first(text, stop, lengths, delivered):
    assert fed(text, stop, lengths, delivered) == expected(text, stop, delivered)


@given(text=texts, stop=stops, lengths=sizes)
def test_only_what_may_be_the_beginning_of_a_stop_string_is_held_back(text, stop, lengths):
    filter_, passed, read = StopStrings(stop), "", ""
    for piece in pieces(text, lengths):
        read += piece
        passed += filter_.feed(piece)
        if filter_.found:
            assert read.startswith(passed)
            return
        held = read[len(passed) :]
        assert read == passed + held
        assert not held or any(each.startswith(held) for each in stop)


@pytest.mark.parametrize(
    ("delivered", "text", "stop", "passed"),
    [
        ("Hello wor", "ld, you", ["world"], ""),
        ("Hello wor", "k, you", ["world"], "k, you"),
        ("Hello wor", "l", ["world"], "l"),
        ("Hello w", "orld", ["world", "work"], ""),
        ("aa", "ab", ["aaab"], ""),
        ("a##", "b###", ["###"], "b"),
        ("world", " you", ["world"], " you"),
        ("", "world", ["world"], ""),
        ("", "one\n\ntwo", ["\n\n"], "one"),
        ("", "你好世界", ["世"], "你好"),
        ("", "ab", ["abc", "b"], "a"),
    ],
)
def test_a_stop_string_may_begin_in_what_was_delivered(delivered, text, stop, passed):
    for lengths in ([1], [2], [100]):
        assert fed(text, stop, lengths, delivered)[0] == passed


def test_nothing_follows_a_stop_string():
    filter_ = StopStrings(["b"])
    assert [filter_.feed("abc"), filter_.feed("d"), filter_.end()] == ["a", "", ""]


def test_no_stop_string_makes_a_node_slow():
    """The worst ones: the end of each match is the beginning of another."""
    stop = ["a" * 999 + "b"] * 16
    started = time.process_time()
    assert fed("a" * 5000, stop, [5]) == ("a" * 5000, None)
    assert time.process_time() - started < 1.0
