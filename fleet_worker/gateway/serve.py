"""`fleet-worker gateway`: one process that serves HTTP until a signal ends it."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from contextlib import closing
from types import FrameType

import uvicorn

from fleet_worker.errors import ConfigurationError
from fleet_worker.gateway.accounts.keys import Keys
from fleet_worker.gateway.accounts.ledger import Ledger
from fleet_worker.gateway.accounts.ledger_file import path_of
from fleet_worker.gateway.accounts.quotas import Quotas
from fleet_worker.gateway.app import Gateway
from fleet_worker.gateway.http.http_protocol import BoundedProtocol
from fleet_worker.gateway.listener import BACKLOG, address, allow_connections, listening
from fleet_worker.gateway.records import Records
from fleet_worker.host.parent_pipe import attach_to_parent
from fleet_worker.router.router import Router
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

ANSWERS_LEAVE_WITHIN = 5
"""Seconds in which the last bytes of the answers leave, after the requests have ended."""

MOST_GARBAGE = 2_000
"""Objects that are made, and not freed, from one collection to the next. A request may leave some in cycles, which hold
its body of up to `max_body_bytes`: with 10,000 a gateway whose requests fail has twice the memory."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, and then until all requests have ended. A second signal ends it at once.

    Raises:
        ConfigurationError: the address cannot be used, or a file cannot.
    """
    attach_to_parent("the gateway", grace=settings.gateway.drain_grace + ANSWERS_LEAVE_WITHIN)
    keys = Keys.load(settings.gateway.keys)
    with (
        Router(settings, patient=False) as router,
        listening(settings) as listener,
        closing(Ledger(path_of(settings), days=settings.gateway.ledger_days)) as ledger,
    ):
        shared = settings if keys.are_needed else None  # without keys nothing is limited
        quotas = Quotas(shared, gateway=ledger.gateway_id, spent=ledger.tokens_since)
        gateway = Gateway(settings, router, keys, quotas, Records(ledger, lambda: quotas.are_shared))
        server = Server(settings, gateway, keys, quotas)
        log.info("serves %s %s", address(settings, listener), _whom(keys))
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(server.serve_until_drained(listener))


class Server(uvicorn.Server):
    """Uvicorn's server, which drains at the first signal."""

    def __init__(self, settings: Settings, gateway: Gateway, keys: Keys, quotas: Quotas) -> None:
        super().__init__(_config(settings, gateway))
        try:
            self.config.load()
        except OSError as error:  # of ssl: all else was checked
            why = getattr(error, "reason", None) or error.strerror
            text = f"gateway.cert and gateway.key: cannot be used ({why}): PEM files that belong together are needed"
            raise ConfigurationError(text) from None
        self._gateway = gateway
        self._keys = keys
        self._quotas = quotas

    async def serve_until_drained(self, listener: socket.socket) -> None:
        self._loop, self._asked_to_end = asyncio.get_running_loop(), asyncio.Event()
        self._loop.add_signal_handler(signal.SIGHUP, self._keys.reload)
        self._quotas.open()
        connecting = asyncio.create_task(self._gateway.fleet.connect())
        connecting.add_done_callback(_spare_the_collector)
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


def _spare_the_collector(connected: asyncio.Task[None]) -> None:
    """Keep the garbage collector from what is there now, and will be to the end: modules, models, connections. A look
    at all of it takes 70 ms, in which no stream gets anything, and came with every thousand requests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(MOST_GARBAGE)


def _whom(keys: Keys) -> str:
    if keys.are_needed:
        return "to callers with a key"
    return "to everybody on this machine: gateway.keys is not set"


def _config(settings: Settings, gateway: Gateway) -> uvicorn.Config:
    mine = settings.gateway
    bounds = {"max_connections": allow_connections(mine.max_connections), "write_timeout": mine.write_timeout}
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
        ssl_keyfile_password="",  # else OpenSSL asks at the terminal
        timeout_keep_alive=round(mine.keep_alive),
        backlog=BACKLOG,
        timeout_graceful_shutdown=ANSWERS_LEAVE_WITHIN,
    )
