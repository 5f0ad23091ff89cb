"""Prometheus metrics of one host, made at each scrape from what its nodes reported last.

Nothing is counted here: the nodes count since they started (`tally.py`), and their counters begin at 0 again when they
do, as Prometheus expects. Labels name nodes, lanes, operations and kinds of errors, never anything of a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from itertools import accumulate
from socketserver import ThreadingMixIn
from typing import get_args
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from fleet_worker.broker.queue_depth import Waiting
from fleet_worker.broker.topology import direct_lane, lane
from fleet_worker.errors import BrokerUnavailable, ConfigurationError, ProviderError
from fleet_worker.protocol.registry_event import Status
from fleet_worker.registry.counters import BOUNDS
from fleet_worker.registry.publisher import RegistryPublisher
from fleet_worker.registry.status_socket import NodeReport, ReportedModel
from fleet_worker.version import VERSION

log = logging.getLogger(__name__)

ASK_EVERY = 5.0
"""Seconds for which an answer of the broker is good enough."""
ANSWER_WITHIN = 1.0
"""Seconds that a scrape waits for the broker."""
CLIENT_TIMEOUT = 5.0
"""Seconds after which a client that says nothing is hung up on."""

_GAUGES: dict[str, tuple[str, Callable[[NodeReport], float | None]]] = {
    "fleet_slots": ("Requests that the node runs at the same time.", lambda report: report.slots),
    "fleet_slots_used": ("Requests that its server is working on.", lambda report: report.running),
    "fleet_tokens_per_second": ("Generated in the last second.", lambda report: report.tokens_per_second),
    "fleet_last_token_age_seconds": ("Since its server delivered anything.", lambda report: report.last_token_age),
    "fleet_reply_lag_seconds": (
        "The longest time that a part of a reply waited for the broker in the last second.",
        lambda report: report.reply_lag,
    ),
}
_HISTOGRAMS = {
    "ttft_seconds": ("fleet_ttft_seconds", "From the request to the server until its first token."),
    "queue_wait_seconds": ("fleet_queue_wait_seconds", "From the router until the node took the request."),
    "tokens_per_second": ("fleet_generation_tokens_per_second", "Of each answer, from its first token on."),
}
_FAULTS: list[type[ProviderError]] = [ProviderError, *ProviderError.__subclasses__()]
_NO_ERRORS = {error.code: 0 for error in _FAULTS}
"""The first error of a kind would be no increase otherwise."""


class Metrics:
    """Serves what `collector` collects at `url`, from now on, in threads of its own.

    Raises:
        ConfigurationError: the port of 127.0.0.1 cannot be had.
    """

    def __init__(self, port: int, collector: HostCollector) -> None:
        registry = CollectorRegistry(support_collectors_without_names=True)
        registry.register(collector)
        try:
            self._server = make_server("127.0.0.1", port, make_wsgi_app(registry), _Server, _Handler)
        except OSError as error:
            raise ConfigurationError(f"registry.metrics_port: {port} cannot be had: {error.strerror}") from None
        self.url = f"http://127.0.0.1:{self._server.server_port}/metrics"
        threading.Thread(target=self._server.serve_forever, name="fleet-metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class HostCollector:
    """What there is to know about a host: `models` and `reports` are by instance, `waiting` asks the broker what waits.

    A part that fails leaves out its own families, and says so in the log once.
    """

    def __init__(
        self,
        host: str,
        *,
        models: Callable[[], Mapping[str, list[ReportedModel]]],
        reports: Callable[[], Mapping[str, NodeReport]],
        announcer: RegistryPublisher,
        waiting: Callable[[list[str]], Mapping[str, Waiting]],
    ) -> None:
        self._host = host
        self._models = models
        self._reports = reports
        self._announcer = announcer
        self._waiting = _Remembered(waiting)
        self._failing: set[str] = set()

    def collect(self) -> Iterator[Metric]:
        """Called by the client library, in a thread for each scrape."""
        of_nodes = (self._instances, self._gauges, self._counts, self._histograms)
        for part in (self._registry, *of_nodes, self._lanes, self._queues):
            try:
                families = list(part())
            except Exception as error:
                self._note(part.__name__, error)
            else:
                self._note(part.__name__)
                yield from (family for family in families if family.samples)

    def _registry(self) -> Iterator[Metric]:
        yield InfoMetricFamily("fleet", "The registry node of this host.", {"version": VERSION})
        yield CounterMetricFamily(
            "fleet_registry_publish_failures",
            "Rounds of registry events that the broker did not take.",
            self._announcer.failures,
        )
        if moment := self._announcer.published_at:
            text = "Since the broker last took registry events of this host."
            yield GaugeMetricFamily("fleet_registry_age_seconds", text, time.monotonic() - moment)

    def _instances(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("fleet_instance_ready", "1 if it takes work.", labels=["node"])
        status = GaugeMetricFamily("fleet_instance_status", "1 for what it is now.", labels=["node", "status"])
        reports = self._reports()
        for name in self._models():
            report, node = reports.get(name), self._node(name)
            now = report.status if report else "unavailable"
            ready.add_metric([node], now == "available")
            for each in get_args(Status):
                status.add_metric([node, each], each == now)
        yield from (ready, status)

    def _gauges(self) -> Iterator[Metric]:
        reports = self._reports().values()
        for name, (text, value_of) in _GAUGES.items():
            family = GaugeMetricFamily(name, text, labels=["node"])
            for report in reports:
                if (value := value_of(report)) is not None:
                    family.add_metric([report.node], value)
            yield family

    def _counts(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily("fleet_tokens", "Generated.", labels=["node"])
        requests = CounterMetricFamily("fleet_requests", "Answered without an error.", labels=["node", "operation"])
        errors = CounterMetricFamily("fleet_errors", "Requests that failed.", labels=["node", "code"])
        for report in self._reports().values():
            operations = {each: 0 for model in report.models for each in model.capabilities}
            tokens.add_metric([report.node], report.tally["tokens"])
            for operation, count in {**operations, **report.tally["requests"]}.items():
                requests.add_metric([report.node, operation], count)
            for code, count in {**_NO_ERRORS, **report.tally["errors"]}.items():
                errors.add_metric([report.node, code], count)
        yield from (tokens, requests, errors)

    def _histograms(self) -> Iterator[Metric]:
        reports = self._reports().values()
        for name, (metric, text) in _HISTOGRAMS.items():
            family = HistogramMetricFamily(metric, text, labels=["node"])
            bounds = [*map(str, BOUNDS[name]), "+Inf"]
            for report in reports:
                measured = report.tally["histograms"][name]
                buckets = list(zip(bounds, accumulate(measured["buckets"]), strict=True))
                family.add_metric([report.node], buckets, measured["sum"])
            yield family

    def _lanes(self) -> Iterator[Metric]:
        served = {each for report in self._reports().values() for each in report.lanes}
        family = GaugeMetricFamily("fleet_lane_served", "1 if this host takes work from it.", labels=["lane"])
        for each in self._possible_lanes():
            family.add_metric([each], each in served)
        yield family

    def _queues(self) -> Iterator[Metric]:
        lanes, text = self._possible_lanes(), "1 if the broker answers within a second."
        try:
            found = self._waiting(lanes)
        except (BrokerUnavailable, TimeoutError) as error:
            self._note("the broker", error)
            yield GaugeMetricFamily("fleet_broker_up", text, 0)
            return
        self._note("the broker")
        yield GaugeMetricFamily("fleet_broker_up", text, 1)
        depth = GaugeMetricFamily("fleet_lane_depth", "Requests that wait in it.", labels=["lane"])
        age = GaugeMetricFamily("fleet_lane_oldest_age_seconds", "Of the first one that waits.", labels=["lane"])
        for name in found.keys() & lanes:
            depth.add_metric([name], found[name].depth)
            if (seconds := found[name].oldest_age) is not None:
                age.add_metric([name], seconds)
        yield from (depth, age)

    def _node(self, instance: str) -> str:
        return f"{instance}@{self._host}"

    def _possible_lanes(self) -> list[str]:
        """Those of everything that this host has, taken from at the moment or not."""
        reports = self._reports()
        found: set[str] = set()
        for name, models in self._models().items():
            report = reports.get(name)
            for model in report.models if report else models:
                found.update(lane(each, model.model) for each in model.capabilities)
            found.add(direct_lane(self._node(name)))
        return sorted(found)

    def _note(self, part: str, error: Exception | None = None) -> None:
        if error is None:
            self._failing.discard(part)
        elif part not in self._failing:
            self._failing.add(part)
            log.warning("metrics are incomplete: %s (%s)", part.lstrip("_"), type(error).__name__)


class _Remembered:
    """An answer that takes as long as it likes, in one thread of its own: it is waited for shortly, and good for a
    while.
    """

    def __init__(self, waiting: Callable[[list[str]], Mapping[str, Waiting]]) -> None:
        self._ask = waiting
        self._lock = threading.Lock()
        self._asked = 0.0
        self._answer: Future[Mapping[str, Waiting]] | None = None

    def __call__(self, lanes: list[str]) -> Mapping[str, Waiting]:
        """Raises `TimeoutError`, or whatever asking raised."""
        with self._lock:
            answer = self._answer
            if answer is None or (answer.done() and time.monotonic() - self._asked >= ASK_EVERY):
                self._asked, answer = time.monotonic(), Future()
                self._answer = answer
                threading.Thread(target=self._fulfil, args=(answer, lanes), name="fleet-depths", daemon=True).start()
        return answer.result(ANSWER_WITHIN)

    def _fulfil(self, answer: Future[Mapping[str, Waiting]], lanes: list[str]) -> None:
        try:
            answer.set_result(self._ask(lanes))
        except Exception as error:
            answer.set_exception(error)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client hung up, or said nothing: not worth a traceback."""


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT

    def log_message(self, *_: object) -> None:
        """A scrape is nothing to tell."""
