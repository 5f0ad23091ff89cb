"""What a router knows about the fleet: which instances and models there are, and whether they are ready.

Fed by registry events, and read by requests and by users. What a host published is forgotten after three of its
intervals without news.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fleet_worker.errors import InvalidRequest, ModelUnavailable
from fleet_worker.protocol.registry_event import GONE, READINESS, Announcement, RegistryEvent
from fleet_worker.protocol.status import InstanceStatus, ModelStatus

log = logging.getLogger(__name__)

INTERVALS_TO_LIVE = 3
FIRST_ANSWER_WITHIN = 0.3
"""Seconds after which a new router that has heard of no host concludes that there are no registry nodes."""
QUIET = 0.15
"""Seconds without another answer after which `wait_for_answers` returns. A refusal waits longer."""
ALL_ANSWERS_WITHIN = 1.0
"""Seconds after which every host has answered a router that asked."""
SWEEP_EVERY = 1.0
"""Seconds between two searches for what has expired: with a thousand hosts, one costs more than a message."""


@dataclass(frozen=True, slots=True)
class Offered:
    """An offering: one model on one instance, now. It is `ready` if both are available."""

    model: str
    capabilities: tuple[str, ...]
    features: tuple[str, ...]
    limits: dict[str, Any]
    ready: bool
    instance: InstanceStatus

    @property
    def node(self) -> str:
        return self.instance.node

    @property
    def host(self) -> str:
        return self.instance.host


class Registry:
    """A live view of all instances and models. Thread-safe; no method waits for the broker."""

    def __init__(self, *, ask: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._changed = threading.Condition()  # its lock is reentrant
        self._instances: dict[tuple[str, str], InstanceStatus] = {}
        self._models: dict[str, dict[tuple[str, str], ModelStatus]] = {}
        self._subscribers: list[Callable[[RegistryEvent], None]] = []
        self._asked_at = clock()
        self._heard_at: float | None = None
        self._next_sweep = 0.0

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
                raise _unavailable(f"no ready instance offers the model after {timeout:g} s", model, self._models)
            return ready

    def refresh(self) -> None:
        """Ask all hosts for their current status, without waiting for the answers."""
        self._ask()

    # --- For the router ---

    def note_asked(self) -> None:
        """Note that the router has just asked all hosts for their status."""
        with self._changed:
            self._asked_at = self._clock()

    def wait_for_answers(self) -> Registry:
        """Wait until the hosts have answered a new router, at most `ALL_ANSWERS_WITHIN` seconds after it asked."""
        with self._changed:
            while True:
                now, heard_at = self._clock(), self._heard_at
                until = self._asked_at + FIRST_ANSWER_WITHIN if heard_at is None else heard_at + QUIET
                left = min(until, self._asked_at + ALL_ANSWERS_WITHIN) - now
                if left <= 0:
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
                    raise self._refusal(model, capability, instance, node)
                self._changed.wait(left)

    def away_for(self, model: str, capability: str, instance: str = "any", node: str | None = None) -> float | None:
        """Return for how many seconds nothing has been ready that offers this: 0 if something is, None if nothing was.

        A host that has been silent for half of the time after which it is forgotten counts as away since it was heard.
        """
        with self._changed:
            now = self._clock()
            offered = (
                (self._instances[key], offering)
                for key, offering in self._models.get(model, {}).items()
                if key in self._instances and capability in offering.capabilities
            )
            ages = [
                _away_for(each, offering, now)
                for each, offering in offered
                if instance in ("any", each.name) and node in (None, each.node)
            ]
            return min(ages, default=None)

    def receive(self, message: Any) -> None:
        """Apply a broker message. An invalid one is logged and dropped: this thread receives all replies, too."""
        try:
            self.apply(Announcement.decode(message.body))
        except InvalidRequest as error:
            log.error("a registry message was dropped: %s", error)
        except Exception as error:
            log.error("a registry message was dropped (%s)", type(error).__name__)

    def apply(self, announcement: Announcement) -> None:
        """Learn what a host publishes, and tell subscribers what has changed."""
        with self._changed:
            self._heard_at = self._clock()
            self._sweep()
            changes = [event for event in announcement.events if self._apply_event(announcement, event)]
            self._changed.notify_all()
        for event in changes:
            self._notify_subscribers(event)

    # --- Inside ---

    def _apply_event(self, announcement: Announcement, event: RegistryEvent) -> bool:
        """Keep what an event says; return whether it is a change that subscribers are told about."""
        key, name = (announcement.host, event.instance), event.model
        now = self._clock()
        expires_at = now + INTERVALS_TO_LIVE * announcement.interval
        if event.status == GONE:
            known = self._instances if name == READINESS else self._models.get(name, {})
            return known.pop(key, None) is not None
        if name == READINESS:
            before = self._instances.get(key)
            instance = event.instance_status(announcement.host, heard_at=now, expires_at=expires_at)
            self._instances[key] = instance
            return before is None or (before.status, before.lanes) != (instance.status, instance.lanes)
        models = self._models.setdefault(name, {})
        model_before, models[key] = models.get(key), event.model_status(expires_at=expires_at)
        return model_before != models[key]

    def _sweep(self) -> None:
        """Free the memory of what has expired. Callers do not get it in any case."""
        now = self._clock()
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_EVERY
        self._instances = {key: each for key, each in self._instances.items() if each.expires_at > now}
        for name, known in list(self._models.items()):
            self._models[name] = {key: each for key, each in known.items() if each.expires_at > now}
            if not self._models[name]:
                del self._models[name]

    def _offered(self, model: str | None) -> Iterator[Offered]:
        """An offering exists while neither the model nor its instance has expired."""
        now = self._clock()
        for name in self._models if model is None else (model,):
            for key, of_model in self._models.get(name, {}).items():
                instance = self._instances.get(key)
                if instance and min(instance.expires_at, of_model.expires_at) > now:
                    ready = instance.status == of_model.status == "available"
                    yield Offered(name, of_model.capabilities, of_model.features, of_model.limits, ready, instance)

    def _is_offered(self, model: str, capability: str, instance: str, node: str | None = None) -> bool:
        return any(
            capability in offered.capabilities
            and instance in ("any", offered.instance.name)
            and node in (None, offered.node)
            for offered in self._offered(model)
        )

    def _refusal(self, model: str, capability: str, instance: str, node: str | None) -> ModelUnavailable:
        of_model = list(self._offered(model))
        able = [each for each in of_model if capability in each.capabilities]
        fitting = [each for each in able if instance in ("any", each.instance.name)]
        if node and fitting:
            why = f"that node does not offer {capability} with that model"
            return _unavailable(why, node, {each.node for each in fitting})
        if able:
            why = "no instance of that name offers this model"
            return _unavailable(why, instance, {each.instance.name for each in able})
        if others := sorted({each for offered in of_model for each in offered.capabilities}):
            return ModelUnavailable(f"{model} is in the fleet, but only for: {', '.join(others)}", nearest=[])
        able_models = {each.model for each in self._offered(None) if capability in each.capabilities}
        return _unavailable(f"no instance offers {capability} with that model", model, able_models)

    def _notify_subscribers(self, event: RegistryEvent) -> None:
        for callback in tuple(self._subscribers):
            try:
                callback(event)
            except Exception as error:
                log.error("a subscriber of the registry failed: %s", type(error).__name__)


def _away_for(instance: InstanceStatus, model: ModelStatus, now: float) -> float:
    silent_for = now - instance.heard_at
    if not instance.ready:
        return silent_for + max(0.0, instance.status_age or 0.0)
    is_there = model.status == "available" and 2 * silent_for < instance.expires_at - instance.heard_at
    return 0.0 if is_there else silent_for


def _unavailable(why: str, name: str, existing: Iterable[str]) -> ModelUnavailable:
    nearest = difflib.get_close_matches(name, list(existing), n=3, cutoff=0.3)
    names = f"; the nearest that exist: {', '.join(nearest)}" if nearest else ""
    return ModelUnavailable(f"{why}{names}", nearest=nearest)
