"""Through the gateway against direct access to the same simulated MLX server, in the same run.

    python -m tests.benchmarks.gateway [SCENARIO ...] [--runs 3]

Broker, simulated server, node and gateway are processes of their own; this one is the client. Medians of the runs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from fleet_worker.host.child_process import ChildProcess, child, python
from fleet_worker.testing import running_host
from tests.benchmarks.http_load import Connection, Streamed
from tests.benchmarks.minis import Load
from tests.benchmarks.registry import beside, simulated_hosts
from tests.benchmarks.slow_readers import beside_slow_readers
from tests.benchmarks.table import Row, main
from tests.benchmarks.usage import cpu_seconds, rss_mb
from tests.brokers import Valkey
from tests.gateways import running_gateway

CHAT, EMBED = "sim-chat", "sim-embed"
MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
NUMBER = re.compile(rb'"content":"\s*(\d+)')
INPUT = [f"sentence number {number}" for number in range(16)]


@dataclass
class Fleet:
    """What a scenario works with."""

    gateway: ChildProcess
    direct_url: str
    pids: list[int]

    @property
    def url(self) -> str:
        return self.gateway.url  # type: ignore[attr-defined,no-any-return]

    def cpu(self) -> float:
        """CPU seconds used so far by broker, node and gateway."""
        return sum(map(cpu_seconds, self.pids))

    def gateway_cpu(self) -> float:
        return cpu_seconds(self.gateway.pid)


@contextmanager
def fleet(*simulator: str) -> Iterator[Fleet]:
    command = python("-m", "fleet_worker.simulator", "--model", CHAT, "--model", EMBED, *simulator)
    with Valkey() as valkey, child("simulator", command) as simulated:
        base_url = json.loads(simulated.wait_for("base_url", 20))["base_url"]
        instance = {"base_url": base_url, "limits": {"concurrency": 64}, "models": {CHAT: {}, EMBED: {}}}
        with running_host(valkey.url, {"sim": instance}) as nodes, running_gateway(valkey.url) as gateway:
            yield Fleet(gateway, base_url, [valkey.pid, nodes["sim"].pid, gateway.pid])


def one_stream() -> list[Row]:
    async def measure(url: str) -> list[float]:
        async with Connection(url) as connection:
            for _ in range(10):
                await connection.stream("/v1/chat/completions", chat(20))
            return [(await connection.stream("/v1/chat/completions", chat(20))).ttft for _ in range(100)]

    with fleet("--ttft", "0.02", "--token-interval", "0.005") as it:
        direct, through = asyncio.run(measure(it.direct_url)), asyncio.run(measure(it.url))
    name = "1 stream, 20 ms TTFT, 5 ms/token"
    return [
        Row(name, "added TTFT p50", "<= 4", _p(through, 50) - _p(direct, 50), "ms"),
        Row(name, "added TTFT p99", "<= 8", _p(through, 99) - _p(direct, 99), "ms"),
    ]


def paced_streams() -> list[Row]:
    streams, tokens = 32, 100
    with fleet("--ttft", "0.02", "--token-interval", "0.02", "--tokens", "1000") as it:
        asyncio.run(many(it.url, streams, 5))
        direct_seconds, _ = _timed(many(it.direct_url, streams, tokens))
        cpu, gateway_cpu = it.cpu(), it.gateway_cpu()
        seconds, results = _timed(many(it.url, streams, tokens))
        cpu, gateway_cpu = it.cpu() - cpu, it.gateway_cpu() - gateway_cpu
    counted = sum(each.tokens for each in results)
    name = "32 streams, 20 ms/token, 100 tokens"
    return [
        Row(name, "tokens/s of direct", ">= 0.98", direct_seconds / seconds * counted / (streams * tokens)),
        Row(name, "TTFT p99", "<= 80", _p([each.ttft for each in results], 99), "ms"),
        Row(name, "longest gap of any stream", "", 1000 * max(map(_longest_gap, results)), "ms"),
        Row(name, "gateway CPU s / 1,000 tokens", "<= 0.08", 1000 * gateway_cpu / counted, "s"),
        Row(name, "CPU s / 1,000 tokens", "<= 0.25", 1000 * cpu / counted, "s"),
    ]


def fast_streams() -> list[Row]:
    return _fast_streams("64 streams, no delay, 200 tokens", ">= 35,000")


def flushed_streams() -> list[Row]:
    return _fast_streams("64 streams, no delay, each token sent by itself", ">= 25,000", "--flush-each")


def _fast_streams(name: str, target: str, *simulator: str) -> list[Row]:
    streams, tokens = 64, 200
    with fleet("--ttft", "0", "--token-interval", "0", "--tokens", "100000", *simulator) as it:
        asyncio.run(many(it.url, streams, 20))
        rates, cpu, gateway_cpu = [], it.cpu(), it.gateway_cpu()
        for _ in range(5):
            seconds, results = _timed(many(it.url, streams, tokens))
            rates.append(sum(each.tokens for each in results) / seconds)
        cpu, gateway_cpu = it.cpu() - cpu, it.gateway_cpu() - gateway_cpu
        rss = rss_mb(it.gateway.pid)
    return [
        Row(name, "tokens/s", target, statistics.median(rates)),
        Row(name, "gateway CPU s / 1,000 tokens", "", 1000 * gateway_cpu / (5 * streams * tokens), "s"),
        Row(name, "CPU s / 1,000 tokens", "", 1000 * cpu / (5 * streams * tokens), "s"),
        Row(name, "gateway RSS", "", rss, "MB"),
    ]


def requests() -> list[Row]:
    with fleet("--ttft", "0", "--token-interval", "0") as it:
        asyncio.run(_in_flight(it.url, "/v1/chat/completions", chat(1, stream=False), 100, 16))
        cpu = it.gateway_cpu()
        rate = asyncio.run(_in_flight(it.url, "/v1/chat/completions", chat(1, stream=False), 1500, 16))
        cpu = it.gateway_cpu() - cpu
    name = "chat, 1 token, 16 in flight"
    return [Row(name, "requests/s", ">= 400", rate), Row(name, "gateway CPU ms / request", "", cpu / 1.5, "ms")]


def embeddings() -> list[Row]:
    body = {"model": EMBED, "input": INPUT, "encoding_format": "base64"}
    with fleet("--flavour", "vllm_batched") as it:
        asyncio.run(_in_flight(it.url, "/v1/embeddings", body, 50, 8))
        rate = asyncio.run(_in_flight(it.url, "/v1/embeddings", body, 800, 8))
    return [Row("embed, 16 x 384, base64, 8 in flight", "texts/s", ">= 5,000", rate * len(INPUT))]


def minis() -> list[Row]:
    """As scale.py's `hundred`, with the gateway as its router."""
    from tests.benchmarks.minis import run

    load = Load(100, 4, 25)
    with (
        Valkey() as broker,
        beside(simulated_hosts, broker.url, load.minis, [load.model]) as (_, hosts),
        beside(run, broker.url, load) as (_, pipe),
    ):
        hosts.recv(), pipe.recv()
        with running_gateway(broker.url) as gateway:
            cpu, body = cpu_seconds(gateway.pid), {"model": load.model, "messages": MESSAGES, "stream": True}
            _, results = _timed(_at_once(gateway.url, body, load.all_streams))  # type: ignore[attr-defined]
            cpu = cpu_seconds(gateway.pid) - cpu
            pushed = pipe.recv()
        hosts.send("end"), hosts.recv()
    lags = [lag for each in results for lag in _lags(each, load, pushed.at)]
    took = max(each.arrivals[-1][0] for each in results) - pushed.began
    name = "100 x 4 x 25 tokens/s through one gateway"
    return [
        Row(
            name, "share of the demand", ">= 0.99", len(lags) / len(pushed.at) * load.seconds / max(load.seconds, took)
        ),
        Row(name, "token lag p50", "", _p(lags, 50), "ms"),
        Row(name, "token lag p99", "<= 80", _p(lags, 99), "ms"),
        Row(name, "gateway CPU s / 1,000 tokens", "", 1000 * cpu / len(lags), "s"),
    ]


