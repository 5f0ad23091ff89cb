import logging
import math
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fleet_worker import __version__
from fleet_worker.broker.queue_depth import Waiting
from fleet_worker.errors import BrokerUnavailable, ConfigurationError
from fleet_worker.protocol.host_messages import HostStatus, ServerStatus
from fleet_worker.protocol.status import STATUSES, InstanceStatus, ModelStatus
from fleet_worker.registry import prometheus as metrics
from fleet_worker.registry.counters import BOUNDS, Counters
from fleet_worker.registry.prometheus import HostCollector, MetricsServer
from fleet_worker.registry.status_socket import NodeReport
from tests.mlx_clients import took_less_than

CHAT = ModelStatus(model="qwen3-14b", capabilities=("chat", "stream_chat"), status="available")
EMBED = ModelStatus(model="minilm", capabilities=("embed",), status="available")
LANES = ["llm.fleet.chat.qwen3-14b", "llm.fleet.node.local@mini", "llm.fleet.stream_chat.qwen3-14b"]
NODE = {"node": "local@mini"}


def report(instance="local", *, counters=None, models=(CHAT,), reply_lag=0.004, **values):
    usual = {
        "pid": 1,
        "status": "available",
        "slots": 4,
        "running": 3,
        "tokens_per_second": 81.5,
        "last_token_age": 0.25,
        "lanes": LANES,
    }
    status = InstanceStatus(host="mini", name=instance, node=f"{instance}@mini", **{**usual, **values})
    return NodeReport(status, models, reply_lag, (counters or Counters()).report())


NO_NODE = NodeReport(
    InstanceStatus(host="mini", name="local", node="local@mini", status="unavailable"), (CHAT,), 0.0, {}
)


def collector(*reports, failures=0, published_at=None, waiting=lambda lanes: {}, host=HostStatus):
    """Of one instance without a node, unless there are reports."""
    publisher = SimpleNamespace(failures=failures, published_at=published_at)
    return HostCollector(lambda: list(reports) or [NO_NODE], publisher=publisher, waiting=waiting, host=host)


class Scraped(dict):
    """Families by name; `of` is the value of one sample."""

    def of(self, name, **labels):
        found = [sample.value for family in self.values() for sample in family.samples if matches(sample, name, labels)]
        assert len(found) == 1, (name, labels, found)
        return found[0]


def matches(sample, name, labels):
    return sample.name == name and sample.labels == labels


def read(text):
    return Scraped((family.name, family) for family in text_string_to_metric_families(text))


def scrape(url):
    with urlopen(url, timeout=10) as response:
        return read(response.read().decode())


def look(collector):
    """What a scrape of it sees, without HTTP."""
    registry = CollectorRegistry()
    registry.register(collector)
    return read(generate_latest(registry).decode())


def seen(*reports, **rest):
    return look(collector(*reports, **rest))


@contextmanager
def serving(collector):
    served = MetricsServer(0, collector)
    try:
        yield served.url
    finally:
        served.close()


def complaints(caplog):
    return [record.getMessage() for record in caplog.records]


# --- what a node reports ----------------------------------------------------------------------------------------------


def test_a_report_becomes_gauges_of_its_node():
    scraped = seen(report())
    assert scraped.of("fleet_instance_ready", **NODE) == 1
    assert scraped.of("fleet_slots", **NODE) == 4
    assert scraped.of("fleet_slots_used", **NODE) == 3
    assert scraped.of("fleet_tokens_per_second", **NODE) == 81.5
    assert scraped.of("fleet_last_token_age_seconds", **NODE) == 0.25
    assert scraped.of("fleet_reply_lag_seconds", **NODE) == 0.004


@pytest.mark.parametrize("status", STATUSES)
def test_a_status_is_the_one_that_is_1(status):
    scraped = seen(report(status=status))
    samples = {sample.labels["status"]: sample.value for sample in scraped["fleet_instance_status"].samples}
    assert samples == {each: each == status for each in STATUSES}
    assert scraped.of("fleet_instance_ready", **NODE) == (status == "available")


def test_an_instance_without_a_node_is_not_ready_and_has_nothing_else():
    scraped = seen()
    assert scraped.of("fleet_instance_ready", **NODE) == 0
    assert scraped.of("fleet_instance_status", status="unavailable", **NODE) == 1
    of_a_node = [
        name for name, family in scraped.items() for sample in family.samples if sample.labels.keys() >= {"node"}
    ]
    assert set(of_a_node) == {"fleet_instance_ready", "fleet_instance_status"}


