"""What `fleet-worker up` runs besides its nodes, if it is asked to: the embedded broker and the gateway."""

from __future__ import annotations

import time
from collections.abc import Iterator

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.node_process import NEVER, Backoff, NodeProcess
from fleet_worker.host.up.programs import GATEWAY, Launcher, embedded_broker, gateway_grace
from fleet_worker.settings import Settings


class Companions:
    """The broker comes before all nodes, and goes after them. No method waits: call `act` at the time `due`."""

    def __init__(self, launcher: Launcher, backoff: Backoff) -> None:
        self._launcher = launcher
        self._backoff = backoff
        self._gateway: NodeProcess | None = None

    @property
    def broker_is_ready(self) -> bool:
        """True if it accepts connections, or is not ours."""
        broker = self._launcher.broker
        return broker is None or broker.serves

    @property
    def gateway_is_gone(self) -> bool:
        return self._gateway is None

    @property
    def broker_is_gone(self) -> bool:
        return self._launcher.broker is None

    @property
    def due(self) -> float:
        dues = [NEVER]
        if self._gateway and (self._gateway.runs or self.broker_is_ready):
            dues.append(self._gateway.due)
        if self._launcher.broker:
            dues.append(self._launcher.broker.due)
        return min(dues)

    def settle(self, old: Settings, new: Settings) -> Iterator[str]:
        """Run what these settings ask for; yield what that changes.

        Raises:
            ConfigurationError: the broker cannot be started with them.
        """
        if new.up.broker and not self._launcher.broker:
            self._launcher.broker = embedded_broker(new)
            self._launcher.broker.start()
        if not new.up.gateway:
            if self._gateway and self._gateway.wanted:
                self.leave()
                yield f"{GATEWAY} ends"
            return
        if not self._gateway or not self._gateway.wanted:
            self._gateway = self._gateway or NodeProcess(GATEWAY, self._launcher.gateway, self._backoff)
            self._gateway.wanted = True
            yield f"{GATEWAY} starts"
        elif _of_gateway(old) != _of_gateway(new):
            self._gateway.replace(gateway_grace(new))
            yield f"{GATEWAY} starts anew"
        else:
            self._gateway.reload()
            yield f"{GATEWAY} reads its keys again"

    def leave(self) -> None:
        """End the gateway, after its requests."""
        if self._gateway:
            self._gateway.wanted = False
            self._gateway.stop(gateway_grace(self._launcher.settings))

    def stop_broker(self) -> None:
        """Only when no node and no gateway runs any more."""
        if self._launcher.broker:
            self._launcher.broker.stop()

    def kill(self) -> None:
        """End the gateway at once."""
        if self._gateway:
            self._gateway.kill()

    def act(self) -> None:
        if broker := self._launcher.broker:
            broker.reap()
            if broker.due <= time.monotonic():
                broker.act()
            if broker.gone:
                broker.close()
                self._launcher.broker = None
        if gateway := self._gateway:
            gateway.reap()
            if gateway.due <= time.monotonic() and (gateway.runs or self.broker_is_ready):
                gateway.act(GATEWAY)
            if gateway.gone:
                self._gateway = None


def check_broker(old: Settings, new: Settings) -> None:
    """Raise `ConfigurationError` if the embedded broker would have to change: it has the work of all hosts."""
    was, will_be = ((each.up.broker, each.broker_url, each.up.address) for each in (old, new))
    if was != will_be and (old.up.broker or new.up.broker):
        text = "up.broker, up.address, and broker_url of an embedded broker change by a restart of fleet-worker up only"
        raise ConfigurationError(text)


def _of_gateway(settings: Settings) -> dict[str, object]:
    """Return the settings that a gateway reads."""
    return settings.model_dump(exclude={"instances", "worker", "registry", "up", "availability"})
