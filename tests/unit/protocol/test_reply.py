"""The frames of a reply, joined deltas, and encoded vectors."""

import base64
import json
import struct
import traceback
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import FleetError, InvalidRequest, Overloaded
from fleet_worker.protocol.reply import (
    Accepted,
    Alive,
    ChatResponse,
    Delta,
    Deltas,
    EmbedResponse,
    Failure,
    Reply,
    Timings,
    Usage,
    join,
    pack_vector,
    unpack_vector,
)
from tests.envelopes import finite, objects, texts

SECRET = "swordfish"


def packed(vector):
    return pack_vector(array("f", vector))


USAGE = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
TIMINGS = Timings(queue_wait=0.1, ttft=0.2, duration=0.3, tokens_per_second=9.5)
ends = {"node": "local@mini-7", "instance": "local", "model": "m", "usage": USAGE, "timings": TIMINGS}
heads = st.fixed_dictionaries({"id": texts.filter(bool), "attempt": st.integers(1, 99), "seq": st.integers(0, 2**40)})
deltas = st.builds(
    Delta,
    content=st.none() | texts,
    reasoning=st.none() | texts,
    tool_calls=st.none() | st.lists(objects, max_size=2),
)
frames = st.one_of(
    st.builds(lambda head, wait: Accepted(**head, instance="local", queue_wait=wait), heads, finite),
    st.builds(
        lambda head, pieces: Deltas(**head, deltas=pieces, tokens=len(pieces)), heads, st.lists(deltas, max_size=3)
    ),
    st.builds(
        lambda head, text, calls: ChatResponse(**head, **ends, content=text, tool_calls=calls, finish_reason="stop"),
        heads,
        st.none() | texts,
        st.lists(objects, max_size=2),
    ),
    st.builds(
        lambda head, vectors: EmbedResponse(**head, **ends, data=[packed(each) for each in vectors], dimensions=2),
        heads,
        st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=2), max_size=2),
    ),
    st.builds(
        lambda head, metadata: Failure(
            **head, code="overloaded", message="busy", error_class="Overloaded", retryable=True, metadata=metadata
        ),
        heads,
        objects,
    ),
    st.builds(lambda head: Alive(**head), heads),
)


@given(st.lists(frames, max_size=4))
def test_a_reply_is_the_same_after_its_way(sent):
    reply = Reply(v=2, node="local@mini-7", frames=sent)
    body = reply.encode()
    assert json.loads(body)["v"] == 2
    assert Reply.encoded("local@mini-7", sent) == body
    assert Reply.decode(body) == reply
    assert Reply.decode(body.decode()) == reply


def test_what_a_newer_node_adds_to_a_reply_is_ignored():
    deltas = Deltas(id="r-1", attempt=1, seq=1, deltas=[Delta(content="Hi")], tokens=1)
    ended = {"usage": Usage(total_tokens=2), "timings": Timings(queue_wait=0, duration=1), "finish_reason": "stop"}
    end = ChatResponse(id="r-1", attempt=1, seq=2, node="n", instance="i", model="m", **ended)
    reply = Reply(v=2, node="n", frames=[deltas, end])
    assert Reply.decode(json.dumps(with_novelties(json.loads(reply.encode())))) == reply


def with_novelties(said):
    """Add an unknown field to each object, but not to the metadata, which has no fixed fields."""
    if isinstance(said, dict):
        known = {key: value if key == "metadata" else with_novelties(value) for key, value in said.items()}
        return {**known, "novelty": SECRET}
    return [with_novelties(each) for each in said] if isinstance(said, list) else said


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"Hi",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"v":2,"node":"n"}',
        b'{"v":1,"node":"n","frames":[]}',
        b'{"v":3,"node":"n","frames":[]}',
        b'{"v":"2","node":"n","frames":[]}',
        b'{"v":2,"node":"n","frames":[{"id":"a","attempt":1,"seq":0}]}',
        b'{"v":2,"node":"n","frames":[{"kind":"song","id":"a","attempt":1,"seq":0}]}',
        b'{"v":2,"node":"n","frames":[{"kind":"alive","id":"a","attempt":1,"seq":"0"}]}',
        b'{"v":2,"node":"n","frames":[{"kind":"alive","id":"a","attempt":1,"seq":0.5}]}',
        b'{"v":2,"node":"n","frames":[{"kind":"accepted","id":"a","attempt":1,"seq":0,"instance":"i","queue_wait":NaN}]}',
        b'{"v":2,"node":"n","frames":[{"kind":"deltas","id":"a","attempt":1,"seq":1,"deltas":[{"content":5}]}]}',
    ],
)
def test_what_is_no_reply_of_this_version_is_refused(body):
    with pytest.raises(InvalidRequest, match="not a valid Reply"):
        Reply.decode(body)