def test_the_age_of_a_token_that_never_came_is_absent():
    assert "fleet_last_token_age_seconds" not in seen(report(last_token_age=None))


def test_nodes_have_their_own_figures():
    scraped = seen(report(), report("embed", slots=2, models=[EMBED]))
    assert scraped.of("fleet_slots", **NODE) == 4
    assert scraped.of("fleet_slots", node="embed@mini") == 2


# --- what a node counts -----------------------------------------------------------------------------------------------


def test_counters_are_those_of_the_node():
    counters = Counters()
    counters.generated(120)
    counters.request("chat")
    counters.request("chat")
    counters.error("timeout")
    counters.error("invalid_request")
    scraped = seen(report(counters=counters))
    assert scraped.of("fleet_tokens_total", **NODE) == 120
    assert scraped.of("fleet_requests_total", operation="chat", **NODE) == 2
    assert scraped.of("fleet_errors_total", code="timeout", **NODE) == 1
    assert scraped.of("fleet_errors_total", code="invalid_request", **NODE) == 1
    assert {scraped[name].type for name in ("fleet_tokens", "fleet_requests", "fleet_errors")} == {"counter"}


def test_prompts_are_counted_by_model_and_what_was_cached_where_the_server_tells():
    counters = Counters()
    counters.prompt("qwen3-14b", 900, 600)
    counters.prompt("qwen3-14b", 100, 0)
    counters.prompt("silent", 50, None)
    counters.prompt("silent", None, None)
    scraped = seen(report(counters=counters, models=(CHAT, EMBED)))
    for model, tokens in (("qwen3-14b", 1_000), ("silent", 50)):
        assert scraped.of("fleet_prompt_tokens_total", model=model, **NODE) == tokens
    assert scraped.of("fleet_cached_prompt_tokens_total", model="qwen3-14b", **NODE) == 600
    assert len(scraped["fleet_cached_prompt_tokens"].samples) == 1
    assert "minilm" not in {sample.labels["model"] for sample in scraped["fleet_prompt_tokens"].samples}


def test_a_node_of_an_older_version_counts_no_prompts():
    older = report()
    del older.counters["prompt_tokens"], older.counters["cached_tokens"]
    scraped = seen(older)
    assert "fleet_prompt_tokens" not in scraped
    assert scraped.of("fleet_tokens_total", **NODE) == 0


def test_what_may_happen_is_counted_from_0():
    """Prometheus would not count the first request and the first error as an increase."""
    scraped = seen(report())
    assert scraped.of("fleet_requests_total", operation="stream_chat", **NODE) == 0
    assert scraped.of("fleet_prompt_tokens_total", model="qwen3-14b", **NODE) == 0
    assert scraped.of("fleet_errors_total", code="instance_unavailable", **NODE) == 0
    assert not any(sample.labels["operation"] == "embed" for sample in scraped["fleet_requests"].samples)


@pytest.mark.parametrize(
    ("measured", "metric"),
    [
        ("ttft_seconds", "fleet_ttft_seconds"),
        ("queue_wait_seconds", "fleet_queue_wait_seconds"),
        ("tokens_per_second", "fleet_generation_tokens_per_second"),
    ],
)
def test_histograms_are_cumulative(measured, metric):
    bounds, counters = BOUNDS[measured], Counters()
    for value in (bounds[0], bounds[0], bounds[2], bounds[-1] + 1):
        counters.request("chat", **{measured: value})
    scraped = seen(report(counters=counters))
    buckets = [sample for sample in scraped[metric].samples if sample.name.endswith("_bucket")]
    assert [float(sample.labels["le"]) for sample in buckets] == [*bounds, math.inf]
    assert [sample.value for sample in buckets] == [2, 2, *[3] * (len(bounds) - 2), 4]
    assert scraped.of(f"{metric}_count", **NODE) == 4
    assert scraped.of(f"{metric}_sum", **NODE) == pytest.approx(2 * bounds[0] + bounds[2] + bounds[-1] + 1)


def test_every_histogram_of_the_node_is_shown():
    histograms = [family for family in seen(report()).values() if family.type == "histogram"]
    assert len(histograms) == len(BOUNDS)


# --- the registry node ------------------------------------------------------------------------------------------------


def test_the_registry_node_has_metrics_of_its_own():
    scraped = seen(failures=7, published_at=time.monotonic() - 20)
    assert scraped.of("fleet_info", version=__version__) == 1
    assert scraped.of("fleet_registry_publish_failures_total") == 7
    assert scraped.of("fleet_registry_age_seconds") == pytest.approx(20, abs=2)


