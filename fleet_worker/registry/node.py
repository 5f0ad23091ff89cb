"""The registry node of a host: a Celery worker whose beat publishes what the instances of this host are.

It works for nobody, so no generation ever delays it, and it asks no MLX server anything: it hears from the inference
nodes, so that a stuck server cannot stop the events of another instance. What changes is published at once, and all of
it on every beat.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from celery import Celery, bootsteps
from celery.beat import Scheduler, Service
from celery.schedules import schedule
from kombu import Consumer

from fleet_worker.broker.queue_depth import waiting
from fleet_worker.broker.topology import ask_queue, direct_lane, lane_queue, transport_of
from fleet_worker.errors import ConfigurationError
from fleet_worker.mlx.offering import offerings_of
from fleet_worker.protocol.registry_event import GONE, READINESS, Announcement, EventType, RegistryEvent
from fleet_worker.registry.publisher import RegistryPublisher
from fleet_worker.registry.status_socket import NodeReport, ReportedModel, Reports, reported_model, socket_path
from fleet_worker.settings import REGISTRY, Settings
from fleet_worker.version import VERSION

if TYPE_CHECKING:
    from fleet_worker.registry.prometheus import Metrics

log = logging.getLogger(__name__)

KINDS = ("readiness", "models")
NO_NODE = (
    "no node answers for this instance: it is starting (perhaps its MLX server is missing), has ended, or is frozen; "
    "see its log and fleet-worker doctor"
)
_TYPES: dict[str, EventType] = {"available": "offering_available", "degraded": "offering_degraded"}


class RegistryNode:
    """What one host has to tell, and the Celery worker that tells it."""

    def __init__(self, app: Celery, settings: Settings, host: str) -> None:
        self.name = f"{REGISTRY}@{host}"
        self._settings = settings
        self._host = host
        self._app = app
        self._models = {name: _configured(settings, name) for name in self._served()}
        self._last: dict[tuple[str, str], str] = {}
        self._ending = False
        transport = transport_of(settings.broker_url)
        self._announcer = RegistryPublisher(app.connection_for_write, transport, self._announcements)
        self.reports = Reports(socket_path(settings.state_dir, host), lambda: self._announcer.announce(*KINDS))
        self._metrics = None if settings.registry.metrics_port is None else self._serve(settings.registry.metrics_port)
        self._schedule()
        app.steps["consumer"].add(self._listening_step())

    def start(self) -> None:
        """Begin to beat, in a thread: a beat process would outlive a killed worker, and soon there would be two."""
        beat = Service(self._app, max_interval=1, scheduler_cls=_QuietScheduler)
        threading.Thread(target=beat.start, name="fleet-beat", daemon=True).start()
        self._announcer.announce(*KINDS)
        log.info("%s is ready, and tells of %s", self.name, ", ".join(self._served()))
        if self._metrics:
            log.info("%s serves metrics at %s", self.name, self._metrics.url)

    def reload(self, settings: Settings) -> bool:
        """Tell of the instances that are configured now; False if anything else changed, which takes a new process."""
        if not can_follow(settings, self._settings):
            return False
        self._settings = settings
        self._announcer.announce(*KINDS)
        return True

    def drain(self, *, ending: bool = False) -> None:
        """Nothing to do: it works for nobody, and so has nothing to hand over."""

    def hand_over(self) -> None:
        """Nothing to do."""

    def wait_until_idle(self, timeout: float) -> bool:
        """True at once."""
        return True

    def close(self, timeout: float = 2.0) -> None:
        """Tell that this host is not there any more, if the broker takes it within `timeout` seconds."""
        self._ending = True
        self.reports.close()
        self._announcer.announce(*KINDS)
        self._announcer.close(timeout)
        if self._metrics:
            self._metrics.close()

    def _serve(self, port: int) -> Metrics:
        """Metrics of this host; they are there before the broker is, to say that it is not.

        Raises:
            ConfigurationError: a package is missing, or the port cannot be had.
        """
        try:
            from fleet_worker.registry.prometheus import HostCollector, Metrics
        except ModuleNotFoundError as error:
            text = f"registry.metrics_port needs one more package ({error.name}): pip install 'fleet-worker[metrics]'"
            raise ConfigurationError(text) from None
        collector = HostCollector(
            self._host,
            models=lambda: self._models,
            reports=self.reports,
            announcer=self._announcer,
            waiting=lambda lanes: waiting(self._app, self._transport, lanes),
        )
        return Metrics(port, collector)

    # The Celery worker

    def _schedule(self) -> None:
        registry, queue = self._settings.registry, lane_queue(direct_lane(self.name), self._transport)
        intervals = {"readiness": registry.readiness_interval, "models": registry.models_interval}
        self._app.conf.task_queues = [queue]
        self._app.conf.worker_concurrency = 1
        self._app.conf.beat_schedule = {
            kind: {
                "task": f"registry.publish_{kind}",
                "schedule": Jittered(seconds),
                "options": {"queue": queue.name, "expires": seconds},
            }
            for kind, seconds in intervals.items()
        }

        @self._app.task(name="registry.publish_readiness", ignore_result=True, shared=False)  # type: ignore[untyped-decorator]
        def publish_readiness() -> None:
            self._announcer.announce("readiness")

        @self._app.task(name="registry.publish_models", ignore_result=True, shared=False)  # type: ignore[untyped-decorator]
        def publish_models() -> None:
            self._announcer.announce("models")

    @property
    def _transport(self) -> Any:
        return transport_of(self._settings.broker_url)

    def _listening_step(self) -> type[bootsteps.ConsumerStep]:
        """A router that has just come asks who is there."""
        node = self

        class Asked(bootsteps.ConsumerStep):  # type: ignore[misc]
            def get_consumers(self, channel: Any) -> list[Consumer]:
                def answer(message: Any) -> None:
                    node._announcer.announce(*KINDS)

                return [Consumer(channel, [ask_queue(node._transport)], on_message=answer, no_ack=True)]

        return Asked

    # What it tells

    def _served(self) -> list[str]:
        return [name for name, instance in self._settings.instances.items() if instance.opted_in]

    def _announcements(self, kinds: frozenset[str]) -> Iterator[tuple[str, Announcement]]:
        """What there is to say now, a message for each type of event; what was published counts as known."""
        reports = {} if self._ending else self.reports()
        for kind in KINDS:
            if kind in kinds:
                found = dict(self._readiness(reports) if kind == "readiness" else self._offerings(reports))
                yield from self._messages(kind, {**self._gone(kind, found), **found})

    def _messages(self, kind: str, said: dict[tuple[str, str], dict[str, Any]]) -> Iterator[tuple[str, Announcement]]:
        by_type: dict[EventType, list[tuple[str, str]]] = {}
        for key, fields in said.items():
            by_type.setdefault(self._type_of(key, fields), []).append(key)
        registry = self._settings.registry
        interval = registry.readiness_interval if kind == "readiness" else registry.models_interval
        for event_type, keys in by_type.items():
            events = [RegistryEvent.of(event_type, **said[key]) for key in keys]
            yield event_type, Announcement(v=1, host=self._host, interval=interval, events=events)
            self._last.update({key: said[key]["health"]["status"] for key in keys})
            for key in keys:
                if said[key]["health"]["status"] == GONE:
                    del self._last[key]

    def _type_of(self, key: tuple[str, str], fields: dict[str, Any]) -> EventType:
        status = fields["health"]["status"]
        return "offering_heartbeat" if self._last.get(key) == status else _TYPES.get(status, "offering_unavailable")

    def _gone(self, kind: str, found: Iterable[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
        """What was told before and is not there any more, since the configuration or the server has changed."""
        missing = {key for key in self._last if (key[1] == READINESS) == (kind == "readiness")}.difference(found)
        return {key: self._farewell(*key) for key in missing}

    def _farewell(self, name: str, model: str) -> dict[str, Any]:
        return {
            "offering": {"provider": "mlx", "instance": name, "model": model},
            "runtime": {"node": f"{name}@{self._host}", "host": self._host, "version": VERSION},
            "capacity": {"slots": 0, "running": 0},
            "health": {"ready": False, "status": GONE, "checked": True, "error": "it is not offered any more"},
        }

    def _readiness(self, reports: dict[str, NodeReport]) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
        for name in self._served():
            offering = {"provider": "mlx", "instance": name, "model": READINESS, "usage": "inference"}
            yield (name, READINESS), self._event(name, reports.get(name), offering)

    def _offerings(self, reports: dict[str, NodeReport]) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
        for name in self._served():
            report = reports.get(name)
            if report:
                self._models[name] = report.models
            elif name not in self._models:
                self._models[name] = _configured(self._settings, name)
            for model in self._models[name]:
                offering = {
                    "provider": "mlx",
                    "instance": name,
                    "model": model.model,
                    "usage": "embedding" if model.capabilities == ["embed"] else "inference",
                    "capabilities": model.capabilities,
                    "features": model.features,
                    "limits": model.limits,
                }
                yield (name, model.model), self._event(name, report, offering, missing=not model.available)

    def _event(
        self, name: str, report: NodeReport | None, offering: dict[str, Any], *, missing: bool = False
    ) -> dict[str, Any]:
        """The fields of an event about an instance, or about one of its models."""
        status = "unavailable" if report is None or missing else report.status
        health: dict[str, Any] = {"ready": status == "available", "status": status, "checked": report is not None}
        if error := self._error(report, missing=missing):
            health["error"] = error
        runtime: dict[str, Any] = {"node": f"{name}@{self._host}", "host": self._host, "version": VERSION}
        capacity: dict[str, Any] = {"slots": self._settings.instances[name].limits.concurrency, "running": 0}
        if report:
            runtime |= {"server": report.server, "pid": report.pid}
            capacity |= {
                "slots": report.slots,
                "running": report.running,
                "tokens_per_second": report.tokens_per_second,
                "last_token_age": report.last_token_age,
            }
        return {
            "offering": offering,
            "runtime": runtime,
            "capacity": capacity,
            "health": health,
            "lane": report.lanes if report else [],
            "metadata": {"extension": "fleet_worker", "configured": True, "live": report is not None},
        }

    def _error(self, report: NodeReport | None, *, missing: bool) -> str:
        if self._ending:
            return "the registry node of this host ended"
        if report is None:
            return NO_NODE
        return "the MLX server does not have this model" if missing else report.reason


def can_follow(settings: Settings, old: Settings) -> bool:
    """Tell whether a registry node can go over to these settings without a new process."""
    parts = {"broker_url", "host", "state_dir", "registry"}
    return settings.model_dump(include=parts) == old.model_dump(include=parts)


class Jittered(schedule):  # type: ignore[misc]
    """Every so many seconds, give or take a fifth: a thousand hosts that were switched on together do not beat
    together.
    """

    def __init__(self, seconds: float, **kwargs: Any) -> None:
        self._seconds = seconds
        super().__init__(timedelta(seconds=seconds * random.uniform(0.1, 1.0)), **kwargs)  # noqa: S311 - spreads load

    def is_due(self, last_run_at: Any) -> Any:
        answer = super().is_due(last_run_at)
        if answer.is_due:
            self.run_every = timedelta(seconds=self._seconds * random.uniform(0.8, 1.2))  # noqa: S311 - spreads load
        return answer

    def __reduce__(self) -> Any:
        return type(self), (self._seconds,)


class _QuietScheduler(Scheduler):  # type: ignore[misc]
    """Says once that the broker does not take its tasks, not at every beat, and keeps its schedule in memory."""

    failing = False

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        try:
            self.apply_async(entry, producer=producer, advance=False)
        except Exception as error:
            if not self.failing:
                log.warning("the beat does not reach the broker (%s)", type(error).__name__)
            self.failing = True
        else:
            self.failing = False


def _configured(settings: Settings, name: str) -> list[ReportedModel]:
    """What is to be expected of an instance whose node has not said anything yet."""
    offerings = offerings_of(settings.instances[name], settings.features, ())
    return [reported_model(each) for each in offerings.values()]
