"""What it costs a router to choose: python -m tests.benchmarks.affinity.cost"""

from __future__ import annotations

import json
import statistics
import time
import tracemalloc
from collections.abc import Callable

from fleet_worker.protocol.cache_digest import CacheDigest, DigestMessage
from fleet_worker.protocol.registry_event import Announcement, RegistryEvent
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.protocol.status import InstanceStatus, ModelStatus
from fleet_worker.registry.view import Registry
from fleet_worker.router.affinity.affinity import Affinity
from tests.benchmarks.affinity.product import ENVELOPE

PROMPT_BYTES = 8_000
"""About 2,000 tokens, in messages of 400 bytes."""
IDS = 60
"""Of each node's digest."""
DAY = 24 * 3600.0
ROUNDS = 300


def main() -> None:
    for nodes in (100, 1_000):
        for holders in (0, 3, nodes // 2, nodes):
            affinity, request = _fleet_of(nodes, holders)
            micros = _median_of(lambda: affinity.place(request, affinity.prefixes(request)))  # noqa: B023
            print(f"{nodes:5} nodes, {holders:4} hold the prompt: {micros:7.0f} microseconds to choose", flush=True)
    affinity, _ = _fleet_of(1_000, 0)
    request = _request(40)
    prefixes = affinity.prefixes(request)
    print(f"short prompt: {_median_of(lambda: affinity.place(request, prefixes)):.1f} microseconds")
    print(f"ids of 2,000 tokens: {_median_of(lambda: affinity.prefixes(_REQUEST)):.0f} microseconds")
    large = _request(400_000)
    print(f"ids of 100,000 tokens: {_median_of(lambda: affinity.prefixes(large)):.0f} microseconds")
    body = _digest("local@mini-0000", 1, ())
    print(f"a digest of {IDS} ids: {_median_of(lambda: affinity.receive(body)):.0f} microseconds")
    tracemalloc.start()
    kept = _fleet_of(1_000, 0)
    print(f"1,000 nodes of {IDS} ids, with the registry: {tracemalloc.get_traced_memory()[0] / 1e6:.1f} MB")
    del kept


def _fleet_of(nodes: int, holders: int) -> tuple[Affinity, FleetRequest]:
    """A fleet in which so many nodes hold all beginnings of the prompt, each one has ids of its own, and a third is
    busy."""
    registry = Registry()
    affinity = Affinity(registry, key=b"key")
    ids = tuple(id_ for id_, _ in affinity.prefixes(_REQUEST).chain)
    for number in range(nodes):
        name = f"local@mini-{number:04}"
        status = InstanceStatus(host=name, name="local", node=name, status="available", pid=1, slots=4)
        model = ModelStatus(model="m", capabilities=("stream_chat",), status="available")
        events = [RegistryEvent.about(status), RegistryEvent.about(status, model)]
        registry.apply(Announcement(v=1, host=name, interval=DAY, events=events))
        affinity.receive(_digest(name, number % 3, ids if number < holders else ()))
    return affinity, _REQUEST


def _digest(name: str, running: int, ids: tuple[str, ...]) -> bytes:
    held = [*ids, *(f"{hash((name, n)) % 10**11:011}" for n in range(IDS - len(ids)))]
    digest = CacheDigest(node=name, slots=4, running=running, prefill_speed=400.0, decode_speed=40.0, held=held)
    return DigestMessage(v=1, host=name, interval=DAY, digests=[digest]).encode()


def _request(size: int) -> FleetRequest:
    messages = [{"role": "user", "content": f"{n:08}" + "x" * min(400, size)} for n in range(max(1, size // 400))]
    return FleetRequest.build({**json.loads(ENVELOPE.model_dump_json()), "params": {"messages": messages}})


def _median_of(work: Callable[[], object]) -> float:
    """Return the median time of this work, in microseconds."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


_REQUEST = _request(PROMPT_BYTES)

if __name__ == "__main__":
    main()
