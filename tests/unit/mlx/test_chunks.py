"""Events and chunks of chat streams that real servers send, but the simulated one does not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import (
    ContextLengthExceeded,
    FleetError,
    InstanceUnavailable,
    InvalidRequest,
    MalformedOutput,
    ModelNotServed,
    Overloaded,
    ProviderError,
)
from fleet_worker.mlx.chunks import ChunkReader, parse_usage
from fleet_worker.mlx.events import EventParser
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


TEXTS = [{"content": "Hi"}, {"content": " there"}]
SAID = [Delta(content="Hi"), Delta(content=" there")]


def choices(*choices, **more):
    return json.dumps({"choices": choices, **more}).encode()


@pytest.mark.parametrize("key", ["delta", "message"])
def test_text_may_be_in_a_message_for_a_delta(key):
    assert read(*(choices({key: {"role": "assistant", **text}}) for text in TEXTS))[1] == SAID


@pytest.mark.parametrize("silent", [{"message": {"content": ""}}, {"text": ""}, {"message": None}])
def test_a_message_without_text_between_others_ends_nothing(silent):
    messages = [choices({"message": text}) for text in TEXTS]
    assert read(messages[0], choices(silent), *messages[1:])[1] == SAID


def test_messages_may_begin_with_reasoning():
    thought, said = choices({"message": {"reasoning": "Hm"}}), choices({"message": {"content": "Yes"}})
    assert read(thought, said)[1] == [Delta(reasoning="Hm"), Delta(content="Yes")]


def test_text_may_be_that_of_a_completion():
    assert read(*(choices({"text": text["content"]}) for text in TEXTS), choices({"text": ""}))[1] == SAID


@pytest.mark.parametrize("delta", [{"delta": {}}, {"delta": None}, {}])
@pytest.mark.parametrize("whole", [{"message": {"content": "Hi there"}}, {"text": "Hi there"}])
def test_a_whole_message_after_its_deltas_is_not_said_again(whole, delta):
    deltas = [event({"role": "assistant"}), *map(event, TEXTS)]
    reader, said = read(*deltas, choices({**delta, **whole, "finish_reason": "stop"}))
    assert (said, reader.finish_reason) == (SAID, "stop")


def test_content_may_be_a_list_of_parts():
    """Mistral's thinking is a list of parts in a part."""
    parts = [{"type": "text", "text": "H"}, {"type": "output_text", "text": "i"}]
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}
    assert read(event({"content": parts}))[1] == [Delta(content="Hi")]
    assert read(event({"content": [thinking, *parts]}))[1] == [Delta(content="Hi", reasoning="Hm")]
    assert read(event({"content": [{"type": "reasoning", "text": "Hm"}]}))[1] == [Delta(reasoning="Hm")]
    assert read(event({"content": []}))[1] == []


def test_a_refusal_of_the_model_is_text():
    assert read(event({"content": None, "refusal": "I will not."}))[1] == [Delta(content="I will not.")]


def test_a_function_call_is_a_tool_call():
    """As OpenAI named it before there were several."""
    pieces = [{"name": "f", "arguments": ""}, {"arguments": '{"x":'}, {"arguments": "1}"}]
    said = join(read(*(event({"content": None, "function_call": piece}) for piece in pieces))[1])
    assert said["tool_calls"] == [call("f", '{"x":1}')]


def test_one_of_several_choices_is_read():
    """We ask for one. Its number may be another than 0, and need not be said."""
    other = {"index": 1, "delta": {"content": "no"}, "finish_reason": "length"}
    mine = [{"index": 0, "delta": text} for text in TEXTS]
    assert read(choices(other, mine[0]), choices(other), choices(mine[1], other))[1] == SAID
    assert read(choices({**mine[0], "index": 7}), choices({**mine[1], "index": 7}))[1] == SAID
    assert read(choices({**mine[0], "index": None}), choices(mine[1]), choices(other))[1] == SAID
    reader, _ = read(choices(mine[0]), choices(other))
    assert reader.finish_reason is None


# --- Half characters


