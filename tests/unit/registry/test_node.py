"""What a host publishes about its instances and their models, and how often."""

import random
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace

import pytest
from celery.beat import ScheduleEntry
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.broker.app import create_app
from fleet_worker.protocol.cache_digest import CacheDigest
from fleet_worker.protocol.host_messages import HostStatus, ServerStatus
from fleet_worker.protocol.registry_event import READINESS
from fleet_worker.protocol.status import InstanceStatus, ModelStatus
from fleet_worker.registry import node as registry_node_module
from fleet_worker.registry.beat import Jittered, QuietScheduler
from fleet_worker.registry.node import NO_NODE, RegistryNode
from fleet_worker.registry.status_socket import NodeReport
from fleet_worker.settings import Settings
from tests.mlx_clients import until

OPTED_IN = {"enabled": True, "respond_to_requests": True}
KEY = "hunter2"
SAME = "the status of its instance"
TALKER = ModelStatus(
    model="talker", capabilities=("chat",), features=("tools",), limits={"context_window": 4096}, status=SAME
)
READINESS_EVERY, MODELS_EVERY = 5.0, 20.0


def settings(folder, instances, **changes):
    all_of_it = {
        "broker_url": f"redis://:{KEY}@127.0.0.1:1/0",
        "state_dir": folder,
        "registry": {"readiness_interval": READINESS_EVERY, "models_interval": MODELS_EVERY},
        "instances": {name: {"fleet": OPTED_IN, **values} for name, values in instances.items()},
    }
    return Settings(**{**all_of_it, **changes})


def report(instance="talk", *, models=(TALKER,), **facts):
    usual = {
        "pid": 7,
        "version": "0.1.0",
        "server": "mlx_lm",
        "status": "available",
        "slots": 4,
        "running": 1,
        "tokens_per_second": 31.5,
        "last_token_age": 0.25,
        "lanes": ("lane",),
    }
    status = InstanceStatus(host="mini", name=instance, node=f"{instance}@mini", **{**usual, **facts})
    models = tuple(replace(each, status=status.status) if each.status is SAME else each for each in models)
    return NodeReport(status, models, 0.0, {})


class Told:
    """Instead of a publisher: what it was asked to publish."""

    def __init__(self, connect, transport, announcements, begun):
        self.kinds = []
        self.closed = False

    def publish(self, *kinds):
        assert not self.closed
        self.kinds.append(kinds)

    def publish_digest(self, body):
        pass

    def close(self, timeout):
        self.closed = True


class Host:
    """A registry node of one instance for chats and one for embeddings, and the reports of their nodes."""

    def __init__(self, state_dir):
        self.state_dir = state_dir
        self.instances = {
            "talk": {
                "base_url": "http://127.0.0.1:8080",
                "api_key": KEY,
                "limits": {"concurrency": 2},
                "models": {"talker": {"context_window": 4096, "features": {"tools": True}}},
            },
            "vectors": {"models": {"minilm": {"dimensions": 384}}},
            "aside": {"models": {"secret": {}}, "fleet": {"enabled": True}},
        }
        configured = settings(state_dir, self.instances)
        self.app = create_app(configured)
        self.node = RegistryNode(self.app, configured, "mini")
        self.nodes = []
        self.socket, self.node.status_server = self.node.status_server, self

    def reports(self):
        return {each.instance.name: each for each in self.nodes}

    @property
    def announced(self):
        return self.node._publisher.kinds

    def close(self):
        self.socket.close()

    def messages(self, *kinds):
        """What is published for these kinds: a list of type, announcement."""
        return list(self.node._announcements(frozenset(kinds)))

    def told(self, *kinds):
        """The events of it, as {(instance, model): (type, event)}."""
        messages = self.messages(*kinds)
        return {
            (event.instance, event.model): (event_type.removeprefix("offering_"), event)
            for event_type, announcement in messages
            for event in announcement.events
        }

    def types(self, *kinds):
        return {of: event_type for of, (event_type, _) in self.told(*kinds).items()}


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(registry_node_module, "RegistryPublisher", Told)
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        host = Host(folder)
        yield host
        host.close()


