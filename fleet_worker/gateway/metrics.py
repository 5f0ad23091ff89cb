"""Prometheus metrics of a gateway, by the name of the key: what it has served since it started.

Labels are names of keys, models that have answered, operations, statuses, outcomes and codes of errors, never anything
of a request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fleet_worker.gateway.facts import Facts
from fleet_worker.registry.counters import BOUNDS

NOBODY = ""
"""The label of requests whose key is not known."""
MOST_CODES = 60
"""Codes of errors that are told apart: some come from nodes."""
MOST_MODELS = 100
"""Models that are told apart."""
OTHER = "other"
_CODE = re.compile(r"[a-z_]{1,40}")


class Metrics:
    """The metrics of one gateway. Thread-safe.

    `dropped` returns how many rows the ledger has dropped, `are_shared` whether quotas hold for all gateways together.
    """

    def __init__(self, dropped: Callable[[], int], are_shared: Callable[[], bool]) -> None:
        self._registry = to = CollectorRegistry(auto_describe=False, support_collectors_without_names=True)
        to.register(_Sampled(dropped, are_shared))
        self._codes: set[str] = set()
        self._models: set[str] = set()
        text = "Requests by the status of their answers."
        self._requests = Counter("fleet_gateway_requests", text, ["key", "operation", "status"], registry=to)
        text = "Requests without a whole answer."
        self._errors = Counter("fleet_gateway_errors", text, ["key", "code"], registry=to)
        text = "Tokens of prompts and of answers."
        self._tokens = Counter("fleet_gateway_tokens", text, ["key", "kind"], registry=to)
        text = "Requests by whether their prompt met its cache."
        self._cache = Counter("fleet_gateway_cache", text, ["key", "outcome"], registry=to)
        text = "Tokens of prompts to servers that tell how many of them were cached."
        self._prompt_tokens = Counter("fleet_gateway_prompt_tokens", text, ["key", "model"], registry=to)
        text = "Those of them that the servers had in their caches."
        self._cached_tokens = Counter("fleet_gateway_cached_tokens", text, ["key", "model"], registry=to)
        text, buckets = "Seconds from the arrival of a request to its first token.", BOUNDS["ttft_seconds"]
        self._ttft = Histogram("fleet_gateway_ttft_seconds", text, ["key"], registry=to, buckets=buckets)
        text, buckets = "Seconds until a node took the request.", BOUNDS["queue_wait_seconds"]
        self._queue_wait = Histogram("fleet_gateway_queue_wait_seconds", text, ["key"], registry=to, buckets=buckets)
        self._running = Gauge("fleet_gateway_running", "Requests that are being answered.", ["key"], registry=to)

    def begun(self, key: str) -> None:
        """Count a request that a key may make."""
        self._running.labels(key).inc()

    def ended(self, facts: Facts, status: int) -> None:
        """Count a request that has ended. One with a known key has `begun`."""
        key = facts.key or NOBODY
        if facts.key:
            self._running.labels(key).dec()
        self._requests.labels(key, facts.operation or OTHER, str(status)).inc()
        if facts.error:
            self._errors.labels(key, self._code(facts.error)).inc()
        for kind, tokens in (("prompt", facts.prompt_tokens), ("completion", facts.completion_tokens)):
            if tokens:
                self._tokens.labels(key, kind).inc(tokens)
        if facts.cache:
            self._cache.labels(key, facts.cache).inc()
        if (cached := facts.usage.cached_tokens) is not None:
            labels = (key, self._model(facts.model))
            self._prompt_tokens.labels(*labels).inc(facts.prompt_tokens)
            self._cached_tokens.labels(*labels).inc(min(max(cached, 0), facts.prompt_tokens))
        for histogram, seconds in ((self._ttft, facts.ttft), (self._queue_wait, facts.queue_wait)):
            if seconds is not None:
                histogram.labels(key).observe(seconds)

    def exposition(self, accepts: str) -> tuple[bytes, str]:
        """Return all metrics in the format that a client accepts, and its content type."""
        encode, media_type = choose_encoder(accepts)
        return encode(self._registry), media_type

    def _model(self, model: str | None) -> str:
        if not model or (model not in self._models and len(self._models) >= MOST_MODELS):
            return OTHER
        self._models.add(model)
        return model

    def _code(self, code: str) -> str:
        if not _CODE.fullmatch(code) or (code not in self._codes and len(self._codes) >= MOST_CODES):
            return OTHER
        self._codes.add(code)
        return code


class _Sampled(Collector):
    """What is read at each scrape."""

    def __init__(self, dropped: Callable[[], int], are_shared: Callable[[], bool]) -> None:
        self._dropped = dropped
        self._are_shared = are_shared

    def collect(self) -> Iterator[Metric]:
        text = "Rows that the ledger could not write."
        yield CounterMetricFamily("fleet_gateway_ledger_dropped", text, self._dropped())
        text = "1 if the quotas of keys hold for all gateways together, 0 if this one counts alone."
        yield GaugeMetricFamily("fleet_gateway_quotas_shared", text, float(self._are_shared()))
