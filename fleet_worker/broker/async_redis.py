"""A connection to Redis or Valkey for a program with an event loop, with the same TLS as all others."""

from __future__ import annotations

import asyncio
import ssl

from redis.asyncio import Connection, ConnectionPool, SSLConnection

from fleet_worker import urls
from fleet_worker.broker.tls import ssl_options
from fleet_worker.certificates import TLS
from fleet_worker.settings import Settings


def connection_to(settings: Settings) -> Connection:
    """Return a connection that is not open yet.

    All that it does raises one of `faults.BROKER_ERRORS` if the broker is away or refuses. It waits without limit: its
    user has to set one, since redis-py would start a task for each.
    """
    tls = ssl_options(settings)
    pool = ConnectionPool.from_url(
        urls.without_parameters(settings.broker_url),
        **({"connection_class": _SecuredConnection, **tls} if tls else {}),
        socket_connect_timeout=None,
        socket_timeout=None,
    )
    connection: Connection = pool.make_connection()  # type: ignore[no-untyped-call]
    return connection


class _SecuredConnection(SSLConnection):
    """redis-py's, with our context. Its own trusts the CAs of the system besides the one that was set."""

    async def connect(self) -> None:
        checks_chain = self.cert_reqs != ssl.CERT_NONE
        tls = TLS(self.ca_certs, self.certfile, self.keyfile, checks_chain, bool(self.check_hostname))
        self.ssl_context.context = await asyncio.to_thread(tls.context)  # which reads files
        await super().connect()  # type: ignore[no-untyped-call]
