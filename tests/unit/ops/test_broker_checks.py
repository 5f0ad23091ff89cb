"""Checks of the broker: judgements of its settings, and connections to brokers that fail."""

import time
from urllib.parse import urlsplit

import pytest
import redis

from fleet_worker.errors import BrokerUnavailable
from fleet_worker.ops.broker_checks import agreement, broker, clock, connected, exposure, reached, redis_settings
from fleet_worker.settings import Settings
from fleet_worker.testing import embedded_broker
from tests.brokers import free_port

ALLOWED = ("ok", "lets its user do all")

GOOD = {
    "maxmemory_policy": "noeviction",
    "maxmemory": 0,
    "used_memory": 1_000_000,
    "aof_enabled": 1,
    "rdb_last_bgsave_status": "ok",
    "aof_last_write_status": "ok",
}
SETTINGS = {
    "good": (GOOD, "", []),
    "saved from time to time": ({**GOOD, "aof_enabled": 0}, "3600 1", []),
    "saved nobody knows how": ({**GOOD, "aof_enabled": 0}, None, []),
    "not saved": ({**GOOD, "aof_enabled": 0}, "", [("warning", "persistence is off")]),
    "evicting": ({**GOOD, "maxmemory_policy": "allkeys-lru"}, "", [("error", "maxmemory-policy is allkeys-lru")]),
    "evicting replies": ({**GOOD, "maxmemory_policy": "volatile-ttl"}, "", [("error", "maxmemory-policy")]),
    "half full": ({**GOOD, "maxmemory": 2_000_000}, "", []),
    "nearly full": ({**GOOD, "maxmemory": 1_050_000}, "", [("warning", "95% of its memory")]),
    "disk full": ({**GOOD, "rdb_last_bgsave_status": "err"}, "", [("error", "its disk")]),
    "disk full, appending": ({**GOOD, "aof_last_write_status": "err"}, "", [("error", "its disk")]),
}


