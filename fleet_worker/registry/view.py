"""What a router knows about the fleet: which instances and models there are, and whether they are ready.

Fed by registry events, and read by requests and by users. What a host published is forgotten after three of its
intervals without news.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from fleet_worker.broker.door import Refused
from fleet_worker.errors import InvalidRequest, ModelUnavailable
from fleet_worker.protocol.registry_event import GONE, READINESS, Announcement, RegistryEvent
from fleet_worker.protocol.status import InstanceStatus, ModelStatus
from fleet_worker.registry.alternatives import nearest, no_such_model, refusal
from fleet_worker.registry.memory_bound import MOST_BYTES, MemoryBound, memory_of
from fleet_worker.registry.offered import Offered, away_for, fits

log = logging.getLogger(__name__)

INTERVALS_TO_LIVE = 3
LONGEST_INTERVAL = 24 * 3600.0
"""Seconds: a host that announces a longer interval is not believed."""
FIRST_ANSWER_WITHIN = 0.3
"""Seconds after which a new router that has heard of no host concludes that there are no registry nodes."""
QUIET = 0.15
"""Seconds without another answer after which `wait_for_answers` returns. A refusal waits longer."""
ALL_ANSWERS_WITHIN = 1.0
"""Seconds after which every host has answered a router that asked."""
SETTLED_AFTER = 5.0
"""Seconds after which a host that was cut off from the broker, as the router was, has answered. It tries every 2 s."""
SWEEP_EVERY = 1.0
"""Seconds between two searches for what has expired: with a thousand hosts, one costs more than a message."""


class Registry:
    """A live view of all instances and models. Thread-safe; no method waits for the broker."""

    def __init__(
        self,
        *,
        ask: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._changed = threading.Condition()  # its lock is reentrant
        self._instances: dict[tuple[str, str], InstanceStatus] = {}
        self._models: dict[str, dict[tuple[str, str], ModelStatus]] = {}
        self._subscribers: list[Callable[[RegistryEvent], None]] = []
        self._asked_at = clock()
        self._heard_at: float | None = None
        self._next_sweep = 0.0
        self.hosts = 0
        """How many are known, as of a second ago at most: it costs nothing to ask."""
        self._memory = MemoryBound(most_bytes)
        self._was_full = False

    # --- For users ---

    def offerings(
        self,
        model: str | None = None,
        *,
        capability: str | None = None,
        feature: str | None = None,
        ready: bool | None = None,
    ) -> list[Offered]:
        """Return what is offered now, filtered by public model name, capability, feature, and whether it is ready."""
        with self._changed:
            return [
                offered
                for offered in self._offered(model)
                if (capability is None or capability in offered.capabilities)
                and (feature is None or feature in offered.features)
                and (ready is None or ready == offered.ready)
            ]

    def models(self, *, ready: bool | None = None) -> list[str]:
        """Return the public names of all offered models, sorted."""
        return sorted({offered.model for offered in self.offerings(ready=ready)})

    def instances(self) -> list[InstanceStatus]:
        """Return the instances of all hosts, sorted by host and name."""
        with self._changed:
            now = self._clock()
            return [each for _, each in sorted(self._instances.items()) if each.expires_at > now]

    def instance(self, node: str) -> InstanceStatus | None:
        """Return the instance of this node; None if its host has said nothing about it, or is forgotten."""
        name, _, host = node.partition("@")
        with self._changed:
            known = self._instances.get((host, name))
            return known if known and known.expires_at > self._clock() else None

    def subscribe(self, callback: Callable[[RegistryEvent], None]) -> Callable[[], None]:
        """Call `callback` with every event that changes something, and return a function that ends the subscription.

        It is called in the thread that receives all replies of the router: it must not block.
        """
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):  # called twice
                self._subscribers.remove(callback)

        return unsubscribe

    def wait_for(self, model: str, timeout: float, *, capability: str | None = None) -> list[Offered]:
        """Wait until a model has ready offerings, and return them.

        Raises:
            ModelUnavailable: there are none after `timeout` seconds.
        """
        with self._changed:
            ready = self._changed.wait_for(lambda: self.offerings(model, capability=capability, ready=True), timeout)
            if not ready:
                if model not in (known := self.models()):
                    raise no_such_model(model, known, f"after {timeout:g} s no instance offers it")
                text = f"after {timeout:g} s none of its instances is ready"
                raise ModelUnavailable(text, nearest=nearest(model, known), param="model")
            return ready

    def refresh(self) -> None:
        """Ask all hosts for their current status, without waiting for the answers."""
        self._ask()

    # --- For the router ---

    def note_asked(self) -> None:
        """Note that the router has just asked all hosts for their status."""
        with self._changed:
            self._asked_at = self._clock()

    @property
    def has_heard(self) -> bool:
        """Return whether any host was ever heard. Nodes work without registry nodes, too: then nothing is known."""
        return self._heard_at is not None

    @property
    def is_settled(self) -> bool:
        """Return whether all hosts have had time to tell their status since the router connected, or reconnected.

        If the broker was away, they may reconnect later than the router.
        """
        return self._clock() >= self._asked_at + SETTLED_AFTER

    def wait_for_answers(self) -> Registry:
        """Wait until the hosts have answered a new router, at most `ALL_ANSWERS_WITHIN` seconds after it asked."""
        with self._changed:
            while True:
                now, heard_at = self._clock(), self._heard_at
                until = self._asked_at + FIRST_ANSWER_WITHIN if heard_at is None else heard_at + QUIET
                left = min(until, self._asked_at + ALL_ANSWERS_WITHIN) - now
                if left <= 0:
                    self._count_hosts()
                    return self
                self._changed.wait(left)

    def require_offered(self, model: str, capability: str, instance: str = "any", node: str | None = None) -> None:
        """Accept a request if the fleet offers what it needs, ready or not: it may become ready before the deadline.

        Waits only while the hosts may still be answering a new router. If no registry node is known, every request is
        accepted: nodes work without one, too.

        Raises:
            ModelUnavailable: nothing offers it. The text tells what does not fit, and names the nearest that does.
        """
        with self._changed:
            while not self._is_offered(model, capability, instance, node):
                heard = self._heard_at is not None
                left = self._asked_at + (ALL_ANSWERS_WITHIN if heard else FIRST_ANSWER_WITHIN) - self._clock()
                if left <= 0:
                    if not self.instances():
                        return
                    wanted = {"model": model, "capability": capability, "instance": instance}
                    raise refusal(list(self._offered(None)), self.instances(), **wanted, node=node)
                self._changed.wait(left)

    def away_for(self, model: str, capability: str, instance: str = "any", node: str | None = None) -> float | None:
        """Return for how many seconds nothing has been ready that offers this: 0 if something is, None if nothing was.
        Hosts that are forgotten count, too, until the next event is received."""
        with self._changed:
            of_model = self._models.get(model, {}).items()
            known = [(self._instances[key], each) for key, each in of_model if key in self._instances]
        fitting = [each for each in known if capability in each[1].capabilities and fits(each[0], instance, node)]
        return away_for(fitting, now=self._clock())

    def receive(self, message: Any) -> None:
        """Apply a broker message.

        Raises:
            Refused: it is not valid. What it says before that is known then.
        """
        try:
            announcement = Announcement.decode(message.body)
            self.apply(announcement, memory_of(message.body) // max(1, len(announcement.events)))
        except (InvalidRequest, ValidationError):
            raise Refused("it is no event of a registry node") from None

    def apply(self, announcement: Announcement, event_bytes: int = 0) -> None:
        """Learn what a host publishes, and tell subscribers what has changed. Each event takes `event_bytes`
        of memory."""
        changes = []
        try:
            with self._changed:
                self._heard_at = self._clock()
                self._sweep()
                for event in announcement.events:
                    if self._apply_event(announcement, event, event_bytes):
                        changes.append(event)
        finally:
            with self._changed:
                self._changed.notify_all()
            for event in changes:
                self._notify_subscribers(event)

    # --- Inside ---

    def _apply_event(self, announcement: Announcement, event: RegistryEvent, event_bytes: int) -> bool:
        """Keep what an event says; return whether it is a change that subscribers are told about."""
        now = self._clock()
        expires_at = now + INTERVALS_TO_LIVE * min(announcement.interval, LONGEST_INTERVAL)
        instance = event.instance_status(announcement.host, heard_at=now, expires_at=expires_at)
        key = instance.host, instance.name
        if event.model == READINESS:
            known: dict[tuple[str, str], Any] = self._instances
            said: Any = instance
        else:
            said = event.model_status(expires_at=expires_at)
            known = self._models.get(said.model, {})
        if event.status == GONE:
            self._memory.forget((*key, event.model))
            return known.pop(key, None) is not None
        if not self._memory.remember((*key, event.model), event_bytes):
            self._log_full()
            return False
        before, known[key] = known.get(key), said
        if event.model != READINESS:
            self._models[said.model] = known
            return bool(before != said)
        return before is None or (before.status, before.lanes) != (said.status, said.lanes)

    def _log_full(self) -> None:
        if not self._was_full:
            log.error("the registry is full: this router knows no more of what further hosts announce")
        self._was_full = True

    def _sweep(self) -> None:
        """Free the memory of what has expired. Callers do not get it in any case."""
        now = self._clock()
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_EVERY
        self._instances = {key: each for key, each in self._instances.items() if each.expires_at > now}
        self._count_hosts()
        for name, known in list(self._models.items()):
            self._models[name] = {key: each for key, each in known.items() if each.expires_at > now}
            if not self._models[name]:
                del self._models[name]
        of_models = ((*key, model) for model, known in self._models.items() for key in known)
        self._memory.keep_only([*((*key, READINESS) for key in self._instances), *of_models])

    def _count_hosts(self) -> None:
        self.hosts = len({host for host, _ in self._instances})

    def _offered(self, model: str | None) -> Iterator[Offered]:
        """An offering exists while neither the model nor its instance has expired."""
        now = self._clock()
        for name in self._models if model is None else (model,):
            for key, of_model in self._models.get(name, {}).items():
                instance = self._instances.get(key)
                if instance and min(instance.expires_at, of_model.expires_at) > now:
                    ready = instance.status == of_model.status == "available"
                    yield Offered(name, of_model.capabilities, of_model.features, of_model.limits, ready, instance)

    def _is_offered(self, model: str, capability: str, instance: str, node: str | None) -> bool:
        return any(
            capability in each.capabilities and fits(each.instance, instance, node) for each in self._offered(model)
        )

    def _notify_subscribers(self, event: RegistryEvent) -> None:
        for callback in tuple(self._subscribers):
            try:
                callback(event)
            except Exception as error:
                log.error("a subscriber of the registry failed: %s", type(error).__name__)
