"""What a router knows about the fleet: which models are where, and whether they are ready.

Fed by registry events, asked by requests and by you. What a host said is forgotten when it was silent for three of
its intervals.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fleet_worker.errors import InvalidRequest, ModelUnavailable
from fleet_worker.protocol.registry_event import GONE, READINESS, Announcement, RegistryEvent

log = logging.getLogger(__name__)

INTERVALS_TO_LIVE = 3
FIRST_WORD = 0.3
"""Seconds that a fresh router waits for a first word of any host before it takes it that none has a registry node."""
QUIET = 0.15
"""Seconds without another word after which a look at the fleet is worth it; a refusal waits for ALL_WORDS."""
SWEEP_EVERY = 1.0
"""Seconds between two looks for what to forget: of a thousand hosts, one look costs more than a message."""
ALL_WORDS = 1.0
"""Seconds after which every host has answered a router that asked."""


@dataclass(frozen=True, slots=True)
class InstanceState:
    """One MLX server as its host described it last: it is available, degraded, unavailable, starting or drained."""

    host: str
    name: str
    node: str
    status: str
    reason: str
    server: str
    version: str
    slots: int
    running: int
    tokens_per_second: float
    last_token_age: float | None
    """Seconds from the last delivered token to `heard_at`."""
    lanes: tuple[str, ...]
    heard_at: float
    """Monotonic seconds."""
    expires_at: float

    @property
    def ready(self) -> bool:
        return self.status == "available"


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model of one instance as its host described it last."""

    model: str
    instance: str
    host: str
    status: str
    capabilities: tuple[str, ...]
    features: tuple[str, ...]
    limits: dict[str, Any]
    expires_at: float


@dataclass(frozen=True, slots=True)
class Offered:
    """An offering: one model on one instance, now."""

    model: str
    capabilities: tuple[str, ...]
    features: tuple[str, ...]
    limits: dict[str, Any]
    ready: bool
    instance: InstanceState

    @property
    def node(self) -> str:
        return self.instance.node

    @property
    def host(self) -> str:
        return self.instance.host


