"""What the gateway knows of the fleet: nothing before it has reached the broker."""

from __future__ import annotations

import asyncio
import logging

from fleet_worker.errors import BrokerUnavailable, FleetError
from fleet_worker.registry.view import Registry
from fleet_worker.router.router import Router

log = logging.getLogger(__name__)

CONNECT_AGAIN_AFTER = 1.0
"""Seconds between two tries to reach the broker, while there is no connection yet."""


class KnownFleet:
    """The registry of one router. Reading it sends nothing, and waits for nothing."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.registry: Registry | None = None
        """None before the broker was reached."""

    async def connect(self) -> None:
        """Connect to the broker, again and again until it is reached. Then models are known."""
        failing = False
        while self.registry is None:
            try:
                self.registry = await self._router.connect()
            except FleetError as error:
                if not failing:
                    log.warning("no broker yet: %s", error.message)
                failing = True
                await asyncio.sleep(CONNECT_AGAIN_AFTER)
        log.info("knows the models of %d instances", len(self.registry.instances()))

    @property
    def broker_is_away(self) -> bool:
        return self._router.broker_away_for != 0.0

    def known(self) -> Registry:
        """Return the registry; raises `BrokerUnavailable` before there is one."""
        if self.registry is None:
            raise BrokerUnavailable("the gateway has not reached the broker yet", retryable=True)
        return self.registry
