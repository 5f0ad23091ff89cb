"""Streams that are read, beside clients of the same gateway that read nothing, and clients that send nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from fleet_worker.gateway.listener import allow_connections
from tests.benchmarks.http_load import Connection
from tests.benchmarks.minis import Load, run
from tests.benchmarks.registry import beside, simulated_hosts
from tests.benchmarks.usage import rss_mb
from tests.brokers import Valkey
from tests.gateways import running_gateway

__all__ = ["Beside", "beside_slow_readers"]

READ = 20
"""Streams that are read. Each gets a token every 250 ms."""
SETTLED = 12
"""Tokens of a stream before its gaps count."""


@dataclass(frozen=True)
class Beside:
    """What was seen with so many others beside."""

    gaps: list[float]
    """Seconds between two reads of the streams that are read."""
    rss: float
    """Megabytes of the gateway at the end."""


def beside_slow_readers(slow: int, idle: int) -> Beside:
    load = Load(minis=(READ + slow) // 4, streams=4, rate=4)
    with ExitStack() as stack:
        broker = stack.enter_context(Valkey())
        _, hosts = stack.enter_context(beside(simulated_hosts, broker.url, load.minis, [load.model]))
        _, pipe = stack.enter_context(beside(run, broker.url, load))
        hosts.recv(), pipe.recv()
        gateway = stack.enter_context(running_gateway(broker.url))
        body = {"model": load.model, "messages": [{"role": "user", "content": "Count."}], "stream": True}
        url = gateway.url  # type: ignore[attr-defined]
        with _clients(url, idle), _clients(url, slow, body):
            gaps, rss = asyncio.run(_gaps(url, body)), rss_mb(gateway.pid)
        pipe.recv(), hosts.send("end"), hosts.recv()
    return Beside(gaps, rss)


@contextmanager
def _clients(url: str, count: int, body: dict[str, object] | None = None) -> Iterator[None]:
    """Open connections; ask for a stream on each if there is a body. Nothing is read from them."""
    allow_connections(count + 1_000)
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((urlsplit(url).hostname, urlsplit(url).port))
            if body:
                client.sendall(head.encode() + content)
        yield


async def _gaps(url: str, body: dict[str, object]) -> list[float]:
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(Connection(url)) for _ in range(READ)]
        streams = await asyncio.gather(*(each.stream("/v1/chat/completions", body) for each in connections))
    later = slice(SETTLED, -1)  # all streams begin at one moment, and end at one moment
    return [after - before for each in streams for (before, _), (after, _) in itertools.pairwise(each.arrivals[later])]
