"""What is recorded of requests, and who may read it, over HTTP."""

import json
import logging

import pytest

from fleet_worker.gateway.accounts.keys import new_key
from fleet_worker.gateway.facts import Facts
from fleet_worker.protocol.reply import Attempt, ChatResponse, Timings, Usage
from fleet_worker.router.progress import Progress
from tests.gateways import ask, get, post, serving

CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "A SECRET PROMPT"}]}'


def test_what_a_client_calls_a_model_is_kept_only_if_the_fleet_has_it():
    facts = Facts(key="alice", operation="chat/completions", model_asked="A SECRET PROMPT")
    assert facts.row("r", "alice", "chat/completions", 404).model_asked is None
    facts.model_asked, facts.model = "gpt-4o", "qwen3-14b"
    assert facts.row("r", "alice", "chat/completions", 200).model_asked == "gpt-4o"


def test_whether_a_prompt_met_its_cache_is_told_and_kept():
    facts = Facts(key="alice", operation="chat/completions")
    facts.note_answer(answered(cache="moved"))
    assert (b"x-fleet-cache", b"moved") in facts.headers()
    assert "cached=60 cache=moved" in facts.line("r")
    row = facts.row("r", "alice", "chat/completions", 200)
    assert (row.cache, row.cached_tokens) == ("moved", 60)


def test_nothing_is_told_of_a_cache_that_nobody_looked_for():
    facts = Facts()
    facts.note_answer(answered(cached_tokens=None))
    assert b"x-fleet-cache" not in dict(facts.headers())
    assert "cache" not in facts.line("r")


def answered(cache=None, cached_tokens=60):
    attempts = [Attempt(attempt=1, node="local@mini-1", error=None, delivered=5)]
    usage = Usage(prompt_tokens=90, completion_tokens=5, cached_tokens=cached_tokens)
    ids = {"id": "r", "attempt": 1, "seq": 1, "node": "local@mini-1", "instance": "local", "model": "m"}
    timings = Timings(queue_wait=0.1, duration=1.0)
    return ChatResponse(
        **ids, usage=usage, timings=timings, attempts=attempts, content="x", finish_reason="stop", cache=cache
    )


@pytest.fixture(scope="module")
def secrets():
    return {name: new_key(name) for name in ("alice", "bob", "prometheus")}


@pytest.fixture(scope="module")
def port(secrets, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    tables = {name: made.table for name, made in secrets.items()}
    tables["alice"] += "rpm = 2\n"
    tables["prometheus"] += "may_read_metrics = true\n"
    path.write_text("\n".join(tables.values()), "utf-8")
    path.chmod(0o600)
    with serving(keys=path) as port:
        yield port


def bearer(made):
    return b"authorization: Bearer " + made.secret.encode()


def answer(port, *words, **options):
    response = ask(port, get(*words, **options) if words[0].startswith(b"/") else post(*words, **options))
    return response.status, json.loads(response.body)


@pytest.mark.parametrize("path", [b"/v1/usage", b"/metrics", b"/v1/models"])
def test_nobody_reads_anything_without_a_key(port, path):
    status, body = answer(port, path)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")


def test_a_key_reads_its_own_usage_and_no_other(port, secrets):
    status, body = answer(port, b"/v1/usage?since=24h", bearer(secrets["bob"]))
    assert (status, body["object"], body["key"], body["requests"]) == (200, "usage", "bob", 0)


def test_a_time_that_is_none_is_named(port, secrets):
    status, body = answer(port, b"/v1/usage?since=yesterday", bearer(secrets["bob"]))
    assert (status, body["error"]["param"]) == (400, "since")


def test_only_some_keys_read_metrics_which_name_all_keys(port, secrets):
    assert answer(port, b"/metrics", bearer(secrets["bob"]))[0] == 403
    response = ask(port, get(b"/metrics", bearer(secrets["prometheus"])))
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/plain")
    assert b"fleet_gateway_quotas_shared 0.0" in response.body


def test_a_failed_request_is_recorded_without_its_text(port, secrets, caplog):
    caplog.set_level(logging.INFO)
    status, _ = answer(port, CHAT, bearer(secrets["bob"]))
    assert status == 503  # there is no broker
    text = ask(port, get(b"/metrics", bearer(secrets["prometheus"]))).body.decode()
    assert 'fleet_gateway_requests_total{key="bob",operation="chat/completions",status="503"} 1.0' in text
    assert 'fleet_gateway_running{key="bob"} 0.0' in text
    assert "key=bob" in caplog.text
    for private in ("SECRET", secrets["bob"].secret):
        assert private not in caplog.text
        assert private not in text


def test_a_session_that_is_none_is_refused_before_anything_is_sent(port, secrets):
    status, body = answer(port, CHAT, bearer(secrets["bob"]), b"x-fleet-session: " + b"x" * 300)
    assert (status, body["error"]["param"]) == (400, "x-fleet-session")


def test_a_wrong_key_is_in_no_log_and_no_metric(port, secrets, caplog):
    caplog.set_level(logging.DEBUG)
    wrong = secrets["alice"].secret[:-4] + "0000"
    assert answer(port, CHAT, b"x-api-key: " + wrong.encode())[0] == 401
    text = ask(port, get(b"/metrics", bearer(secrets["prometheus"]))).body.decode()
    assert 'fleet_gateway_requests_total{key="",operation="chat/completions",status="401"}' in text
    assert wrong not in caplog.text + text


def test_a_prompt_counts_also_if_the_answer_was_cut_off_while_it_waited_for_another_node():
    facts = Facts(prompt_estimate=100)
    facts.note_first_token(progress(1, "local@mini-1"))
    facts.note_cut_off(progress(2, None), 7)
    assert (facts.node, facts.attempts) == ("local@mini-1", 2)
    assert (facts.prompt_tokens, facts.completion_tokens) == (100, 7)


def test_a_prompt_that_no_node_has_taken_counts_nothing():
    facts = Facts(prompt_estimate=100)
    facts.note_cut_off(progress(1, None), 0)
    assert facts.prompt_tokens == 0


def progress(attempt, node):
    return Progress(attempt=attempt, node=node, instance=None, queue_wait=None, resumed=0, past=())
