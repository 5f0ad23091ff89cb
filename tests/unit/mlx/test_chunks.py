"""Events and chunks of chat streams that real servers send, but the simulated one does not."""

import json

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