@pytest.mark.parametrize(("info", "save", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_a_broker_must_be_set_up_to_lose_nothing(info, save, expected):
    assert_found(redis_settings(info, save), expected)


PASSWORD, TLS = ("warning", "no password"), ("warning", "no TLS")
EXPOSURES = {
    "redis://localhost:6379/0": [],
    "redis://127.0.0.7/0": [],
    "redis://[::1]:6379/0": [],
    "redis:///0": [],
    "amqp://guest:guest@localhost//": [],
    "redis://broker:6379/0": [PASSWORD, TLS],
    "redis://10.0.0.1": [PASSWORD, TLS],
    "redis://operator@broker": [PASSWORD, TLS],
    "valkey://:hush@broker": [TLS],
    "rediss://broker": [PASSWORD],
    "valkeys://:hush@broker": [],
    "amqp://fleet:hush@broker//": [TLS],
    "amqps://fleet:hush@broker//": [],
}


@pytest.mark.parametrize(("url", "expected"), EXPOSURES.items())
def test_a_broker_on_the_network_has_a_password_and_tls(url, expected):
    findings = list(exposure(Settings(broker_url=url)))
    assert_found(findings, expected)
    assert "hush" not in str(findings)


def test_the_scheme_of_tls_is_that_of_the_broker():
    (redis_finding,), (rabbitmq_finding,) = (
        exposure(Settings(broker_url=url)) for url in ("redis://:x@broker", "amqp://x:x@broker")
    )
    assert "rediss://" in redis_finding.advice
    assert "amqps://" in rabbitmq_finding.advice


@pytest.mark.parametrize(
    ("ahead", "severity", "found"),
    [
        (0.004, "ok", "0.00 s ahead"),
        (-0.5, "ok", "0.50 s behind"),
        (-0.51, "warning", "0.51 s behind"),
        (2.0, "warning", "2.00 s ahead"),
        (2.1, "error", "2.10 s ahead"),
        (-7200, "error", "7200.00 s behind"),
    ],
)
def test_clocks_have_to_agree(ahead, severity, found):
    finding = agreement(ahead)
    assert finding.severity == severity
    assert finding.found.startswith(found)
    assert ("NTP" in finding.advice) is (severity != "ok")


@pytest.mark.parametrize(("seconds", "severity"), [(0.0004, "ok"), (0.05, "ok"), (0.051, "warning")])
def test_a_broker_has_to_be_near(seconds, severity):
    finding = reached("Valkey 9.1", "broker:6379", seconds)
    assert finding.severity == severity
    assert finding.found == f"Valkey 9.1 at broker:6379, round trip {seconds * 1000:.1f} ms"


# --- Real brokers


@pytest.fixture(scope="module")
def url():
    with embedded_broker() as url:
        yield url


@pytest.fixture
def client(url):
    with redis.Redis.from_url(url) as client:
        yield client
        client.flushall()
        client.acl_deluser("limited")


@pytest.mark.parametrize("ahead", [0.0, 1.2, -3.0])
def test_the_clock_of_the_broker_is_asked(url, ahead):
    (finding,) = clock(Settings(broker_url=url), now=lambda: time.time() + ahead)
    assert finding.severity == {0.0: "ok", 1.2: "warning", -3.0: "error"}[ahead]


def test_half_of_a_round_trip_is_on_the_way_back(url):
    """A clock that only runs while the answer travels back."""
    begun = time.time()
    moments = iter([begun, begun + 2.0] * 5)
    (finding,) = clock(Settings(broker_url=url), now=lambda: next(moments))
    ahead, _, words = finding.found.partition(" ")
    assert words.startswith("s ahead")
    assert 1.0 - (time.time() - begun) - 0.01 <= float(ahead) <= 1.01  # the broker's clock ran on until it was asked


def test_the_quickest_answer_tells_the_time_best(url):
    slow = [(0.0, 8.0)] * 4
    moments = iter([time.time() + late for both in [*slow, (0.0, 0.0)] for late in both])
    assert clock(Settings(broker_url=url), now=lambda: next(moments))[0].severity == "ok"


@pytest.mark.parametrize(
    ("forbidden", "expected"),
    {
        "-info": [("ok", "Redis or Valkey"), ("warning", "cannot be read by this user"), ALLOWED],
        "-config": [("ok", "Valkey 9"), ALLOWED],
        "-brpop": [("ok", "Valkey 9"), ("warning", "persistence"), ("error", "BRPOP, so nobody can take a request")],
        "-publish -pubsub": [
            ("ok", "Valkey 9"),
            ("warning", "persistence"),
            ("error", "the command PUBSUB NUMSUB, so nobody can see whether a router listens"),
            (
                "error",
                "the command PUBLISH, so nobody can publish registry events, ask for the status",
            ),
        ],
    }.items(),
)
def test_a_user_may_not_be_allowed_to_ask(forbidden, expected, url, client):
    """As with hosted brokers."""
    everything = {"keys": "*", "channels": "*", "categories": ["+@all"]}
    client.acl_setuser("limited", enabled=True, passwords=["+hush"], commands=forbidden.split(), **everything)
    assert_found(broker(Settings(broker_url=url.replace("//", "//limited:hush@"))), expected)


def test_a_broker_that_loses_work_is_reported(url, client):
    assert_found(broker(Settings(broker_url=url)), [("ok", "Valkey"), ("warning", "persistence"), ALLOWED])
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("save", "60 1")
    try:
        assert_found(broker(Settings(broker_url=url)), [("ok", "Valkey"), ("error", "maxmemory-policy"), ALLOWED])
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("save", "")


def test_a_connection_that_breaks_counts_as_none(url, client):
    with pytest.raises(BrokerUnavailable), connected(Settings(broker_url=url)) as connection:
        connection.default_channel.client.execute_command("NONSENSE")


UNUSABLE = {
    "redis://operator:hush-hush@127.0.0.1:{closed}/0": "127.0.0.1:{closed} does not run: nothing listens there",
    "amqp://operator:hush-hush@127.0.0.1:{closed}//": "127.0.0.1:{closed} does not run: nothing listens there",
    "redis://operator:hush-hush@nowhere.invalid:6379/0": "nowhere.invalid:6379 is on a host that cannot be found",
    "amqp://operator:hush-hush@nowhere.invalid//": "nowhere.invalid is on a host that cannot be found",
    "redis://operator:hush-hush@127.0.0.1:{open}/0": "127.0.0.1:{open} refuses the user or the password",
    "redis://127.0.0.1:{open}/99": "127.0.0.1:{open} refuses what a node asks of it",
}


@pytest.mark.parametrize(("given", "found"), UNUSABLE.items())
def test_a_broker_that_cannot_be_used_is_one_error_in_our_own_words(url, given, found):
    ports = {"closed": free_port(), "open": urlsplit(url).port}
    (finding,) = broker(Settings(broker_url=given.format(**ports)))
    assert finding.severity == "error"
    assert finding.found == "the broker at " + found.format(**ports)
    assert finding.advice
    assert "hush" not in finding.advice


def assert_found(findings, expected):
    findings = list(findings)
    assert [finding.severity for finding in findings] == [severity for severity, _ in expected], findings
    for finding, (severity, word) in zip(findings, expected, strict=True):
        assert word in finding.found
        assert bool(finding.advice) is (severity != "ok")


def test_an_embedded_broker_that_does_not_run_is_no_matter_of_its_url(tmp_path):
    settings = Settings(broker_url=f"redis://127.0.0.1:{free_port()}/0", up={"broker": True}, state_dir=tmp_path)
    [found] = broker(settings)
    assert found.severity == "error"
    assert str(tmp_path / "broker" / "appendonlydir") in found.advice