def test_half_a_pair_of_surrogates_is_joined_with_its_other_half():
    first, second = (b'{"choices": [{"delta": {"content": "%b"}}]}' % text for text in (rb"hi \ud83d", rb"\ude00 yo"))
    for splitter in (None, ReasoningSplitter()):
        assert join(read(first, second, splitter=splitter)[1])["content"] == "hi 😀 yo"
        assert join(read(first, event({}), splitter=splitter)[1])["content"] == "hi �"
        assert join(read(first, event({"content": "."}), splitter=splitter)[1])["content"] == "hi �."


@pytest.mark.parametrize("field", ["content", "reasoning", "reasoning_content"])
def test_a_half_at_the_end_of_all_is_replaced(field):
    half = b'{"choices": [{"delta": {"%b": "a\xe2\x82"}}]}' % field.encode()
    assert join(read(half)[1])["content" if field == "content" else "reasoning"] == "a�"


def test_arguments_of_tool_calls_may_be_cut_in_a_character():
    pieces = [rb"{\"x\":\"\ud83d", rb"\ude00\"}"]
    fragment = b'{"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "%b"}}]}}]}'
    (whole,) = join(read(*(fragment % piece for piece in pieces))[1])["tool_calls"]
    assert json.loads(whole["function"]["arguments"]) == {"x": "😀"}


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


@pytest.mark.parametrize("done", [b"[DONE]", b" [DONE] ", b"[done]", b'"[DONE]"'])
def test_done_is_spelled_in_several_ways(done):
    reader = ChunkReader()
    assert reader.read([event({"content": "a"}), done, event({"content": "b"}), done]) == [Delta(content="a")]
    assert reader.done


def test_text_after_the_finish_reason_is_not_part_of_the_answer():
    """Usage is, and an error is one. A server that goes on and on is not read to its end."""
    reader, deltas = read(
        event({"content": "a"}, "stop"), event({"content": "b"}, "length"), event({}, usage={"total_tokens": 2})
    )
    assert (deltas, reader.finish_reason, reader.usage.total_tokens) == ([Delta(content="a")], "stop", 2)
    with pytest.raises(ProviderError):
        reader.read([b'{"error": "late"}'])
    assert not reader.overruns
    reader.read([event({"content": "b"})] * 1000)
    assert reader.overruns


@pytest.mark.parametrize("reason", [None, "", "null", "None", "NONE", 0, False])
def test_a_finish_reason_may_be_said_to_be_none(reason):
    assert read(event({"content": "a"}, reason))[0].finish_reason is None


def test_the_case_of_a_finish_reason_does_not_matter():
    assert read(event({"content": "a"}, "STOP"))[0].finish_reason == "stop"


HEARTBEATS = [b" ", b"\t", b"ping", b"Heartbeat", b"keepalive", b"{}", b'{"type": "ping"}', b'{"choices": []}']


@pytest.mark.parametrize("heartbeat", HEARTBEATS)
def test_heartbeats_say_nothing_and_are_no_progress(heartbeat):
    reader = ChunkReader()
    assert (reader.read([heartbeat]), reader.moved) == ([], False)
    assert (reader.read([heartbeat, event({})]), reader.moved) == ([], True)
    assert (reader.read([heartbeat]), reader.moved) == ([], False)


# --- An answer in one piece


def completion(message, **choice):
    return choices({"index": 0, "message": {"role": "assistant", **message}, **choice}, usage={"completion_tokens": 3})


def test_a_whole_completion_is_an_answer():
    """Its finish_reason may be missing: it is whole."""
    for end in ({"finish_reason": "length"}, {"finish_reason": None}, {}):
        reader = ChunkReader(ReasoningSplitter())
        said = reader.read_whole(completion({"content": "Hi", "reasoning": "Hm"}, **end))
        assert said == [Delta(content="Hi", reasoning="Hm")]
        assert (reader.finish_reason, reader.done) == (end.get("finish_reason") or "stop", True)
        assert reader.usage == Usage(completion_tokens=3)


def test_half_of_a_completion_is_none():
    reader = ChunkReader()
    assert reader.read_whole(completion({"content": "Hi"})[:50]) == []
    assert (reader.finish_reason, reader.done) == (None, False)


@pytest.mark.parametrize("body", [b"{}", b"[]", b'"Hi"', b'{"choices": []}', b'{"data": [1]}'])
def test_other_json_is_no_answer(body):
    with pytest.raises(MalformedOutput):
        ChunkReader().read_whole(body)


