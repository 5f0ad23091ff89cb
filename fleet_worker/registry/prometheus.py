"""Prometheus metrics of one host, computed at each scrape from the last reports of its nodes.

Nodes count from their start (`counters`), so counters return to 0 when a node restarts, as Prometheus expects. Labels
are nodes, lanes, models, operations and error codes, never anything of a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from itertools import accumulate
from operator import attrgetter
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from fleet_worker.broker.queue_depth import Waiting
from fleet_worker.broker.topology import direct_lane, lane
from fleet_worker.errors import BrokerUnavailable, ConfigurationError, ProviderError
from fleet_worker.protocol.host_messages import HostStatus
from fleet_worker.protocol.status import STATUSES
from fleet_worker.registry.counters import BOUNDS
from fleet_worker.registry.publisher import RegistryPublisher
from fleet_worker.registry.status_socket import NodeReport
from fleet_worker.version import VERSION

log = logging.getLogger(__name__)

ASK_EVERY = 5.0
"""Seconds for which an answer of the broker is reused."""
ANSWER_WITHIN = 1.0
"""Seconds that a scrape waits for the broker."""
CLIENT_TIMEOUT = 5.0
"""Seconds after which a client that sends nothing is disconnected."""

_GAUGES = {
    "fleet_slots": ("instance.slots", "Requests that the node can run at the same time."),
    "fleet_slots_used": ("instance.running", "Requests that the node is running."),
    "fleet_tokens_per_second": ("instance.tokens_per_second", "Tokens generated in the last second."),
    "fleet_last_token_age_seconds": ("instance.last_token_age", "Seconds since the MLX server delivered a token."),
    "fleet_reply_lag_seconds": ("reply_lag", "The longest wait of a reply's part for the broker in the last second."),
}
"""The fields of a report that are shown as they are."""
_HISTOGRAMS = {
    "ttft_seconds": ("fleet_ttft_seconds", "Seconds from the request to the MLX server until its first token."),
    "queue_wait_seconds": ("fleet_queue_wait_seconds", "Seconds that requests waited until a node took them."),
    "tokens_per_second": ("fleet_generation_tokens_per_second", "Tokens per second of each answer after its first."),
}
_FAULTS: list[type[ProviderError]] = [ProviderError, *ProviderError.__subclasses__()]
_NO_ERRORS = {error.code: 0 for error in _FAULTS}
"""Counters start at 0: Prometheus sees no increase in one that starts at 1."""


class MetricsServer:
    """Serves the metrics of `collector` over HTTP at `url`, in its own threads.

    Raises:
        ConfigurationError: the port of 127.0.0.1 is not available.
    """

    def __init__(self, port: int, collector: HostCollector) -> None:
        registry = CollectorRegistry(support_collectors_without_names=True)
        registry.register(collector)
        try:
            self._server = make_server("127.0.0.1", port, make_wsgi_app(registry), _Server, _Handler)
        except OSError as error:
            text = f"registry.metrics_port: {port} cannot be used: {error.strerror}; choose another one"
            raise ConfigurationError(text) from None
        self.url = f"http://127.0.0.1:{self._server.server_port}/metrics"
        threading.Thread(target=self._server.serve_forever, name="fleet-metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class HostCollector:
    """Collects the metrics of a host. `reports` returns one report per instance, `waiting` asks the broker for the
    depths of lanes, `host` returns what `fleet-worker up` tells, `dropped` counts the messages that the registry node
    dropped: `{its name: {reason: number}}`.

    If a part fails, its metrics are missing, and one log line says so.
    """

    def __init__(
        self,
        reports: Callable[[], list[NodeReport]],
        *,
        publisher: RegistryPublisher,
        waiting: Callable[[list[str]], Mapping[str, Waiting]],
        host: Callable[[], HostStatus] = HostStatus,
        dropped: Callable[[], dict[str, Mapping[str, int]]] = dict,
    ) -> None:
        self._reports = reports
        self._host = host
        self._dropped = dropped
        self._publisher = publisher
        self._waiting = _Cached(waiting)
        self._failing: set[str] = set()

    def collect(self) -> Iterator[Metric]:
        """Called by the client library, in a thread for each scrape."""
        reports = self._reports()
        live = [report for report in reports if report.instance.pid is not None]
        dropped = {report.instance.node: report.counters.get("dropped", {}) for report in live} | self._dropped()
        parts = {  # generators: each begins below, where it may fail
            "registry": self._registry(),
            "instances": _instances(reports),
            "servers": _servers(self._host(), {each.instance.name: each.instance.node for each in reports}),
            "gauges": _gauges(live),
            "counts": _counts(live),
            "prompts": _prompts(live),
            "histograms": _histograms(live),
            "dropped": _dropped(dropped),
            "lanes": _lanes(reports),
            "queues": self._queues(reports),
        }
        for name, part in parts.items():
            try:
                families = list(part)
            except Exception as error:
                self._note(name, error)
            else:
                self._note(name)
                yield from (family for family in families if family.samples)

    def _registry(self) -> Iterator[Metric]:
        yield InfoMetricFamily("fleet", "The registry node of this host.", {"version": VERSION})
        yield CounterMetricFamily(
            "fleet_registry_publish_failures",
            "Rounds of registry events that the broker did not take.",
            self._publisher.failures,
        )
        if published_at := self._publisher.published_at:
            text = "Seconds since the broker last took registry events of this host."
            yield GaugeMetricFamily("fleet_registry_age_seconds", text, time.monotonic() - published_at)

    def _queues(self, reports: list[NodeReport]) -> Iterator[Metric]:
        lanes, text = _possible_lanes(reports), "1 if the broker answers within a second."
        try:
            waiting = self._waiting(lanes)
        except (BrokerUnavailable, TimeoutError) as error:
            self._note("the broker", error)
            yield GaugeMetricFamily("fleet_broker_up", text, 0)
            return
        self._note("the broker")
        yield GaugeMetricFamily("fleet_broker_up", text, 1)
        found = {name: waiting[name] for name in lanes if name in waiting}
        depths = {name: each.depth for name, each in found.items()}
        yield _gauge("fleet_lane_depth", "Requests waiting in the lane.", "lane", depths)
        text = "Seconds since the oldest waiting request was submitted."
        ages = {name: each.oldest_age for name, each in found.items()}
        yield _gauge("fleet_lane_oldest_age_seconds", text, "lane", ages)

    def _note(self, part: str, error: Exception | None = None) -> None:
        """Log the first failure of a part after it worked."""
        if error is None:
            self._failing.discard(part)
        elif part not in self._failing:
            self._failing.add(part)
            log.warning("metrics are incomplete: %s (%s)", part, type(error).__name__)


def _gauge(name: str, text: str, label: str, values: Mapping[str, float | None]) -> Metric:
    """A gauge with one label; values of None are left out."""
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        if value is not None:
            family.add_metric([key], value)
    return family


def _instances(reports: list[NodeReport]) -> Iterator[Metric]:
    instances = [report.instance for report in reports]
    text = "1 if the instance takes requests."
    yield _gauge("fleet_instance_ready", text, "node", {each.node: each.ready for each in instances})
    text = "1 for the current status of the instance."
    family = GaugeMetricFamily("fleet_instance_status", text, labels=["node", "status"])
    for instance in instances:
        for status in STATUSES:
            family.add_metric([instance.node, status], status == instance.status)
    yield family


def _servers(host: HostStatus, nodes: Mapping[str, str]) -> Iterator[Metric]:
    """Of the MLX servers that `fleet-worker up` manages; `nodes` has the names of nodes by instance."""
    yield GaugeMetricFamily("fleet_away", "1 if the owner of this machine needs it.", bool(host.away))
    servers = {nodes[each.instance]: each for each in host.servers if each.instance in nodes}
    counts = {
        "fleet_server_restarts": ("restarts", "Restarts of the MLX server, for whatever reason."),
        "fleet_server_deaths": ("deaths", "Ends of the MLX server that nobody has asked for."),
    }
    for name, (count, text) in counts.items():
        family = CounterMetricFamily(name, text, labels=["node"])
        for node, server in servers.items():
            family.add_metric([node], getattr(server, count))
        yield family
    text = "1 if the MLX server has died too often, and is only tried once in a while."
    quarantined = {node: server.stage == "quarantined" for node, server in servers.items()}
    yield _gauge("fleet_server_quarantined", text, "node", quarantined)
    text = "Bytes of memory of all processes of the MLX server."
    yield _gauge("fleet_server_memory_bytes", text, "node", {node: each.memory for node, each in servers.items()})


def _gauges(live: list[NodeReport]) -> Iterator[Metric]:
    for name, (field, text) in _GAUGES.items():
        yield _gauge(name, text, "node", {report.instance.node: attrgetter(field)(report) for report in live})


def _counts(live: list[NodeReport]) -> Iterator[Metric]:
    tokens = CounterMetricFamily("fleet_tokens", "Generated tokens.", labels=["node"])
    requests = CounterMetricFamily(
        "fleet_requests", "Requests answered without an error.", labels=["node", "operation"]
    )
    errors = CounterMetricFamily("fleet_errors", "Failed requests.", labels=["node", "code"])
    for report in live:
        node, counters = report.instance.node, report.counters
        operations = {each: 0 for model in report.models for each in model.capabilities}
        tokens.add_metric([node], counters["tokens"])
        for operation, count in {**operations, **counters["requests"]}.items():
            requests.add_metric([node, operation], count)
        for code, count in {**_NO_ERRORS, **counters["errors"]}.items():
            errors.add_metric([node, code], count)
    yield from (tokens, requests, errors)


def _prompts(live: list[NodeReport]) -> Iterator[Metric]:
    """Nodes of older versions count no prompts; servers that do not tell what they had cached have no such sample."""
    labels = ["node", "model"]
    prompts = CounterMetricFamily("fleet_prompt_tokens", "Tokens of the prompts of all answered chats.", labels=labels)
    text = "Tokens of these prompts that the server had in its prompt cache."
    cached = CounterMetricFamily("fleet_cached_prompt_tokens", text, labels=labels)
    for report in live:
        node, counters = report.instance.node, report.counters
        if "prompt_tokens" in counters:
            models = {model.model: 0 for model in report.models if "embed" not in model.capabilities}
            for model, tokens in {**models, **counters["prompt_tokens"]}.items():
                prompts.add_metric([node, model], tokens)
            for model, tokens in counters["cached_tokens"].items():
                cached.add_metric([node, model], tokens)
    yield from (prompts, cached)


def _dropped(by_node: Mapping[str, Mapping[str, int]]) -> Iterator[Metric]:
    text = "Messages that were no messages of this fleet."
    family = CounterMetricFamily("fleet_dropped_messages", text, labels=["node", "reason"])
    for node, reasons in by_node.items():
        for reason, count in reasons.items():
            family.add_metric([node, reason], count)
    yield family


def _histograms(live: list[NodeReport]) -> Iterator[Metric]:
    for name, (metric, text) in _HISTOGRAMS.items():
        family = HistogramMetricFamily(metric, text, labels=["node"])
        bounds = [*map(str, BOUNDS[name]), "+Inf"]
        for report in live:
            measured = report.counters["histograms"][name]
            buckets = list(zip(bounds, accumulate(measured["buckets"]), strict=True))
            family.add_metric([report.instance.node], buckets, measured["sum"])
        yield family


def _lanes(reports: list[NodeReport]) -> Iterator[Metric]:
    served = {each for report in reports for each in report.instance.lanes}
    text = "1 if a node of this host takes requests from the lane."
    yield _gauge("fleet_lane_served", text, "lane", {each: each in served for each in _possible_lanes(reports)})


def _possible_lanes(reports: list[NodeReport]) -> list[str]:
    """The lanes of all models and nodes of this host, also those that its nodes have left."""
    lanes = {lane(each, model.model) for report in reports for model in report.models for each in model.capabilities}
    return sorted(lanes | {direct_lane(report.instance.node) for report in reports})


class _Cached:
    """Calls a slow function in a thread of its own, waits briefly for the result, and reuses it for a while."""

    def __init__(self, waiting: Callable[[list[str]], Mapping[str, Waiting]]) -> None:
        self._ask = waiting
        self._lock = threading.Lock()
        self._asked_at = 0.0
        self._answer: Future[Mapping[str, Waiting]] | None = None

    def __call__(self, lanes: list[str]) -> Mapping[str, Waiting]:
        """Raises `TimeoutError` after `ANSWER_WITHIN` seconds, or what the function raised."""
        with self._lock:
            answer = self._answer
            if answer is None or (answer.done() and time.monotonic() - self._asked_at >= ASK_EVERY):
                self._asked_at, answer = time.monotonic(), Future()
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
        """A client disconnected or sent nothing: not worth a traceback."""


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT

    def log_message(self, *_: object) -> None:
        """Do not log scrapes."""
