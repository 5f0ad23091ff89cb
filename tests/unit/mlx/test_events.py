"""Server-sent events, however a stream of them is cut, and with all that is between them."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import MalformedOutput
from fleet_worker.mlx.events import MAX_EVENT_BYTES, EventParser

NOT_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # str.splitlines splits at each of them

line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
texts = st.text(alphabet=st.sampled_from("ab :é€😀" + NOT_LINE_ENDS), max_size=8)
streams = st.lists(
    st.sampled_from(
        [b"data:", b"data: ", b"data", b"\n", b"\n\n", b"\r", b"\r\n", b":", b"id: 1", b"x", "é\u2028".encode()]
    ),
    max_size=30,
).map(b"".join)


@st.composite
def cut(draw, whole):
    """Draw a way to split the same bytes; some pieces may be empty."""
    stream = draw(whole)
    places = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    return [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]


def parsed(pieces):
    stream = EventParser()
    events = [event for piece in pieces for event in stream.feed(piece)]
    return events + stream.end()


def by_the_book(stream):
    """Parse a whole stream as the specification says, by other code than ours."""
    events, data = [], []
    for line in [*re.split(rb"\r\n|\n|\r", stream), b""]:
        if found := re.fullmatch(rb"data: ?(.*)", line, re.DOTALL):
            data.append(found[1])
        elif line == b"" and data:
            events += [b"\n".join(data)] if any(data) or len(data) > 1 else []
            data = []
    return events


@given(cut(streams))
def test_however_a_stream_is_cut_its_events_are_those_of_the_specification(pieces):
    assert parsed(pieces) == by_the_book(b"".join(pieces))


@st.composite
def written(draw):
    """Draw events, and a stream of them with one kind of line end, and with comments and other fields between."""
    events = draw(st.lists(st.lists(texts, min_size=1, max_size=3), max_size=6))
    end = draw(line_ends)
    between = st.sampled_from(
        [b"", b": keepalive 1/2" + end, b"event: message" + end, b"id: 7" + end, b"retry: 9" + end]
    )
    stream = b""
    for lines in events:
        for line in lines:
            stream += draw(between) + b"data: " + line.encode() + end
        stream += end
    return ["\n".join(lines).encode() for lines in events], stream


@given(written(), st.data())
def test_what_was_written_is_read_whole(case, data):
    events, stream = case
    assert parsed(data.draw(cut(st.just(stream)))) == [event for event in events if event]


@given(st.lists(texts.map(lambda text: json.dumps({"content": text}, ensure_ascii=False)), min_size=1), st.data())
def test_a_stream_of_json_with_odd_characters_stays_json(payloads, data):
    stream = "".join(f"data: {payload}\r\n\r\n" for payload in payloads).encode()
    events = parsed(data.draw(cut(st.just(stream))))
    assert [json.loads(event) for event in events] == [json.loads(payload) for payload in payloads]


@pytest.mark.parametrize("character", NOT_LINE_ENDS)
def test_only_three_line_ends_are_line_ends(character):
    assert EventParser().feed(f"data: a{character}b\n\n".encode()) == [f"a{character}b".encode()]


def test_a_character_cut_in_two_arrives_whole():
    stream = EventParser()
    whole = "data: 😀\n\n".encode()
    assert stream.feed(whole[:8]) == []
    assert [event.decode() for event in stream.feed(whole[8:])] == ["😀"]


def test_a_line_end_cut_in_two_ends_one_line():
    stream = EventParser()
    assert stream.feed(b"data: a\r") == []
    assert stream.feed(b"\ndata: b\r") == []
    assert stream.feed(b"\n\r") == []
    assert stream.feed(b"\n") == [b"a\nb"]


def test_an_event_leaves_as_soon_as_it_is_complete():
    stream = EventParser()
    assert stream.feed(b"data: 1\n\ndata: 2\n\ndata: 3\n") == [b"1", b"2"]
    assert stream.feed(b"\n") == [b"3"]


def test_an_event_that_ends_with_lone_returns_waits_for_one_byte_at_most():
    stream = EventParser()
    assert stream.feed(b"data: 1\r\rd") == [b"1"]


def test_one_space_after_the_colon_is_not_data():
    assert parsed([b"data:a\n\ndata: a\n\ndata:  a\n\n"]) == [b"a", b"a", b" a"]


def test_lines_of_one_event_are_joined():
    assert parsed([b"data: {\ndata:\ndata: }\n\n"]) == [b"{\n\n}"]


def test_an_event_without_data_is_none():
    assert parsed([b"event: ping\nid: 1\n\n\n\n"]) == []


def test_comments_interrupt_nothing():
    stream = EventParser()
    assert stream.feed(b": keepalive 1/4\n\ndata: a\n: keepalive 2/4\ndata: b\n\n:\n") == [b"a\nb"]


@pytest.mark.parametrize(
    "rest", [b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r", b"data: [DONE]\r\n", b"data: [DONE]\n\r"]
)
def test_a_last_event_needs_no_blank_line(rest):
    stream = EventParser()
    assert stream.feed(rest) == []
    assert stream.end() == [b"[DONE]"]
    assert stream.end() == []


def test_nothing_is_left_of_a_stream_that_ended_well():
    stream = EventParser()
    assert stream.feed(b"data: a\n\n") == [b"a"]
    assert stream.end() == []


def test_an_event_may_be_as_large_as_the_limit():
    stream = EventParser()
    payload = b"x" * (MAX_EVENT_BYTES - len(b"data: "))
    assert stream.feed(b"data: " + payload) == []
    assert stream.feed(b"\n\n") == [payload]


def test_a_line_that_never_ends_is_refused():
    stream = EventParser()
    stream.feed(b"data: " + b"x" * (MAX_EVENT_BYTES - 6))
    with pytest.raises(MalformedOutput):
        stream.feed(b"x")


def test_an_event_of_lines_that_never_ends_is_refused():
    line = b"data: " + b"x" * 1000 + b"\n"
    with pytest.raises(MalformedOutput):
        parsed([line * 1000] * (2 * MAX_EVENT_BYTES // len(line * 1000)))


def test_a_long_stream_of_small_events_has_no_limit():
    stream = EventParser()
    events = b"data: " + b"x" * 1000 + b"\n\n"
    assert sum(len(stream.feed(events * 1000)) for _ in range(10)) == 10_000


# --- What is not by the book


def test_events_without_data_are_left_out():
    assert parsed([b"data:\n\ndata: \n\ndata: a\n\ndata\n\n"]) == [b"a"]


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_byte_order_mark_is_no_part_of_the_first_line(cut):
    stream = "\ufeffdata: a\n\n".encode()
    assert parsed([stream[:cut], stream[cut:]]) == [b"a"]


def test_white_space_before_a_field_is_none_of_it():
    assert parsed([b" data: a\n\n\xef\xbb\xbfevent: error\n data: b\n\n"]) == [b"a", b'{"error":"b"}']


@pytest.mark.parametrize("kind", ["ping", "PING", "heartbeat", "keepalive", "keep-alive"])
def test_an_event_that_is_a_heartbeat_by_its_type_says_nothing(kind):
    assert parsed([f"event: {kind}\ndata: what?\n\nevent: {kind}\n\ndata: a\n\n".encode()]) == [b"a"]


def test_other_types_mean_nothing():
    assert parsed([b"event: message\ndata: a\n\nevent:chunk\ndata: b\n\n"]) == [b"a", b"b"]


@pytest.mark.parametrize(
    ("lines", "data"),
    [
        (b"event: error\ndata: boom", "boom"),
        (b"data: boom\nevent: error", "boom"),
        (b'event:error\ndata: {"code": 429}', '{"code": 429}'),
        (b"event: server_error\ndata: bo\ndata: om", "bo\nom"),
        (b"event: Error", ""),
        (b"event: error\ndata: \xff", "\ufffd"),
    ],
)
def test_an_event_that_is_an_error_by_its_type_is_one(lines, data):
    (error, after) = parsed([lines + b"\n\ndata: a\n\n"])
    assert (json.loads(error), after) == ({"error": data}, b"a")


@pytest.mark.parametrize(
    "body", ['{"a": "\n\ndata: b\n\n"}', "[1,\r\n2]", '"text"', "<html>\n\n</html>", '\ufeff {"a":\n1}']
)
def test_a_body_that_is_no_event_stream_is_one_event(body):
    for size in (1, 3, 1000):
        stream, sent = EventParser(), body.encode()
        assert [event for at in range(0, len(sent), size) for event in stream.feed(sent[at : at + size])] == []
        assert stream.is_whole
        assert stream.end() == [body.lstrip("\ufeff ").encode()]


@pytest.mark.parametrize("start", ["data: ", ":", "event: x\n", "\n\n", "id: 1\n", "x\n"])
def test_a_body_that_begins_with_a_line_is_an_event_stream(start):
    stream = EventParser()
    stream.feed(start.encode() + b"a\n\n")
    assert not stream.is_whole


@pytest.mark.parametrize("start", [b"data: ", b"data: x\ndata: ", b"{", b": ", b" "])
def test_what_never_ends_costs_no_more_than_the_limit(start):
    """Time, too: what has arrived is not copied for each piece of a line."""
    stream = EventParser()
    stream.feed(start)
    with pytest.raises(MalformedOutput, match="too large"):
        list(map(stream.feed, [b" " * 100] * (2 * MAX_EVENT_BYTES // 100)))


@pytest.mark.parametrize("containers", [b"{},", b"[],", b'{"a":[]},'])
@pytest.mark.parametrize("start", [b"data: [", b"[", b"data: [\ndata:"])
def test_an_event_that_would_be_much_larger_in_memory_is_refused(start, containers):
    """4 MB of `[],` are 90 MB of lists."""
    stream, sent = EventParser(), start + containers * 300_000 + b"1]\n\n"
    with pytest.raises(MalformedOutput, match="lists and objects"):
        [*map(stream.feed, (sent[at : at + 65_536] for at in range(0, len(sent), 65_536))), stream.end()]
