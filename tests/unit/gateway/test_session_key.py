"""What a client calls its conversation, as the router is told."""

import json
import re
import time
from types import SimpleNamespace

import pytest

from fleet_worker.errors import InvalidRequest, ModelUnavailable
from fleet_worker.gateway.accounts.key import ANYONE, Key
from fleet_worker.gateway.dialects import (
    anthropic_messages,
    ollama_chat,
    openai_completions,
    openai_responses,
)
from fleet_worker.gateway.dialects.anthropic_messages import LONGEST_USER
from fleet_worker.gateway.dialects.openai_chat import OpenAIChat
from fleet_worker.gateway.known_fleet import KnownFleet
from fleet_worker.gateway.options import prompt_options
from fleet_worker.gateway.session_key import LONGEST
from fleet_worker.registry.view import Registry
from fleet_worker.router.router import Router
from tests.gateways import ask, post, serving

MESSAGES = [{"role": "user", "content": "Hello"}]
ID = "54c1eb09-bc4c-4d2f-98eb-6d2ab2d5e2fe"
OTHER_ID = "2c4e1cf0-7a67-4d2e-9a4b-1d16d3f44752"
DIALECTS = {
    "chat": (OpenAIChat(), {"messages": MESSAGES}),
    "responses": (openai_responses, {"input": "Hello"}),
    "completions": (openai_completions, {"prompt": "Hello"}),
    "messages": (anthropic_messages, {"messages": MESSAGES, "max_tokens": 5}),
    "ollama": (ollama_chat, {"messages": MESSAGES}),
}


def key(name="alice", **fields):
    return Key(name=name, **fields)


def options(headers=None, dialect="chat", caller=None, **body):
    module, least = DIALECTS[dialect]
    asked = module.asked({"model": "m", **least, **body}, "r1", 0)
    return prompt_options(asked, SimpleNamespace(headers=headers or {}), caller or key())


def session(*args, **fields):
    return options(*args, **fields).get("session")


OWN = session({"x-fleet-session": ID})
"""The session of `alice` that is named `ID`."""


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_request_that_names_no_conversation_has_none(dialect):
    assert options(dialect=dialect) == {}
    assert options({"user-agent": "x", "x-request-id": ID, "accept": "*/*"}, dialect) == {}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "name",
    [
        "x-fleet-session",
        "x-session-affinity",
        "x-session-id",
        "session-id",
        "session_id",
        "thread-id",
        "conversation_id",
        "conversation-id",
        "x-conversation-id",
        "x-claude-code-session-id",
        "x-openwebui-chat-id",
        "x-litellm-session-id",
        "x-dynamo-session-id",
        "x-opencode-session",
        "x-kilo-session",
        "x-grok-conv-id",
        "x-amp-thread-id",
        "x-affinity",
        "helicone-session-id",
    ],
)
def test_headers_of_any_client_name_its_conversation(dialect, name):
    assert session({name: ID}, dialect) == OWN


@pytest.mark.parametrize(
    "name",
    ["x-parent-session-id", "x-request-id", "x-session-id-2", "session", "chat", "x-openwebui-user-id", "cookie"],
)
def test_other_headers_name_none(name):
    assert session({name: ID}) is None


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("chat", {"prompt_cache_key": ID}),
        ("chat", {"session_id": ID}),
        ("chat", {"litellm_session_id": ID}),
        ("chat", {"metadata": {"session_id": ID}}),
        ("chat", {"prompt_cache_key": ID, "session_id": "s"}),
        ("responses", {"prompt_cache_key": ID}),
        ("responses", {"metadata": {"session_id": ID}}),
        ("completions", {"prompt_cache_key": ID}),
        ("messages", {"metadata": {"user_id": f"user_0a1b_account__session_{ID}"}}),
        ("messages", {"metadata": {"user_id": f"user_0a1b_account_{OTHER_ID}_session_{ID}"}}),
        ("messages", {"metadata": {"user_id": json.dumps({"device_id": "d", "account_uuid": "", "session_id": ID})}}),
    ],
)
def test_bodies_name_it(dialect, body):
    assert session(None, dialect, **body) == OWN


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"x-fleet-session": ID, "x-session-affinity": "a"}, {"prompt_cache_key": "b"}),
        ({"x-session-affinity": "a"}, {"prompt_cache_key": ID}),
        ({"x-session-affinity": ID, "x-session-id": "a"}, {}),
        ({"session-id": "a", "thread-id": ID}, {}),
        ({"x-parent-session-id": "a", "x-session-id": ID}, {}),
        ({"x-zed-session-id": "a", "x-chat-id": ID}, {}),
    ],
)
def test_what_names_the_smallest_part_comes_first(headers, body):
    assert session(headers, **body) == OWN


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        ("chat", {"user": ID, "safety_identifier": ID, "metadata": {"user_id": ID}}),
        ("responses", {"user": ID}),
        ("completions", {"user": ID}),
        ("messages", {"metadata": {"user_id": ID}}),
    ],
)
def test_a_user_is_no_conversation(dialect, body):
    assert session(None, dialect, **body) is None
    assert session({"x-claude-code-session-id": ID}, dialect, **body) == OWN