TALK, VECTORS = ("talk", READINESS), ("vectors", READINESS)


# --- Readiness


def test_an_instance_without_a_node_is_unavailable(host):
    event_type, event = host.told("readiness")[TALK]
    assert event_type == "unavailable"
    assert event.offering == {"provider": "mlx", "instance": "talk", "model": READINESS, "usage": "inference"}
    assert event.health == {
        "ready": False,
        "status": "unavailable",
        "checked": False,
        "error": NO_NODE,
    }
    assert event.capacity == {"slots": 2, "running": 0, "status_age": 0.0}
    assert (event.runtime["node"], event.runtime["host"]) == ("talk@mini", "mini")
    assert event.lane == []
    assert event.metadata["live"] is False


def test_an_instance_is_what_its_node_reports(host):
    host.nodes = [report()]
    event_type, event = host.told("readiness")[TALK]
    assert event_type == "available"
    assert event.health == {"ready": True, "status": "available", "checked": True}
    figures = {"tokens_per_second": 31.5, "last_token_age": 0.25, "status_age": 0.0}
    assert event.capacity == {"slots": 4, "running": 1, **figures}

    assert (event.runtime["server"], event.runtime["pid"]) == ("mlx_lm", 7)
    assert event.lane == ["lane"]
    assert event.metadata["live"] is True


def test_a_router_learns_since_when_an_instance_has_its_status(host, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(registry_node_module.time, "monotonic", lambda: now[0])
    ages = []
    for status, seconds in [("available", 5), ("available", 5), ("unavailable", 60), ("unavailable", 1)]:
        host.nodes = [report(status=status)]
        ages.append(host.told("readiness")[TALK][1].capacity["status_age"])
        now[0] += seconds
    assert ages == [0.0, 5.0, 0.0, 60.0]


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_beats_go_on_when_the_clock_of_the_host_is_corrected(step, monkeypatch):
    seconds = 0.05
    schedule = Jittered(seconds, app=create_app(Settings()))
    entry = ScheduleEntry("beat", "task", schedule=schedule, app=create_app(Settings()))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + step)
    until(lambda: entry.is_due().is_due, 1)
    assert abs((schedule.now() - entry.last_run_at).total_seconds()) < 5


def test_what_has_not_changed_is_a_heartbeat(host):
    def told(status, reason=""):
        host.nodes = [report(status=status, reason=reason)]
        event_type, event = host.told("readiness")[TALK]
        assert event.health.get("error", "") == reason
        assert event.health["ready"] == (status == "available")
        return event_type

    assert [told("starting", "not tried yet") for _ in range(2)] == ["unavailable", "heartbeat"]
    assert [told("available") for _ in range(3)] == ["available", "heartbeat", "heartbeat"]
    assert [told("degraded", "late") for _ in range(2)] == ["degraded", "heartbeat"]
    assert [told("unavailable", "dead") for _ in range(2)] == ["unavailable", "heartbeat"]
    assert told("available") == "available"
    host.nodes = []
    assert [host.types("readiness")[TALK] for _ in range(2)] == ["unavailable", "heartbeat"]


def test_there_is_one_message_for_each_type_of_event(host):
    host.nodes = [report("talk"), report("vectors")]
    ((event_type, announcement),) = host.messages("readiness")
    assert event_type == "offering_available"
    assert [event.event_type for event in announcement.events] == ["offering_available"] * 2
    assert (announcement.host, announcement.interval) == ("mini", READINESS_EVERY)
    host.nodes = [report("talk"), report("vectors", status="degraded")]
    messages = host.messages("readiness")
    assert {event_type: [event.instance for event in said.events] for event_type, said in messages} == {
        "offering_heartbeat": ["talk"],
        "offering_degraded": ["vectors"],
    }