def overload() -> list[Row]:
    """Twice as many requests as 64 slots can answer, from clients that come back after each answer or refusal."""
    crowd = Crowd()
    with fleet("--ttft", "0", "--token-interval", "0.02") as it:
        asyncio.run(crowd.come(it.url, rate=2 * 64 / crowd.seconds, seconds=40))
    waits = [seconds - crowd.seconds for seconds in crowd.answered]
    served = crowd.served_by_client
    name = "twice the capacity of 64 slots, max_wait 5 s"
    return [
        Row(name, "refused", "~ 0.5", len(crowd.refused) / (len(crowd.refused) + len(waits))),
        Row(name, "refusal p50", "", _p(crowd.refused, 50), "ms"),
        Row(name, "refusal p99", "<= 50", _p(crowd.refused, 99), "ms"),
        Row(name, "wait of the admitted p95", "<= 6,000", _p(waits, 95), "ms"),
        Row(name, "longest wait", "", 1000 * max(waits), "ms"),
        Row(name, "answers of the unluckiest client / mean", "> 0.3", min(served) / statistics.mean(served)),
    ]


def slow() -> list[Row]:
    alone, others = beside_slow_readers(slow=0, idle=0), beside_slow_readers(slow=500, idle=2_000)
    name = "20 streams, 250 ms/token, beside 500 that read nothing and 2,000 idle"
    return [
        Row(name, "gap p99, alone", "", _p(alone.gaps, 99), "ms"),
        Row(name, "gap p99, beside them", "as alone", _p(others.gaps, 99), "ms"),
        Row(name, "gateway RSS, alone", "", alone.rss, "MB"),
        Row(name, "gateway RSS, beside them", "<= 150", others.rss, "MB"),
    ]


