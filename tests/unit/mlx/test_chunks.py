"""Events and chunks of chat streams that real servers send, but the simulated one does not."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import (
    ContextLengthExceeded,
    FleetError,
    InvalidRequest,
    MalformedOutput,
    ModelNotServed,
    Overloaded,
    ProviderError,
)
from fleet_worker.mlx.chunks import ChunkReader, parse_usage
from fleet_worker.mlx.events import MAX_EVENT_BYTES, EventParser
from fleet_worker.mlx.reasoning import ReasoningSplitter
from fleet_worker.protocol.reply import Delta, Usage, join


def event(delta=None, finish=None, **more):
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}).encode()


def read(*events, splitter=None):
    reader = ChunkReader(splitter)
    deltas = [delta for one in events for delta in reader.read([one])]
    return reader, deltas + reader.end()


def calls_of(*pieces):
    """The complete tool calls of these deltas; each piece is the `tool_calls` of one delta."""
    return join(read(*(event({"tool_calls": piece}) for piece in pieces))[1])["tool_calls"]


# --- Text


def test_a_delta_has_only_what_says_something():
    chunks = [{"role": "assistant"}, {"content": ""}, {"content": None, "reasoning": None}, {}, None, {"content": "Hi"}]
    assert read(*map(event, chunks))[1] == [Delta(content="Hi")]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_has_two_names(name):
    """Some servers send both, with the same text."""
    assert read(event({name: "Hm"}), event({"content": "Yes", name: "."}))[1] == [
        Delta(reasoning="Hm"),
        Delta(content="Yes", reasoning="."),
    ]
    assert read(event({"reasoning": "Hm", "reasoning_content": "Hm"}))[1] == [Delta(reasoning="Hm")]


def test_reasoning_in_tags_joins_reasoning_in_a_field():
    splitter = ReasoningSplitter()
    assert read(event({"content": "<think>b</think>c", "reasoning": "a"}), splitter=splitter)[1] == [
        Delta(content="c", reasoning="ab")
    ]


def test_text_that_waits_for_a_tag_comes_at_the_end():
    _, deltas = read(event({"content": "a <th"}), event({"content": "e"}), splitter=ReasoningSplitter())
    assert join(deltas)["content"] == "a <the"
    _, deltas = read(event({"content": "a <th"}), splitter=ReasoningSplitter())
    assert deltas == [Delta(content="a "), Delta(content="<th")]


def test_every_piece_stays_a_piece():
    """Events that arrive together are not merged."""
    assert ChunkReader().read([event({"content": text}) for text in "abc"]) == [Delta(content=text) for text in "abc"]


# --- How it ends


def test_the_first_finish_reason_counts():
    """mlx-omni-server repeats it; others send an empty one until the end."""
    reader, _ = read(event({"content": "a"}, ""), event({}, "length"), event({"role": "assistant"}, "stop"))
    assert reader.finish_reason == "length"


def test_a_finish_reason_may_be_left_out_until_it_comes():
    reader, _ = read(b'{"choices": [{"delta": {"content": "a"}}]}')
    assert (reader.finish_reason, reader.done) == (None, False)


def test_content_may_ride_on_the_finish_chunk():
    reader, deltas = read(event({"content": "end"}, "stop"))
    assert (deltas, reader.finish_reason) == ([Delta(content="end")], "stop")


def test_nothing_after_done_is_read():
    reader = ChunkReader()
    assert reader.read([event({"content": "a"}), b"[DONE]", b"junk"]) == [Delta(content="a")]
    assert reader.read([event({"content": "b"})]) == []
    assert reader.done


def test_a_chunk_without_choices_says_nothing():
    """Such chunks have usage, or are pings, or are of a kind that we do not know."""
    assert read(b'{"choices": []}', b'{"choices": null}', b"{}", b'{"type": "ping"}')[1] == []


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"prompt_tokens": 1, "completion_tokens": 2}, Usage(prompt_tokens=1, completion_tokens=2)),
        ({"total_tokens": 3, "cached_tokens": 1}, Usage(total_tokens=3, cached_tokens=1)),
        ({"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 5}}, Usage(prompt_tokens=1, cached_tokens=5)),
        ({"prompt_tokens": None, "completion_tokens": 2}, Usage(completion_tokens=2)),
        ({"prompt_tokens": "1", "completion_tokens": 2.0, "total_tokens": True}, Usage()),
        ({"prompt_tokens_details": None}, Usage()),
        ({"prompt_tokens_details": [5]}, Usage()),
        ({"queue_seconds": 5}, Usage()),
        ({}, Usage()),
        (None, Usage()),
        ([1], Usage()),
        ("many", Usage()),
    ],
)
def test_usage_is_what_are_counts(said, expected):
    assert parse_usage(said) == expected


def test_usage_may_come_with_any_chunk_and_null_before():
    reader, _ = read(event({"content": "a"}, usage=None), event({}, "stop", usage={"prompt_tokens": 1}))
    assert reader.usage == Usage(prompt_tokens=1)
    reader, _ = read(event({}, "stop", usage={"prompt_tokens": 1}), b'{"choices": [], "usage": {"prompt_tokens": 2}}')
    assert reader.usage == Usage(prompt_tokens=2)


# --- Tool calls


def call(name="f", arguments="{}", **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def test_fragments_join_by_their_number():
    first = call("f", "", index=0, id="a")
    assert calls_of(
        [first],
        [{"index": 0, "function": {"arguments": '{"x":'}}],
        [call("g", "", index=1, id="b")],
        [{"index": 0, "function": {"arguments": "1}"}}, {"index": 1, "function": {"arguments": "{}"}}],
    ) == [call("f", '{"x":1}', id="a"), call("g", "{}", id="b")]


@pytest.mark.parametrize("index", [{}, {"index": None}, {"index": "0"}])
def test_calls_without_a_number_are_counted(index):
    """The calls come in one delta, or each in its own."""
    whole = [call("f", id="a"), call("g", id="b")]
    assert calls_of([{**piece, **index} for piece in whole]) == whole
    assert calls_of(*([{**piece, **index}] for piece in whole)) == whole
    unnamed = [call("f"), call("f")]
    assert calls_of(*([{**piece, **index}] for piece in unnamed)) == unnamed


def test_fragments_without_a_number_belong_to_the_last_call():
    more = {"function": {"arguments": "1}"}}
    assert calls_of([call("f", '{"x":', id="a")], [more], [call("g", '{"y":', id="b")], [{**more, "id": "b"}]) == [
        call("f", '{"x":1}', id="a"),
        call("g", '{"y":1}', id="b"),
    ]


def test_a_new_id_begins_a_call_whatever_else_is_missing():
    pieces = [{"id": name, "function": {"arguments": arguments}} for name, arguments in ("a1", "a2", "b3")]
    assert calls_of(*([piece] for piece in pieces)) == [
        {"id": "a", "function": {"name": "", "arguments": "12"}},
        {"id": "b", "function": {"name": "", "arguments": "3"}},
    ]


def test_arguments_may_be_an_object():
    """They become a string of JSON, as OpenAI defines them."""
    assert calls_of([call("f", {"city": "Zürich"}, index=0)]) == [call("f", '{"city": "Zürich"}')]


def test_a_call_may_leave_out_everything():
    assert calls_of([{}], [{"index": 0, "function": None}]) == [{"function": {"name": "", "arguments": ""}}]


# --- What is no chunk


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"5",
        b'"text"',
        b"[DONE",
        b'{"choices": 5}',
        b'{"choices": {"a": 1}}',
        b'{"choices": [5]}',
        b'{"choices": [null]}',
        b'{"choices": [{"delta": 5}]}',
        b'{"choices": [{"delta": [1]}]}',
        event({"content": 5}),
        event({"content": ["a"]}),
        event({"reasoning": {"a": 1}}),
        event({"tool_calls": 5}),
        event({"tool_calls": [5]}),
        event({"tool_calls": {"a": 1}}),
        event({"tool_calls": [{"function": 5}]}),
        event({"tool_calls": [{"function": {"name": 5}}]}),
        event({"tool_calls": [{"function": {"arguments": [1]}}]}),
        b"\xff\xfe",
        b'{"choices": [{"delta": {"content": "\xff"}}]}',
        b'{"choices": [{"delta": {"content": "\\ud800"}}]}',
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("splitter", [None, ReasoningSplitter()])
def test_what_is_no_chunk_is_malformed_output(data, splitter):
    with pytest.raises(MalformedOutput) as raised:
        read(data, splitter=splitter)
    assert not raised.value.retryable


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
part = st.sampled_from(["index", "id", "type", "function", "name", "arguments"])
pieces = st.lists(json_values | st.dictionaries(part, json_values | st.dictionaries(part, json_values)), max_size=3)
deltas = st.fixed_dictionaries(
    {}, optional={"content": json_values, "reasoning": json_values, "tool_calls": pieces | json_values}
)


@given(st.lists(deltas, max_size=4), json_values, json_values)
def test_whatever_a_server_sends_is_read_or_refused_and_what_is_read_joins(said, finish, usage):
    """Only our own errors are raised."""
    try:
        reader, read_deltas = read(*(event(delta, finish, usage=usage) for delta in said), splitter=ReasoningSplitter())
    except FleetError:
        return
    join(read_deltas)
    assert isinstance(reader.finish_reason, str | None)


# --- Errors inside a 200


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ({"message": "Internal server error", "code": 500}, ProviderError),
        ({"message": "queue is full", "code": "429"}, Overloaded),
        ({"message": "slow down", "code": "rate_limit_exceeded"}, Overloaded),
        ({"message": "later", "type": "overloaded_error"}, Overloaded),
        ({"message": "no", "type": "invalid_request_error", "code": None}, InvalidRequest),
        ({"message": "no", "code": 400}, InvalidRequest),
        ({"message": "too long", "code": "context_length_exceeded"}, ContextLengthExceeded),
        ({"message": "maximum context length is 10", "code": 400}, ContextLengthExceeded),
        ({"message": "what?", "code": "model_not_found", "status": 404}, ProviderError),
        ({"message": "model x not found", "code": 404}, ModelNotServed),
        ({"code": "²²²"}, ProviderError),
        ({"code": 10**30}, ProviderError),
        ({"code": "9" * 5000}, ProviderError),
        ({"code": True}, ProviderError),
        ({"code": [1]}, ProviderError),
        ({}, ProviderError),
        ("Internal server error", ProviderError),
        ("", ProviderError),
        (["worse"], ProviderError),
        (False, ProviderError),
    ],
)
def test_an_error_in_a_stream_is_known_by_its_code(error, expected):
    with pytest.raises(FleetError) as raised:
        read(event({"content": "a"}, "stop", error=error))
    assert type(raised.value) is expected
    assert raised.value.retryable is (expected in (ProviderError, Overloaded))


def test_an_error_that_is_null_is_none():
    assert read(event({"content": "a"}, error=None))[1] == [Delta(content="a")]


def test_a_chunk_counts_when_its_text_is_let_go():
    """So the count of an interrupted stream is that of the text that its reader has."""
    reader = ChunkReader(ReasoningSplitter())
    counts = []
    for text in ("a", "<", "thi", "s", " b<"):
        reader.read([event({"content": text})])
        counts.append(reader.tokens)
    assert counts == [1, 1, 1, 4, 5]
    assert reader.end()
    assert reader.tokens == 5
    reader.read([event({"content": "<"})])
    assert reader.end()
    assert reader.tokens == 6


# --- Events

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
            events.append(b"\n".join(data))
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
    assert parsed(data.draw(cut(st.just(stream)))) == events


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
