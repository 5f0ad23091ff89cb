"""Through the fleet against direct access to the same simulated MLX server, in the same run.

    python -m tests.benchmarks.compare [SCENARIO ...] [--runs 3]

Broker, simulated server and node are processes of their own; the router is this one. Medians of the runs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import ChildProcess, child, python
from fleet_worker.mlx.events import EventParser
from fleet_worker.testing import running_node
from tests.benchmarks.table import Row, main
from tests.benchmarks.usage import cpu_seconds, rss_mb
from tests.brokers import Valkey

MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
EMBED_INPUT = [f"sentence number {number}" for number in range(16)]


@dataclass
class Fleet:
    """What a scenario works with."""

    router: Router
    direct: httpx.Client
    node: ChildProcess
    broker_pid: int
    broker_url: str

    def cpu(self) -> float:
        """CPU seconds used so far by node, broker and router."""
        return cpu_seconds(self.node.pid) + cpu_seconds(self.broker_pid) + time.process_time()


@contextmanager
def fleet(*simulator: str, concurrency: int = 64) -> Iterator[Fleet]:
    command = python("-m", "fleet_worker.simulator", "--model", "sim-chat", "--model", "sim-embed", *simulator)
    with Valkey() as valkey, child("simulator", command) as simulated:
        base_url = json.loads(simulated.wait_for("base_url", 20))["base_url"]
        limits = httpx.Limits(max_connections=100)
        with (
            running_node(
                valkey.url,
                base_url=base_url,
                limits={"concurrency": concurrency},
                models={"sim-chat": {}, "sim-embed": {}},
            ) as node,
            Router(Settings(broker_url=valkey.url)) as router,
            httpx.Client(base_url=base_url, limits=limits, timeout=60, trust_env=False) as direct,
        ):
            yield Fleet(router, direct, node, valkey.pid, valkey.url)


# --- One stream ------------------------------------------------------------------------------------------------------


def one_stream() -> list[Row]:
    with fleet("--ttft", "0.02", "--token-interval", "0.005", "--stamped") as it:
        for _ in range(10):
            _direct_stream(it, 20)
            _fleet_stream(it, 20)
        direct, through = [], []
        lags: list[float] = []
        for _ in range(100):
            direct.append(_direct_stream(it, 20)[0])
            ttft, arrivals = _fleet_stream(it, 20)
            through.append(ttft)
            lags += [at - float(text) for at, text in arrivals]
    name = "1 stream, 20 ms TTFT, 5 ms/token"
    return [
        Row(name, "added TTFT p50", "<= 3", 1000 * (_p(through, 50) - _p(direct, 50)), "ms"),
        Row(name, "added TTFT p99", "<= 5", 1000 * (_p(through, 99) - _p(direct, 99)), "ms"),
        Row(name, "token lag p50", "<= 2", 1000 * _p(lags, 50), "ms"),
        Row(name, "token lag p99", "", 1000 * _p(lags, 99), "ms"),
    ]


def lone_stream() -> list[Row]:
    tokens = 400
    with fleet("--ttft", "0.02", "--token-interval", "0.02", "--tokens", "1000") as it:
        _fleet_stream(it, 20)
        cpu, node_cpu = it.cpu(), cpu_seconds(it.node.pid)
        _fleet_stream(it, tokens)
        cpu, node_cpu = it.cpu() - cpu, cpu_seconds(it.node.pid) - node_cpu
    name = "1 stream, 20 ms/token, nothing beside it"
    return [
        Row(name, "CPU s / 1,000 tokens", "<= 0.6", 1000 * cpu / tokens, "s"),
        Row(name, "node CPU s / 1,000 tokens", "", 1000 * node_cpu / tokens, "s"),
    ]


# --- Many streams ----------------------------------------------------------------------------------------------------


def paced_streams() -> list[Row]:
    streams, tokens = 32, 100
    with fleet("--ttft", "0.02", "--token-interval", "0.02", "--tokens", "1000") as it:
        asyncio.run(_many(it.router, streams, 5))
        direct_seconds, _ = _timed(lambda: _direct_many(it, streams, tokens))
        cpu = it.cpu()
        messages = _messages(it)
        seconds, results = _timed(lambda: asyncio.run(_many(it.router, streams, tokens)))
        cpu = it.cpu() - cpu
        messages = _messages(it) - messages
    counted = sum(len(arrivals) for _, arrivals in results)
    gaps = [max(b - a for (a, _), (b, _) in itertools.pairwise(arrivals)) for _, arrivals in results]
    name = "32 streams, 20 ms/token, 100 tokens"
    return [
        Row(name, "tokens/s of direct", ">= 0.985", direct_seconds / seconds * counted / (streams * tokens)),
        Row(name, "TTFT p99", "<= 60", 1000 * _p([ttft for ttft, _ in results], 99), "ms"),
        Row(name, "longest gap of any stream", "", 1000 * max(gaps), "ms"),
        Row(name, "CPU s / 1,000 tokens", "<= 0.2", cpu / counted * 1000, "s"),
        Row(name, "broker messages / token", "", messages / counted),
    ]


def fast_streams() -> list[Row]:
    return _fast_streams("64 streams, no delay, 200 tokens", ">= 60,000")


def flushed_streams() -> list[Row]:
    return _fast_streams("64 streams, no delay, each token sent by itself", ">= 30,000", "--flush-each")


def _fast_streams(name: str, target: str, *simulator: str) -> list[Row]:
    streams, tokens = 64, 200
    with fleet("--ttft", "0", "--token-interval", "0", "--tokens", "100000", *simulator) as it:
        asyncio.run(_many(it.router, streams, 20))
        direct_seconds, _ = _timed(lambda: _direct_many(it, streams, tokens))
        rss = 0.0
        rates, shares, cpu = [], [], cpu_seconds(it.node.pid)
        for _ in range(5):
            messages = _messages(it)
            seconds, results = _timed(lambda: asyncio.run(_many(it.router, streams, tokens)))
            counted = sum(len(arrivals) for _, arrivals in results)
            rates.append(counted / seconds)
            shares.append((_messages(it) - messages - streams) / counted)
            rss = max(rss, rss_mb(it.node.pid))
        cpu = cpu_seconds(it.node.pid) - cpu
    return [
        Row(name, "tokens/s", target, statistics.median(rates)),
        Row(name, "tokens/s of direct", "", statistics.median(rates) * direct_seconds / (streams * tokens)),
        Row(name, "broker messages / token", "<= 0.03", statistics.median(shares)),
        Row(name, "node CPU s / 1,000 tokens", "<= 0.03", 1000 * cpu / (5 * streams * tokens), "s"),
        Row(name, "node RSS", "<= 60", rss, "MB"),
    ]


def requests() -> list[Row]:
    with fleet("--ttft", "0", "--token-interval", "0") as it:

        def through(_: int) -> None:
            it.router.chat("sim-chat", MESSAGES, max_tokens=1, timeout=30)

        def direct(_: int) -> None:
            _direct_stream(it, 1)

        _in_flight(through, 100, 16)
        direct_rate = _in_flight(direct, 1000, 16)
        rate = _in_flight(through, 1500, 16)
    name = "chat, 1 token, 16 in flight"
    return [Row(name, "requests/s", ">= 500", rate), Row(name, "of direct", "", rate / direct_rate)]


def embeddings() -> list[Row]:
    with fleet("--flavour", "vllm_batched") as it:

        def through(_: int) -> None:
            it.router.embed("sim-embed", EMBED_INPUT, timeout=30)

        def direct(_: int) -> None:
            it.direct.post("/v1/embeddings", json={"model": "sim-embed", "input": EMBED_INPUT}).json()

        _in_flight(through, 50, 8)
        direct_rate = _in_flight(direct, 400, 8)
        rate = _in_flight(through, 800, 8)
    name = "embed, 16 x 384, 8 in flight"
    return [Row(name, "inputs/s", ">= 6,000", rate * 16), Row(name, "of direct", "", rate / direct_rate)]


def memory() -> list[Row]:
    with fleet("--ttft", "0", "--token-interval", "0") as it:

        def through(_: int) -> None:
            it.router.chat("sim-chat", MESSAGES, max_tokens=1, timeout=30)

        _in_flight(through, 3000, 16)
        before, node_before = rss_mb(os.getpid()), rss_mb(it.node.pid)
        _in_flight(through, 10_000, 16)
        growth, node_growth = rss_mb(os.getpid()) - before, rss_mb(it.node.pid) - node_before
    name = "10,000 chats"
    return [Row(name, "router growth", "flat", growth, "MB"), Row(name, "node growth", "", node_growth, "MB")]


SCENARIOS: dict[str, Callable[[], list[Row]]] = {
    "one": one_stream,
    "lone": lone_stream,
    "paced": paced_streams,
    "fast": fast_streams,
    "flushed": flushed_streams,
    "requests": requests,
    "embed": embeddings,
    "memory": memory,
}


# --- Clients ---------------------------------------------------------------------------------------------------------

Arrivals = list[tuple[float, str]]


def _fleet_stream(it: Fleet, tokens: int) -> tuple[float, Arrivals]:
    started, arrivals = time.monotonic(), []
    for delta in it.router.stream_chat("sim-chat", MESSAGES, max_tokens=tokens, timeout=60):
        arrivals.append((time.monotonic(), delta.content or ""))
    return arrivals[0][0] - started, arrivals


async def _many(router: Router, streams: int, tokens: int) -> list[tuple[float, Arrivals]]:
    async def one() -> tuple[float, Arrivals]:
        started, arrivals = time.monotonic(), []
        async for delta in router.stream_chat("sim-chat", MESSAGES, max_tokens=tokens, timeout=60):
            arrivals.append((time.monotonic(), delta.content or ""))
        return arrivals[0][0] - started, arrivals

    return await asyncio.gather(*(one() for _ in range(streams)))


def _direct_stream(it: Fleet, tokens: int) -> tuple[float, int]:
    body = {"model": "sim-chat", "messages": MESSAGES, "max_tokens": tokens, "temperature": 0, "stream": True}
    started, first, count = time.monotonic(), 0.0, 0
    events = EventParser()
    with it.direct.stream("POST", "/v1/chat/completions", json=body) as response:
        for received in response.iter_raw():
            for event in events.feed(received):
                if event != b"[DONE]" and json.loads(event)["choices"][0]["delta"].get("content"):
                    first = first or time.monotonic()
                    count += 1
    return first - started, count


def _direct_many(it: Fleet, streams: int, tokens: int) -> list[tuple[float, int]]:
    with ThreadPoolExecutor(streams) as pool:
        return list(pool.map(lambda _: _direct_stream(it, tokens), range(streams)))


def _in_flight(call: Callable[[int], Any], times: int, width: int) -> float:
    """Calls per second."""

    def some(first: int) -> None:
        for number in range(first, times, width):
            call(number)

    with ThreadPoolExecutor(width) as pool:
        seconds, _ = _timed(lambda: list(pool.map(some, range(width))))
    return times / seconds


# --- Measures --------------------------------------------------------------------------------------------------------


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.monotonic()
    result = call()
    return time.monotonic() - started, result


def _p(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _messages(it: Fleet) -> int:
    """Messages that went through the broker so far: every one is pushed to a list once."""
    import redis

    with redis.Redis.from_url(it.broker_url) as client:
        return int(client.info("commandstats").get("cmdstat_lpush", {}).get("calls", 0))


if __name__ == "__main__":
    main(__doc__, SCENARIOS)
