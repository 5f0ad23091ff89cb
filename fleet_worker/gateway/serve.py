"""`fleet-worker gateway`: one process that serves HTTP until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from fleet_worker.errors import ConfigurationError
from fleet_worker.gateway.app import Gateway
from fleet_worker.gateway.http_protocol import BoundedProtocol
from fleet_worker.gateway.keys import Keys
from fleet_worker.gateway.ledger import Ledger
from fleet_worker.gateway.ledger_file import path_of
from fleet_worker.gateway.quotas import Quotas
from fleet_worker.router.router import Router
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that wait to be accepted."""
ANSWERS_LEAVE_WITHIN = 5
"""Seconds in which the last bytes of the answers leave, after the requests have ended."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, and then until all requests have ended. A second signal ends it at once.

    Raises:
        ConfigurationError: the address cannot be used, or a file cannot.
    """
    keys = Keys.load(settings.gateway.keys)
    with (
        Router(settings, patient=False) as router,
        _listening(settings) as listener,
        closing(Ledger(path_of(settings))) as ledger,
    ):
        quotas = Quotas(settings, gateway=ledger.gateway_id, spent=ledger.tokens_since)
        gateway = Gateway(settings, router, keys, quotas, ledger)
        server = Server(settings, gateway, keys, quotas)
        log.info("serves %s %s", address(settings, listener), _whom(keys))
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(server.serve_until_drained(listener))


class Server(uvicorn.Server):
    """Uvicorn's server, which drains at the first signal."""

    def __init__(self, settings: Settings, gateway: Gateway, keys: Keys, quotas: Quotas) -> None:
        super().__init__(_config(settings, gateway))
        self._gateway = gateway
        self._keys = keys
        self._quotas = quotas

    async def serve_until_drained(self, listener: socket.socket) -> None:
        self._loop, self._asked_to_end = asyncio.get_running_loop(), asyncio.Event()
        self._loop.add_signal_handler(signal.SIGHUP, self._keys.reload)
        self._quotas.open()
        connecting = asyncio.create_task(self._gateway.fleet.connect())
        serving = asyncio.create_task(self.serve([listener]))
        ending = asyncio.create_task(self._asked_to_end.wait())
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        log.info("ends: no new requests, and those that run have %g s", self._gateway.running.drain_grace)
        await self._gateway.running.drain()
        connecting.cancel()
        self.should_exit = True
        await serving
        await self._quotas.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._asked_to_end.is_set():
            self.should_exit = self.force_exit = True
            self._gateway.running.end_all()
        self._asked_to_end.set()


def address(settings: Settings, listener: socket.socket) -> str:
    """Return where the gateway can be reached, as a URL or the path of its socket."""
    if settings.gateway.socket:
        return f"unix:{settings.gateway.socket}"
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.gateway.cert else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _whom(keys: Keys) -> str:
    if keys.are_needed:
        return "to callers with a key"
    return "to everybody on this machine: gateway.keys is not set"


def _config(settings: Settings, gateway: Gateway) -> uvicorn.Config:
    mine = settings.gateway
    bounds = {"max_connections": mine.max_connections, "write_timeout": mine.write_timeout}
    return uvicorn.Config(
        gateway,
        http=type("Protocol", (BoundedProtocol,), bounds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=mine.cert,
        ssl_keyfile=mine.key,
        timeout_keep_alive=round(mine.keep_alive),
        backlog=BACKLOG,
        timeout_graceful_shutdown=ANSWERS_LEAVE_WITHIN,
    )


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    """Yield a socket that is bound where the settings say."""
    path = settings.gateway.socket
    try:
        listener = _unix_socket(path) if path else _tcp_socket(settings.gateway.host, settings.gateway.port)
    except OSError as error:
        where = (
            f"gateway.socket {path}" if path else f"gateway.host {settings.gateway.host}, port {settings.gateway.port}"
        )
        raise ConfigurationError(f"{where}: cannot be used: {error.strerror or error}; choose another one") from None
    listener.listen(BACKLOG)
    try:
        yield listener
    finally:
        listener.close()
        if path:
            path.unlink(missing_ok=True)


def _tcp_socket(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    return listener


def _unix_socket(path: Path) -> socket.socket:
    """Return a socket that only this user can reach. One that a killed gateway left behind is replaced."""
    listener = socket.socket(socket.AF_UNIX)
    if path.is_socket() and listener.connect_ex(str(path)) != 0:
        path.unlink()
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    return listener
