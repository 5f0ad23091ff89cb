"""Keys, quotas, ledger and usage of gateways over real HTTP, with a real fleet."""

import json
import signal
import subprocess
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
import redis

from fleet_worker.gateway.accounts.keys import new_key
from fleet_worker.gateway.accounts.ledger_file import read_only
from fleet_worker.host.child_process import python
from tests.flow.gateway.conftest import CHAT
from tests.gateways import running_gateway

pytestmark = pytest.mark.rest
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The file of keys, and the secret of each by its name."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    lines = {
        "free": "may_read_metrics = true",
        "few": "rpm = 3",
        "one": "max_parallel = 1",
        "poor": "budget_per_day = 30",
        "narrow": 'models = []\naliases = { "gpt-*" = "sim-chat" }',
        "shared": "rpm = 10",
    }
    made = {name: new_key(name) for name in lines}
    path.write_text("\n".join(made[name].table.replace('models = ["*"]\n', "") + line for name, line in lines.items()))
    path.chmod(0o600)
    return SimpleNamespace(path=path, **{name: each.secret for name, each in made.items()})


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return tmp_path_factory.mktemp("ledger") / "ledger.sqlite"


@pytest.fixture(scope="module")
def gateway(fleet, keys, ledger):
    with running_gateway(fleet, keys=keys.path, ledger=ledger) as process:
        yield process


@pytest.fixture(scope="module")
def other(fleet, keys):
    with running_gateway(fleet, keys=keys.path) as process:
        yield process


def client(gateway, secret):
    return httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {secret}"}, timeout=20)


def chat(http, max_tokens=2, **options):
    body = {"model": CHAT, "messages": HELLO, "max_tokens": max_tokens, **options}
    return http.post("/v1/chat/completions", json=body)


def until(condition, within=10):
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
    return found


def test_who_has_no_key_gets_nothing(gateway):
    for headers in ({}, {"x-api-key": "sk-fleet-00000000-0"}):
        reply = httpx.post(f"{gateway.url}/v1/chat/completions", json={}, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key"])
def test_a_key_is_read_where_each_client_puts_it(gateway, keys, header):
    value = f"Bearer {keys.free}" if header == "authorization" else keys.free
    assert httpx.get(f"{gateway.url}/v1/models", headers={header: value}).status_code == 200


def test_only_so_many_requests_a_minute(gateway, keys):
    with client(gateway, keys.few) as http:
        replies = [chat(http) for _ in range(4)]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["2", "1", "0", "0"]
    assert replies[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(replies[-1].headers["retry-after"]) <= 120


def test_the_sdk_does_not_repeat_what_a_spent_budget_refuses(gateway, keys):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=keys.poor, max_retries=5, timeout=20) as sdk:
        sdk.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=40)
        began = time.monotonic()
        with pytest.raises(openai.RateLimitError) as raised:
            sdk.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=1)
    assert raised.value.code == "insufficient_quota"
    assert time.monotonic() - began < 0.4


def test_a_client_that_leaves_frees_its_place_and_pays_for_what_it_got(gateway, keys, mlx, ledger):
    with client(gateway, keys.one) as http, mlx.held(at_token=5):
        body = {"model": CHAT, "messages": HELLO, "max_tokens": 1000, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            for _ in range(5):
                next(lines)
            assert chat(http).status_code == 429
        until(lambda: chat(http, max_tokens=1, model="nothing").status_code == 404)
    (row,) = until(lambda: rows(ledger, "one", 499))
    assert row[0] >= 1
    assert row[1] >= 1
    with client(gateway, keys.one) as http:
        until(lambda: chat(http).status_code == 200)


def rows(ledger, key, status):
    with read_only(ledger) as db:
        query = "SELECT prompt_tokens, completion_tokens, tags FROM requests WHERE key = ? AND status = ?"
        found = db.execute(query, (key, status)).fetchall()
    db.close()
    return found


def test_a_key_sees_only_its_own_models(gateway, keys):
    with client(gateway, keys.narrow) as http:
        assert http.get("/v1/models").json()["data"] == []
        assert chat(http).status_code == 404
        reply = chat(http, model="gpt-4o")
        assert (reply.status_code, reply.json()["model"]) == (200, "gpt-4o")
        assert reply.headers["x-fleet-model"] == CHAT


def test_limits_hold_for_two_gateways_together(gateway, other, keys):
    with client(gateway, keys.shared) as one, client(other, keys.shared) as two:
        codes = [chat(http).status_code for _ in range(10) for http in (one, two)]
    assert (codes.count(200), codes.count(429)) == (10, 10)


def test_keys_are_read_again_at_a_signal_and_streams_go_on(gateway, keys, mlx):
    new = new_key("new")
    with client(gateway, keys.free) as http, mlx.held(at_token=2):
        body = {"model": CHAT, "messages": HELLO, "max_tokens": 5, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            before = keys.path.read_text()
            keys.path.write_text(f"{before}\n{new.table}")
            gateway.signal(signal.SIGHUP)
            with client(gateway, new.secret) as another:
                until(lambda: another.get("/v1/models").status_code == 200)
            keys.path.write_text("[keys.broken")
            gateway.signal(signal.SIGHUP)
            gateway.wait_for("the keys stay as they were", 10)
            mlx.release()
            assert [line for line in lines if line][-1] == "data: [DONE]"
    with client(gateway, new.secret) as another:
        assert another.get("/v1/models").status_code == 200
    keys.path.write_text(before)


def test_an_operator_sees_who_used_what(gateway, keys, ledger):
    with client(gateway, keys.free) as http:
        tagged = chat(http, max_tokens=3).request
        http.post(tagged.url, content=tagged.content, headers={"x-fleet-tags": "team-a,nightly"})
        until(lambda: any("team-a" in row[2] for row in rows(ledger, "free", 200)))
        own = http.get("/v1/usage").json()
    command = python("-m", "fleet_worker", "usage", str(ledger), "--json", "--by", "tag", "--key", "free")
    printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    tags = {each["tag"]: each for each in printed["usage"]}
    assert tags["team-a"]["completion_tokens"] == tags["nightly"]["completion_tokens"] == 3
    assert own["completion_tokens"] == sum(each["completion_tokens"] for each in tags.values()) - 3


def test_a_budget_survives_a_restart_of_gateway_and_broker_alike(fleet, keys, tmp_path):
    """On a broker that keeps nothing of it: another database of the same server has no counts."""
    made, path = new_key("saver"), tmp_path / "keys.toml"
    path.write_text(f"{made.table}budget_per_month = 30\n")
    settings = {"keys": path, "ledger": tmp_path / "ledger.sqlite"}
    with running_gateway(fleet, **settings) as gateway, client(gateway, made.secret) as http:
        assert chat(http, max_tokens=40).status_code == 200
    forget(fleet)
    with running_gateway(fleet, **settings) as gateway, client(gateway, made.secret) as http:
        reply = chat(http)
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "insufficient_quota")


def forget(url):
    with redis.Redis.from_url(url) as broker:
        for key in broker.scan_iter("llm.quota.*"):
            broker.delete(key)
