"""The Responses API and legacy completions over real HTTP, through a real node."""

import json

import pytest
from openai import BadRequestError, NotFoundError
from openai.types.responses import ResponseInputItemParam
from pydantic import BaseModel, TypeAdapter

from fleet_worker.simulator import reply_tokens
from tests.flow.gateway.conftest import CHAT
from tests.open_responses import check_events, check_response, read_events

HELLO = [{"role": "user", "content": "Hello"}]


def answer(max_tokens):
    return "".join(reply_tokens(HELLO, max_tokens))


def test_the_sdk_gets_a_response(client):
    response = client.responses.create(model=CHAT, input="Hello", max_output_tokens=7, store=False)
    assert (response.output_text, response.status) == (answer(7), "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 7
    check_response(response.to_dict())


def test_the_sdk_builds_the_response_of_a_stream(client):
    with client.responses.stream(model=CHAT, input="Hello") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        response = stream.get_final_response()
    assert text == response.output_text == answer(100)
    assert response.status == "completed"
    assert TypeAdapter(list[ResponseInputItemParam]).validate_python(response.to_dict()["output"])


def test_all_events_of_a_stream_are_as_specified(http):
    body = {"model": CHAT, "input": "Hello", "stream": True, "metadata": {"a": "b"}}
    reply = http.post("/v1/responses", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    response = check_events(read_events(reply.content))
    assert response["id"] == f"resp_{reply.headers['x-request-id'].replace('-', '')}"


class Answer(BaseModel):
    says: str


def test_the_sdk_parses_an_answer(client):
    response = client.responses.parse(model=CHAT, input="Hello", text_format=Answer)
    assert isinstance(response.output_parsed, Answer)


def test_errors_name_the_field_of_this_api(client):
    with pytest.raises(BadRequestError) as refusal:
        client.responses.create(model=CHAT, input="Hello", previous_response_id="resp_1")
    assert refusal.value.param == "previous_response_id"
    with pytest.raises(BadRequestError) as refusal:
        client.responses.create(model=CHAT, input="Hello", reasoning={"effort": "extreme"})
    assert refusal.value.param == "reasoning.effort"
    with pytest.raises(NotFoundError) as missing:
        client.responses.create(model="no such model", input="Hello")
    assert missing.value.code == "model_not_found"
    with pytest.raises(NotFoundError):
        client.responses.retrieve("resp_1")


def test_the_sdk_gets_a_legacy_completion(client):
    completion = client.completions.create(model=CHAT, prompt="Hello", max_tokens=7)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == (answer(7), "length")
    with client.completions.create(model=CHAT, prompt="Hello", max_tokens=7, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer(7)
    assert json.loads(chunks[-1].to_json())["choices"][0]["finish_reason"] == "length"