def test_a_web_page_is_no_answer_and_another_server_may_have_one():
    with pytest.raises(MalformedOutput, match="base_url") as raised:
        ChunkReader().read_whole(b"<!doctype html><html>...")
    assert raised.value.retryable


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
        ({"prompt_tokens": -1, "completion_tokens": 2**31, "total_tokens": 10**400}, Usage()),
        ({"prompt_tokens": float("nan"), "completion_tokens": float("inf"), "total_tokens": 0}, Usage(total_tokens=0)),
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
        event({"content": [{"type": "image_url", "image_url": "x"}]}),
        event({"content": [{"type": "text"}]}),
        event({"content": [{"type": "text", "text": 5}]}),
        b'{"choices": [{"message": "Hi"}]}',
        b'{"choices": [{"text": 5}]}',
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


texts = st.sampled_from([b"a", b"<think>", rb"\ud83d", rb"\ude00", b"\xf0\x9f", b"\x98\x80", b"\xff", b'"'])
lines = st.builds(
    lambda field, text: b'data: {"choices": [{"delta": {"%b": "%b"}}]}\n\n' % (field, text),
    st.sampled_from([b"content", b"reasoning", b"role", b"\xc3"]),
    texts,
)


@given(st.lists(lines | st.binary(max_size=9) | st.sampled_from([b"\n\n", b"event: error\n", b"data: "]), max_size=8))
def test_whatever_the_bytes_of_a_stream_are_what_is_read_can_be_sent(stream):
    events, reader = EventParser(), ChunkReader(ReasoningSplitter())
    try:
        said = [delta for received in stream for delta in reader.read(events.feed(received))]
        said += reader.read(events.end())
    except FleetError:
        return
    for delta in said + reader.end():
        delta.model_dump_json()


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
        ({"message": "what?", "code": "model_not_found", "status": 404}, ModelNotServed),
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


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"error": {"message": "full", "code": 429}}, Overloaded),
        ({"error": {"error": {"code": "429"}}}, Overloaded),
        ({"error": '{"code": 429}'}, Overloaded),
        ({"detail": "Internal Server Error"}, ProviderError),
        ({"detail": {"error": {"code": 429}}}, Overloaded),
        ({"detail": [{"loc": ["body", "stop"], "msg": "Input should be a valid list"}]}, InvalidRequest),
        ({"object": "error", "message": "no", "type": "BadRequestError", "code": 400}, InvalidRequest),
        ({"object": "error", "message": "no", "type": "BadRequestError"}, InvalidRequest),
        ({"object": "error", "message": "maximum context length is 10", "code": 400}, ContextLengthExceeded),
        ({"type": "error", "message": "no"}, ProviderError),
        ({"status": "error"}, ProviderError),
        ({"errors": ["no"]}, ProviderError),
        ({"code": 503, "message": "loading"}, InstanceUnavailable),
    ],
)
def test_an_error_has_many_forms(said, expected):
    """In a stream, and in the place of one."""
    for fail in (read, ChunkReader().read_whole):
        with pytest.raises(FleetError) as raised:
            fail(json.dumps(said).encode())
        assert type(raised.value) is expected


@pytest.mark.parametrize("finish", [None, "stop"])
@pytest.mark.parametrize("of", ["choice", "delta"])
def test_an_error_may_be_in_a_choice(of, finish):
    """Even if the server says that the answer has come to its end."""
    error = {"error": {"message": "full", "code": 429}}
    delta, choice = (error, {}) if of == "delta" else ({"content": ""}, error)
    with pytest.raises(Overloaded):
        read(event({"content": "Hel"}), choices({"index": 0, "delta": delta, "finish_reason": finish, **choice}))


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


@pytest.mark.parametrize(
    "delta",
    [
        {"thinking": "Hm"},
        {"content": "", "thinking": "Hm"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "H"}, {"type": "reasoning.summary", "summary": "m"}]},
        {"reasoning": "Hm", "reasoning_details": [{"type": "reasoning.text", "text": "Hm"}], "thinking": "Hm"},
    ],
)
def test_other_names_of_reasoning_are_known(delta):
    assert read(event(delta))[1] == [Delta(reasoning="Hm")]
