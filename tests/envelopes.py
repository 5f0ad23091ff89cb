"""Request envelopes for tests: a good one with changes, refusals, and any that hypothesis finds."""

import pytest
from hypothesis import strategies as st

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router.submission import Submission

LARGE = 8 * 1024 * 1024
IMAGE = "data:image/png;base64,iVBORw0KGgo="


def user(content="Hi"):
    return {"role": "user", "content": content}


def tool(parameters):
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def envelope(**changes):
    return {
        "protocol_version": 2,
        "request_id": "r-1",
        "correlation_id": "r-1",
        "idempotency_key": "r-1",
        "attempt": 1,
        "operation": "chat",
        "provider": "mlx",
        "provider_instance": "any",
        "model": "qwen3-14b",
        "params": {"messages": [user()]},
        "reply_to": "llm.fleet.reply.mini-7.0123456789ab.120",
        "message_context": {},
        "caller": {},
        "trace_context": {},
        "signed_token": None,
        "timeout_seconds": 300.0,
        "expires_at": 2_000_000_000.0,
        "priority": "normal",
        **changes,
    }


def decode(raw, max_bytes=LARGE):
    return FleetRequest.decode(raw, max_bytes=max_bytes)


def refused(raw):
    """The text of the refusal at the worker."""
    with pytest.raises(InvalidRequest) as caught:
        decode(raw)
    return caught.value.message


def built(operation, params, max_bytes=LARGE):
    """As a router builds it, before anything is sent."""
    request = FleetRequest.build(envelope(operation=operation, params=params))
    request.check_size(max_bytes)
    return request


def request_of(router, operation, model, **arguments):
    """The envelope of what one calls a method of this router with."""
    return Submission.of(router._settings, operation, model, {}, None, arguments).request


def refused_params(operation, params):
    """The text of the refusal at the router."""
    with pytest.raises(InvalidRequest) as caught:
        built(operation, params)
    return caught.value.message


finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, values, max_size=3)
contents = texts | st.lists(
    st.builds(lambda text: {"type": "text", "text": text}, texts)
    | st.just({"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}}),
    max_size=2,
)
turns = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["system", "user", "tool"]), contents
)
chat_params = st.builds(
    lambda messages, rest: {"messages": messages, **rest},
    st.lists(turns, min_size=1, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "max_tokens": st.none() | st.integers(1, 1000),
            "temperature": st.none() | st.floats(0, 2),
            "top_k": st.integers(0, 1000),
            "seed": st.integers(0, 2**32 - 1),
            "stop": st.text("ab", min_size=1) | st.lists(st.text("ab", min_size=1), max_size=3),
            "tools": st.lists(st.builds(tool, objects), max_size=2),
            "response_format": st.builds(lambda schema: {"type": "json_schema", "json_schema": schema}, objects),
            "logit_bias": st.dictionaries(st.integers(0, 99).map(str), finite, max_size=2),
            "chat_template_kwargs": st.just({"enable_thinking": False}),
        },
    ),
)
embed_params = st.builds(lambda texts: {"input": texts}, st.lists(texts.filter(bool), min_size=1, max_size=3))
envelopes = st.builds(
    lambda body, caller, context, wait: envelope(
        operation=body[0], params=body[1], caller=caller, message_context=context, timeout_seconds=wait
    ),
    st.tuples(st.sampled_from(["chat", "stream_chat"]), chat_params) | st.tuples(st.just("embed"), embed_params),
    objects,
    objects,
    st.floats(0.001, 3600),
)
