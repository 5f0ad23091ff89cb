"""Ollama's API: what its clients ask, and the answers as its own SDK reads them."""

import json
from array import array
from contextlib import contextmanager, suppress

import httpx
import ollama
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway.dialects import ollama_chat, ollama_embed, ollama_embeddings, ollama_generate, ollama_models
from fleet_worker.gateway.problems import Problem
from fleet_worker.protocol.openai import ChatParams, EmbedParams
from fleet_worker.protocol.reply import ChatResponse, Delta, EmbedResponse, Timings, Usage, pack_vector
from fleet_worker.simulator.texts import embedding

PNG = "iVBORw0KGgo="
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
HELLO = [{"role": "user", "content": "hello"}]
IDS = {"id": "r", "attempt": 1, "seq": 9, "node": "local@mini-1", "instance": "local", "model": "sea"}
TIMINGS = Timings(queue_wait=0.5, ttft=1.0, duration=3.0)


def chat(**fields):
    return checked(ollama_chat.asked({"model": "sea", "messages": HELLO, **fields}, "1-2", 1_700_000_000))


def generation(**fields):
    return checked(ollama_generate.asked({"model": "sea", "prompt": "hello", **fields}, "1-2", 1_700_000_000))


def checked(request):
    ChatParams.model_validate(request.body)
    return request


def response(finish_reason="stop", **fields):
    usage = Usage(prompt_tokens=50, completion_tokens=7)
    return ChatResponse(**IDS, usage=usage, timings=TIMINGS, finish_reason=finish_reason, **fields)


def lines(streamed):
    assert streamed.endswith(b"\n")
    return [json.loads(line) for line in streamed.splitlines()]


def stream(asked, *deltas, ending=None):
    writer = asked.writer
    return writer.begin() + b"".join(writer.deltas([delta]) for delta in deltas) + writer.end(ending or response())


@contextmanager
def client(body, status=200):
    """Yield a client of Ollama whose every request gets this answer."""
    answering = ollama.Client(host="http://fleet")
    answering._client.close()
    transport = httpx.MockTransport(lambda request: httpx.Response(status, content=body))
    answering._client = httpx.Client(base_url="http://fleet", transport=transport)
    with answering._client:
        yield answering


def test_a_chat_streams_unless_it_is_told_not_to():
    asked = chat()
    assert (asked.model, asked.stream, asked.body) == ("sea", True, {"messages": HELLO})
    assert not chat(stream=False).stream


def test_a_model_may_have_the_tag_that_clients_add():
    assert chat(model="sea:latest").model == "sea"


def test_options_have_the_names_of_openai():
    options = {
        "num_predict": 100.0,
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["END"],
        "repeat_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "num_ctx": 4096,
        "mirostat": 0,
    }
    assert chat(options=options, keep_alive="5m").body == {
        "messages": HELLO,
        "max_tokens": 100,
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["END"],
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
    }


@pytest.mark.parametrize("nothing", [{"format": ""}, {"options": None}, {"think": None}, {"options": {"stop": []}}])
def test_fields_that_ask_for_nothing(nothing):
    assert chat(**nothing).body == {"messages": HELLO}


def test_formats():
    schema = {"type": "object", "properties": {"tide": {"type": "string"}}}
    assert chat(format="json").body["response_format"] == {"type": "json_object"}
    assert generation(format=schema).body["response_format"]["json_schema"]["schema"] == schema


def test_thinking():
    assert chat(think=True).body["chat_template_kwargs"] == {"enable_thinking": True}
    assert chat(think="low").body["reasoning_effort"] == "low"
    whole = json.loads(chat(think=False).writer.whole(response(content="a", reasoning="hm")))
    assert whole["message"] == {"role": "assistant", "content": "a"}
    assert b"hm" not in stream(chat(think=False), Delta(reasoning="hm"), Delta(content="a"))


def test_images_are_data_urls():
    message = {"role": "user", "content": "what?", "images": [PNG, "/9j/4AAQ"]}
    parts = chat(messages=[message]).body["messages"][0]["content"]
    assert [part.get("text") or part["image_url"]["url"] for part in parts] == [
        "what?",
        f"data:image/png;base64,{PNG}",
        "data:image/jpeg;base64,/9j/4AAQ",
    ]
    assert len(generation(images=[PNG], prompt="").body["messages"][0]["content"]) == 1


