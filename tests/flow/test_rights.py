"""An account that lacks a right, and a broker that takes nothing for now: a node names it in one line, is not ready
meanwhile, and goes on by itself when it may."""

import queue
import re
import shlex
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from fleet_worker import BrokerUnavailable, Router, Settings
from fleet_worker.host.child_process import child
from fleet_worker.host.up.programs import node_command
from fleet_worker.ops.broker_checks import broker as check_broker
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import SimulatedMLX, running_host, worker_toml
from tests.brokers import RabbitMQ, Valkey
from tests.mlx_clients import HELLO, until

pytestmark = [pytest.mark.rest, pytest.mark.timeout(120)]

MANUAL = Path(__file__).parents[2] / "docker" / "README.md"
LINES_IN_TEN_SECONDS = 6
AT_ONCE = 4
"""Cases that are tried beside each other: most of their time is waiting. Each has an account, a node and a model."""


@pytest.fixture(scope="module")
def valkey():
    with Valkey() as broker, redis.Redis.from_url(broker.url) as client:
        broker.client = client
        yield broker


@pytest.fixture(scope="module")
def rabbitmq():
    with RabbitMQ() as broker:
        yield broker


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(models=[f"allowed-{uuid.uuid4().hex[:8]}" for _ in range(AT_ONCE)]) as mlx:
        yield mlx


def as_user(broker, user="fleet"):
    return broker.url.replace("guest:guest@", "").replace("//", f"//{user}:PASSWORD@", 1)


@contextmanager
def a_node(url, mlx, model):
    name = f"{model}@test"
    with tempfile.TemporaryDirectory(prefix="fleet-host-") as folder:
        config = Path(folder, "worker.toml")
        config.write_text(worker_toml(model, {"base_url": mlx.base_url, "models": {model: {}}}), "utf-8")
        environment = {"FLEET_CONFIG": str(config), "FLEET_BROKER_URL": url, "FLEET_STATE_DIR": folder}
        with child(name, node_command(name), environment) as node:
            yield node


def of_broker(node):
    """What its log says of the broker."""
    words = ("the broker", "could not be asked")
    return [line for line in list(node.lines) if any(word in line for word in words) and "INFO" not in line]


def ask(url, model, **settings):
    with Router(Settings(broker_url=url, router=settings)) as router:
        router.registry.require_offered = lambda *_: None  # there is no registry node
        return router.chat(model, HELLO, max_tokens=1, timeout=20)


def try_all(cases, mlx, check):
    """Call `check(model, *case)` for each case, `AT_ONCE` at a time. The names of those that fail are in the error."""
    models = queue.SimpleQueue()
    for model in mlx.models:
        models.put(model)

    def check_one(case):
        model = models.get_nowait()
        try:
            check(model, *case)
        finally:
            models.put(model)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        checks = {name: pool.submit(check_one, case) for name, case in cases.items()}
    failures = {name: error for name, each in checks.items() if (error := each.exception())}
    for name, error in failures.items():
        error.add_note(f"The case: {name}")
    if failures:
        raise BaseExceptionGroup(", ".join(failures), list(failures.values()))


def assert_refused_then_served(url, mlx, model, named, allow, ready_within=8.0):
    with a_node(url, mlx, model) as node:
        until(lambda: any(named in line for line in of_broker(node)), 15)
        time.sleep(6)
        assert len(of_broker(node)) <= LINES_IN_TEN_SECONDS, of_broker(node)
        assert not any("is ready" in line or "Traceback" in line for line in list(node.lines))
        allow()
        node.wait_for("is ready", ready_within)
        assert ask(url, model).node == f"{model}@test"
        assert len(of_broker(node)) <= 2 * LINES_IN_TEN_SECONDS, of_broker(node)


def manual(begins):
    """The command of the manual."""
    return next(line for line in MANUAL.read_text("utf-8").splitlines() if line.startswith(begins))


ALL = ["~*", "&*", "+@all"]
LACKS = {
    "channels": (["~*", "+@all"], "channels of our names"),
    "keys": (["~other", "&*", "+@all"], "keys of our names"),
    "writing": (["%R~*", "&*", "+@all"], "keys of our names"),
    "BRPOP": ([*ALL, "-brpop"], "the command BRPOP"),
    "PUBLISH": ([*ALL, "-publish"], "the command PUBLISH"),
    "PUBSUB": ([*ALL, "-pubsub"], "the command PUBSUB NUMSUB"),
    "scripts": ([*ALL, "-@scripting"], "the command EVALSHA"),
    "everything": ([], "the command PING"),
}


def set_user(valkey, rules, user="fleet"):
    valkey.client.execute_command("ACL", "SETUSER", user, "reset", "on", ">PASSWORD", *rules)


def test_a_user_of_valkey_that_lacks_a_right(valkey, mlx):
    def check(model, rules, named):
        set_user(valkey, rules, model)
        url = as_user(valkey, model)
        found = check_broker(Settings(broker_url=url))
        assert any(finding.severity == "error" and named in finding.found for finding in found), found
        if named not in ("the command PUBSUB NUMSUB", "the command BRPOP"):  # only a node uses them
            with pytest.raises(BrokerUnavailable, match=named):
                ask(url, model)
        assert_refused_then_served(url, mlx, model, named, lambda: set_user(valkey, ALL, model))

    try_all(LACKS, mlx, check)