def test_a_sub_agent_has_a_conversation_of_its_own():
    sent = {"x-claude-code-session-id": ID}
    agents = {session({**sent, "x-claude-code-agent-id": agent}, "messages") for agent in ("a1", "a2")}
    assert len(agents | {OWN}) == 3
    assert session({**sent, "x-claude-code-agent-id": "\x80"}, "messages") == OWN


@pytest.mark.parametrize("name", ["", " ", "a\tb", "a\x85b", "x" * (LONGEST + 1)])
def test_a_bad_name_is_refused_in_our_own_header_and_else_ignored(name):
    with pytest.raises(InvalidRequest, match="x-fleet-session: must have 1 to 256 visible characters") as raised:
        session({"x-fleet-session": name})
    assert raised.value.param == "x-fleet-session"
    assert session({"x-session-id": name}) is None
    assert session({"x-session-affinity": name, "x-session-id": ID}) == OWN
    assert session(prompt_cache_key=name) is None
    assert session({"x-session-id": ID}, prompt_cache_key=name) == OWN


@pytest.mark.parametrize("value", [7, True, ["a"], {"id": "a"}])
def test_what_is_no_text_is_ignored(value):
    assert session(prompt_cache_key=value, session_id=value, metadata={"session_id": value}) is None
    assert session(metadata=value if isinstance(value, dict) else None) is None


@pytest.mark.parametrize("user", ["{", '{"session_id": 7}', '{"session_id": ""}', "7", "null", "_session_"])
def test_a_user_may_have_any_form(user):
    assert session(None, "messages", metadata={"user_id": user}) is None


def test_a_user_that_is_nested_deep_harms_nothing():
    assert session(None, "messages", metadata={"user_id": "[" * LONGEST_USER}) is None


def test_a_name_is_any_text():
    assert (
        session(prompt_cache_key="Gespräch 1 ☕")
        == session(session_id="Gespräch 1 ☕")
        != session(prompt_cache_key="G")
    )


def test_two_keys_with_the_same_name_of_a_session_do_not_share_it():
    assert session({"x-fleet-session": ID}, caller=key("bob")) != OWN


def test_no_text_of_the_client_goes_further():
    assert re.fullmatch("[0-9a-f]{32}", OWN)
    asked = OpenAIChat().asked({"model": "m", "messages": MESSAGES, "prompt_cache_key": ID}, "r1", 0)
    assert ID not in json.dumps(asked.body)  # else the router would take it, unscoped


def test_a_key_may_have_a_scope_of_its_own_and_prompts_that_are_not_kept():
    assert options(caller=key(cache_scope=True, keep_warm=False)) == {"cache_scope": "alice", "keep_warm": False}


def test_the_router_is_told_over_http(monkeypatch):
    told = []

    async def achat(self, model, **options):
        told.append(options["session"])
        raise ModelUnavailable("this is a test")

    monkeypatch.setattr(KnownFleet, "known", lambda _: Registry())
    monkeypatch.setattr(Router, "achat", achat)
    body = json.dumps({"model": "m", "messages": MESSAGES}).encode()
    with serving() as port:
        for name in (b"X-Session-Affinity", b"session_id", b"X-OpenWebUI-Chat-Id"):
            assert ask(port, post(body, name + b": " + ID.encode())).status == 404
    assert told == [session({"x-session-id": ID}, caller=ANYONE)] * 3


def test_a_long_name_of_a_header_costs_no_time():
    begun = time.perf_counter()
    assert session({"x-" + "a-" * 30_000 + "b": ID, "x-" + "a" * 60_000: ID}) is None
    assert time.perf_counter() - begun < 0.5