@pytest.mark.parametrize(
    "frame",
    [
        {"kind": SECRET},
        {"kind": "deltas", "deltas": SECRET},
        {"kind": "deltas", "deltas": [SECRET]},
        {"kind": "deltas", "deltas": [{"content": [SECRET]}]},
        {"kind": "response", "content": [SECRET], "finish_reason": SECRET},
        {"kind": "embedding", "data": SECRET},
        {"kind": "error", "metadata": SECRET},
        SECRET,
    ],
    ids=repr,
)
def test_a_refused_reply_is_not_repeated(frame):
    body = json.dumps({"v": 2, "node": "n", "frames": [frame]})
    for broken in (body, body[:-2], f"{SECRET} {body}"):
        with pytest.raises(InvalidRequest) as caught:
            Reply.decode(broken)
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_frames_show_no_completion_and_no_vector():
    head = {"id": "r-1", "attempt": 1, "seq": 1}
    call = {"function": {"name": SECRET, "arguments": SECRET}}
    vector = packed([0.25, 0.5])
    embedded = EmbedResponse(**head, **ends, data=[vector], dimensions=2)
    delta = Delta(content=SECRET, reasoning=SECRET, tool_calls=[call])
    answer = ChatResponse(**head, **ends, content=SECRET, reasoning=SECRET, tool_calls=[call], finish_reason="stop")
    assert embedded.vectors == [[0.25, 0.5]]
    sent = [
        delta,
        Deltas(**head, deltas=[delta], tokens=1),
        answer,
        embedded,
        Reply(v=2, node="n", frames=[answer, embedded]),
    ]
    shown = " ".join(f"{each!r} {each}" for each in sent)
    assert SECRET not in shown
    assert vector not in shown
    assert "0.25" not in shown
    assert "r-1" in shown


def test_a_failure_is_rebuilt_as_the_error_it_was():
    failure = Failure(
        id="r-1",
        attempt=1,
        seq=1,
        code="overloaded",
        message="busy",
        error_class="Overloaded",
        retryable=False,
        metadata={"retry_after": 2.0},
    )
    error = failure.error()
    assert type(error) is Overloaded
    assert (error.message, error.retryable, error.metadata) == ("busy", False, {"retry_after": 2.0})
    assert type(failure.model_copy(update={"code": "of tomorrow"}).error()) is FleetError


def test_a_response_knows_its_request():
    assert ChatResponse(id="r-1", attempt=1, seq=1, finish_reason="stop", **ends).request_id == "r-1"
    assert EmbedResponse(id="r-2", attempt=1, seq=1, data=[], dimensions=2, **ends).request_id == "r-2"


def test_reading_the_vectors_does_not_change_a_response():
    first, second = (EmbedResponse(id="r", attempt=1, seq=1, data=[packed([1.5])], dimensions=1, **ends) for _ in "ab")
    assert first.vectors == [[1.5]]
    assert first == second
    assert first.model_dump_json() == second.model_dump_json()


