import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.mlx.reasoning import ReasoningSplitter, split_reasoning

TAG = re.compile(r"<(/?)think(?:ing)?>")

words = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<thinking>",
        "</thinking>",
        "<",
        "</",
        "<th",
        "think>",
        "<thinks>",
        "ing>",
        "\n",
        "\n\n",
        "a",
        " ",
        "é",
        ">",
    ]
)
texts = st.lists(words, max_size=16).map("".join)


@st.composite
def pieces(draw):
    text = draw(texts)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def stream(parts, *, starts_inside=False):
    splitter = ReasoningSplitter(starts_inside=starts_inside)
    sides = [splitter.feed(part) for part in parts] + [splitter.end()]
    return "".join(visible for visible, _ in sides), "".join(reasoning for _, reasoning in sides)


def by_segments(text, *, starts_inside):
    """Split the whole text at once, by other code than ours."""
    sides = {True: "", False: ""}
    at, inside, seam = 0, starts_inside, False
    for tag in [*TAG.finditer(text), None]:
        segment = text[at : tag.start() if tag else len(text)]
        sides[inside] += segment.lstrip("\n") if seam else segment
        if tag:
            at, inside, seam = tag.end(), not tag[1], True
    return sides[False], sides[True]


@given(pieces(), st.booleans())
def test_however_a_text_is_cut_both_sides_are_the_same(parts, starts_inside):
    assert stream(parts, starts_inside=starts_inside) == by_segments("".join(parts), starts_inside=starts_inside)


@given(texts, st.booleans())
def test_letter_by_letter_is_as_good_as_at_once(text, starts_inside):
    assert stream(text, starts_inside=starts_inside) == stream([text], starts_inside=starts_inside)


@given(pieces(), st.booleans())
def test_nothing_but_tags_and_line_breaks_is_lost(parts, starts_inside):
    visible, reasoning = stream(parts, starts_inside=starts_inside)
    kept = sorted((visible + reasoning).replace("\n", ""))
    assert kept == sorted(TAG.sub("", "".join(parts)).replace("\n", ""))


@given(st.lists(st.text(alphabet="ab<>/ \n", max_size=5), max_size=8))
def test_a_text_without_tags_stays_as_it_is(parts):
    assert stream(parts) == ("".join(parts), "")


@given(texts)
def test_a_piece_is_held_back_only_while_it_may_become_a_tag(text):
    splitter = ReasoningSplitter()
    splitter.feed(text)
    held = "".join(splitter.end())
    assert not held or any(tag.startswith(held) for tag in ("<think>", "</think>", "<thinking>", "</thinking>"))


@pytest.mark.parametrize("name", ["think", "thinking"])
def test_reasoning_is_separated_and_the_line_breaks_after_a_tag_go(name):
    assert split_reasoning(f"<{name}>\nhm, 4\n</{name}>\n\nIt is 4.") == ("It is 4.", "hm, 4\n")


def test_text_before_a_thought_stays_before_what_follows_it():
    assert split_reasoning("Well. <think>2+2</think>4.") == ("Well. 4.", "2+2")


def test_a_model_may_think_twice():
    assert split_reasoning("<think>a</think>b<think>c</think>d") == ("bd", "ac")


def test_a_tag_that_stays_open_makes_the_rest_reasoning():
    assert stream(["yes <thi", "nk>but the", "n"]) == ("yes ", "but then")


def test_an_orphan_closing_tag_of_a_whole_text_ends_the_reasoning():
    assert split_reasoning("so it is 4\n</think>\n\n4") == ("4", "so it is 4\n")


def test_an_orphan_closing_tag_in_a_stream_is_dropped_and_takes_nothing_back():
    assert stream(["so it ", "is 4</th", "ink>", "\n\n4"]) == ("so it is 44", "")


def test_a_template_that_opens_the_tag_itself_makes_the_beginning_reasoning():
    assert stream(["so it is 4</think>", "4"], starts_inside=True) == ("4", "so it is 4")
    assert split_reasoning("never closed", starts_inside=True) == ("", "never closed")


def test_a_second_opening_tag_changes_nothing():
    assert split_reasoning("<think>a<think>b</think>c") == ("c", "ab")


def test_what_only_looks_like_a_tag_is_text():
    assert stream(["1 <thin", "k 2 </thinks> 3 <"]) == ("1 <think 2 </thinks> 3 <", "")


def test_text_that_cannot_become_a_tag_is_not_held_back():
    splitter = ReasoningSplitter()
    assert splitter.feed("a < b") == ("a < b", "")
    assert splitter.feed("<thi") == ("", "")
    assert splitter.feed("s") == ("<this", "")


def test_a_thought_leaves_while_it_is_thought():
    splitter = ReasoningSplitter()
    assert splitter.feed("<think>\n") == ("", "")
    assert splitter.feed("one ") == ("", "one ")
    assert splitter.feed("two") == ("", "two")


def test_line_breaks_go_even_when_they_come_one_by_one():
    assert stream(["<think>", "\n", "\n", "a", "\n", "</think>", "\n", "\n", "b", "\n"]) == ("b\n", "a\n")


def test_after_the_end_there_is_no_more():
    splitter = ReasoningSplitter()
    splitter.feed("a<")
    assert splitter.end() == ("<", "")
    assert splitter.end() == ("", "")
