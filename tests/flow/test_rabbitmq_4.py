"""RabbitMQ 4 as later versions will be: it refuses queues that are neither durable nor exclusive.

`RABBITMQ_4` names a folder with a Debian 13 (tests/README.md); without it these tests are skipped.
"""

import os
import time
import uuid
from pathlib import Path

import pytest

from fleet_worker import Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.ops.broker_checks import broker as check_broker
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import RabbitMQ
from tests.mlx_clients import HELLO, until

FOLDER = os.environ.get("RABBITMQ_4")
STRICT = "deprecated_features.permit.transient_nonexcl_queues = false\n"

pytestmark = [
    pytest.mark.rest,
    pytest.mark.skipif(not FOLDER, reason="RABBITMQ_4 names no folder with a Debian 13 that has rabbitmq-server"),
]


@pytest.fixture(scope="module")
def broker():
    with RabbitMQ(root=Path(FOLDER), config=STRICT) as broker:
        yield broker


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(models=[f"four-{uuid.uuid4().hex[:8]}"], token_interval=0.02, tokens=1000) as mlx:
        yield mlx


@pytest.fixture(scope="module")
def host(broker, mlx):
    with running_host(broker.url, {"four": {"base_url": mlx.base_url, "models": {mlx.models[0]: {}}}}) as host:
        yield host


@pytest.fixture
def router(broker, host):
    with Router(Settings(broker_url=broker.url)) as router:
        yield router


def test_requests_are_answered_and_the_registry_tells_where(router, mlx):
    (offered,) = router.registry.wait_for(mlx.models[0], 20)
    assert offered.node == "four@test"
    assert router.chat(mlx.models[0], HELLO, max_tokens=1, timeout=20).node == "four@test"


def test_a_lost_connection_costs_no_token(router, mlx, broker):
    with router.stream_chat(mlx.models[0], HELLO, max_tokens=150, timeout=50) as stream:
        pieces = []
        for delta in stream:
            pieces.append(delta.content)
            if len(pieces) in (20, 80):
                broker.drop_connections()
    assert pieces == reply_tokens(HELLO, 150, tokens=1000)
    assert [attempt.error for attempt in stream.response.attempts] == [None]


def test_a_cancelled_stream_stops(router, mlx):
    with router.stream_chat(mlx.models[0], HELLO, max_tokens=900, timeout=50) as stream:
        next(stream)
    until(lambda: mlx.counters["running"] == 0, 5)


def test_control_commands_and_events_work(broker, host):
    app = create_app(Settings(broker_url=broker.url))
    nodes = {"four@test", "registry@test"}
    until(lambda: {name for answer in app.control.ping(timeout=1.0) for name in answer} == nodes)
    heard = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": heard.append})
        for _ in range(10):  # a node sends one every two seconds; other messages count, too
            receiver.capture(limit=1, timeout=10, wakeup=False)
            if heard:
                break
    assert {event["hostname"] for event in heard} <= nodes


def test_the_doctor_has_no_complaint(broker):
    assert {finding.severity for finding in check_broker(Settings(broker_url=broker.url))} == {"ok"}


def test_no_queue_is_refused_and_none_is_left(broker, host, router, mlx):
    router.chat(mlx.models[0], HELLO, max_tokens=1, timeout=20)
    router.close()
    until(lambda: "llm.fleet.reply" not in broker.control("list_queues", "name"))
    assert not [
        line for node in host.values() for line in node.lines if "INTERNAL_ERROR" in line or "cannot be joined" in line
    ]


def test_a_restart_of_the_broker_costs_no_token(router, mlx, broker):
    with router.stream_chat(mlx.models[0], HELLO, max_tokens=150, timeout=50) as stream:
        pieces = []
        for delta in stream:
            pieces.append(delta.content)
            if len(pieces) == 20:
                broker.stop()
                time.sleep(0.5)
                broker.start()
    assert pieces == reply_tokens(HELLO, 150, tokens=1000)