def test_the_age_of_what_was_never_published_is_absent():
    assert "fleet_registry_age_seconds" not in seen(published_at=None)


def test_all_names_begin_with_fleet():
    assert all(name.startswith("fleet_") for name in seen(report(), waiting=lambda lanes: {}))


# --- lanes ------------------------------------------------------------------------------------------------------------


def test_lanes_that_were_left_are_shown_as_not_served():
    scraped = seen(report(lanes=LANES[:1]))
    served = {sample.labels["lane"]: sample.value for sample in scraped["fleet_lane_served"].samples}
    assert served == {LANES[0]: 1, LANES[1]: 0, LANES[2]: 0}


def test_lanes_of_an_instance_without_a_node_are_those_that_are_known_of_it():
    assert {sample.labels["lane"] for sample in seen()["fleet_lane_served"].samples} == set(LANES)


def test_models_that_a_node_found_have_lanes():
    scraped = seen(report(models=[EMBED]))
    assert scraped.of("fleet_lane_served", lane="llm.fleet.embed.minilm") == 0


def test_the_depth_of_lanes_is_that_of_the_broker():
    asked = []

    def ask(lanes):
        asked.extend(lanes)
        return {LANES[0]: Waiting(5, 12.5), LANES[1]: Waiting(0)}

    scraped = seen(report(), waiting=ask)
    assert asked == LANES
    assert scraped.of("fleet_lane_depth", lane=LANES[0]) == 5
    assert scraped.of("fleet_lane_depth", lane=LANES[1]) == 0
    ages = scraped["fleet_lane_oldest_age_seconds"].samples
    assert [(sample.labels["lane"], sample.value) for sample in ages] == [(LANES[0], 12.5)]
    assert scraped.of("fleet_broker_up") == 1


def test_lanes_of_others_are_left_out():
    scraped = seen(report(), waiting=lambda lanes: {"llm.fleet.chat.elsewhere": Waiting(5, 1.0)})
    assert not {"fleet_lane_depth", "fleet_lane_oldest_age_seconds"} & scraped.keys()


def test_the_broker_is_asked_once_in_a_while(monkeypatch):
    asked = []
    of_host = collector(report(), waiting=lambda lanes: asked.append(lanes) or {})
    look(of_host)
    look(of_host)
    assert len(asked) == 1
    monkeypatch.setattr(metrics, "ASK_EVERY", 0.0)
    look(of_host)
    assert len(asked) == 2


def test_a_broker_that_is_away_is_down_and_nothing_else_is_missing(caplog):
    def ask(lanes):
        raise BrokerUnavailable("away")

    of_host = collector(report(), waiting=ask)
    for _ in range(2):
        scraped = look(of_host)
    assert scraped.of("fleet_broker_up") == 0
    assert not {"fleet_lane_depth", "fleet_lane_oldest_age_seconds"} & scraped.keys()
    assert scraped.of("fleet_slots", **NODE) == 4
    assert complaints(caplog) == ["metrics are incomplete: the broker (BrokerUnavailable)"]


def test_a_silent_broker_is_waited_for_briefly_and_asked_by_one_thread(monkeypatch):
    monkeypatch.setattr(metrics, "ANSWER_WITHIN", 0.05)
    monkeypatch.setattr(metrics, "ASK_EVERY", 0.0)
    answer, asked = threading.Event(), []

    def ask(lanes):
        asked.append(lanes)
        answer.wait(10)
        return {LANES[0]: Waiting(1)}

    of_host = collector(waiting=ask)
    with took_less_than(1.0):
        assert [look(of_host).of("fleet_broker_up") for _ in range(3)] == [0, 0, 0]
    monkeypatch.setattr(metrics, "ANSWER_WITHIN", 5.0)
    monkeypatch.setattr(metrics, "ASK_EVERY", 60.0)
    answer.set()
    assert look(of_host).of("fleet_lane_depth", lane=LANES[0]) == 1
    assert len(asked) == 1