class Registry:
    """The live view. Safe to use from any thread; it never waits for the broker."""

    def __init__(self, *, ask: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._changed = threading.Condition()  # its lock is reentrant
        self._instances: dict[tuple[str, str], InstanceState] = {}
        self._models: dict[str, dict[tuple[str, str], ModelState]] = {}
        self._subscribers: list[Callable[[RegistryEvent], None]] = []
        self._asked_at = clock()
        self._heard_at: float | None = None
        self._next_sweep = 0.0

    # For you

    def offerings(
        self,
        model: str | None = None,
        *,
        capability: str | None = None,
        feature: str | None = None,
        ready: bool | None = None,
    ) -> list[Offered]:
        """Return what is offered now, as far as these say: a public name, a capability, a feature, ready or not."""
        with self._changed:
            return [
                offered
                for offered in self._offered(model)
                if (capability is None or capability in offered.capabilities)
                and (feature is None or feature in offered.features)
                and (ready is None or ready == offered.ready)
            ]

    def models(self, *, ready: bool | None = None) -> list[str]:
        """Return the public names of all models that are offered."""
        return sorted({offered.model for offered in self.offerings(ready=ready)})

    def instances(self) -> list[InstanceState]:
        """Return the instances of all hosts, by host and name."""
        with self._changed:
            now = self._clock()
            return [state for _, state in sorted(self._instances.items()) if state.expires_at > now]

    def subscribe(self, callback: Callable[[RegistryEvent], None]) -> Callable[[], None]:
        """Call this with every event that changes something, in the router's own thread, so be quick.

        Returns a function that ends the subscription.
        """
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):  # it was called before
                self._subscribers.remove(callback)

        return unsubscribe

    def wait_for(self, model: str, timeout: float, *, capability: str | None = None) -> list[Offered]:
        """Return the ready offerings of a model as soon as there is one.

        Raises:
            ModelUnavailable: there was none within `timeout` seconds.
        """
        with self._changed:
            ready = self._changed.wait_for(lambda: self.offerings(model, capability=capability, ready=True), timeout)
            if not ready:
                raise self._unavailable(model, f"no ready instance offers the model after {timeout:g} s")
            return ready

    def refresh(self) -> None:
        """Ask all hosts for their figures of this moment, and do not wait for the answers."""
        self._ask()

    # For the router

    def asked(self) -> None:
        """The fleet was asked who is there just now."""
        with self._changed:
            self._asked_at = self._clock()

    def settle(self) -> Registry:
        """Wait while a fresh router is still being told what there is, at most a second."""
        with self._changed:
            while True:
                now, heard_at = self._clock(), self._heard_at
                until = self._asked_at + FIRST_WORD if heard_at is None else heard_at + QUIET
                patience = min(until, self._asked_at + ALL_WORDS) - now
                if patience <= 0:
                    return self
                self._changed.wait(patience)

    def check(self, model: str, capability: str, instance: str = "any", node: str | None = None) -> None:
        """Let a request pass if somebody offers this, ready or not: it may become so before the deadline.

        Waits only while a fresh router has not heard everybody yet, at most a second. While no registry node is heard
        of, everything passes: nodes may work without one.

        Raises:
            ModelUnavailable: nobody does. The text names the nearest models that exist; or nodes, if one is asked for.
        """
        with self._changed:
            while not self._is_offered(model, capability, instance, node):
                heard = self._heard_at is not None
                patience = self._asked_at + (ALL_WORDS if heard else FIRST_WORD) - self._clock()
                if patience <= 0:
                    if not self.instances():
                        return
                    if node and self._is_offered(model, capability, instance):
                        raise self._not_there(node, f"that node does not offer {capability} with that model")
                    raise self._unavailable(model, f"no instance offers {capability} with that model")
                self._changed.wait(patience)

    def receive(self, message: Any) -> None:
        """A message of the registry arrived."""
        try:
            self.hear(Announcement.decode(message.body))
        except InvalidRequest as error:
            log.error("a registry message was dropped: %s", error)
        except Exception as error:  # the thread that is in here receives replies, too
            log.error("a registry message was dropped (%s)", type(error).__name__)

    def hear(self, announcement: Announcement) -> None:
        with self._changed:
            self._heard_at = self._clock()
            self._forget_the_silent()
            changes = [event for event in announcement.events if self._take(announcement, event)]
            self._changed.notify_all()
        for event in changes:
            self._tell(event)

    # Inside

    def _take(self, announcement: Announcement, event: RegistryEvent) -> bool:
        """Remember what an event says, and tell whether it is news."""
        now = self._clock()
        key, expires_at = (announcement.host, event.instance), now + INTERVALS_TO_LIVE * announcement.interval
        status = str(event.health.get("status", "unavailable"))
        if status == GONE:
            return self._forget(key, event.model)
        if event.model == READINESS:
            before = self._instances.get(key)
            self._instances[key] = _instance_state(announcement.host, event, status, now, expires_at)
            return before is None or (before.status, before.lanes) != (status, tuple(event.lane))
        known = self._models.setdefault(event.model, {})
        model_before = known.get(key)
        model = known[key] = _model_state(announcement.host, event, status, expires_at)
        return model_before is None or replace(model_before, expires_at=expires_at) != model

    def _forget(self, key: tuple[str, str], model: str) -> bool:
        if model == READINESS:
            return self._instances.pop(key, None) is not None
        return self._models.get(model, {}).pop(key, None) is not None

    def _forget_the_silent(self) -> None:
        """Nobody is shown what has expired: this only makes room."""
        now = self._clock()
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_EVERY
        for key in [key for key, state in self._instances.items() if state.expires_at <= now]:
            del self._instances[key]
        for model, states in list(self._models.items()):
            for key in [key for key, state in states.items() if state.expires_at <= now]:
                del states[key]
            if not states:
                del self._models[model]

    def _offered(self, model: str | None) -> Iterator[Offered]:
        """An offering needs two fresh words: one about the model, one about its instance."""
        now = self._clock()
        for name in self._models if model is None else (model,):
            for key, state in self._models.get(name, {}).items():
                instance = self._instances.get(key)
                if instance and min(instance.expires_at, state.expires_at) > now:
                    ready = instance.ready and state.status == "available"
                    yield Offered(name, state.capabilities, state.features, state.limits, ready, instance)

    def _is_offered(self, model: str, capability: str, instance: str, node: str | None = None) -> bool:
        return any(
            capability in offered.capabilities
            and instance in ("any", offered.instance.name)
            and node in (None, offered.node)
            for offered in self._offered(model)
        )

    def _unavailable(self, model: str, why: str) -> ModelUnavailable:
        return _missing(why, difflib.get_close_matches(model, list(self._models), n=3, cutoff=0.3))

    def _not_there(self, node: str, why: str) -> ModelUnavailable:
        return _missing(why, difflib.get_close_matches(node, [each.node for each in self.instances()], n=3, cutoff=0.3))

    def _tell(self, event: RegistryEvent) -> None:
        for callback in tuple(self._subscribers):
            try:
                callback(event)
            except Exception as error:
                log.error("a subscriber of the registry failed: %s", type(error).__name__)


def _missing(why: str, nearest: list[str]) -> ModelUnavailable:
    there = f"; the nearest that exist: {', '.join(nearest)}" if nearest else ""
    return ModelUnavailable(f"{why}{there}", nearest=nearest)


def _instance_state(host: str, event: RegistryEvent, status: str, now: float, expires_at: float) -> InstanceState:
    capacity, runtime = event.capacity, event.runtime
    return InstanceState(
        host=host,
        name=event.instance,
        node=str(runtime.get("node", "")),
        status=status,
        reason=str(event.health.get("error", "")),
        server=str(runtime.get("server", "")),
        version=str(runtime.get("version", "")),
        slots=int(capacity.get("slots", 0)),
        running=int(capacity.get("running", 0)),
        tokens_per_second=float(capacity.get("tokens_per_second", 0.0)),
        last_token_age=capacity.get("last_token_age"),
        lanes=tuple(event.lane),
        heard_at=now,
        expires_at=expires_at,
    )


def _model_state(host: str, event: RegistryEvent, status: str, expires_at: float) -> ModelState:
    offering = event.offering
    return ModelState(
        model=event.model,
        instance=event.instance,
        host=host,
        status=status,
        capabilities=tuple(offering.get("capabilities", ())),
        features=tuple(offering.get("features", ())),
        limits=dict(offering.get("limits", {})),
        expires_at=expires_at,
    )