@pytest.mark.parametrize("message", [Delta(content="a"), USAGE, TIMINGS, Alive(id="r", attempt=1, seq=0)])
def test_messages_do_not_change(message):
    name = next(iter(type(message).model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(message, name, None)


# --- Vectors


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_a_vector_of_float32_travels_exactly(vector):
    there = unpack_vector(packed(vector)).tolist()
    assert struct.pack(f"{len(vector)}d", *there) == struct.pack(f"{len(vector)}d", *vector)


@given(st.lists(st.floats(-1, 1)))
def test_a_vector_travels_as_little_endian_float32(vector):
    assert base64.b64decode(packed(vector)) == struct.pack(f"<{len(vector)}f", *vector)


# --- Joined deltas


@st.composite
def fragments(draw):
    """Draw tool calls, and deltas with parts of their arguments, one call after the other or alternating."""
    calls = [
        {"id": f"call-{number}", "type": "function", "function": {"name": f"f{number}", "arguments": draw(texts)}}
        for number in range(draw(st.integers(0, 3)))
    ]
    pieces = []
    for index, call in enumerate(calls):
        function = call["function"]
        cut = draw(st.integers(0, len(function["arguments"])))
        head = {
            **call,
            "index": index,
            "function": {"name": function["name"], "arguments": function["arguments"][:cut]},
        }
        tail = [{"index": index, "function": {"arguments": letter}} for letter in function["arguments"][cut:]]
        pieces.append([head, *tail])
    deltas = []
    while any(pieces):
        queue = draw(st.sampled_from([queue for queue in pieces if queue]))
        deltas.append(Delta(tool_calls=[queue.pop(0)]))
    return calls, deltas


@given(fragments())
def test_tool_calls_are_whole_again(case):
    calls, pieces = case
    assert join(pieces)["tool_calls"] == calls


@given(st.lists(st.tuples(st.none() | texts, st.none() | texts)))
def test_text_and_reasoning_are_joined_apart(sides):
    whole = join(Delta(content=content, reasoning=reasoning) for content, reasoning in sides)
    assert (whole["content"] or "") == "".join(content or "" for content, _ in sides)
    assert (whole["reasoning"] or "") == "".join(reasoning or "" for _, reasoning in sides)


def test_of_nothing_comes_nothing():
    assert join([]) == {"content": None, "reasoning": None, "tool_calls": []}
    assert join([Delta(), Delta(content="")]) == {"content": None, "reasoning": None, "tool_calls": []}


def test_whole_calls_without_numbers_stay_apart():
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in "ab"]
    assert join([Delta(tool_calls=calls)])["tool_calls"] == calls
    assert join([Delta(tool_calls=[call]) for call in calls])["tool_calls"] == calls


def test_a_call_may_come_without_arguments():
    pieces = [{"index": 0, "id": "a", "type": "function", "function": {"name": "now", "arguments": None}}]
    assert join([Delta(tool_calls=pieces)])["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "now", "arguments": ""}}
    ]


HEAD = {"id": "r-1", "attempt": 1, "seq": 0}
ACCEPTED = {**HEAD, "kind": "accepted", "instance": "local", "queue_wait": 0.0}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"id": each} for each in (None, 5, ["r-1"], "", "x" * 201)),
        *({"attempt": each} for each in (None, "1", 1.5, 0, 1_001, 10**30)),
        *({"seq": each} for each in (None, "0", -1, 10**30)),
        *({"queue_wait": each} for each in (None, "0", [0])),
        *({"kind": each} for each in (None, "", "unheard of", ["accepted"])),
    ],
)
def test_a_frame_of_a_stranger_is_refused_without_a_quotation(wrong):
    with pytest.raises(InvalidRequest) as caught:
        Reply.decode(json.dumps({"v": 2, "node": "n", "frames": [{**ACCEPTED, **wrong, "instance": SECRET}]}).encode())
    assert SECRET not in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"null", b"5", b"\xff", b"{}", b"[" * 100_000, b'{"v": 2, "node": "n", "frames": 5}'),
        *(b'{"v": %s, "node": "n", "frames": []}' % version for version in (b"1", b"3", b'"2"', b"[2]")),
        *(b'{"v": 2, "node": %s, "frames": []}' % name for name in (b"5", b"null", b'"%s"' % (b"x" * 256))),
        json.dumps({"v": 2, "node": "n", "frames": [{**HEAD, "kind": "alive"}] * 20_001}).encode(),
        b'{"v": 2, "node": "n", "frames": [{"id": "r", "attempt": 1, "seq": 0, "kind": "accepted", "instance": "i",'
        b' "queue_wait": 1e400}]}',
    ],
)
def test_what_is_no_reply_is_refused(body):
    with pytest.raises(InvalidRequest):
        Reply.decode(body)


@pytest.mark.parametrize(
    "fragment",
    [
        {"index": [1]},
        {"index": "a"},
        {"index": None},
        {"function": "f"},
        {"function": [1]},
        {"function": {"name": 5}},
        {"function": {"arguments": {}}},
    ],
)
def test_fragments_of_tool_calls_that_cannot_be_joined_are_refused_before_anybody_joins_them(fragment):
    frame = {"kind": "deltas", "id": "r", "attempt": 1, "seq": 0, "tokens": 1, "deltas": [{"tool_calls": [fragment]}]}
    with pytest.raises(InvalidRequest, match="tool_calls"):
        Reply.decode(json.dumps({"v": 2, "node": "n", "frames": [frame]}))
