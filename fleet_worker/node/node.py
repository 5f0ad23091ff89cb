"""An inference node: one instance, the models that it offers, and the lanes that it consumes while that works."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from celery import Celery
from celery.worker import state as celery_state

from fleet_worker.broker.app import door_of
from fleet_worker.broker.topology import transport_of
from fleet_worker.errors import (
    ConfigurationError,
    ConnectionFailure,
    FleetError,
    InstanceUnavailable,
    ModelNotServed,
    Overloaded,
    ProviderError,
)
from fleet_worker.host.parent_pipe import is_supervised
from fleet_worker.host.up_socket import NoUp, ask
from fleet_worker.host.up_socket import socket_path as up_socket_path
from fleet_worker.mlx.profiles import PROFILES
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.node.confirmations import Confirmations
from fleet_worker.node.health_monitor import HealthMonitor
from fleet_worker.node.host_link import HostLink
from fleet_worker.node.lane_consumer import LaneConsumer, lanes_of
from fleet_worker.node.new_settings import can_follow
from fleet_worker.node.offered_models import OfferedModels
from fleet_worker.node.prompt_cache.prompt_cache import PromptCache
from fleet_worker.node.readiness import Readiness, State
from fleet_worker.node.reply_publisher import ReplyPublisher
from fleet_worker.node.router_clocks import RouterClocks
from fleet_worker.node.router_presence import RouterPresence
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.node.server_discovery import Server
from fleet_worker.protocol.host_messages import Restart
from fleet_worker.protocol.status import InstanceStatus, Status
from fleet_worker.registry.counters import Counters
from fleet_worker.registry.status_socket import NodeReport, StatusClient, model_status, socket_path
from fleet_worker.settings import Settings
from fleet_worker.version import VERSION

log = logging.getLogger(__name__)

ANSWERED_WITHIN = 5.0
"""Seconds in which `up` answers that it restarts a server."""
FIRST_ORDER_WITHIN = 2.0
"""Seconds that a node waits for the first order of the `up` that has started it, before it takes work."""
LANES_LEFT_WITHIN = 2.0
"""Seconds to wait for lanes to be left before the node counts as idle: the broker may be away."""


class Node:
    """What the tasks of one node share, and what follows from how they end.

    Opens no connection to the broker before `start`.

    Raises:
        ConfigurationError: the instance has nothing to offer.
    """

    def __init__(self, app: Celery, settings: Settings, name: str, server: Server) -> None:
        transport = transport_of(settings.broker_url)
        self.name = name
        self.instance, _, self._host = name.partition("@")
        self.settings = settings
        self.server_kind = server.kind
        self.mlx = server.client
        self.models = OfferedModels(settings, self.instance, server.kind, server.models)
        self.running = RunningAttempts()
        self.prompt_cache = PromptCache(
            settings.instances[self.instance].prompt_cache_size,
            forgets_on_swap=PROFILES[server.kind].forgets_on_swap,
        )
        self.counters = Counters()
        self.door = door_of(app)
        self.router_clocks = RouterClocks()
        self.confirmations = Confirmations()
        self.publisher = ReplyPublisher(app.connection_for_write, name, max_pending=settings.worker.max_pending)
        self.presence = RouterPresence(
            app.connection_for_read,
            transport,
            self.running,
            abandoned_after=settings.worker.abandoned_after,
            learn=self.publisher.learn,
        )
        self.state = State("starting")
        self.handed_over = 0
        """Requests that were handed over to other nodes since this one was drained."""
        self.process = secrets.token_hex(6)
        self.server_restarts = 0
        """How often its server was restarted, or replaced, since this process began."""
        self._restarts_before = 0
        """What that was at the beginning of a pause."""
        self._lane_consumer = LaneConsumer(app, transport)
        self._lane_consumer.changed = self._on_lanes_changed
        self.publisher.on_refused(self._lane_consumer.reply_refused)
        self._served: frozenset[str] = frozenset()
        """The lanes that the log calls served."""
        self._updating = threading.Lock()
        """Held while the lanes follow, so that the last of two updates sees the newest facts."""
        self._host_link = HostLink(self, up_socket_path(settings.state_dir, self._host))
        self.running.changed = self._host_link.changed
        self._readiness = Readiness(stall_after=settings.worker.stall_after)
        self._monitor = HealthMonitor(
            self.mlx,
            self._readiness,
            self.models,
            self.running,
            settings.worker,
            self._update_lanes,
            restarted=self.server_restarted,
            prefill_speed=lambda: self.prompt_cache.prefill_speed,
            fault_changed=self._host_link.changed,
        )
        self._status_client = StatusClient(socket_path(settings.state_dir, self._host), self._report)
        self._tokens_reported = (time.monotonic(), 0)

    @property
    def slots(self) -> int:
        return self.settings.instances[self.instance].limits.concurrency

    @property
    def lanes(self) -> frozenset[str]:
        """The lanes that it consumes now, as far as the broker has confirmed them."""
        return self._lane_consumer.lanes

    @property
    def drained(self) -> bool:
        return self.state.status == "drained"

    @property
    def fault(self) -> str:
        """Why its server has to be restarted; empty if it need not."""
        return self._monitor.fault.text

    @property
    def held(self) -> int:
        """The number of messages that were taken and are not done, whether or not their tasks have begun."""
        return len(celery_state.reserved_requests)

    def start(self) -> None:
        log.info("%s found a %s server at %s", self.name, self.server_kind, self.mlx.url)
        self.presence.start()
        self._status_client.start()
        self._host_link.start()
        if is_supervised():  # the owner may be using this host
            self._host_link.wait_for_order(FIRST_ORDER_WITHIN)
        self._monitor.start()

    def reload(self, settings: Settings) -> bool:
        """Follow new settings of what is offered; return False if others changed, which need a new process.

        Raises:
            ConfigurationError: it would have nothing to offer; the old settings stay.
        """
        if not can_follow(settings, self.settings, self.instance):
            return False
        self.models.follow_settings(settings)
        self.settings = settings
        self._update_lanes()
        return True

    def drain(self, *, ending: bool = False) -> None:
        """Take no more work, and go on with what is running; for good if the node is ending."""
        if not self.drained:
            self.handed_over = 0
        self._readiness.drain(ending=ending)
        self._update_lanes()

    def undrain(self) -> None:
        """Take work again as soon as the server has proved that it works, unless the node is ending."""
        self._readiness.undrain()
        self._monitor.canary_now()
        self._update_lanes()

    def server_restarted(self) -> None:
        """Another process is its server now: what the last one had in memory is gone."""
        self.server_restarts += 1
        self.prompt_cache.clear()

    def pause(self, status: Status, reason: str) -> None:
        """Take no work until `resume`, as a drained node does; an operator's drain stays in force beside it."""
        self._readiness.pause(status, reason)
        self._restarts_before = self.server_restarts
        self._monitor.fault.forget()
        self._update_lanes()

    def resume(self) -> None:
        """End a pause: take work again as soon as the server has proved that it works."""
        self.running.refusal = None
        paused, is_unseen = self._readiness.paused, self.server_restarts == self._restarts_before
        if paused and paused.status == "starting" and is_unseen:
            self._monitor.server_is_replaced()
        self._readiness.resume()
        self._monitor.canary_now()
        self._update_lanes()

    def restart_server(self) -> str:
        """Ask the `up` of this host to restart the MLX server of this node; return why it does not, or "".

        Before it does, it pauses this node, so that no request fails.
        """
        try:
            return ask(self.settings, Restart(self.instance, server=True), within=ANSWERED_WITHIN).error
        except (NoUp, ConfigurationError) as error:
            return str(error)

    def hand_over(self, reason: str = "the node is being drained", *, after_fault: bool = False) -> None:
        """Stop what is running, so that other nodes go on with it; during a pause, what begins later as well.

        `after_fault`: what runs may be the cause of a fault of the server, so it is not free to do that to every node.
        """
        if self._readiness.paused:
            self.running.refusal = lambda: InstanceUnavailable(reason, handed_over=True)
        known = {"instance_frozen": True} if after_fault else {"handed_over": True}
        if stopped := self.running.stop(lambda: InstanceUnavailable(reason, **known)):
            self.handed_over += stopped
            log.warning("%s hands over what is still running: %d", self.name, stopped)

    def wait_until_idle(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until all requests that were taken are done; return whether they are."""
        ends = time.monotonic() + timeout
        self._lane_consumer.wait_until_settled(min(LANES_LEFT_WITHIN, timeout))  # until then a request may still begin
        while self.publisher.wait_until_idle(max(0.0, ends - time.monotonic())):
            if not self.held:
                return True
            if time.monotonic() >= ends:
                break
            time.sleep(0.02)  # a task is just beginning or ending, and Celery has no event for that
        return False

    def close(self, timeout: float = 10.0) -> None:
        """Publish the last frames within `timeout` seconds, then close all connections."""
        self.presence.close()
        self._host_link.close()
        self._monitor.close()
        self._status_client.close()
        self.publisher.close(timeout)
        self.mlx.close()

    def tell_ended(self) -> None:
        """A request ended: tell the registry node soon what the server has cached now, and which slot is free."""
        self._status_client.send_soon()

    @contextmanager
    def counting_failures(self, model: str, request_id: str, cancel_token: CancelToken) -> Iterator[None]:
        """Count an error within this block against the server, unless the request was cancelled, or had to share the
        only slot: that is told as `disturbed`. A server that is away during a pause was stopped on purpose."""
        try:
            yield
        except FleetError as error:
            if cancel_token.error is None:
                if self._readiness.paused and isinstance(error, InstanceUnavailable | ConnectionFailure):
                    error.metadata["handed_over"] = True
                elif self.slots == 1 and type(error) in (ProviderError, Overloaded) and self.mlx.may_be_occupied:
                    error.metadata["disturbed"] = True
                elif isinstance(error, ModelNotServed):
                    self._monitor.check_model(model)
                else:
                    self._monitor.request_failed(error, request_id)
            raise

    def _update_lanes(self) -> None:
        """Consume the lanes of the available models if the instance is ready, else none; tell the registry node."""
        with self._updating:
            before, self.state = self.state, self._readiness.state
            models = self.models.available
            wanted = frozenset(lanes_of(self.name, models, self.settings) if self.state.ready and models else ())
            left, joined = self._lane_consumer.wanted - wanted, wanted - self._lane_consumer.wanted
            if left or joined:
                self._lane_consumer.consume(wanted)
                self._log_left(left)
            if left or before != self.state:  # lanes that are joined are told when the broker has confirmed them
                self._status_client.send_now()

    def _log_left(self, left: Iterable[str]) -> None:
        self._served -= frozenset(left)
        level = logging.INFO if self._readiness.is_ordered else logging.WARNING
        for each in sorted(left):
            log.log(level, "%s leaves lane %s: %s", self.name, each, self.state.reason or "the model is not there")

    def _on_lanes_changed(self) -> None:
        """Called in the thread of Celery's event loop when the broker has confirmed, refused or cancelled a lane."""
        with self._updating:
            joined = self.lanes - self._served
            self._served |= joined
        for each in sorted(joined):
            log.info("%s serves lane %s", self.name, each)
        if joined:
            log.info("%s is ready, %d slot%s", self.name, self.slots, "" if self.slots == 1 else "s")
        self._status_client.send_now()

    def _confirmed_state(self) -> State:
        """Return the state to publish: whatever its server can do, a node works only for lanes that the broker lets it
        consume."""
        if not self.state.ready or self.lanes or not self._lane_consumer.wanted:
            return self.state
        if refusal := self._lane_consumer.refusal:
            return State("unavailable", f"the broker {refusal}")
        return State("starting", "the broker has not confirmed its lanes yet")

    def _report(self) -> NodeReport:
        state, last, available = self._confirmed_state(), self.mlx.last_content, self.models.available
        return NodeReport(
            instance=InstanceStatus(
                host=self._host,
                name=self.instance,
                node=self.name,
                status=state.status,
                reason=state.reason,
                server=self.server_kind,
                version=VERSION,
                pid=os.getpid(),
                process=self.process,
                server_restarts=self.server_restarts,
                slots=self.slots,
                running=len(self.running),
                tokens_per_second=self._tokens_per_second(),
                last_token_age=round(time.monotonic() - last, 3) if last else None,
                lanes=tuple(sorted(self.lanes)),
                prompt_tokens=self.counters.prompt_tokens,
                cached_tokens=self.counters.cached_tokens,
                cache_troubles=self.prompt_cache.troubles(),
            ),
            models=tuple(
                model_status(each, state.status if name in available else "unavailable")
                for name, each in self.models.by_name.items()
            ),
            reply_lag=self.publisher.take_lag(),
            counters={**self.counters.report(), "dropped": self.door.dropped},
            prompt_cache=self.prompt_cache.digest(self.name, slots=self.slots, running=len(self.running)),
        )

    def _tokens_per_second(self) -> float:
        """Since the last report."""
        (before, tokens), self._tokens_reported = self._tokens_reported, (time.monotonic(), self.counters.tokens)
        return round((self._tokens_reported[1] - tokens) / max(self._tokens_reported[0] - before, 0.001), 1)
