"""Two parts of one answer, joined, are the text of the whole answer."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fleet_worker.mlx.overlap import OverlapFilter, before_last_word
from fleet_worker.protocol.reply import Delta, join

letters = st.sampled_from([*"ab1 é\n.,海。🚢<", "\u2028", "  ", " the", " of"])
texts = st.lists(letters, min_size=1, max_size=30).map("".join)
sizes = st.lists(st.integers(1, 5), min_size=1)


def pieces(text, lengths):
    """Split the text into pieces of these lengths, in turn."""
    at, found = 0, []
    while at < len(text):
        length = lengths[len(found) % len(lengths)]
        found.append(text[at : at + length])
        at += length
    return found


def fed(overlap, said, lengths=(3,), field="content"):
    """What an overlap filter returns of this text, which comes in pieces."""
    deltas = [overlap.feed(Delta(**{field: piece})) for piece in pieces(said, lengths)]
    overlap.end()
    return join(delta for delta in deltas if delta)["content"] or ""


# --- Repeated text


@given(text=texts, cut=st.integers(1), lengths=sizes, stripped=st.booleans())
@example(text="set on a stormy", cut=6, lengths=[1], stripped=True)
@example(text="set on a stormy", cut=7, lengths=[1], stripped=True)
def test_a_text_joins_wherever_it_was_cut_however_it_comes_and_with_its_space_or_without(text, cut, lengths, stripped):
    delivered, rest = text[: cut % len(text)], text[cut % len(text) :]
    word = before_last_word(delivered)
    if word == len(delivered):  # nothing can be repeated; other tests cover this
        return
    said = text[word:].removeprefix(" ") if stripped else text[word:]
    overlap = OverlapFilter(delivered, again=delivered[word:])
    assert delivered + fed(overlap, said, lengths) == text
    assert not overlap.differs
    assert overlap.new <= len(rest)


@given(text=texts, cut=st.integers(1), lengths=sizes, first=st.booleans(), then=st.booleans())
@example(text="Hello you", cut=5, lengths=[1], first=False, then=True)
@example(text="Hello you", cut=5, lengths=[1], first=True, then=False)
def test_an_answer_from_its_beginning_says_all_again(text, cut, lengths, first, then):
    """Some servers begin it with a space, others do not."""
    text = text.lstrip(" ")
    assume(text)
    delivered, rest = text[: cut % len(text)], text[cut % len(text) :]
    assume(delivered)
    overlap = OverlapFilter("", again=" " * first + delivered)
    assert fed(overlap, " " * then + text, lengths) == rest
    assert not overlap.differs


@given(reasoning=texts, text=texts, cut=st.integers(0), lengths=sizes)
def test_reasoning_is_said_again_too(reasoning, text, cut, lengths):
    thought = reasoning[: cut % len(reasoning)]
    cases = [(thought, ""), (reasoning, text[: cut % len(text)])]
    for thought, delivered in cases:
        overlap = OverlapFilter("", again=delivered, reasoning=thought)
        deltas = [overlap.feed(Delta(reasoning=piece)) for piece in pieces(reasoning, lengths)]
        deltas += [overlap.feed(Delta(content=piece)) for piece in pieces(text, lengths)]
        new = join(delta for delta in deltas if delta)
        assert (thought + (new["reasoning"] or ""), delivered + (new["content"] or "")) == (reasoning, text)
        assert not overlap.differs


@given(text=texts, said=texts, lengths=sizes)
def test_what_differs_lets_nothing_through(text, said, lengths):
    word = before_last_word(text)
    again = text[word:]
    assume(word < len(text) and not said.removeprefix(" ").startswith(again.removeprefix(" ")))
    overlap = OverlapFilter(text, again=again)
    assert fed(overlap, said, lengths) == ""
    assert overlap.differs


def test_pieces_are_counted_by_whether_they_hold_anything_new():
    overlap = OverlapFilter("The harbour", again=" harbour")
    assert [overlap.feed(Delta(content=text)) for text in ("har", "bour")] == [None, None]
    assert (overlap.repeated, overlap.new) == (2, 0)
    assert overlap.feed(Delta(content=" is")) == Delta(content=" is")
    assert (overlap.repeated, overlap.new) == (2, 1)


def test_an_answer_that_ends_before_it_has_said_all_again_differs():
    overlap = OverlapFilter("set on", again=" on")
    assert overlap.feed(Delta(content=" o")) is None
    assert not overlap.differs
    overlap.end()
    assert overlap.differs


def test_reasoning_and_calls_do_not_come_before_all_is_said_again():
    call = {"index": 0, "function": {"name": "weather", "arguments": "{}"}}
    for delta in (Delta(reasoning="Hm"), Delta(tool_calls=[call])):
        overlap = OverlapFilter("set on", again=" on")
        assert overlap.feed(delta) is None
        assert overlap.differs


def test_an_answer_that_begins_to_think_is_another_one():
    overlap = OverlapFilter("Hello")
    assert overlap.feed(Delta(reasoning="Hm")) is None
    assert overlap.differs


def test_calls_go_through():
    call = {"index": 0, "function": {"name": "weather", "arguments": "{}"}}
    assert OverlapFilter("Hello").feed(Delta(tool_calls=[call])) == Delta(tool_calls=[call])


# --- Where the last word begins


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("set on", "set"),
        ("set on ", "set"),
        ("set on a", "set on"),
        ("set  on", "set  on"),
        ("word", "word"),
        ("", ""),
        ("if x:\n    return", "if"),
        ("one\ntwo", "one\ntwo"),
        ("one two\nthree", "one"),
        ("東京。大阪", "東京"),
        ("東京大阪", "東京大阪"),
        ("set on \ufffd", "set"),
        ("word\ufffd", "word"),
        ("\ufffd", ""),
        ("a " + "b" * 198, "a"),
        ("a " + "b" * 300, "a " + "b" * 300),
        ("a bc " + "\ufffd" * 200, "a bc " ),
    ],
)  # fmt: skip
def test_a_word_begins_before_its_space(text, before):
    assert text[: before_last_word(text)] == before


# --- Guessed spaces


@pytest.mark.parametrize(
    ("said", "joined"),
    [
        ("\n\nthree", "one:\n\nthree"),
        (" \n\nthree", "one:\n\nthree"),
        ("\n    three", "one:\n\n    three"),
        ("three", "one:\n\nthree"),
        ("\n", "one:\n\n"),
        ("", "one:\n\n"),
    ],
)
def test_white_space_may_be_said_again_or_not(said, joined):
    for lengths in ([1], [100]):
        overlap = OverlapFilter("one:\n\n", again="\n\n", guess_space=True)
        assert "one:\n\n" + fed(overlap, said, lengths) == joined
        assert not overlap.differs


def test_calls_may_follow_white_space():
    call = {"index": 0, "function": {"name": "weather", "arguments": "{}"}}
    overlap = OverlapFilter("one:\n\n", again="\n\n", guess_space=True)
    assert overlap.feed(Delta(tool_calls=[call])) == Delta(tool_calls=[call])


@pytest.mark.parametrize(
    ("delivered", "said", "joined"),
    [
        ("set on", "a stormy", "set on a stormy"),
        ("set on", " a stormy", "set on a stormy"),
        ("set on", ", a stormy", "set on, a stormy"),
        ("set on,", "a", "set on,a"),
        ("Mambo No", "5", "Mambo No 5"),
        ("東京", "海", "東京海"),
        ("東京", "tower", "東京tower"),
        ("สวัสดี", "ครับ", "สวัสดีครับ"),
        ("서울", "바다", "서울 바다"),
        ("на", "море", "на море"),
    ],
)
def test_a_space_is_guessed_between_words(delivered, said, joined):
    assert delivered + fed(OverlapFilter(delivered, guess_space=True), said, (1,)) == joined
    assert delivered + fed(OverlapFilter(delivered), said, (1,)) == delivered + said


# --- Stop strings


@pytest.mark.parametrize(
    ("said", "stop", "stopped"),
    [
        (" ", ["world"], True),
        ("", ["world"], True),
        ("", [" world"], True),
        (" w", ["or!", "order"], True),
        (" ", ["ork"], False),
        (" ", [], False),
        (" wor", ["world"], False),
    ],
)
def test_a_server_may_cut_a_stop_string_out_of_what_it_should_say_again(said, stop, stopped):
    """Its answer ends before the stop string, which begins in the delivered text."""
    for delivered, before in (("Hello wor", ""), ("", "Hello")):
        overlap = OverlapFilter(delivered, again=f"{before} wor", stop=stop)
        assert fed(overlap, before + said, (1,)) == ""
        assert (overlap.stopped, overlap.differs) == (stopped, not stopped and said != " wor")
