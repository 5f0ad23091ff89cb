"""All that a router does about the prompt caches of servers. With `router.affinity = false` there is none of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from kombu import Connection

from fleet_worker.broker.topology import transport_of
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.protocol.reply import Frame, LastFrame
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.registry.view import Registry
from fleet_worker.router import context_length
from fleet_worker.router.affinity.affinity import Affinity
from fleet_worker.router.affinity.kept_prompts import KeptPrompts
from fleet_worker.router.affinity.prefixes import fleet_key
from fleet_worker.router.affinity.warming import ReadyNodes, Warming
from fleet_worker.router.control_publisher import ControlPublisher
from fleet_worker.router.digest_consumer import DigestConsumer
from fleet_worker.router.scheduler import Scheduler
from fleet_worker.router.submission import Submission
from fleet_worker.router.submitter import Submitter
from fleet_worker.router.warm_ups import WarmUps
from fleet_worker.settings import Settings

LONG_PROMPT = 8_000
"""Characters: a server reads them for some seconds, and longer than a new router needs to learn what is cached."""
KNOWN_WITHIN = 1.5
"""Seconds from the start after which no prompt waits for that."""


class PromptCaches:
    """Connects what places requests (`affinity`), what hears from nodes (`digest_consumer`) and what warms servers
    again (`warm_ups`)."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        connect: Callable[[], Connection],
        ready_nodes: ReadyNodes,
        reply_to: str,
        submitter: Submitter,
        control: ControlPublisher,
        scheduler: Scheduler,
    ) -> None:
        secret = settings.router.affinity_secret
        key = fleet_key(secret.get_secret_value() if secret else None, settings.broker_url)
        self.affinity = Affinity(registry, key=key)
        kept = KeptPrompts(settings.router.warm_memory)
        warming = Warming(kept, self.affinity.holders, ready_nodes)
        self._warm_ups = WarmUps(warming, kept, self.affinity.warms, reply_to, submitter, control, scheduler)
        self._digests = DigestConsumer(connect, transport_of(settings.broker_url), registry, self._receive_digests)
        self._known_at = 0.0
        """When the first digests are not waited for any longer: time.monotonic() seconds."""

    def start(self) -> None:
        self._known_at = time.monotonic() + KNOWN_WITHIN
        self._digests.start()
        self._warm_ups.start()

    def close(self) -> None:
        """Return at once; a warm-up that is under way is cancelled."""
        self._digests.close()
        self._warm_ups.close()

    def wait_until_known(self, asked: Submission, deadline: float) -> None:
        """Wait until nodes have told a new router what they hold, if the prompt is long and may go to any of them."""
        left = min(self._known_at, deadline) - time.monotonic()
        if left <= 0 or asked.node or asked.request.provider_instance != "any":
            return
        if context_length.characters(asked.request) >= LONG_PROMPT:
            self._digests.first.wait(left)

    def prefixes(self, asked: Submission) -> PromptPrefixes | None:
        """Return the ids of the beginnings of its prompt; None for what has none."""
        if asked.request.operation == "embed":
            return None
        return self.affinity.prefixes(asked.request, asked.cache.session, asked.cache.scope)

    def asked(self, request: FleetRequest, prefixes: PromptPrefixes) -> None:
        """Note a request that is in flight, and whose prompt may be kept: `ended` tells what became of it."""
        self._warm_ups.asked(request, prefixes)

    def ended(self, request_id: str, last: LastFrame) -> None:
        """Note that a request has ended, with this frame."""
        self._warm_ups.ended(request_id, last)

    def receive(self, node: str, frame: Frame) -> bool:
        """Take a frame of a warm-up; return False if it is none, or not wanted any more."""
        return self._warm_ups.receive(node, frame)

    def _receive_digests(self, body: bytes) -> None:
        """Raises `Refused`."""
        for digest in self.affinity.receive(body):
            self._warm_ups.heard(digest)