def test_results_belong_to_calls_by_name_and_order():
    calls = [{"function": {"name": name, "arguments": {"at": name}}} for name in ("a", "b", "a")]
    results = [{"role": "tool", "tool_name": name, "content": f"{at}"} for at, name in enumerate(["b", "a", "a"])]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    messages = chat(messages=[*HELLO, called, *results]).body["messages"]
    made = messages[1]["tool_calls"]
    assert [call["function"]["arguments"] for call in made] == ['{"at": "a"}', '{"at": "b"}', '{"at": "a"}']
    ids = [call["id"] for call in made]
    assert len({*ids}) == 3
    assert [message["tool_call_id"] for message in messages[2:]] == [ids[1], ids[0], ids[2]]


def test_results_of_unknown_names_belong_to_calls_in_their_order():
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("a", "b")]
    turn = [{"role": "assistant", "tool_calls": calls}, *[{"role": "tool", "content": "seen"}] * 2]
    messages = chat(messages=[*HELLO, *turn, *turn]).body["messages"]
    ids = [call["id"] for message in messages for call in message.get("tool_calls", ())]
    assert len({*ids}) == 4
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == ids


def test_a_result_without_a_call_is_sent():
    assert chat(messages=[*HELLO, {"role": "tool", "content": "seen"}]).body["messages"][-1]["tool_call_id"]


def test_ids_of_calls_are_kept():
    call = {"id": "call_x", "function": {"name": "look", "arguments": "{}"}}
    told = {"role": "tool", "tool_call_id": "call_x", "content": "seen"}
    turns = [*HELLO, {"role": "assistant", "tool_calls": [call]}, told]
    messages = chat(messages=turns, tools=[TOOL]).body["messages"]
    assert (messages[1]["tool_calls"][0]["id"], messages[2]["tool_call_id"]) == ("call_x", "call_x")


def test_tools_may_leave_out_their_type():
    assert chat(tools=[{"function": TOOL["function"]}]).body["tools"] == [TOOL]


def test_a_prompt_is_a_chat_with_one_message():
    assert generation(system="Be kind.").body["messages"] == [{"role": "system", "content": "Be kind."}, *HELLO]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"raw": True}, "raw"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"context": [1]}, "context"),
        ({"logprobs": True}, "logprobs"),
        ({"images": ["nothing"]}, "images.0"),
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"format": "xml"}, "format"),
        ({"think": "hard"}, "think"),
        ({"model": ""}, "model"),
    ],
)
def test_a_wrong_field_is_named(fields, param):
    with pytest.raises(InvalidRequest) as refusal:
        generation(**fields)
    assert refusal.value.param == param


def test_the_sdk_reads_a_stream():
    streamed = stream(chat(), Delta(reasoning="hm"), Delta(content="größer "), Delta(content="\u2028sea"))
    with client(streamed) as reading:
        parts = list(reading.chat("sea", HELLO, stream=True))
    assert [part.message.thinking for part in parts] == ["hm", None, None, None]
    assert "".join(part.message.content for part in parts) == "größer \u2028sea"
    last = parts[-1]
    assert [part.done for part in parts] == [False, False, False, True]
    assert (last.done_reason, last.eval_count, last.prompt_eval_count) == ("stop", 7, 50)
    seconds = (last.total_duration, last.load_duration, last.prompt_eval_duration, last.eval_duration)
    assert seconds == (3_500_000_000, 500_000_000, 1_000_000_000, 2_000_000_000)
    assert {(part.model, part.created_at) for part in parts} == {("sea", "2023-11-14T22:13:20Z")}


def test_the_sdk_reads_a_whole_answer():
    with client(chat().writer.whole(response("length", content="a", reasoning="hm"))) as reading:
        answer = reading.chat("sea", HELLO)
    assert (answer.message.role, answer.message.content, answer.message.thinking) == ("assistant", "a", "hm")
    assert (answer.done, answer.done_reason) == (True, "length")


def test_the_sdk_reads_generations():
    with client(stream(generation(), Delta(reasoning="hm"), Delta(content="a"), Delta(content="b"))) as reading:
        parts = list(reading.generate("sea", "hello", stream=True))
    assert [(part.response, part.thinking, part.done) for part in parts] == [
        ("", "hm", False),
        ("a", None, False),
        ("b", None, False),
        ("", None, True),
    ]
    with client(generation().writer.whole(response(content="ab"))) as reading:
        assert reading.generate("sea", "hello").response == "ab"


