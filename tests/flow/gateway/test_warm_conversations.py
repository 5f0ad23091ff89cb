"""Conversations that meet their caches, through a gateway, and what its clients and operators are told about that."""

import itertools
from types import SimpleNamespace

import httpx
import pytest

from fleet_worker.gateway.accounts.keys import new_key
from fleet_worker.gateway.accounts.ledger_file import read_only
from fleet_worker.testing import SimulatedMLX, embedded_broker, running_host
from tests.fleets import until
from tests.gateways import running_gateway

pytestmark = pytest.mark.rest
MODEL = "sim-chat"
WORDS = 4000
"""Of a prompt, which takes 0.8 s to be read: if it were less, it would make no difference where it is read."""
numbers = itertools.count()


@pytest.fixture(scope="module")
def minis():
    options = {"models": [MODEL], "token_interval": 0.002, "prefill_rate": 5000}
    with SimulatedMLX(**options) as one, SimulatedMLX(**options) as other:
        yield one, other


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The file of keys, and the secret of each by its name."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    lines = {"alice": "may_read_metrics = true", "bob": "", "secretive": "cache_scope = true\nkeep_warm = false"}
    made = {name: new_key(name) for name in lines}
    path.write_text("\n".join(made[name].table + line for name, line in lines.items()), "utf-8")
    path.chmod(0o600)
    return SimpleNamespace(path=path, **{name: each.secret for name, each in made.items()})


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return tmp_path_factory.mktemp("ledger") / "ledger.sqlite"


@pytest.fixture(scope="module")
def gateway(minis, keys, ledger):
    instances = {
        f"mini{number}": {"base_url": mini.base_url, "limits": {"concurrency": 4}, "models": {MODEL: {}}}
        for number, mini in enumerate(minis)
    }
    with (
        embedded_broker() as url,
        running_host(url, instances),
        running_gateway(url, keys=keys.path, ledger=ledger) as process,
    ):
        yield process


def client(gateway, secret, **headers):
    return httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {secret}", **headers}, timeout=20)


def begun():
    """The first messages of a conversation that is like no other."""
    number = next(numbers)
    return [
        {"role": "system", "content": f"{number} " + " ".join(f"rule{each}" for each in range(WORDS))},
        {"role": "user", "content": f"Question {number}"},
    ]


def ask(http, messages, **fields):
    """Ask, add the answer and the next question to the messages, and return what was told of the cache."""
    answer = http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, "max_tokens": 4, **fields})
    assert answer.status_code == 200, answer.text
    messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    return answer.headers["x-fleet-cache"]


def test_the_next_turns_of_a_conversation_meet_their_cache(gateway, keys, ledger):
    messages = begun()
    with client(gateway, keys.alice, **{"x-request-id": "turns"}) as http:
        assert ask(http, messages) == "cold"
        until(lambda: ask(http, messages) == "hit")  # on a slow machine, a turn may come before a digest
        said = {"model": MODEL, "messages": messages, "stream": True, "max_tokens": 4}
        stream = http.post("/v1/chat/completions", json=said)
        assert stream.text.rstrip().endswith("[DONE]")
        assert "x-fleet-cache" not in stream.headers  # they were sent before it was known
        metrics = http.get("/metrics").text
    found = until_recorded(ledger, "turns", metrics)
    assert found[0] == "cold"
    assert set(found[1:]) <= {"hit", "moved"}
    prompt, cached = (
        float(metrics.partition(f'fleet_gateway_{name}_tokens_total{{key="alice",model="{MODEL}"}} ')[2].split()[0])
        for name in ("prompt", "cached")
    )
    assert prompt > 2 * WORDS
    assert WORDS <= cached < prompt
    gateway.wait_for("cache=hit", 5)


def until_recorded(ledger, request_id, metrics):
    """Wait until the ledger has as many answers as the metrics; return what became of the caches of each."""
    counted = [line for line in metrics.splitlines() if line.startswith('fleet_gateway_cache_total{key="alice"')]
    number = sum(float(line.split()[-1]) for line in counted)
    until(lambda: len(outcomes(ledger, request_id)) >= number)
    return outcomes(ledger, request_id)


def outcomes(ledger, request_id):
    with read_only(ledger) as db:
        found = db.execute("SELECT cache FROM requests WHERE request_id = ? ORDER BY rowid", (request_id,)).fetchall()
    db.close()
    return [each for (each,) in found]


def test_a_key_with_a_scope_is_not_led_to_the_prompts_of_others_nor_they_to_its_own(gateway, keys):
    with (
        client(gateway, keys.alice) as alice,
        client(gateway, keys.bob) as bob,
        client(gateway, keys.secretive) as secretive,
    ):
        messages = begun()
        assert ask(alice, messages) == "cold"
        assert ask(bob, messages) != "cold"
        assert ask(secretive, messages) == "cold"
        own = begun()
        assert ask(secretive, own) == "cold"
        assert ask(secretive, own) != "cold"
        assert ask(bob, own) == "cold"
