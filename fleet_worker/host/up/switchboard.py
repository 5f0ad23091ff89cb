"""Who is connected to `fleet-worker up`: what they say reaches the right place, and watchers hear of every change."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from pathlib import Path

from fleet_worker.host.up.up_server import Client, UpServer
from fleet_worker.protocol.host_messages import Done, HostStatus, NodeNews, Reload, Restart, ToUp, Watch


class Switchboard:
    """All functions that it is given must not wait."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        *,
        hear: Callable[[Client, NodeNews], None],
        forget: Callable[[Client], None],
        restart: Callable[[Restart], Done],
        reload: Callable[[], Done],
    ) -> None:
        self._hear = hear
        self._forget = forget
        self._restart = restart
        self._reload = reload
        self._status = HostStatus()
        self._watchers: set[Client] = set()
        self._server = UpServer(selector, self._receive, self._gone)

    def listen(self, path: Path) -> None:
        """Listen here, and nowhere else any more; who is connected stays so. Raises `ConfigurationError`."""
        self._server.listen(path)

    def publish(self, status: HostStatus) -> None:
        """Tell all watchers, if it has changed."""
        if status != self._status:
            self._status = status
            for watcher in list(self._watchers):
                watcher.send(status)

    def close(self) -> None:
        self._server.close()

    def _receive(self, client: Client, message: ToUp) -> None:
        match message:
            case NodeNews():
                self._hear(client, message)
            case Watch():
                self._watchers.add(client)
                client.send(self._status)
            case Restart():
                client.send(self._restart(message))
            case Reload():
                client.send(self._reload())

    def _gone(self, client: Client) -> None:
        self._watchers.discard(client)
        self._forget(client)