def test_an_instance_that_has_not_opted_in_is_not_published(host):
    host.nodes = [report("aside")]
    assert {instance for instance, _ in host.told("readiness", "models")} == {"talk", "vectors"}


# --- Models


def test_models_are_those_of_the_configuration_until_their_node_reports(host):
    models = host.told("models")
    event_type, event = models["talk", "talker"]
    assert event_type == "unavailable"
    assert event.offering == {
        "provider": "mlx",
        "instance": "talk",
        "model": "talker",
        "usage": "inference",
        "capabilities": ["chat", "stream_chat"],
        "features": ["completion", "streaming", "tools"],
        "limits": {"context_window": 4096, "max_output_tokens": 4096},
    }
    assert event.health["error"] == NO_NODE
    _, embedder = models["vectors", "minilm"]
    assert (embedder.offering["usage"], embedder.offering["limits"]) == ("embedding", {"dimensions": 384})
    assert models.keys() == {("talk", "talker"), ("vectors", "minilm")}


def test_models_are_those_that_their_node_reported_last(host):
    host.nodes = [report(models=[TALKER, replace(TALKER, model="found")])]
    models = host.told("models")
    assert models["talk", "talker"][1].offering["capabilities"] == ["chat"]
    assert models["talk", "found"][0] == "available"
    host.nodes = []
    assert host.types("models")["talk", "found"] == "unavailable"
    assert host.types("models")["talk", "found"] == "heartbeat"


def test_a_missing_model_is_unavailable_while_its_instance_is_not(host):
    host.nodes = [report()]
    host.told("readiness", "models")
    host.nodes = [report(models=[replace(TALKER, status="unavailable"), replace(TALKER, model="other")])]
    told = host.told("readiness", "models")
    assert told[TALK][0] == "heartbeat"
    event_type, event = told["talk", "talker"]
    assert (event_type, event.health["status"], event.health["ready"]) == ("unavailable", "unavailable", False)
    assert event.health["error"] == "the MLX server does not have this model"
    assert told["talk", "other"][0] == "available"
    host.nodes = [report()]
    assert host.types("models")["talk", "talker"] == "available"


def test_a_model_has_the_status_of_its_instance(host):
    host.nodes = [report(status="degraded", reason="late")]
    event_type, event = host.told("models")["talk", "talker"]
    assert (event_type, event.health["status"], event.health["error"]) == ("degraded", "degraded", "late")


def test_readiness_and_models_have_their_own_intervals_and_readiness_is_first(host):
    assert [said.interval for _, said in host.messages("models", "readiness")] == [READINESS_EVERY, MODELS_EVERY]
    assert {model for _, model in host.told("readiness")} == {READINESS}
    assert READINESS not in {model for _, model in host.told("models")}


# --- What counts as published


def test_a_change_that_was_not_published_stays_a_change(host):
    """The publisher gives a round up when the broker does not take one of its messages."""
    host.nodes = [report("talk"), report("vectors", status="degraded")]
    round_ = host.node._announcements(frozenset({"readiness"}))
    first, _ = next(round_)
    second, _ = next(round_)
    round_.close()
    assert {first, second} == {"offering_available", "offering_degraded"}
    told = host.types("readiness")
    assert sorted([told[TALK], told[VECTORS]]) == sorted(["heartbeat", second.removeprefix("offering_")])


def test_nothing_counts_as_known_if_nothing_was_published(host):
    for _ in range(3):
        round_ = host.node._announcements(frozenset({"readiness", "models"}))
        event_type, _ = next(round_)
        round_.close()
        assert event_type == "offering_unavailable"


def test_no_url_and_no_key_is_ever_published(host):
    host.nodes = [report()]
    for _, announcement in host.messages("readiness", "models"):
        assert KEY.encode() not in announcement.encode()
        assert b"http:" not in announcement.encode()


# --- Beginning, reload and end


