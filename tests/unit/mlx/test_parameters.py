"""No parameter of a chat is dropped in silence, whatever kind of server gets it."""

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import UnsupportedParameter
from fleet_worker.mlx.enforcement import Rules
from fleet_worker.mlx.offering import offerings_of
from fleet_worker.mlx.parameters import (
    KINDS,
    TABLE,
    Treatment,
    dropped_parameters,
    refused_parameter,
    sent_fields,
    treatment,
)
from fleet_worker.mlx.profiles import PROFILES, chat_body
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.settings import Instance, Model

EACH = pytest.mark.parametrize("kind", KINDS)
OFFERING = offerings_of(Instance(models={"m": Model(backend="default_model")}), {}, ())["m"]
TOOLS = [{"type": "function", "function": {"name": "f"}}]

everything = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.none() | st.integers(1, 9999),
        "max_completion_tokens": st.integers(1, 9999),
        "temperature": st.none() | st.sampled_from([0.0, 0.3, 2.0]),
        "top_p": st.sampled_from([0.1, 1.0]),
        "top_k": st.sampled_from([0, 5, 1000]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 0.1]),
        "frequency_penalty": st.sampled_from([-2.0, 0.0, 0.1]),
        "repetition_penalty": st.sampled_from([0.1, 1.0, 1.1]),
        "seed": st.integers(0, 99),
        "stop": st.sampled_from([[], ["a"], ["a", "b"]]),
        "tools": st.sampled_from([[], TOOLS]),
        "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "f"}}]),
        "parallel_tool_calls": st.booleans(),
        "response_format": st.sampled_from(
            [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {}}}]
        ),
        "logit_bias": st.sampled_from([{}, {"5": 1.0}]),
        "reasoning_effort": st.sampled_from(["none", "minimal", "low"]),
        "chat_template_kwargs": st.sampled_from([{}, {"enable_thinking": True}, {"thinking_budget": 5}]),
        "n": st.just(1),
        "user": st.just("me"),
    },
).map(lambda params: params if params.get("tools") else {k: v for k, v in params.items() if k != "tool_choice"})
CHANGES_NOTHING = {
    "top_p": 1, "top_k": 0, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
    "logit_bias": {}, "stop": [], "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
    "response_format": {"type": "text"}, "n": 1, "chat_template_kwargs": {},
}  # fmt: skip


def params_of(**params):
    return ChatParams.model_validate({"messages": [{"role": "user", "content": "Hi"}], **params})


def body_of(kind, **params):
    return chat_body(params_of(**params), OFFERING, PROFILES[kind])


def test_the_table_has_every_kind_and_every_parameter():
    assert set(KINDS) == set(PROFILES)
    assert {len(row) for row in TABLE.values()} == {len(KINDS)}
    assert {each for row in TABLE.values() for each in row} <= set(get_args(Treatment))
    fields = {row.partition(":")[0].partition(".")[0] for row in TABLE}
    assert fields | {"messages", "n"} == set(ChatParams.model_fields)


ACCOUNTED = {
    "stop": lambda value, body, rules, dropped: rules.stop == tuple(value),
    "response_format": lambda value, body, rules, dropped: rules.json_format == value,
    "parallel_tool_calls": lambda value, body, rules, dropped: rules.single_call is not value,
    "tool_choice": lambda value, body, rules, dropped: (
        body.get("tool_choice") == value or (value in ("auto", "none") and "tools" not in body)
    ),
    "tools": lambda value, body, rules, dropped: body.get("tools", value) == value,
    "reasoning_effort": lambda value, body, rules, dropped: (
        "reasoning_effort" in dropped
        or any(text in json.dumps(body) for text in (value, {"none": "enable_thinking"}.get(value, "low")))
    ),
    "chat_template_kwargs": lambda value, body, rules, dropped: all(name in json.dumps(body) for name in value),
    **{
        field: lambda value, body, rules, dropped, field=field: body.get(field) == value or field in dropped
        for field in ("seed", "top_k", "min_p")
    },
    "user": lambda value, body, rules, dropped: "user" in dropped,
}
"""Whether something is done with a parameter; others are sent as they are."""
LIMITS = {"max_tokens", "max_completion_tokens", "temperature"}


@given(st.sampled_from(KINDS), everything)
def test_each_parameter_is_sent_done_by_the_node_refused_or_reported(kind, params):
    """The one property that all kinds share."""
    given_ = params_of(**params)
    temperature = 0.7 if given_.temperature is None else given_.temperature
    if refused := refused_parameter(given_, kind, temperature):
        field = refused.partition(".")[0]
        assert params[field] != CHANGES_NOTHING.get(field)
        with pytest.raises(UnsupportedParameter):
            body_of(kind, **params)
        return
    body, rules, dropped = body_of(kind, **params), Rules.of(given_), dropped_parameters(given_, kind, temperature)
    assert body["max_tokens"] == (given_.max_tokens or given_.max_completion_tokens or 4096) + (kind == "omni")
    for field, value in params.items():
        if field not in LIMITS and value != CHANGES_NOTHING.get(field):
            done = ACCOUNTED.get(field, lambda value, body, *_, field=field: body[field] == value)
            assert done(value, body, rules, dropped), field


@given(st.sampled_from(KINDS), everything)
def test_a_body_always_streams_has_limits_and_holds_nothing_unknown(kind, params):
    given_ = params_of(**params)
    if refused_parameter(given_, kind, 0.7 if given_.temperature is None else given_.temperature):
        return
    body = chat_body(given_, OFFERING, PROFILES[kind])
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["model"] == "default_model"
    assert body["temperature"] == (0.7 if params.get("temperature") is None else params["temperature"])
    known = sent_fields(kind) | {"messages", "model", "stream", "stream_options", *PROFILES[kind].constants}
    renamed = {"enable_thinking", "thinking_budget"} if kind == "mlx_vlm" else {"chat_template_kwargs"}
    assert body.keys() <= known | renamed
    assert None not in body.values()
    json.dumps(body, allow_nan=False)


@EACH
def test_values_that_change_nothing_are_never_refused(kind):
    assert refused_parameter(params_of(**CHANGES_NOTHING), kind, 0.7) is None
    assert body_of(kind, **CHANGES_NOTHING)


@EACH
@pytest.mark.parametrize(("field", "value"), [("seed", 7), ("top_k", 5), ("min_p", 0.1)])
def test_what_a_draw_depends_on_has_no_influence_at_temperature_0(kind, field, value):
    refuses = treatment(field, kind) == "refused"
    params = params_of(**{field: value})
    assert refused_parameter(params, kind, 0.0) is None
    assert refused_parameter(params, kind, 0.7) == (field if refuses else None)
    assert dropped_parameters(params, kind, 0.0) == ([field] if refuses else [])
    assert dropped_parameters(params, kind, 0.7) == []


def test_a_kind_of_a_newer_version_is_taken_to_do_everything():
    assert refused_parameter(params_of(top_k=5), "mlx_next", 0.7) is None


def test_a_refusal_names_the_parameter_and_the_way_out():
    with pytest.raises(UnsupportedParameter) as raised:
        body_of("vllm_mlx", frequency_penalty=0.5)
    assert raised.value.code == "unsupported_parameter"
    assert raised.value.metadata == {"param": "frequency_penalty"}
    assert "leave it out" in raised.value.message
