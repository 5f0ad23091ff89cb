"""The registry node of a host: a Celery worker whose beat publishes the status of the host's instances.

It runs no requests, so no generation delays it, and it talks to no MLX server: the inference nodes report to it, so
that one stuck server cannot delay the events of another. Changes are published at once, everything on every beat.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.beat import Service

from fleet_worker.broker.app import door_of
from fleet_worker.broker.control_listener import Subscription
from fleet_worker.broker.queue_depth import waiting
from fleet_worker.broker.topology import ask_queue, direct_lane, lane_queue, transport_of
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.up_socket import socket_path as up_socket_path
from fleet_worker.mlx.offering import offerings_of
from fleet_worker.protocol.cache_digest import CacheDigest
from fleet_worker.protocol.registry_event import (
    GONE,
    READINESS,
    WHOLE_STATUS,
    Announcement,
    EventType,
    RegistryEvent,
)
from fleet_worker.protocol.status import InstanceStatus, ModelStatus
from fleet_worker.registry.beat import Jittered, QuietScheduler
from fleet_worker.registry.digests import DigestPublisher
from fleet_worker.registry.host_watch import HostWatch
from fleet_worker.registry.publisher import RegistryPublisher
from fleet_worker.registry.status_socket import NodeReport, StatusServer, model_status, socket_path
from fleet_worker.settings import REGISTRY, Instance, Settings
from fleet_worker.version import VERSION

if TYPE_CHECKING:
    from fleet_worker.registry.prometheus import MetricsServer

log = logging.getLogger(__name__)

KINDS = ("readiness", "models")
NO_NODE = (
    "no node answers for this instance: it is starting (perhaps its MLX server is missing), has ended, or is frozen; "
    "see its log and fleet-worker doctor"
)


class RegistryNode:
    """Collects what the nodes of this host report, publishes it, and serves it to Prometheus.

    Raises:
        ConfigurationError: another registry node runs on this host, or metrics cannot be served.
    """

    def __init__(self, app: Celery, settings: Settings, host: str) -> None:
        self.name = f"{REGISTRY}@{host}"
        self._settings = settings
        self._host = host
        self._app = app
        self._transport = transport_of(settings.broker_url)
        registry = settings.registry
        self._intervals = {"readiness": registry.readiness_interval, "models": registry.models_interval}
        """Seconds between two rounds of each kind. Other intervals need a new process."""
        self._models: dict[str, tuple[ModelStatus, ...]] = {}
        """Of each instance, as its node reported them last."""
        self._since: dict[str, tuple[str, float]] = {}
        """By instance: its status, and since when (time.monotonic()) it has that."""
        self._published: dict[tuple[str, str], str] = {}
        """The status that routers know, by instance and model."""
        self._ending = False
        self._was_cut_off = False
        """It has been without the questions of routers since everything was published."""
        self._publisher = RegistryPublisher(
            app.connection_for_write, self._transport, self._announcements, self._on_first_round
        )
        self._digest_publisher = DigestPublisher(self._publisher.publish_digest, host, self._digests)
        self.status_server = StatusServer(
            socket_path(settings.state_dir, host), self._publish_all, self._digest_publisher.changed
        )
        self.host_watch = HostWatch(up_socket_path(settings.state_dir, host), host, self._publish_all)
        self._metrics = None if settings.registry.metrics_port is None else self._serve(settings.registry.metrics_port)
        self._schedule()

    @property
    def subscription(self) -> Subscription:
        """A new router asks all hosts for their status; each router that wants digests says so now and then."""
        return ask_queue, self._answer

    def start(self) -> None:
        """Start the beat in a thread: a beat process would survive a killed worker, and its successor add a second."""
        beat = Service(self._app, max_interval=1, scheduler_cls=QuietScheduler)
        threading.Thread(target=beat.start, name="fleet-beat", daemon=True).start()
        self._digest_publisher.start()
        self.host_watch.start()
        self._publish_all()
        if self._metrics:
            log.info("%s serves metrics at %s", self.name, self._metrics.url)

    def connected(self, connected: bool) -> None:
        """Publish everything after a lost connection: a router may have asked meanwhile."""
        if connected and self._was_cut_off:
            self._publish_all()
        self._was_cut_off = not connected

    def reload(self, settings: Settings) -> bool:
        """Publish the instances of new settings; False if anything else changed, which needs a new process."""
        if not can_follow(settings, self._settings):
            return False
        self._settings = settings
        self._publish_all()
        return True

    def close(self, timeout: float = 2.0) -> None:
        """Publish that this host is unavailable, if the broker takes it within `timeout` seconds."""
        self._ending = True
        self.host_watch.close()
        self.status_server.close()
        self._publish_all()
        self._digest_publisher.close()
        self._publisher.close(timeout)
        if self._metrics:
            self._metrics.close()

    def _serve(self, port: int) -> MetricsServer:
        """Serve metrics, also before there is a broker: they show that there is none."""
        try:
            from fleet_worker.registry.prometheus import HostCollector, MetricsServer
        except ModuleNotFoundError as error:
            text = (
                f"registry.metrics_port needs one more package ({error.name}): in a checkout, pip install '.[metrics]'"
            )
            raise ConfigurationError(text) from None
        return MetricsServer(
            port,
            HostCollector(
                self._reports,
                publisher=self._publisher,
                waiting=lambda lanes: waiting(self._app, self._transport, lanes),
                host=lambda: self.host_watch.host,
                dropped=lambda: {self.name: door_of(self._app).dropped},
            ),
        )

    def _on_first_round(self) -> None:
        if not self._ending:
            log.info("%s is ready, and publishes the status of %s", self.name, ", ".join(self._settings.serving()))

    # --- The Celery worker ---

    def _schedule(self) -> None:
        queue = lane_queue(direct_lane(self.name), self._transport)
        beats: dict[str, Any] = {}
        for kind, seconds in self._intervals.items():
            task = f"registry.publish_{kind}"
            options = {"queue": queue.name, "expires": seconds}
            beats[kind] = {"task": task, "schedule": Jittered(seconds), "options": options}

            @self._app.task(name=task, ignore_result=True, shared=False)  # type: ignore[untyped-decorator]
            def publish(kind: str = kind) -> None:
                self._publisher.publish(kind)
                if kind == "readiness":
                    self._digest_publisher.beat()

        self._app.conf.update(task_queues=[queue], worker_concurrency=1, beat_schedule=beats)

    # --- What it publishes ---

    def _answer(self, message: Any) -> None:
        """Raises `Refused`."""
        if message.body == WHOLE_STATUS:
            self._publish_all()
        else:
            self._digest_publisher.receive(message.body)

    def _digests(self) -> list[CacheDigest]:
        reports = self.status_server.reports().values()
        return [report.prompt_cache for report in reports if report.prompt_cache]

    def _publish_all(self) -> None:
        self._publisher.publish(*KINDS)

    def _announcements(self, kinds: frozenset[str]) -> Iterator[tuple[str, Announcement]]:
        """Yield one message per type of event. When the next one is asked for, the broker has the last one."""
        for kind in (each for each in KINDS if each in kinds):
            by_type: dict[EventType, list[RegistryEvent]] = {}
            for event in self._events(kind):
                by_type.setdefault(event.event_type, []).append(event)
            for event_type, events in by_type.items():
                yield event_type, Announcement(v=1, host=self._host, interval=self._intervals[kind], events=events)
                for event in events:
                    self._published[event.instance, event.model] = event.status
                    if event.status == GONE:
                        del self._published[event.instance, event.model]

    def _events(self, kind: str) -> Iterator[RegistryEvent]:
        """First what is not offered any more, since the configuration or the server has changed; then the rest."""
        offered: dict[tuple[str, str], tuple[InstanceStatus, ModelStatus | None]] = {}
        for report in self._reports():
            instance = self._with_age(report.instance)
            for model in (None,) if kind == "readiness" else report.models:
                offered[instance.name, model.model if model else READINESS] = instance, model
        for name, model_name in self._published.keys() - offered.keys():
            if (model_name == READINESS) == (kind == "readiness"):
                gone = self._without_node(name, GONE, "it is not offered any more")
                model = None if kind == "readiness" else ModelStatus(model=model_name, status=GONE)
                yield RegistryEvent.about(gone, model)
        for key, (instance, model) in offered.items():
            yield RegistryEvent.about(instance, model, known=self._published.get(key))

    def _with_age(self, instance: InstanceStatus) -> InstanceStatus:
        """In the thread of the publisher only."""
        now = time.monotonic()
        status, since = self._since.get(instance.name, ("", now))
        if status != instance.status:
            self._since[instance.name] = instance.status, now
            since = now
        return replace(instance, status_age=round(now - since, 3))

    def _reports(self) -> list[NodeReport]:
        """Return one report for each instance that has opted in, also for those whose nodes do not report now."""
        reports = {} if self._ending else self.status_server.reports()
        self._models |= {name: report.models for name, report in reports.items()}
        serving = self._settings.serving()
        found = [reports.get(name) or self._report_without_node(name, each) for name, each in serving.items()]
        return [replace(each, instance=self.host_watch.completed(each.instance)) for each in found]

    def _report_without_node(self, name: str, instance: Instance) -> NodeReport:
        """The models are those that its node reported last, or those of the configuration."""
        if name not in self._models:
            offerings = offerings_of(instance, self._settings.features, ())
            self._models[name] = tuple(model_status(each, "unavailable") for each in offerings.values())
        known = self.host_watch.without_node(name) or ("unavailable", NO_NODE)
        shown, reason = ("unavailable", "the registry node of this host ended") if self._ending else known
        status = self._without_node(name, shown, reason, slots=instance.limits.concurrency)
        models = tuple(replace(each, status=status.status) for each in self._models[name])
        return NodeReport(status, models, reply_lag=0.0, counters={})

    def _without_node(self, name: str, status: str, reason: str, slots: int = 0) -> InstanceStatus:
        facts: dict[str, Any] = {"host": self._host, "name": name, "node": f"{name}@{self._host}", "version": VERSION}
        return InstanceStatus(**facts, status=status, reason=reason, slots=slots)


def can_follow(settings: Settings, old: Settings) -> bool:
    """Return whether a registry node can apply these settings without a new process."""
    parts = {"broker_url", "broker_ca", "broker_cert", "broker_key", "host", "state_dir", "registry"}
    return settings.model_dump(include=parts) == old.model_dump(include=parts)
