"""The legacy completions of OpenAI."""

import json

import pytest
from openai.types import Completion

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway.dialects import openai_completions
from fleet_worker.gateway.problems import Problem
from fleet_worker.protocol.reply import ChatResponse, Delta, Timings, Usage

ID = "0f8fad5b"


def asked(**fields):
    return openai_completions.asked({"model": "qwen3", "prompt": "Once", **fields}, ID, 1_700_000_000)


def response(finish_reason="stop", **fields):
    return ChatResponse(
        id=ID,
        attempt=1,
        seq=2,
        node="local@mini",
        instance="local",
        model="mlx-community/Qwen3-4bit",
        usage=Usage(prompt_tokens=7, completion_tokens=5),
        timings=Timings(queue_wait=0, duration=1),
        finish_reason=finish_reason,
        **fields,
    )


def chunks(stream):
    *events, done, rest = stream.decode("ascii").split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("prompt", ["Once", ["Once"]])
def test_a_prompt_is_a_message_of_the_user(prompt):
    chat = asked(prompt=prompt, max_tokens=9, stop=["\n"], echo=False, logprobs=None, suffix="", n=1, best_of=1)
    assert chat.body == {"max_tokens": 9, "stop": ["\n"], "messages": [{"role": "user", "content": "Once"}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "messages"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"model": ""}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(fields, param):
    with pytest.raises(InvalidRequest) as refusal:
        asked(**fields)
    assert refusal.value.param == param


@pytest.mark.parametrize(("finish_reason", "told"), [("stop", "stop"), ("length", "length"), ("tool_calls", "stop")])
def test_a_whole_answer(finish_reason, told):
    body = json.loads(asked().writer.whole(response(finish_reason, content="upon\u2028", reasoning="Hm")))
    Completion.model_validate(body)
    assert body["choices"] == [{"index": 0, "text": "upon\u2028", "logprobs": None, "finish_reason": told}]
    assert (body["model"], body["id"], body["usage"]["total_tokens"]) == ("qwen3", f"cmpl-{ID}", 12)


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_stream(with_usage):
    writer = asked(stream=True, stream_options={"include_usage": with_usage}).writer
    deltas = [Delta(reasoning="Hm"), Delta(content="upon"), Delta(resumed=True), Delta(content=" a")]
    told = chunks(writer.begin() + writer.deltas(deltas) + writer.end(response("length")))
    assert [choice["text"] for chunk in told for choice in chunk["choices"]] == ["upon", " a", ""]
    assert [choice["finish_reason"] for chunk in told for choice in chunk["choices"]] == [None, None, "length"]
    assert {(chunk["id"], chunk["object"], chunk["model"]) for chunk in told} == {
        (f"cmpl-{ID}", "text_completion", "qwen3")
    }
    if with_usage:
        assert [chunk["usage"] is None for chunk in told] == [True, True, True, False]
        assert told[-1]["choices"] == []
    else:
        assert all("usage" not in chunk for chunk in told)


def test_a_late_error():
    event = asked(stream=True).writer.failed(Problem(status=502, code="node_lost", message="Gone."))
    error = json.loads(event.decode("ascii").removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == ("node_lost", "Gone.")
