"""The bodies of chats and embeddings: what router and node accept and refuse."""

import math
import re

import pytest
from hypothesis import given

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.reply import Delta, join
from tests.envelopes import IMAGE, built, chat_params, decode, envelope, refused, refused_params, user


@given(chat_params)
def test_nothing_a_caller_said_is_lost_on_the_way(params):
    sent = decode(envelope(params=params)).encode()["params"]
    said = {key: value for key, value in params.items() if value is not None}
    if isinstance(said.get("stop"), str):
        said["stop"] = [said["stop"]]
    assert sent == said


def test_a_tool_keeps_its_nulls():
    """In a JSON schema null is a value."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"enum": ["a", None], "default": None}}}
    assert decode(envelope(params={"messages": [user()], "tools": [tool]})).encode()["params"]["tools"] == [tool]


def test_a_text_is_a_list_of_one_text():
    assert built("embed", {"input": "a"}).params.input == ["a"]
    assert built("chat", {"messages": [user()], "stop": "a"}).params.stop == ["a"]


def test_nulls_say_nothing():
    nulls = dict.fromkeys(set(ChatParams.model_fields) - {"messages"})
    assert built("chat", {"messages": [user()], **nulls}).params == ChatParams.model_validate({"messages": [user()]})


def test_what_openai_clients_echo_in_a_message_is_dropped():
    turn = {"role": "assistant", "content": "4", "refusal": None, "audio": None, "annotations": [], "partial": False}
    assert decode(envelope(params={"messages": [turn]})).encode()["params"]["messages"] == [
        {"role": "assistant", "content": "4"}
    ]


def test_a_call_for_tools_and_its_result_are_turns():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        user(),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]
    sent = decode(envelope(params={"messages": turns})).encode()["params"]["messages"]
    assert sent == [turns[0], {"role": "assistant", "tool_calls": [call]}, turns[2]]


def test_images_are_noticed():
    image = {"type": "image_url", "image_url": {"url": IMAGE}}
    assert decode(
        envelope(params={"messages": [user(), user([{"type": "text", "text": "?"}, image])]})
    ).params.has_images
    assert not decode(
        envelope(params={"messages": [user("image_url"), user([{"type": "text", "text": IMAGE}])]})
    ).params.has_images


# --- What router and node refuse

DEEP_NAN = [{"type": "function", "function": {"parameters": {"properties": {"x": {"minimum": math.nan}}}}}]
BAD_CHATS = {
    "no messages": {},
    "messages that are nothing": {"messages": []},
    "messages that are null": {"messages": None},
    "messages as one text": {"messages": "Hi"},
    "messages as one object": {"messages": user()},
    "a message that is a text": {"messages": ["Hi"]},
    "a message that is null": {"messages": [None]},
    "a message without role": {"messages": [{"content": "Hi"}]},
    "a message of an unknown role": {"messages": [{"role": "wizard", "content": "Hi"}]},
    "a message without content": {"messages": [{"role": "user"}]},
    "a message whose content is null": {"messages": [user(None)]},
    "content that is a number": {"messages": [user(5)]},
    "content that is an object": {"messages": [user({"type": "text", "text": "Hi"})]},
    "content in parts that are texts": {"messages": [user(["Hi"])]},
    "content of an unknown type": {"messages": [user([{"type": "video", "text": "Hi"}])]},
    "content without type": {"messages": [user([{"text": "Hi"}])]},
    "a text part that is a number": {"messages": [user([{"type": "text", "text": 5}])]},
    "an image by http": {"messages": [user([{"type": "image_url", "image_url": {"url": "http://10.0.0.1/a.png"}}])]},
    "an image by https": {"messages": [user([{"type": "image_url", "image_url": {"url": "https://h/a.png"}}])]},
    "an image of the host's disk": {
        "messages": [user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])]
    },
    "an image that is a page": {"messages": [user([{"type": "image_url", "image_url": {"url": "data:text/html,Hi"}}])]},
    "an image by http after a good one": {
        "messages": [
            user(
                [
                    {"type": "image_url", "image_url": {"url": IMAGE}},
                    {"type": "image_url", "image_url": {"url": "http://h"}},
                ]
            )
        ]
    },
    "an image that is a text": {"messages": [user([{"type": "image_url", "image_url": IMAGE}])]},
    "tool calls that are a text": {"messages": [{"role": "assistant", "content": "", "tool_calls": "f()"}]},
    "half a character": {"messages": [user("\ud83d")]},
    "bytes": {"messages": [user(b"Hi")]},
    "a set": {"messages": [user()], "stop": {"a"}},
    "a stop that is a number": {"messages": [user()], "stop": 5},
    "a stop with a number in it": {"messages": [user()], "stop": ["a", 5]},
    "a stop that is null in a list": {"messages": [user()], "stop": [None]},
    "a stop that is empty": {"messages": [user()], "stop": ""},
    "a stop with an empty text in it": {"messages": [user()], "stop": ["a", ""]},
    "too many stops": {"messages": [user()], "stop": ["a"] * 17},
    "top_k as large as a vocabulary": {"messages": [user()], "top_k": 151_936},
    "top_k just too large": {"messages": [user()], "top_k": 1001},
    "top_k below what vLLM takes": {"messages": [user()], "top_k": -2},
    "top_k that is a fraction": {"messages": [user()], "top_k": 1.5},
    "top_k that is true": {"messages": [user()], "top_k": True},
    "max_tokens without end": {"messages": [user()], "max_tokens": 10**30},
    "max_tokens as a text": {"messages": [user()], "max_tokens": "5"},
    "max_tokens as a float": {"messages": [user()], "max_tokens": 5.0},
    "a temperature that is no number": {"messages": [user()], "temperature": math.nan},
    "an infinite temperature": {"messages": [user()], "temperature": math.inf},
    "a temperature below nothing": {"messages": [user()], "temperature": -0.1},
    "a temperature too high": {"messages": [user()], "temperature": 2.1},
    "a temperature as a text": {"messages": [user()], "temperature": "hot"},
    "a top_p of nothing": {"messages": [user()], "top_p": 0},
    "a top_p above all": {"messages": [user()], "top_p": 1.1},
    "an infinite penalty": {"messages": [user()], "repetition_penalty": math.inf},
    "a seed too large": {"messages": [user()], "seed": 2**32},
    "two answers": {"messages": [user()], "n": 2},
    "stream": {"messages": [user()], "stream": True},
    "model": {"messages": [user()], "model": "gpt-4o"},
    "adapters": {"messages": [user()], "adapters": "/tmp/evil"},
    "draft_model": {"messages": [user()], "draft_model": "org/model"},
    "role_mapping": {"messages": [user()], "role_mapping": {"bos": "<s>"}},
    "chat_template": {"messages": [user()], "chat_template": "{{ messages }}"},
    "a chat_template among its arguments": {"messages": [user()], "chat_template_kwargs": {"chat_template": "{{ x }}"}},
    "return_tensors": {"messages": [user()], "chat_template_kwargs": {"return_tensors": "pt"}},
    "a wrong reasoning effort": {"messages": [user()], "reasoning_effort": "enormous"},
    "a logit bias that is a list": {"messages": [user()], "logit_bias": [1]},
    "a logit bias that is no number": {"messages": [user()], "logit_bias": {"5": math.nan}},
    "tools that are a text": {"messages": [user()], "tools": "search"},
    "tools that are texts": {"messages": [user()], "tools": ["search"]},
    "a number that is none deep inside a tool": {"messages": [user()], "tools": DEEP_NAN},
    "infinity deep inside a tool": {"messages": [user()], "tools": [{"a": [{"b": -math.inf}]}]},
    "bytes deep inside a tool": {"messages": [user()], "tools": [{"a": [{"b": b"x"}]}]},
    "a response format that is a text": {"messages": [user()], "response_format": "json"},
    "a number that is none in a response format": {"messages": [user()], "response_format": {"schema": [math.nan]}},
}
BAD_EMBEDDINGS = {
    "no input": {},
    "an embedding of nothing": {"input": []},
    "an embedding of null": {"input": None},
    "an embedding of an empty text": {"input": ""},
    "an empty text among others": {"input": ["a", ""]},
    "token ids": {"input": [1, 2, 3]},
    "lists of token ids": {"input": [[1, 2], [3]]},
    "token ids among texts": {"input": ["a", [1]]},
    "a number": {"input": 5},
    "an object": {"input": {"text": "a"}},
    "a null among texts": {"input": ["a", None]},
    "half a character": {"input": "\ud83d"},
    "too many texts": {"input": ["a"] * 2049},
    "messages": {"input": "a", "messages": [user()]},
}
BAD = [("chat", name, params) for name, params in BAD_CHATS.items()] + [
    ("embed", name, params) for name, params in BAD_EMBEDDINGS.items()
]


@pytest.mark.parametrize(("operation", "params"), [pytest.param(kind, params, id=name) for kind, name, params in BAD])
def test_bad_params_are_refused_at_the_router_and_again_at_the_worker(operation, params):
    refused_params(operation, params)
    refused(envelope(operation=operation, params=params))
    if operation == "chat":
        refused_params("stream_chat", params)
        refused(envelope(operation="stream_chat", params=params))


GOOD_CHATS = {
    "the least": {"messages": [user()]},
    "an empty text": {"messages": [user("")]},
    "every role": {
        "messages": [{"role": role, "content": "a"} for role in ("system", "developer", "user", "assistant", "tool")]
    },
    "bounds below": {"messages": [user()], "max_tokens": 1, "temperature": 0, "top_k": 0, "min_p": 0, "seed": 0},
    "bounds above": {"messages": [user()], "temperature": 2, "top_p": 1, "top_k": 1000, "seed": 2**32 - 1},
    "sixteen stops": {"messages": [user()], "stop": ["a"] * 16},
    "one answer": {"messages": [user()], "n": 1},
    "a tool by name": {
        "messages": [user()],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "tools": [{"type": "function", "function": {"name": "f", "strict": True}}],
    },
    "a choice without tools that asks for none": {"messages": [user()], "tool_choice": "auto"},
}


WITHOUT_EFFECT = {
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
    "stream_options": {"include_usage": True},
    "modalities": ["text"],
    "logprobs": False,
    "top_logprobs": 0,
    "stream": False,
    "functions": [],
    "function_call": "none",
    "max_tokens": -1,
    "max_completion_tokens": 0,
    "seed": -1,
    "top_k": -1,
}


def said(operation, params):
    return built(operation, params).encode()["params"]


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_has_no_effect_here_is_accepted_and_not_sent(name):
    least = {"messages": [user()]}
    assert said("chat", {**least, name: WITHOUT_EFFECT[name]}) == least
    assert said("chat", {**least, name: None}) == least
    assert decode(envelope(params={**least, name: WITHOUT_EFFECT[name]})).encode()["params"] == least


@pytest.mark.parametrize("effort", ["xhigh", "max"])
def test_an_effort_that_only_openai_knows_is_the_highest_that_all_know(effort):
    params = {"messages": [user()], "reasoning_effort": effort, "chat_template_kwargs": {"reasoning_effort": effort}}
    assert said("chat", params) == {
        "messages": [user()],
        "reasoning_effort": "high",
        "chat_template_kwargs": {"reasoning_effort": "high"},
    }


def test_marks_for_another_cache_are_dropped():
    mark = {"cache_control": {"type": "ephemeral"}}
    tool = {"type": "function", "function": {"name": "f"}}
    params = {"messages": [user([{"type": "text", "text": "a", **mark}])], "tools": [{**tool, **mark}]}
    assert said("chat", params) == {"messages": [user([{"type": "text", "text": "a"}])], "tools": [tool]}


HISTORY = {
    "nothing": ({"content": None}, {}),
    "nothing at all": ({}, {}),
    "no calls": ({"content": "a", "tool_calls": []}, {"content": "a"}),
    "an answer as OpenAI has it": (
        {"content": "a", "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
        {"content": "a"},
    ),
    "reasoning": ({"content": "a", "reasoning": "r", "reasoning_content": "r"}, {"content": "a"}),
    "only reasoning": ({"content": None, "reasoning": "r"}, {}),
    "a refusal": ({"content": [{"type": "refusal", "refusal": "no"}]}, {"content": [{"type": "text", "text": "no"}]}),
    "a refusal beside no content": ({"content": None, "refusal": "no"}, {"content": "no"}),
    "a name": ({"content": "a", "name": "n"}, {"content": "a", "name": "n"}),
}


@pytest.mark.parametrize(("answer", "sent"), HISTORY.values(), ids=HISTORY)
def test_every_answer_can_be_sent_back(answer, sent):
    messages = [user(), {"role": "assistant", **answer}, user()]
    assert said("chat", {"messages": messages})["messages"] == [user(), {"role": "assistant", **sent}, user()]


def test_an_answer_of_this_fleet_can_be_sent_back_whole():
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for answer in (Delta(content="a"), Delta(reasoning="r"), Delta(tool_calls=[call]), Delta()):
        whole = join([answer])
        assert said("chat", {"messages": [user(), {"role": "assistant", **whole}]})
        assert said("chat", {"messages": [user(), {"role": "assistant", **answer.model_dump()}]})


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_vectors_may_be_asked_for_in_either_form(encoding):
    assert said("embed", {"input": "a", "encoding_format": encoding, "dimensions": 8}) == {
        "input": ["a"],
        "dimensions": 8,
    }


@pytest.mark.parametrize("params", GOOD_CHATS.values(), ids=GOOD_CHATS)
def test_good_params_pass(params):
    assert decode(envelope(params=params)).params == built("chat", params).params


def test_as_many_texts_as_allowed_are_embedded():
    assert len(built("embed", {"input": ["a"] * 2048}).params.input) == 2048


# --- The texts of refusals


@pytest.mark.parametrize(
    ("params", "where"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [user(), user(5)]}, "messages.1.content"),
        ({"messages": [user(["Hi"])]}, "messages.0.content"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "http://h"}}])]}, "messages.0.content"),
        ({"messages": [user()], "temprature": 1}, "temprature"),
        ({"messages": [user()], "chat_template_kwargs": {"return_tensors": 1}}, "chat_template_kwargs.return_tensors"),
        ({"messages": [user()], "logit_bias": {"5": "x"}}, "logit_bias"),
        ({"messages": [user()], "tool_choice": 5}, "tool_choice"),
    ],
)
def test_a_refusal_says_where_in_the_words_of_openai(params, where):
    message = refused_params("chat", params)
    assert where in message
    assert not [word for word in ("tagged-union", "Value error", "list[", "dict[", "literal[") if word in message]


TOOL = {"type": "function", "function": {"name": "f"}}
HALF = "half a character at position 1"
REFUSALS = [
    ("chat", {"temperature": "hot"}, "temperature", "must be a number, not a string"),
    ("chat", {"temperature": 3}, "temperature", "must be at most 2"),
    ("chat", {"top_p": 0}, "top_p", "must be more than 0"),
    ("chat", {"seed": 2**32}, "seed", "must be less than 4294967296"),
    ("chat", {"max_tokens": 5.0}, "max_tokens", "must be an integer, not a decimal number"),
    ("chat", {"max_tokens": True}, "max_tokens", "must be an integer, not a boolean"),
    ("chat", {"parallel_tool_calls": "yes"}, "parallel_tool_calls", "must be true or false, not a string"),
    ("chat", {"messages": []}, "messages", "must be a list that is not empty"),
    ("chat", {"messages": None}, "messages", "is missing"),
    ("chat", {"messages": [None]}, "messages.0", "must be an object, not null"),
    ("chat", {"messages": [user(), user(5)]}, "messages.1.content", "must be a string or a list, not a number"),
    ("chat", {"messages": [user(None)]}, "messages.0.content", "is missing: a string or a list of parts is needed"),
    ("chat", {"messages": [{"content": "a"}]}, "messages.0.role", "is missing"),
    ("chat", {"messages": [{"role": "function", "content": "a"}]}, "messages.0.role", "has the role tool"),
    ("chat", {"messages": [user([{"type": "video"}])]}, "messages.0.content.0", "of these types: 'text', 'image_url'"),
    ("chat", {"messages": [user("a\ud83d")]}, "messages.0.content", HALF),
    ("chat", {"messages": [user([{"type": "text", "text": "a\ude00"}])]}, "messages.0.content.0.text", HALF),
    ("chat", {"tools": [{"secret": "a\ud83d"}]}, "tools.0", HALF),
    ("chat", {"tools": [{"a\ud83d": 1}]}, "tools.0", HALF),
    ("chat", {"stop": ["a\ud83d"]}, "stop.0", HALF),
    ("embed", {"input": ["a", "b\ud83d"]}, "input.1", HALF),
    ("chat", {"tools": [{"a": math.nan}]}, "tools.0", "is a number that is not finite"),
    ("chat", {"tools": [{"a": {1: 2}}]}, "tools.0", "has a key that is a number"),
    ("chat", {"stop": {"a"}}, "stop", "is a Python set"),
    ("chat", {"tool_choice": 5}, "tool_choice", "must be 'none', 'auto' or 'required' or an object, not a number"),
    (
        "chat",
        {"tools": [{}]},
        "tools.0.type",
        'is missing; tools.0.function: is missing (a tool is {"type": "function"',
    ),
    ("chat", {"tools": [{"type": "web_search"}]}, "tools.0.type", "must be 'function', not another string"),
    ("chat", {"tools": [{"type": "function", "name": "f"}]}, "tools.0.function", "is missing (a tool is"),
    ("chat", {"tools": [TOOL, {**TOOL, "function": {"name": 5}}]}, "tools.1.function.name", "a string, not a number"),
    ("chat", {"tools": [{**TOOL, "function": {"name": ""}}]}, "tools.0.function.name", "a string that is not empty"),
    ("chat", {"tool_choice": "required"}, "tool_choice", "has none: add tools, or leave it out"),
    ("chat", {"tool_choice": "required", "tools": []}, "tool_choice", "has none: add tools, or leave it out"),
    ("chat", {"tool_choice": "any", "tools": [TOOL]}, "tool_choice", 'not another string (it is "auto"'),
    ("chat", {"tool_choice": {}, "tools": [TOOL]}, "tool_choice.type", "is missing"),
    (
        "chat",
        {"tool_choice": {**TOOL, "function": {"name": "g"}}, "tools": [TOOL]},
        "tool_choice",
        "use the name of one of them",
    ),
    ("chat", {"response_format": {}}, "response_format.type", 'is missing (it is {"type": "json_object"}'),
    ("chat", {"response_format": {"type": "grammar"}}, "response_format.type", "must be 'text', 'json_object' or"),
    ("chat", {"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "json_schema"),
    ("chat", {"reasoning_effort": "huge"}, "reasoning_effort", "not another string"),
    ("chat", {"n": 2}, "n", "must be 1, not another number (send the request once for each answer)"),
    ("chat", {"logprobs": True}, "logprobs", "answers come without log probabilities: leave it out"),
    ("chat", {"top_logprobs": 5}, "top_logprobs", "leave it out"),
    ("chat", {"functions": [{}]}, "functions", "use tools"),
    ("chat", {"function_call": "auto"}, "function_call", "use tool_choice"),
    ("chat", {"modalities": ["text", "audio"]}, "modalities", "answers are text"),
    ("chat", {"stream": True}, "stream", "call stream_chat"),
    ("chat", {"web_search_options": {}}, "web_search_options", "leave it out"),
    ("chat", {"max_token": 5}, "max_token", "unknown field, the nearest that exists is max_tokens"),
    ("embed", {"input": [1, 2]}, "input.0", "(send texts; LangChain does with check_embedding_ctx_length=False)"),
    ("embed", {"input": ""}, "input.0", "must be a string that is not empty"),
    ("embed", {"input": "a", "encoding_format": "int8"}, "encoding_format", "must be 'float' or 'base64'"),
    ("embed", {"input": "a", "dimensions": 0}, "dimensions", "must be at least 1"),
]


@pytest.mark.parametrize(("operation", "params", "param", "told"), REFUSALS)
def test_a_refusal_names_the_field_the_kind_and_the_way_out(operation, params, param, told):
    whole = {"messages": [user()], **params} if operation == "chat" else params
    with pytest.raises(InvalidRequest) as caught:
        built(operation, whole)
    error = caught.value
    assert (error.param, error.metadata["param"]) == (param, param)
    assert error.message.startswith(f"{param}: ")
    assert told in error.message
    with pytest.raises(InvalidRequest) as caught:
        decode(envelope(operation=operation, params=whole))
    assert (caught.value.param, caught.value.message) == (error.param, error.message)


PYDANTIC = re.compile(
    r"Input should|Field required|Value error|Extra inputs|valid |instance of|unable to|at least \d+ (item|character)"
)


@pytest.mark.parametrize(("operation", "params"), [pytest.param(kind, params, id=name) for kind, name, params in BAD])
def test_no_refusal_is_in_the_words_of_a_library(operation, params):
    assert not PYDANTIC.search(refused_params(operation, params))


def test_a_refusal_is_short_whatever_was_sent():
    unknown = {f"{'x' * 5000}{number}": 1 for number in range(50)}
    assert len(refused_params("chat", {"messages": [user()], **unknown})) < 2000
    assert "more" in refused_params("chat", {"messages": [user()], **{f"x{number}": 1 for number in range(50)}})
