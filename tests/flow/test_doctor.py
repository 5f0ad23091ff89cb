"""What the doctor sees of a fleet, on both brokers."""

import pytest

from fleet_worker.broker.faults import place_of
from fleet_worker.ops.broker_checks import broker as check_broker
from fleet_worker.ops.broker_checks import clock
from fleet_worker.ops.doctor import fleet
from fleet_worker.ops.findings import Finding
from fleet_worker.settings import Settings


@pytest.mark.both_brokers
def test_the_broker_says_what_it_is(broker):
    settings = Settings(broker_url=broker.url)
    first, *_ = check_broker(settings)
    kind = {"valkey": "Valkey 9.", "rabbitmq": "RabbitMQ 3."}[broker.name]
    assert (first.severity, first.found.startswith(kind)) == ("ok", True)
    assert place_of(settings.broker_url) in first.found
    (time,) = clock(settings)
    assert (time.severity, "not compared" in time.found) == ("ok", broker.name == "rabbitmq")


@pytest.mark.both_brokers
def test_a_wrong_password_is_told_from_a_broker_that_is_down(broker):
    settings = Settings(broker_url=broker.url.replace("guest:guest@", "").replace("//", "//operator:hush-hush@", 1))
    (finding,) = check_broker(settings)
    assert (finding.severity, "the user or the password" in finding.found) == ("error", True)
    assert "hush" not in str(finding)


@pytest.mark.both_brokers
def test_a_wrong_virtual_host_or_database_is_told(broker):
    url = {"valkey": broker.url.replace("/0", "/99"), "rabbitmq": f"{broker.url}nowhere"}[broker.name]
    (finding,) = check_broker(Settings(broker_url=url))
    assert (finding.severity, "the end of broker_url" in finding.advice) == ("error", True)


def test_nodes_answer_by_name(broker, node):
    assert fleet(Settings(broker_url=broker.url)) == [Finding("ok", "nodes that answer: 1 (sim@test)")]