def test_a_host_that_ends_publishes_that_everything_is_unavailable(host):
    host.nodes = [report("talk"), report("vectors", models=[])]
    host.told("readiness", "models")
    host.node.close()
    told = host.told("readiness", "models")
    assert {event_type for event_type, _ in told.values()} == {"unavailable"}
    assert {event.health["error"] for _, event in told.values()} == {"the registry node of this host ended"}
    assert {event.health["status"] for _, event in told.values()} == {"unavailable"}
    assert host.announced[-1] == ("readiness", "models")
    assert host.node._publisher.closed


def test_a_reload_publishes_the_instances_that_are_configured_now(host):
    host.nodes = [report("talk"), report("vectors")]
    host.told("readiness", "models")
    del host.instances["vectors"]
    host.instances["new"] = {"models": {"m": {}}}
    assert host.node.reload(settings(host.state_dir, host.instances))
    assert host.announced[-1] == ("readiness", "models")
    assert host.types("readiness", "models") == {
        TALK: "heartbeat",
        ("new", READINESS): "unavailable",
        ("vectors", READINESS): "unavailable",
        ("talk", "talker"): "heartbeat",
        ("new", "m"): "unavailable",
        ("vectors", "talker"): "unavailable",
    }
    assert ("vectors", READINESS) not in host.types("readiness", "models")  # it is said once


@pytest.mark.parametrize(
    "change",
    [
        {"broker_url": "redis://127.0.0.1:2/0"},
        {"host": "another"},
        {"state_dir": "/tmp/another"},
        {"registry": {"readiness_interval": 1.0}},
    ],
)
def test_anything_else_takes_a_new_process(host, change):
    assert not host.node.reload(settings(host.state_dir, host.instances, **change))
    assert host.announced == []


def test_everything_is_published_after_a_lost_connection_since_a_router_may_have_asked_meanwhile(host):
    host.node.connected(True)
    assert host.announced == []
    host.node.connected(False)
    host.node.connected(True)
    host.node.connected(True)
    assert host.announced == [("readiness", "models")]


def test_a_router_that_asks_is_answered_with_everything(host):
    queue, receive = host.node.subscription
    assert queue("redis").exchange.name == "llm.registry.ask"
    receive(SimpleNamespace(body=b"{}"))
    assert host.announced == [("readiness", "models")]


# --- Digests of prompt caches


class Digests:
    """Instead of their publisher: how often it was told of a beat, and what it received."""

    def __init__(self):
        self.beats, self.received = 0, []

    def beat(self):
        self.beats += 1

    def receive(self, body):
        self.received.append(body)


@pytest.fixture
def digests(host):
    host.node._digest_publisher = Digests()
    return host.node._digest_publisher


def test_a_router_that_wants_digests_gets_no_whole_status(host, digests):
    _, receive = host.node.subscription
    receive(SimpleNamespace(body=b'{"v":1}'))
    assert digests.received == [b'{"v":1}']
    assert host.announced == []


def test_digests_are_published_with_each_readiness_beat(host, digests):
    for task in ("registry.publish_models", "registry.publish_readiness", "registry.publish_readiness"):
        host.app.tasks[task]()
    assert digests.beats == 2


def test_the_digests_of_a_host_are_what_its_nodes_report(host):
    """An older node reports none."""
    digest = CacheDigest(node="talk@mini", slots=4, running=1)
    host.nodes = [replace(report("talk"), prompt_cache=digest), report("vectors")]
    assert host.node._digests() == [digest]


# --- The beat


def test_the_beat_is_in_the_configuration_of_celery_and_works_by_its_tasks(host):
    beats = host.app.conf.beat_schedule
    assert {kind: beat["task"] for kind, beat in beats.items()} == {
        "readiness": "registry.publish_readiness",
        "models": "registry.publish_models",
    }
    assert {kind: beat["options"]["expires"] for kind, beat in beats.items()} == {
        "readiness": READINESS_EVERY,
        "models": MODELS_EVERY,
    }
    (queue,) = host.app.conf.task_queues
    assert {beat["options"]["queue"] for beat in beats.values()} == {queue.name} == {"llm.fleet.node.registry@mini"}
    for beat in beats.values():
        host.app.tasks[beat["task"]]()
    assert host.announced == [("readiness",), ("models",)]


