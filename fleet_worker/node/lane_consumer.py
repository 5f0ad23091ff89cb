"""Joins and leaves lanes while the worker runs, and knows which of them the broker has confirmed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from celery import Celery, bootsteps

from fleet_worker.broker.faults import describe
from fleet_worker.broker.rehearsal import confirm_lane, rehearse_replies
from fleet_worker.broker.topology import Transport, direct_lane, lane, lane_queue, old_lane
from fleet_worker.mlx.offering import Offering
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

CHECK_EVERY = 0.5
"""Seconds between two checks of what is consumed: somebody may have cancelled a consumer."""
REFUSED_BACK_OFF = (0.5, 1.0, 2.0, 5.0)
"""Seconds before each further try to join a lane that is refused; the last one from then on."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A target set of lanes. `fulfilled` is set once the consumer has applied it; never for one that was replaced
    before."""

    lanes: frozenset[str] = frozenset()
    fulfilled: threading.Event = field(default_factory=threading.Event)


class LaneConsumer:
    """Makes Celery's consumer consume a set of lanes, none at first. Safe for all threads.

    A lane that cannot be joined is tried again: when the broker is back, and after growing pauses if it refuses. A lane
    whose consumer was lost, since its queue was deleted or somebody cancelled it, is joined again within a second.
    Within a second after a lane was left nothing more is taken from it; a message that is taken in that second goes
    back to it.
    """

    def __init__(self, app: Celery, transport: Transport) -> None:
        self._app = app
        self._transport = transport
        self._target = _Target()
        self._joined: frozenset[str] = frozenset()
        self._refused: dict[str, str] = {}
        self._refusals = 0
        """Tries in a row in which a lane was refused."""
        self._lost: set[str] = set()
        """Lanes to leave, and to join again: the broker has cancelled them, or refused a reply."""
        self._can_reply = False
        """Whether the broker lets this connection do what a request needs besides its lane."""
        self._consumer: Any = None
        self._timer: Any = None
        self.changed: Callable[[], object] = lambda: None
        """Called in the thread of the event loop when `lanes` or `refusal` has changed."""
        app.steps["consumer"].add(self._step())

    @property
    def wanted(self) -> frozenset[str]:
        """The lanes that are to be consumed."""
        return self._target.lanes

    @property
    def lanes(self) -> frozenset[str]:
        """Those of them that the broker has confirmed; none while it is away."""
        return self._joined & self.wanted

    @property
    def refusal(self) -> str | None:
        """Why the broker refuses a lane that is wanted: words that follow "the broker"."""
        return next((reason for name, reason in self._refused.items() if name in self.wanted), None)

    def consume(self, lanes: Iterable[str]) -> None:
        """Consume these lanes and no others."""
        self._target = _Target(frozenset(lanes))
        if self._consumer:
            self._consumer.call_soon(self._apply_in, 0.0)

    def reply_refused(self) -> None:
        """Leave all lanes, and join them again when the broker takes replies."""
        if self._can_reply and self._consumer:
            self._consumer.call_soon(self._leave_all)

    def wait_until_settled(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until the last `consume` is applied; the broker may be away."""
        return self._consumer is None or self._target.fulfilled.wait(timeout)

    def _step(self) -> type[bootsteps.StartStopStep]:
        """Return a step that Celery starts with each connection to the broker, which has a new task consumer."""
        lane_consumer = self

        class Lanes(bootsteps.StartStopStep):  # type: ignore[misc]
            requires = ("celery.worker.consumer.tasks:Tasks",)

            def start(self, consumer: Any) -> None:
                lane_consumer._consumer = consumer
                # Not now: what RabbitMQ delivers before the event loop runs has no callback yet, and is never handled.
                consumer.call_soon(lane_consumer._apply_in, 0.0)

            def stop(self, consumer: Any) -> None:
                """Let Celery join no lanes by itself: it would join the old ones, all or none."""
                lane_consumer._app.amqp.queues.deselect(list(lane_consumer._app.amqp.queues))
                lane_consumer._lost, lane_consumer._can_reply = set(), False
                lane_consumer._update(frozenset(), lane_consumer._refused)

        return Lanes

    def _apply_in(self, seconds: float) -> None:
        """Use the event loop's timer: there Celery notices a lost connection and opens another, and no other error
        does harm."""
        if self._timer:
            self._timer.cancel()
        self._timer = self._consumer.timer.call_after(seconds, self._apply)

    def _apply(self) -> None:
        """Runs in the thread of Celery's event loop, the only one that may use the consumer."""
        if not self._consumer.task_consumer:  # the worker ends
            return
        target = self._target
        lost, self._lost = self._lost, set()
        try:
            for name in (self._consuming() - target.lanes) | (self._consuming() & lost):
                self._consumer.cancel_task_queue(name)
            refused = self._join(sorted(target.lanes - self._consuming()))
            joined = self._consuming()
        # Nothing is consumed any more. A closed channel of kombu has lost what it needs: AttributeError.
        except (*self._consumer.channel_errors, AttributeError) as error:
            raise ConnectionResetError(f"the broker closed the channel ({type(error).__name__})") from error
        target.fulfilled.set()
        self._refusals = self._refusals + 1 if refused else 0
        self._apply_in(REFUSED_BACK_OFF[min(self._refusals, len(REFUSED_BACK_OFF)) - 1] if refused else CHECK_EVERY)
        self._update(joined, refused)

    def _consuming(self) -> frozenset[str]:
        return frozenset(filter(self._consumer.task_consumer.consuming_from, self._app.amqp.queues))

    def _leave_all(self) -> None:
        self._can_reply = False
        self._lost |= self._target.lanes
        self._apply_in(0.0)

    def _join(self, lanes: list[str]) -> dict[str, str]:
        """Join these lanes; return those that the broker refuses, and why.

        RabbitMQ closes the channel for a queue that exists with other arguments, and with the channel everything that
        it consumes. So each queue is first declared on a channel of its own.
        """
        refused: dict[str, str] = {}
        if lanes:
            with self._consumer.connection.channel() as channel:
                try:
                    self._prove_replies(channel)
                except self._consumer.channel_errors as error:
                    return dict.fromkeys(lanes, describe(error))
                for name in lanes:
                    queue = lane_queue(name, self._transport)
                    try:
                        queue(channel).declare()
                        confirm_lane(channel, queue)
                    except self._consumer.channel_errors as error:
                        refused[name] = describe(error)
                    else:
                        self._app.amqp.queues.add(queue)
                        self._consumer.add_task_queue(name)
                        self._watch(name)
        return refused

    def _prove_replies(self, channel: Any) -> None:
        """A node that could take requests and not reply would be the fastest way to lose them."""
        if not self._can_reply:
            rehearse_replies(channel, self._transport)
            self._can_reply = True

    def _watch(self, name: str) -> None:
        """Have RabbitMQ tell when it cancels this consumer: its queue was deleted, or moved to another host. By itself
        Celery would close the connection then, and RabbitMQ deliver again all that runs."""
        if self._transport == "amqp":
            task_consumer = self._consumer.task_consumer
            tag = task_consumer._active_tags[name]
            task_consumer.channel.cancel_callbacks[tag] = partial(self._on_cancelled, name)

    def _on_cancelled(self, name: str, tag: str) -> None:
        self._lost.add(name)
        self._update(self._joined - {name}, self._refused)
        self._apply_in(0.0)

    def _update(self, joined: frozenset[str], refused: dict[str, str]) -> None:
        """Log what the broker refuses and did not refuse before, and tell what has changed."""
        new = [name for name in sorted(refused) if refused[name] != self._refused.get(name)]
        for reason in sorted({refused[name] for name in new}):
            names = [name for name in new if refused[name] == reason]
            what = f"lane {names[0]}" if len(names) == 1 else f"each of {len(names)} lanes"
            log.warning("%s cannot be joined, and is tried again: the broker %s", what, reason)
        for name in sorted(self._refused.keys() & joined):
            log.warning("lane %s is joined now", name)
        before, self._joined = (self._joined, self._refused), joined
        self._refused = refused
        if before != (joined, refused):
            self.changed()


def lanes_of(node_name: str, offerings: dict[str, Offering], settings: Settings) -> list[str]:
    """Return the lanes of a node: one for each capability and model, and its direct lane."""
    names = (lane, old_lane) if settings.worker.old_lanes else (lane,)
    work = [(each, offering.model) for offering in offerings.values() for each in offering.capabilities]
    return [*sorted({name(*each) for name in names for each in work}), direct_lane(node_name)]
