"""The answers of `/v1/messages`, as Anthropic's own SDK reads them."""

import json
from functools import cache

import anthropic
import httpx2
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fleet_worker.gateway.dialects import anthropic_messages
from fleet_worker.gateway.problems import Problem
from fleet_worker.protocol.reply import ChatResponse, Delta, Timings, Usage

BODY = {"model": "sea", "max_tokens": 100, "messages": [{"role": "user", "content": "hello" * 100}]}
REQUEST_ID = "0190a1b2-c3d4-7000-8000-0123456789ab"


def writer(**fields):
    return anthropic_messages.asked({**BODY, "stream": True, **fields}, REQUEST_ID, 1_700_000_000).writer


def response(finish_reason="stop", usage=None, **fields):
    usage = usage or Usage(prompt_tokens=50, completion_tokens=7, total_tokens=57, cached_tokens=30)
    timings = Timings(queue_wait=0.0, duration=1.0)
    ids = {"id": "r", "attempt": 1, "seq": 9, "node": "local@mini-1", "instance": "local", "model": "sea"}
    return ChatResponse(**ids, usage=usage, timings=timings, finish_reason=finish_reason, **fields)


def said(content):
    return Delta(content=content)


def thought(reasoning):
    return Delta(reasoning=reasoning)


def called(arguments, index=0, **begin):
    """Return a fragment of a call of a tool; with `name` and `id` its first one."""
    name = {"name": begin.pop("name")} if "name" in begin else {}
    return Delta(tool_calls=[{"index": index, **begin, "function": {**name, "arguments": arguments}}])


@cache
def checked_events():
    return TypeAdapter(RawMessageStreamEvent)


def stream(*deltas, ending=None, **fields):
    """Return the bytes of a stream. Each delta is a frame of its own."""
    made = writer(**fields)
    return made.begin() + b"".join(made.deltas([delta]) for delta in deltas) + made.end(ending or response())


def events(streamed):
    """Return the events, each checked by the model of the SDK, without pings."""
    found = []
    for part in streamed.decode("ascii").split("\n\n")[:-1]:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            found.append(checked_events().validate_python(event))
    return found


def client(body, status=200, media_type="text/event-stream"):
    """Return a client of Anthropic's whose every request gets this answer."""
    answer = httpx2.Response(status, content=body, headers={"content-type": media_type})
    transport = httpx2.MockTransport(lambda request: answer)
    http = httpx2.Client(transport=transport)
    return anthropic.Anthropic(api_key="k", base_url="http://fleet", max_retries=0, http_client=http)


def accumulated(streamed):
    """Return the message that the SDK's stream helper puts together."""
    with client(streamed).messages.stream(**BODY) as reading:
        return reading.get_final_message()


def whole(given, **fields):
    return Message.model_validate_json(writer(**fields).whole(given))


THINKING_AND_CALLING = (
    [
        thought("It is"),
        thought(" near."),
        said("\n\n"),
        said("I "),
        said("look.\u2028"),
        called('{"at":', id="call_9", name="look"),
        called(' "sea"}'),
        called("", index=1, id="functions.look:1", name="look"),
    ],
    response(
        "tool_calls",
        reasoning="It is near.",
        content="\n\nI look.\u2028",
        tool_calls=[
            {
                "index": 0,
                "id": "call_9",
                "type": "function",
                "function": {"name": "look", "arguments": '{"at": "sea"}'},
            },
            {"index": 1, "id": "functions.look:1", "function": {"name": "look", "arguments": ""}},
        ],
    ),
)