def beats(seconds, count):
    """The intervals of the first beats; the first one is from the start of the process."""
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    schedule = Jittered(seconds, nowfun=lambda: now[0], app=create_app(Settings()))
    last, intervals = now[0], []
    while len(intervals) < count:
        now[0] += timedelta(seconds=seconds / 100)
        if schedule.is_due(last).is_due:
            intervals.append((now[0] - last).total_seconds() / seconds)
            last = now[0]
    return intervals


@given(st.integers(0, 10**6), st.sampled_from([0.05, 15.0, 3600.0]))
def test_beats_vary_by_a_fifth(seed, seconds):
    random.seed(seed)
    first, *others = beats(seconds, 4)
    assert 0.1 <= first <= 1.02
    assert all(0.8 <= interval <= 1.22 for interval in others)


def test_hosts_that_were_started_together_do_not_beat_together():
    random.seed(1)
    hosts = [beats(15.0, 3) for _ in range(60)]
    for beat in range(3):
        moments = sorted(sum(intervals[: beat + 1]) for intervals in hosts)
        assert moments[-1] - moments[0] > 0.7
        assert max(later - earlier for earlier, later in pairwise(moments)) < 0.3
    assert max(last for *_, last in hosts) - min(last for *_, last in hosts) > 0.3


def test_a_schedule_that_is_not_due_stays_as_it_is():
    schedule = Jittered(15.0, app=create_app(Settings()))
    before = schedule.run_every
    for _ in range(20):
        assert not schedule.is_due(datetime.now(UTC)).is_due
    assert schedule.run_every == before


def test_a_beat_that_does_not_reach_the_broker_is_logged_once(host, monkeypatch, caplog):
    scheduler = QuietScheduler(host.app, lazy=True)
    away = [True]

    def publish(entry, **_):
        if away[0]:
            raise ConnectionRefusedError(KEY)

    monkeypatch.setattr(scheduler, "apply_async", publish)
    for _ in range(3):
        scheduler.apply_entry(object())
    assert [record.getMessage() for record in caplog.records] == [
        "the beat of the registry node cannot reach the broker (ConnectionRefusedError)"
    ]
    away[0] = False
    scheduler.apply_entry(object())
    away[0] = True
    scheduler.apply_entry(object())
    assert len(caplog.records) == 2
    assert KEY not in caplog.text


# --- What `fleet-worker up` tells


def test_an_instance_whose_server_is_in_quarantine_says_so_with_and_without_its_node(host):
    host.node.host_watch._take(HostStatus((ServerStatus("talk", "quarantined", "ended with exit code 1", deaths=5),)))
    for nodes in ([], [report(status="unavailable", reason="it does not accept connections")]):
        host.nodes = nodes
        _, event = host.told("readiness")["talk", READINESS]
        assert event.status == "unavailable"
        assert "fleet-worker restart talk@mini --server" in event.health["error"]
        assert event.runtime["server_deaths"] == 5


def test_a_host_whose_owner_needs_it_is_away_and_so_are_its_models(host):
    host.node.host_watch._take(HostStatus(away="a user is at it"))
    _, event = host.told("readiness")["talk", READINESS]
    assert (event.status, event.health["error"], event.event_type) == (
        "away",
        "a user is at it",
        "offering_unavailable",
    )
    assert {event.status for _, event in host.told("models").values()} == {"away"}


def test_what_up_tells_is_published_at_once(host):
    del host.announced[:]
    host.node.host_watch._take(HostStatus(away="a user is at it"))
    assert host.announced == [("readiness", "models")]
