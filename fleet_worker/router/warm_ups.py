"""Runs recent prompts again on servers that lost their caches (`affinity.warming` decides which). They are no requests
of a caller: no admission, no retry, no other node, and the answer is dropped."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fleet_worker.broker.topology import direct_lane
from fleet_worker.errors import FleetError
from fleet_worker.protocol.cache_digest import CacheDigest
from fleet_worker.protocol.prompt_prefixes import USUAL_TOKENS_PER_BYTE, PromptPrefixes
from fleet_worker.protocol.reply import Accepted, ChatResponse, Failure, Frame, LastFrame
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router.affinity.kept_prompts import KeptPrompts
from fleet_worker.router.affinity.warming import Outcome, Warming, WarmUp
from fleet_worker.router.attempts import MOVED
from fleet_worker.router.control_publisher import ControlPublisher
from fleet_worker.router.effects import CancelOrphan, Confirm
from fleet_worker.router.scheduler import BROKER_PATIENCE, Scheduler
from fleet_worker.router.submitter import Submitter

CHECK_EVERY = 1.0
TAKEN_WITHIN = 10.0
"""Seconds after which a node without a free slot gets no more of them."""
LONGEST = 300.0
"""Seconds for one of them, however much longer it is expected to take."""
NOT_TO_BLAME = frozenset({"overloaded", "expired", "cancelled"})
"""Codes of errors with which a node declines a request."""


@dataclass(slots=True)
class _Sent:
    warm_up: WarmUp
    take_by: float
    end_by: float
    """time.monotonic() seconds."""


class WarmUps:
    """Keeps the prompts of this router's callers, and sends those that are due, one at a time for each node.

    `receive` runs in the thread of the reply consumer, `heard` in that of the digest consumer, the rest in that of the
    scheduler and those of callers.
    """

    def __init__(
        self,
        warming: Warming,
        kept: KeptPrompts,
        warms: Callable[[str, PromptPrefixes], None],
        reply_to: str,
        submitter: Submitter,
        control: ControlPublisher,
        scheduler: Scheduler,
    ) -> None:
        self._warming = warming
        self._kept = kept
        self._warms = warms
        """Called when a node reads a prompt, and when it has read it."""
        self._reply_to = reply_to
        self._submitter = submitter
        self._control = control
        self._scheduler = scheduler
        self._lock = threading.Lock()
        self._asked: dict[str, tuple[FleetRequest, PromptPrefixes]] = {}
        """The requests of callers that are in flight, by id."""
        self._sent: dict[str, _Sent] = {}
        """What this has sent, by request id."""

    def start(self) -> None:
        self._check_later()

    def close(self) -> None:
        """Cancel what is under way."""
        for request_id in tuple(self._sent):
            self._end(request_id, "not_taken", cancel=True)

    # --- The requests of callers ---

    def asked(self, request: FleetRequest, prefixes: PromptPrefixes) -> None:
        """Note a request that is in flight: `ended` tells what became of it."""
        self._asked[request.request_id] = request, prefixes

    def ended(self, request_id: str, last: LastFrame) -> None:
        """Keep the prompt of a request that was answered, unless a node has failed with it: it may be the cause."""
        request, prefixes = self._asked.pop(request_id, (None, PromptPrefixes()))
        if request and isinstance(last, ChatResponse) and {each.error for each in last.attempts} <= {None, MOVED}:
            node = last.node
            tokens = last.usage.prompt_tokens or round(prefixes.size * USUAL_TOKENS_PER_BYTE)
            epoch, now = self._warming.epoch_of(node), time.monotonic()
            self._kept.keep(request, prefixes, tokens=tokens, node=node, epoch=epoch, now=now)

    # --- What nodes tell ---

    def heard(self, digest: CacheDigest) -> None:
        """Take a digest. It does not name a prompt that is still being read: what was sent there is noted again."""
        for sent in tuple(self._sent.values()):
            warm_up = sent.warm_up
            if warm_up.is_accepted and (warm_up.node, warm_up.epoch) == (digest.node, digest.epoch):
                self._warms(warm_up.node, warm_up.prompt.prefixes)
        if self._warming.heard(digest, time.monotonic()):
            self._scheduler.soon(partial(self._send_due, digest.node))

    def receive(self, node: str, frame: Frame) -> bool:
        """Take a frame of a request that this has sent; return False if it is none, or not wanted any more."""
        sent = self._sent.get(frame.id)
        if sent is None or sent.warm_up.node != node:
            return False
        match frame:
            case Accepted():
                sent.warm_up.is_accepted = True
                self._warms(node, sent.warm_up.prompt.prefixes)
                if frame.asks:
                    self._control.tell(frame.id, Confirm(node, frame.attempt))
            case Failure():
                declined = frame.code in NOT_TO_BLAME or frame.metadata.get("handed_over") is True
                self._end(frame.id, "not_taken" if declined else "failed")
            case ChatResponse():
                self._warms(node, sent.warm_up.prompt.prefixes)
                self._end(frame.id, "answered")
        return True

    # --- In the scheduler thread ---

    def _check_later(self) -> None:
        self._scheduler.at(time.monotonic() + CHECK_EVERY, self._check)

    def _check(self) -> None:
        self._check_later()
        now = time.monotonic()
        self._warming.forget_old(now)
        for request_id, sent in tuple(self._sent.items()):
            if not sent.warm_up.is_accepted and now >= sent.take_by:
                self._end(request_id, "not_taken", cancel=True)
            elif now >= sent.end_by:
                self._end(request_id, "failed", cancel=True)
        self._send_due()

    def _send_due(self, only: str | None = None) -> None:
        """`only`: the node of which something was heard. All of them would take too long after each digest."""
        for warm_up in self._warming.due(time.monotonic(), only):
            self._send(warm_up)

    def _send(self, warm_up: WarmUp) -> None:
        request_id, now = f"warm-up.{uuid.uuid4().hex}", time.monotonic()
        seconds = min(LONGEST, TAKEN_WITHIN + 30.0 + 3 * warm_up.seconds)
        ids = dict.fromkeys(("request_id", "correlation_id", "idempotency_key"), request_id)
        request = warm_up.prompt.request.model_copy(update={**ids, "timeout_seconds": seconds})
        self._sent[request_id] = _Sent(warm_up, now + TAKEN_WITHIN, now + seconds)
        lane, prefixes = direct_lane(warm_up.node), warm_up.prompt.prefixes
        try:
            self._submitter.submit(
                request.addressed_to(self._reply_to), lane, patience=BROKER_PATIENCE, prefixes=prefixes
            )
        except FleetError:
            self._end(request_id, "not_taken", cancel=True)

    def _end(self, request_id: str, outcome: Outcome, *, cancel: bool = False) -> None:
        with self._lock:
            sent = self._sent.pop(request_id, None)
        if sent is None:
            return
        if cancel:
            self._control.tell(request_id, CancelOrphan(sent.warm_up.node, 1))
        self._warming.ended(sent.warm_up, outcome, time.monotonic())
        self._scheduler.soon(partial(self._send_due, sent.warm_up.node))
