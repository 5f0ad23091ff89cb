"""An inference node: one instance, what it offers, and the lanes it takes work from while it really can work."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fleet_worker.broker.topology import direct_lane, lane
from fleet_worker.errors import ConfigurationError, FleetError, InstanceUnavailable, ModelNotServed
from fleet_worker.mlx.client import MLXClient
from fleet_worker.mlx.offering import Offering, no_offerings_advice, offerings_of
from fleet_worker.mlx.profiles import PROFILES, lacks_template
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.node.cancel_listener import CancelListener
from fleet_worker.node.health_monitor import HealthMonitor
from fleet_worker.node.lane_consumer import LaneConsumer
from fleet_worker.node.readiness import Readiness, State
from fleet_worker.node.reply_publisher import ReplyPublisher
from fleet_worker.node.router_presence import RouterPresence
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry.counters import Counters
from fleet_worker.registry.status_socket import NodeReport, StatusClient, model_status, socket_path
from fleet_worker.settings import Instance, Settings
from fleet_worker.version import VERSION

log = logging.getLogger(__name__)

LANES_JOINED_WITHIN = 0.5
"""Seconds that are waited before it is told which lanes it has; what takes longer is told when it is done."""
LANES_LEFT_WITHIN = 2.0
"""Seconds that leaving the lanes may take, before it counts as done: the broker may be away."""


class Node:
    """What the tasks of one node work with, and what follows from how that goes.

    `offerings` are by public name; they are replaced as a whole, never changed in place.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        instance: str,
        server: str,
        mlx: MLXClient,
        offerings: dict[str, Offering],
        reported: Sequence[str],
        sender: ReplyPublisher,
        intake: LaneConsumer,
        running: RunningAttempts,
        listeners: RouterPresence,
        control: CancelListener,
    ) -> None:
        self.name = name
        self.instance = instance
        self.server = server
        self.settings = settings
        self.mlx = mlx
        self.offerings = offerings
        self._reported = reported
        self._without_template: set[str] = set()
        self.sender = sender
        self.state = State("starting")
        self.running = running
        self.listeners = listeners
        self._control = control
        self._intake = intake
        self._told_lanes: frozenset[str] = frozenset()
        self._following = threading.RLock()
        """Of whoever changes what is offered, or makes the lanes follow: settings and the server's list are read, and
        what follows from both is set, before somebody else reads them."""
        self._counting = threading.Lock()
        self._at_work = 0
        self.handed_over = 0
        """Requests that other nodes had to go on with, since it was drained."""
        self._working_since: float | None = None
        self._readiness = Readiness(stall_after=settings.worker.stall_after)
        self._watch = HealthMonitor(
            mlx,
            self._readiness,
            settings.worker,
            canary_for=self._canary_for,
            working_since=lambda: self._working_since,
            models=self._models_reported,
            changed=self._follow,
        )
        self._status_client = StatusClient(socket_path(settings.state_dir, name.partition("@")[2]), self._report)
        self.tally = Counters()
        self._tokens = (time.monotonic(), 0)

    @property
    def instance_settings(self) -> Instance:
        return self.settings.instances[self.instance]

    @property
    def slots(self) -> int:
        return self.instance_settings.limits.concurrency

    @property
    def lanes(self) -> frozenset[str]:
        """The lanes that it really takes work from at the moment."""
        return self._intake.lanes

    def start(self) -> None:
        log.info("%s found a %s server at %s", self.name, self.server, self.mlx.url)
        self._warn_of_templates()
        self._control.start()
        self.listeners.start()
        self._watch.start()
        self._status_client.start()

    def reload(self, settings: Settings) -> bool:
        """Follow new settings of what is offered; False if anything else of it changed, which takes a new process.

        Raises:
            ConfigurationError: with them it would offer nothing; it keeps what it has.
        """
        if not can_follow(settings, self.settings, self.instance):
            return False
        with self._following:
            instance = settings.instances[self.instance]
            offerings = offerings_of(instance, settings.features, self._reported)
            if not offerings:
                advice = no_offerings_advice(f"instances.{self.instance}", instance)
                raise ConfigurationError(f"it would have nothing to offer: {advice}")
            self.settings, self.offerings = settings, offerings
            self._warn_of_templates()
            self._readiness.has(offerings)
            self._follow()
        return True

    @property
    def drained(self) -> bool:
        return self.state.status == "drained"

    @property
    def held(self) -> int:
        """Requests that it has taken and not finished."""
        return self._intake.held

    def drain(self, *, ending: bool = False) -> None:
        """Take no more work; what is running goes on. For good if the node is ending."""
        if not self.drained:
            self.handed_over = 0
        self._readiness.drain(ending=ending)
        self._follow()

    def undrain(self) -> None:
        """Take work again as soon as the server has proved that it works, unless the node is ending."""
        self._readiness.undrain()
        self._watch.try_now()
        self._follow()

    def hand_over(self) -> None:
        """Stop what is running, so that other nodes go on with it."""
        if stopped := self.running.stop(lambda: InstanceUnavailable("the node is being drained")):
            self.handed_over += stopped
            log.warning("%s hands over what is still running: %d", self.name, stopped)

    def wait_until_idle(self, timeout: float) -> bool:
        """Wait until all that was taken is done, or for so many seconds; tell whether it is."""
        ends = time.monotonic() + timeout
        self._intake.settled(min(LANES_LEFT_WITHIN, timeout))  # or something might begin after all
        while self.sender.wait_until_idle(max(0.0, ends - time.monotonic())):
            if not self.held:
                return True
            if time.monotonic() >= ends:
                break
            time.sleep(0.02)  # a task is just beginning, or has just ended: Celery does not tell when
        return False

    def close(self, timeout: float = 10.0) -> None:
        """Let the last frames go out within `timeout` seconds, then close the connections."""
        self._control.close()
        self.listeners.close()
        self._watch.close()
        self._status_client.close()
        self.sender.close(timeout)
        self.mlx.close()

    @contextmanager
    def working(self, model: str, cancel_token: CancelToken) -> Iterator[None]:
        """The server works on a request for this model. How it ends says something about it, unless we stopped it."""
        self._count(+1)
        try:
            yield
        except FleetError as error:
            if cancel_token.error is None:
                self._failed(model, error)
            raise
        finally:
            self._count(-1)

    def _failed(self, model: str, error: FleetError) -> None:
        if isinstance(error, ModelNotServed):
            self._readiness.lacks(model)
        else:
            self._readiness.failed(error)
        self._watch.look_now()

    def _count(self, more: int) -> None:
        with self._counting:
            before, self._at_work = self._at_work, self._at_work + more
            if not before or not self._at_work:
                self._working_since = time.monotonic() if self._at_work else None

    def _canary_for(self) -> Offering | None:
        """The first one that is there: any other might make a server swap models."""
        missing = self.state.missing
        return next((each for name, each in self.offerings.items() if name not in missing), None)

    def _models_reported(self, reported: list[str]) -> None:
        with self._following:
            instance, self._reported = self.instance_settings, reported
            if found := offerings_of(instance, self.settings.features, reported):
                self.offerings = found
                self._warn_of_templates()
            if instance.models and reported and PROFILES[self.server].lists_models:
                there = {name for name, each in self.offerings.items() if each.backend in reported}
                self._readiness.has(there)
                for name in self.offerings.keys() - there:
                    self._readiness.lacks(name)
            self._follow()

    def _warn_of_templates(self) -> None:
        """Once for each model, until its template is found, and missing again."""
        without = {name for name, each in self.offerings.items() if lacks_template(each, PROFILES[self.server])}
        for model in sorted(without - self._without_template):
            log.warning(
                "no chat template of %s is found, so streams of it that broke off elsewhere go on here only at "
                "temperature 0: fleet-worker doctor says what to do",
                model,
            )
        self._without_template = without

    def _follow(self) -> None:
        """Make the lanes follow the truth."""
        with self._following:
            before, self.state = self.state, self._readiness.state
            offered = {name: each for name, each in self.offerings.items() if name not in self.state.missing}
            wanted = frozenset(lanes_of(self.name, offered)) if self.state.ready and offered else frozenset()
            left, joined = self._intake.wanted - wanted, wanted - self._intake.wanted
            if left or joined:
                self._intake.follow(wanted)
                self._tell(left, joined)
            if joined:  # what it leaves is not among its lanes any more, whenever that is done
                self._intake.settled(LANES_JOINED_WITHIN)
            if before != self.state or self._told_lanes != self.lanes:
                self._told_lanes = self.lanes
                self._status_client.send_now()

    def _tell(self, left: frozenset[str], joined: frozenset[str]) -> None:
        for each in sorted(joined):
            log.info("%s serves lane %s", self.name, each)
        level = logging.INFO if self.drained else logging.WARNING  # it is meant to leave them
        for each in sorted(left):
            log.log(level, "%s leaves lane %s: %s", self.name, each, self.state.reason or "the model is not there")
        if joined:
            log.info("%s is ready, %d slot%s", self.name, self.slots, "" if self.slots == 1 else "s")

    def _report(self) -> NodeReport:
        last, state = self.mlx.last_content, self.state
        return NodeReport(
            instance=InstanceStatus(
                host=self.name.partition("@")[2],
                name=self.instance,
                node=self.name,
                status=state.status,
                reason=state.reason,
                server=self.server,
                version=VERSION,
                pid=os.getpid(),
                slots=self.slots,
                running=self._at_work,
                tokens_per_second=self._tokens_per_second(),
                last_token_age=round(time.monotonic() - last, 3) if last else None,
                lanes=tuple(sorted(self.lanes)),
            ),
            models=tuple(
                model_status(each, "unavailable" if name in state.missing else state.status)
                for name, each in self.offerings.items()
            ),
            reply_lag=self.sender.take_lag(),
            counters=self.tally.report(),
        )

    def _tokens_per_second(self) -> float:
        """Since the last report."""
        (before, tokens), self._tokens = self._tokens, (time.monotonic(), self.tally.tokens)
        return round((self._tokens[1] - tokens) / max(self._tokens[0] - before, 0.001), 1)


_OFFERED = {"models", "model_whitelist", "model_blacklist", "features"}


def can_follow(settings: Settings, old: Settings, name: str) -> bool:
    """Tell whether a node of this instance can go over to these settings without a new process."""
    instance = settings.instances.get(name)
    return instance is not None and instance.opted_in and _fixed(settings, instance) == _fixed(old, old.instances[name])


def _fixed(settings: Settings, instance: Instance) -> dict[str, Any]:
    """What a running node cannot change."""
    return {
        "instance": instance.model_dump(exclude=_OFFERED | {"fleet", "usage"}),
        "settings": settings.model_dump(exclude={"instances", "features", "router", "registry"}),
    }


def lanes_of(node_name: str, offerings: dict[str, Offering]) -> list[str]:
    """Every lane this node takes work from: one per capability and model, and the one for this node only."""
    shared = {lane(each, offering.model) for offering in offerings.values() for each in offering.capabilities}
    return [*sorted(shared), direct_lane(node_name)]