def test_a_stream_has_its_events_in_order():
    deltas, ending = THINKING_AND_CALLING
    read = events(stream(*deltas, ending=ending))
    assert [event.type for event in read if event.type != "content_block_delta"] == [
        "message_start",
        *["content_block_start", "content_block_stop"] * 4,
        "message_delta",
        "message_stop",
    ]
    starts = [event for event in read if event.type == "content_block_start"]
    assert [(event.index, event.content_block.type) for event in starts] == [
        (0, "thinking"),
        (1, "text"),
        (2, "tool_use"),
        (3, "tool_use"),
    ]
    open_block = None
    for event in read:
        if event.type == "content_block_start":
            open_block = event.index
        elif event.type in ("content_block_delta", "content_block_stop"):
            assert event.index == open_block


def test_a_ping_follows_the_start():
    names = [line for line in writer().begin().decode().split("\n") if line.startswith("event")]
    assert names == ["event: message_start", "event: ping"]
    assert writer().heartbeat == b'event: ping\ndata: {"type":"ping"}\n\n'


def test_a_stream_and_a_whole_answer_are_the_same():
    deltas, ending = THINKING_AND_CALLING
    message = whole(ending)
    assert accumulated(stream(*deltas, ending=ending)).to_dict() == message.to_dict()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[1].text == "\n\nI look.\u2028"
    assert message.content[2].input == {"at": "sea"}
    assert (message.content[2].id, message.content[3].id) == ("toolu_call_9", "toolu_functions_x2e_look_x3a_1")
    assert message.content[3].input == {}
    assert message.content[0].signature
    assert (message.id, message.model, message.role) == ("msg_0190a1b2c3d4700080000123456789ab", "sea", "assistant")


def test_usage_counts_what_came_from_the_cache_apart():
    start, *_, last, _ = events(stream(said("a")))
    assert start.message.usage.output_tokens == 0
    assert 100 < start.message.usage.input_tokens < 200  # an estimate, of 500 letters
    assert (last.usage.input_tokens, last.usage.cache_read_input_tokens, last.usage.output_tokens) == (20, 30, 7)
    assert accumulated(stream(said("a"))).usage.input_tokens == 20


def test_what_the_server_does_not_count_stays_an_estimate():
    start, *_, last, _ = events(stream(said("a"), ending=response(usage=Usage())))
    assert last.usage.input_tokens == start.message.usage.input_tokens
    assert last.usage.output_tokens == 0


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason"),
    [("stop", "end_turn"), ("length", "max_tokens"), ("tool_calls", "end_turn"), ("content_filter", "refusal")],
)
def test_why_an_answer_ended(finish_reason, stop_reason):
    assert whole(response(finish_reason, content="a")).stop_reason == stop_reason
    assert accumulated(stream(said("a"), ending=response(finish_reason))).stop_reason == stop_reason


def test_a_stop_sequence_that_ended_an_answer_is_told():
    ending = response("stop", content="a", stop_string="END")
    for message in (whole(ending), accumulated(stream(said("a"), ending=ending))):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")


def test_an_answer_that_calls_a_tool_ends_for_that():
    call = {"id": "c", "function": {"name": "look", "arguments": "{}"}}
    assert whole(response("stop", tool_calls=[call])).stop_reason == "tool_use"


def test_blank_text_is_no_block():
    """Anthropic's clients may not send one back, and models write some before calls."""
    call = called("{}", id="c", name="look")
    assert [block.type for block in accumulated(stream(said("\n"), said("\n"), call)).content] == ["tool_use"]
    assert accumulated(stream(said("\n\n"), said(" "), said("a"))).content[0].text == "\n\n a"
    assert whole(response(content=" \n")).content == []


def test_thoughts_between_texts_are_blocks_of_their_own():
    message = accumulated(stream(said("a"), thought("hm"), said("b"), Delta(content="c", reasoning="oh")))
    assert [block.type for block in message.content] == ["text", "thinking", "text", "thinking", "text"]


def test_no_thoughts_follow_a_call():
    """vllm-mlx sends the last of them beside the finish_reason."""
    message = accumulated(stream(thought("a"), called("{}", id="c", name="look"), thought("b"), said("so")))
    assert [block.type for block in message.content] == ["thinking", "tool_use", "text"]