def test_a_broker_that_comes_back_is_up(monkeypatch, caplog):
    monkeypatch.setattr(metrics, "ASK_EVERY", 0.0)
    failures = [BrokerUnavailable("away"), BrokerUnavailable("away"), None, BrokerUnavailable("again")]

    def ask(lanes):
        if failure := failures.pop(0):
            raise failure
        return {}

    of_host = collector(waiting=ask)
    assert [look(of_host).of("fleet_broker_up") for _ in range(4)] == [0, 0, 1, 0]
    assert complaints(caplog) == ["metrics are incomplete: the broker (BrokerUnavailable)"] * 2


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_part_that_fails_leaves_out_its_families_and_is_logged_once(caplog):
    def ask(lanes):
        raise KeyError("a secret word")

    of_host = collector(replace(report(), counters={"tokens": 1}), waiting=ask)
    for _ in range(2):
        scraped = look(of_host)
    assert scraped.of("fleet_slots", **NODE) == 4
    assert not {"fleet_tokens", "fleet_ttft_seconds", "fleet_broker_up"} & scraped.keys()
    wrong = [f"metrics are incomplete: {part} (KeyError)" for part in ("counts", "histograms", "queues")]
    assert complaints(caplog) == wrong


def test_a_histogram_with_other_buckets_is_left_out():
    """One of a node that runs another version."""
    counters = Counters().report()
    counters["histograms"]["ttft_seconds"]["buckets"].append(1)
    scraped = seen(replace(report(), counters=counters))
    assert "fleet_ttft_seconds" not in scraped
    assert scraped.of("fleet_tokens_total", **NODE) == 0


# --- over HTTP --------------------------------------------------------------------------------------------------------


def test_it_is_served_to_this_machine_only():
    with serving(collector(report())) as url:
        assert url.startswith("http://127.0.0.1:")
        assert scrape(url).of("fleet_slots", **NODE) == 4


def test_one_family_can_be_asked_for():
    with serving(collector(report())) as url:
        assert set(scrape(f"{url}?name[]=fleet_slots")) == {"fleet_slots"}


def test_a_port_that_is_taken_is_a_configuration_error():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"registry\.metrics_port: {port} "):
            MetricsServer(port, collector())


def test_a_port_is_given_back():
    with serving(collector()) as url:
        port = urlsplit(url).port
    MetricsServer(port, collector()).close()


def test_a_silent_client_is_disconnected(monkeypatch, capsys):
    monkeypatch.setattr(metrics._Handler, "timeout", metrics._Handler.timeout / 50)
    with serving(collector()) as url:
        with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=5) as client:
            assert client.recv(1) == b""
        assert scrape(url).of("fleet_info", version=__version__) == 1
    assert capsys.readouterr().err == ""


def test_scrapes_are_not_logged(caplog, capsys):
    with caplog.at_level(logging.DEBUG), serving(collector(report())) as url:
        scrape(url)
    assert (caplog.records, capsys.readouterr().err) == ([], "")


def test_messages_that_were_dropped_are_counted_for_each_node_by_reason():
    counters = Counters()
    counters.report = lambda: {**Counters().report(), "dropped": {"it is compressed": 3}}
    publisher = SimpleNamespace(failures=0, published_at=None)
    of_registry = {"registry@mini": {"it is no task": 1}}
    reports = [report("local", counters=counters), report("other")]
    found = HostCollector(lambda: reports, publisher=publisher, waiting=lambda lanes: {}, dropped=lambda: of_registry)
    scraped = look(found)
    assert scraped.of("fleet_dropped_messages_total", node="local@mini", reason="it is compressed") == 3
    assert scraped.of("fleet_dropped_messages_total", node="registry@mini", reason="it is no task") == 1


# --- what `fleet-worker up` tells -------------------------------------------------------------------------------------


def test_a_managed_server_has_metrics_of_its_own():
    server = ServerStatus("local", "quarantined", restarts=6, deaths=5, memory=2**34)
    stranger = ServerStatus("not served any more", "serving")
    scraped = seen(report(), host=lambda: HostStatus((server, stranger)))
    assert scraped.of("fleet_server_restarts_total", **NODE) == 6
    assert scraped.of("fleet_server_deaths_total", **NODE) == 5
    assert scraped.of("fleet_server_quarantined", **NODE) == 1
    assert scraped.of("fleet_server_memory_bytes", **NODE) == 2**34
    assert scraped.of("fleet_away") == 0


def test_so_has_one_whose_node_is_gone_and_whose_memory_is_not_known():
    scraped = seen(host=lambda: HostStatus((ServerStatus("local", "starting"),)))
    assert scraped.of("fleet_server_quarantined", **NODE) == 0
    assert scraped.of("fleet_server_restarts_total", **NODE) == 0
    assert "fleet_server_memory_bytes" not in scraped


def test_a_host_whose_owner_needs_it_is_away():
    assert seen(host=lambda: HostStatus(away="a user is at it")).of("fleet_away") == 1


def test_a_server_that_nobody_manages_has_none():
    assert not [name for name in seen(report()) if name.startswith("fleet_server_")]
