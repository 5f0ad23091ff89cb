"""A chat completion as OpenAI's SDK types it: what a stream tells is what the whole answer is."""

import json

from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fleet_worker.gateway.dialects.openai_chat import ChatWriter
from fleet_worker.protocol.reply import ChatResponse, Delta, Timings, Usage, join

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"
texts = st.sampled_from(["a", " ", "\n", "é", "👍", "\u2028", "\x00", "\r\n", "data: [DONE]\n\n", '{"a":'])
fragments = st.builds(
    lambda index, given_id, arguments: {"index": index, "id": given_id, "function": {"arguments": arguments}},
    st.integers(0, 2),
    st.sampled_from([None, "", "same"]),
    st.sampled_from([None, "", '{"a": ', "1}"]),
)
pieces = st.builds(Delta, content=texts) | st.builds(Delta, reasoning=texts) | st.builds(Delta, resumed=st.just(True))


@st.composite
def answers(draw):
    """The batches of a stream: text, thoughts, and up to three calls that go on side by side."""
    named = [
        Delta(tool_calls=[{"index": at, "id": f"c{at}", "type": "function", "function": {"name": "look"}}])
        for at in range(draw(st.integers(0, 3)))
    ]
    goes_on = st.builds(
        lambda each: Delta(tool_calls=[each]), fragments.filter(lambda each: each["index"] < len(named))
    )
    rest = draw(st.lists(pieces | goes_on if named else pieces, max_size=8))
    return draw(st.lists(pieces, max_size=4)), named, rest


def writer():
    return ChatWriter("mödel", ID, 1, ("reasoning_content",), with_usage=True)


def response(deltas, finish_reason):
    seen = {"id": "r", "attempt": 1, "seq": 1, "node": "n@h", "instance": "n", "model": "m", "usage": Usage()}
    return ChatResponse(**seen, **join(deltas), timings=Timings(queue_wait=0, duration=1), finish_reason=finish_reason)


@given(answers(), st.sampled_from(["stop", "length", "tool_calls", "weird"]))
def test_a_stream_tells_what_the_whole_answer_is(batches, finish_reason):
    end = response([delta for batch in batches for delta in batch], finish_reason)
    whole = json.loads(writer().whole(end))
    ChatCompletion.model_validate(whole, strict=True)
    stream = writer()
    text = (stream.begin() + b"".join(map(stream.deltas, batches)) + stream.end(end)).decode()
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    *chunks, last = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in (*chunks, last):
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    (choice,) = whole["choices"]
    assert told(chunks) == choice["message"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
        choice["finish_reason"]
    ]


def told(chunks):
    """Put a stream together, as a client does."""
    message, calls = {"role": None, "content": "", "refusal": None}, []
    for delta in (chunk["choices"][0]["delta"] for chunk in chunks):
        if "role" in delta:
            assert message["role"] is None
            message["role"] = delta["role"]
        for field in ("content", "reasoning_content"):
            if field in delta:
                message[field] = message.get(field, "") + delta[field]
        for piece in delta.get("tool_calls", ()):
            if piece["index"] == len(calls):
                calls.append({"id": piece["id"], "type": piece["type"], "function": {**piece["function"]}})
            else:
                assert piece.keys() == {"index", "function"}
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    if calls:
        return {**message, "content": message["content"] or None, "tool_calls": calls}
    return message


def test_calls_without_ids_get_some_that_no_other_answer_has():
    """Also if a client gives one id to all requests of a conversation."""
    calls = [{"function": {"name": "look", "arguments": "{}"}}] * 2
    ids = set()
    for _ in range(2):
        end = response([Delta(tool_calls=calls)], "tool_calls")
        (choice,) = json.loads(writer().whole(end))["choices"]
        ids |= {call["id"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == 4