def test_no_thoughts_are_shown_to_a_client_that_wants_none():
    ending = response(reasoning="hm", content="a")
    assert [block.type for block in whole(ending, thinking={"type": "disabled"}).content] == ["text"]
    message = accumulated(stream(thought("hm"), said("a"), thinking={"type": "disabled"}))
    assert [block.type for block in message.content] == ["text"]


def test_thoughts_may_be_shown_without_their_text():
    hidden = {"type": "adaptive", "display": "omitted"}
    streamed = stream(thought("secret"), said("a"), thinking=hidden)
    assert b"secret" not in streamed
    message = accumulated(streamed)
    assert (message.content[0].thinking, bool(message.content[0].signature)) == ("", True)
    assert whole(response(reasoning="secret", content="a"), thinking=hidden).content[0].thinking == ""


def test_calls_that_are_mixed_are_put_together():
    mixed = [called('{"a"', 0, id="x", name="one"), called('{"b"', 1, id="y", name="two"), called(":1}", 0)]
    message = accumulated(stream(*mixed, called(":2}", 1)))
    assert [block.input for block in message.content] == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("arguments", "understood"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        ('{"a": 1, "b": "cu', {"a": 1}),
        ("[1]", {"unreadable_arguments": "[1]"}),
        ("{at: sea}", {"unreadable_arguments": "{at: sea}"}),
        ('{"a": NaN}', {"unreadable_arguments": '{"a": NaN}'}),
    ],
)
def test_arguments_that_a_model_got_wrong(arguments, understood):
    call = {"id": "c", "function": {"name": "look", "arguments": arguments}}
    assert whole(response("length", tool_calls=[call])).content[0].input == understood


pieces = st.one_of(
    st.builds(said, st.sampled_from(["a", " ", "\n", "größer ", "\u2028", '"'])),
    st.builds(thought, st.sampled_from(["hm", " "])),
    st.builds(called, st.sampled_from(["", '{"a":', "1}"]), st.integers(0, 2), name=st.just("look")),
)


@given(st.lists(pieces, max_size=12))
def test_blocks_begin_and_end_one_after_the_other_and_lose_nothing(deltas):
    read = events(stream(*deltas))
    number, is_open = -1, False
    for event in read[1:-2]:
        if event.type == "content_block_start":
            assert (event.index, is_open) == (number + 1, False)
            number, is_open = event.index, True
        elif event.type == "content_block_stop":
            assert (event.index, is_open) == (number, True)
            is_open = False
        else:
            assert is_open
            assert event.index == number or event.delta.type == "input_json_delta"
    assert not is_open
    texts = [event.delta.text for event in read if getattr(getattr(event, "delta", None), "type", "") == "text_delta"]
    told = "".join(delta.content or "" for delta in deltas)
    assert "".join("".join(texts).split()) == "".join(told.split())


def test_an_answer_without_anything_is_complete():
    assert accumulated(stream()).content == []


def test_a_stream_that_continues_on_another_node_does_not_show_it():
    assert stream(said("a"), Delta(resumed=True), said("b")) == stream(said("a"), said("b"))


def test_a_late_error_is_an_event_that_the_sdk_raises():
    made = writer()
    problem = Problem(status=503, code="overloaded", message="busy")
    streamed = made.begin() + made.deltas([said("a")]) + made.failed(problem)
    with pytest.raises(anthropic.APIStatusError) as raised, client(streamed).messages.stream(**BODY) as reading:
        reading.until_done()
    assert raised.value.body == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "busy"},
        "request_id": REQUEST_ID,
    }


def test_an_early_error_is_read_by_the_sdk():
    problem = Problem(status=404, code="model_not_found", message="no such model")
    body = anthropic_messages.problem_body(problem, REQUEST_ID)
    with pytest.raises(anthropic.NotFoundError, match="no such model") as raised:
        client(body, 404, "application/json").messages.create(**BODY)
    assert raised.value.type == "not_found_error"