def test_calls_of_tools_are_whole():
    calls = [
        {"id": f"call_{at}", "type": "function", "function": {"name": "look", "arguments": f'{{"at": {at}}}'}}
        for at in range(2)
    ]
    deltas = [Delta(tool_calls=[{"index": at, **call}]) for at, call in enumerate(calls)]
    ending = response("tool_calls", tool_calls=calls)
    with client(stream(chat(tools=[TOOL]), *deltas, ending=ending)) as reading:
        called, last = reading.chat("sea", HELLO, tools=[TOOL], stream=True)
    assert [call.function.arguments for call in called.message.tool_calls] == [{"at": 0}, {"at": 1}]
    assert (called.done, last.done, last.done_reason) == (False, True, "stop")
    whole = json.loads(chat(tools=[TOOL]).writer.whole(ending))["message"]["tool_calls"]
    assert [call["id"] for call in whole] == ["call_0", "call_1"]


def test_a_heartbeat_is_an_empty_piece():
    assert lines(chat().writer.heartbeat)[0]["message"] == {"role": "assistant", "content": ""}
    assert lines(generation().writer.heartbeat)[0] | {"created_at": ""} == {
        "model": "sea",
        "created_at": "",
        "response": "",
        "done": False,
    }


def test_errors_early_and_late():
    problem = Problem(status=404, code="model_not_found", message="no such model")
    body = ollama_chat.problem_body(problem, "r")
    with client(body, 404) as reading, pytest.raises(ollama.ResponseError, match="no such model") as raised:
        reading.chat("sea", HELLO)
    assert raised.value.status_code == 404
    writer = chat().writer
    late = writer.begin() + writer.deltas([Delta(content="a")]) + writer.failed(problem)
    with client(late) as reading, pytest.raises(ollama.ResponseError, match="no such model"):
        list(reading.chat("sea", HELLO, stream=True))


@pytest.mark.parametrize(("keep_alive", "reason"), [(None, "load"), ("5m", "load"), (0, "unload")])
def test_a_request_without_a_prompt_only_loads_the_model(keep_alive, reason):
    for asked in (
        ollama_chat.asked({"model": "sea", "messages": [], "keep_alive": keep_alive}, "r", 0),
        ollama_generate.asked({"model": "sea", "keep_alive": keep_alive}, "r", 0),
    ):
        answer = json.loads(asked.answer)
        assert (asked.model, answer["done"], answer["done_reason"]) == ("sea", True, reason)


def test_embeddings():
    vectors = [embedding(text, 4) for text in ("one", "two")]
    data = [pack_vector(array("f", vector)) for vector in vectors]
    reply = EmbedResponse(**IDS, usage=Usage(prompt_tokens=2), timings=TIMINGS, data=data, dimensions=4)
    asked = ollama_embed.asked({"model": "sea", "input": ["one", "two"], "truncate": True}, "r", 0)
    EmbedParams.model_validate(asked.body)
    assert asked.body == {"input": ["one", "two"]}
    with client(asked.writer.whole(reply)) as reading:
        answer = reading.embed("sea", ["one", "two"])
    assert (answer.embeddings, answer.model, answer.prompt_eval_count) == (vectors, "sea", 2)
    older = ollama_embeddings.asked({"model": "sea", "prompt": "one"}, "r", 0)
    assert older.body == {"input": "one"}
    with client(older.writer.whole(reply)) as reading:
        assert reading.embeddings("sea", "one").embedding == vectors[0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("messages", "options", "tools", "format", "think", "stream", "keep_alive", "prompt", "images", "input")


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_any_json_is_understood_or_refused(fields):
    for dialect in (ollama_chat, ollama_generate, ollama_embed, ollama_embeddings):
        with suppress(InvalidRequest):
            dialect.asked({"model": "sea", **fields}, "r", 0)


def test_the_version_is_known():
    assert ollama_models.look_up("GET /api/version", {}, None, None) == {"version": ollama_models.VERSION}
    assert ollama_models.look_up("POST /api/pull", {}, None, None) is None