NOTHING_FOR_NOW = {
    "a replica": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), "it is the replica of another"),
    "no memory": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), "its maxmemory is reached"),
    "no replicas": (
        ("CONFIG", "SET", "min-replicas-to-write", "1"),
        ("CONFIG", "SET", "min-replicas-to-write", "0"),
        "it has too few replicas",
    ),
}


def test_a_valkey_that_takes_nothing_for_now(mlx):
    def check(model, begin, end, named):
        with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
            client.execute_command(*begin)
            found = check_broker(Settings(broker_url=valkey.url))
            assert any(finding.severity == "error" and named in finding.found for finding in found), found
            with pytest.raises(BrokerUnavailable, match=named):
                ask(valkey.url, model, connect_timeout=2)
            assert_refused_then_served(valkey.url, mlx, model, named, lambda: client.execute_command(*end))

    try_all(NOTHING_FOR_NOW, mlx, check)


PERMISSIONS = {
    "configure": (("^$", ".*", ".*"), "Exchange.declare of exchange llm.fleet"),
    "write": ((".*", "^$", ".*"), "Queue.bind of queue llm."),
    "read": ((".*", ".*", "^$"), "Queue.bind of exchange llm."),
    "replies": ((".*", "llm", ".*"), "Basic.publish of exchange amq.default"),
}


def test_a_user_of_rabbitmq_that_lacks_a_permission(rabbitmq, mlx):
    def check(model, permissions, named):
        rabbitmq.control("add_user", model, "PASSWORD")
        rabbitmq.control("set_permissions", model, *permissions)
        url = as_user(rabbitmq, model)
        found = check_broker(Settings(broker_url=url))
        assert any(finding.severity == "error" and named in finding.found for finding in found), found
        allow = ("set_permissions", model, ".*", ".*", ".*")
        assert_refused_then_served(url, mlx, model, named, lambda: rabbitmq.control(*allow))

    try_all(PERMISSIONS, mlx, check)


def test_a_rabbitmq_that_blocks_publishers(rabbitmq, mlx):
    rabbitmq.control("set_vm_memory_high_watermark", "0.000001")
    until(lambda: "memory" in rabbitmq.control("eval", "rabbit_alarm:get_alarms()."), 10)
    named = "it is short of memory or of disk space"
    with pytest.raises(BrokerUnavailable, match=named):
        ask(rabbitmq.url, mlx.models[0], connect_timeout=2)
    assert_refused_then_served(
        rabbitmq.url, mlx, mlx.models[0], named, lambda: rabbitmq.control("set_vm_memory_high_watermark", "0.6"), 15.0
    )


def serves(url, mlx):
    instances = {"allowed": {"base_url": mlx.base_url, "models": {mlx.models[0]: {}}}}
    with running_host(url, instances) as host, Router(Settings(broker_url=url)) as router:
        router.registry.wait_for(mlx.models[0], 20)
        assert router.chat(mlx.models[0], HELLO, max_tokens=1, timeout=20).node == "allowed@test"
        found = check_broker(Settings(broker_url=url))
        assert not [finding for finding in found if finding.severity == "error"]
        assert not [line for process in host.values() for line in process.lines if "not allow" in line]


def test_the_rights_of_the_manual_are_enough_in_valkey(valkey, mlx):
    valkey.client.execute_command("ACL", "DELUSER", "fleet")
    valkey.client.execute_command(*manual("ACL SETUSER fleet").split())
    serves(as_user(valkey), mlx)


def test_the_rights_of_the_manual_are_enough_in_rabbitmq(rabbitmq, mlx):
    rabbitmq.control("add_user", "fleet", "PASSWORD")
    rabbitmq.control(*shlex.split(manual("rabbitmqctl set_permissions"))[1:])
    serves(as_user(rabbitmq), mlx)


def test_a_right_that_is_taken_away_from_a_node_that_works_is_named_and_comes_back(valkey, mlx):
    set_user(valkey, ALL)
    with a_node(as_user(valkey), mlx, mlx.models[0]) as node:
        node.wait_for("is ready", 20)
        set_user(valkey, [*ALL, "-brpop"])
        valkey.drop_connections()
        node.wait_for("the command BRPOP", 10)
        time.sleep(5)
        assert len(of_broker(node)) <= LINES_IN_TEN_SECONDS, of_broker(node)
        set_user(valkey, ALL)
        node.wait_for(re.compile("lane .* is joined now").search, 10)


def test_a_node_whose_replies_are_refused_leaves_its_lanes_and_its_stream_loses_no_token(valkey):
    """The broker is full for two seconds in the middle of a stream."""
    model = f"full-{uuid.uuid4().hex[:8]}"
    with SimulatedMLX(models=[model], token_interval=0.02, tokens=1000) as mlx, a_node(valkey.url, mlx, model) as node:
        node.wait_for("is ready", 20)
        with Router(Settings(broker_url=valkey.url)) as router:
            router.registry.require_offered = lambda *_: None
            with router.stream_chat(model, HELLO, max_tokens=200, timeout=30) as stream:
                pieces = [next(stream).content for _ in range(10)]
                valkey.client.config_set("maxmemory", "1")
                node.wait_for("cannot be joined", 5)
                time.sleep(2)
                valkey.client.config_set("maxmemory", "0")
                pieces += [delta.content for delta in stream]
        assert pieces == reply_tokens(HELLO, 200, tokens=1000)
        assert [attempt.error for attempt in stream.response.attempts] == [None]
        node.wait_for("is joined now", 10)