SCENARIOS: dict[str, Callable[[], list[Row]]] = {
    "one": one_stream,
    "paced": paced_streams,
    "fast": fast_streams,
    "flushed": flushed_streams,
    "requests": requests,
    "embed": embeddings,
    "minis": minis,
    "overload": overload,
    "slow": slow,
}


# --- Clients ---------------------------------------------------------------------------------------------------------


def chat(max_tokens: int, *, stream: bool = True) -> dict[str, Any]:
    return {"model": CHAT, "messages": MESSAGES, "max_tokens": max_tokens, "temperature": 0, "stream": stream}


async def many(url: str, streams: int, tokens: int) -> list[Streamed]:
    return await _at_once(url, chat(tokens), streams)


async def _at_once(url: str, body: dict[str, Any], streams: int) -> list[Streamed]:
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(Connection(url)) for _ in range(streams)]
        return await asyncio.gather(*(each.stream("/v1/chat/completions", body) for each in connections))


class Crowd:
    """Clients that take turns. Each asks on a connection of its own, and notes how long the answer took."""

    seconds, tokens, clients = 1.0, 50, 16
    """Of one request that does not wait."""

    def __init__(self) -> None:
        self.answered: list[float] = []
        self.refused: list[float] = []
        self.served_by_client = [0] * self.clients

    async def come(self, url: str, rate: float, seconds: float) -> None:
        began, idle = time.monotonic(), []
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as asking:
            for number in range(int(rate * seconds)):
                await asyncio.sleep(began + number / rate - time.monotonic())
                connection = idle.pop() if idle else await stack.enter_async_context(_patient(url))
                asking.create_task(self._ask(connection, number % self.clients, idle))

    async def _ask(self, connection: Connection, client: int, idle: list[Connection]) -> None:
        began = time.monotonic()
        status, _ = await connection.answer("/v1/chat/completions", chat(self.tokens, stream=False))
        (self.answered if status == 200 else self.refused).append(time.monotonic() - began)
        self.served_by_client[client] += status == 200
        idle.append(connection)


def _patient(url: str) -> Connection:
    return Connection(url, x_fleet_max_wait="5")


async def _in_flight(url: str, path: str, body: dict[str, Any], times: int, width: int) -> float:
    """Requests per second."""

    async def some() -> None:
        async with Connection(url) as connection:
            for _ in range(times // width):
                await connection.whole(path, body)

    started = time.monotonic()
    await asyncio.gather(*(some() for _ in range(width)))
    return times // width * width / (time.monotonic() - started)


# --- Measures --------------------------------------------------------------------------------------------------------


def _timed(call: Awaitable[list[Streamed]]) -> tuple[float, list[Streamed]]:
    async def wait() -> list[Streamed]:
        return await call

    started = time.monotonic()
    result = asyncio.run(wait())
    return time.monotonic() - started, result


def _longest_gap(streamed: Streamed) -> float:
    return max(b - a for (a, _), (b, _) in itertools.pairwise(streamed.arrivals))


def _lags(streamed: Streamed, load: Load, pushed_at: list[float]) -> Iterator[float]:
    """Seconds. The first token of a stream is its number."""
    number = int(NUMBER.findall(streamed.first)[0])
    arrived = itertools.chain.from_iterable([at] * count for at, count in streamed.arrivals)
    return (at - pushed_at[token * load.all_streams + number] for token, at in enumerate(arrived))


def _p(seconds: list[float], percent: int) -> float:
    """In milliseconds."""
    return 1000 * statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    main(__doc__, SCENARIOS)
