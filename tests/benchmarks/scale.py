"""One router, and the replies of a fleet to it.

    python -m tests.benchmarks.scale [SCENARIO ...] [--runs 3]

The nodes are simulated, all of them in one process (tests.benchmarks.minis), their hosts in another one; broker and
router are real, and the router, which is this process, reads with asyncio. The lag of a token is the time from its push
by the node until its reader has it. Medians of the runs.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from typing import Any

from fleet_worker import Router, Settings
from tests.benchmarks.digests import busy_hosts, listening_router
from tests.benchmarks.idle import idle_hosts
from tests.benchmarks.minis import Load, Pushed, run
from tests.benchmarks.registry import beside, simulated_hosts
from tests.benchmarks.table import Row, main
from tests.benchmarks.usage import cpu_seconds, rss_mb
from tests.brokers import RabbitMQ, Valkey

Broker = Valkey | RabbitMQ
_Usage = tuple[float, float]
"""CPU in percent of a core, and memory in MB."""

MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]


# --- Scenarios -------------------------------------------------------------------------------------------------------


def ten() -> list[Row]:
    return _one_router(Valkey, Load(10, 4, 25), "0.1", p50="", p99="<= 10")


def hundred() -> list[Row]:
    return _one_router(Valkey, Load(100, 4, 25), "0.06", p50="<= 5", p99="<= 50")


def rabbitmq() -> list[Row]:
    return _one_router(RabbitMQ, Load(100, 4, 12.5), "", p50="", p99="<= 100")


def thousand() -> list[Row]:
    return _one_router(Valkey, Load(1_000, 1, 10), "", p50="", p99="<= 100")


def overload() -> list[Row]:
    """More than the router can; beside it another router that has little to do."""
    load = Load(100, 4, 80)
    with Valkey() as broker, beside(_calm_router, broker.url) as (_, calm):
        before = calm.recv()
        with _minis(broker.url, load) as minis, _router(broker.url) as router:
            calm.send("now")
            got = asyncio.run(_read_all(router, load))
            pushed = minis.recv()
        beside_it = calm.recv()
    lags, delays = got.lags(load, pushed), got.delays(load, pushed)
    name = f"overload: {_describe(load)}"
    return [
        Row(name, "tokens that arrived", "1", len(lags) / (load.all_streams * load.tokens)),
        Row(name, "token lag p99", "<= 1,000", _p(lags, 99), "ms"),
        Row(name, "token lag p99, gathering included", "", _p(delays, 99), "ms"),
        Row(name, "longest of these", "", 1000 * max(delays), "ms"),
        Row(name, "tokens/s", f"{load.all_streams * load.rate:,.0f}", len(lags) / got.seconds),
        Row(name, "router CPU s / 1,000 tokens", "", 1000 * got.cpu / len(lags), "s"),
        *_of_minis(name, load, pushed),
        Row(name, "another router: token lag p99, alone", "", before, "ms"),
        Row(name, "another router: token lag p99, beside it", "", beside_it, "ms"),
    ]


def idle() -> list[Row]:
    """A thousand hosts that nobody asks anything, and a router that knows them."""
    hosts = 1_000
    with (
        Valkey() as broker,
        beside(simulated_hosts, broker.url, hosts, [Load.model]) as (_, registry),
        beside(idle_hosts, broker.url, hosts, Load.model) as (_, nodes),
    ):
        registry.recv()
        nodes.recv()
        with _router(broker.url):
            time.sleep(5)  # all have answered the router's question, and the last connections are settled
            cpu, router_cpu, began = cpu_seconds(broker.pid), time.process_time(), time.monotonic()
            time.sleep(20)
            seconds = time.monotonic() - began
            cpu, router_cpu = cpu_seconds(broker.pid) - cpu, time.process_time() - router_cpu
        for pipe in (nodes, registry):
            pipe.send("end")
            pipe.recv()
    name = f"{hosts:,} idle hosts"
    return [
        Row(name, "broker CPU", "< 5", 100 * cpu / seconds, "% of a core"),
        Row(name, "router CPU", "< 5", 100 * router_cpu / seconds, "% of a core"),
    ]


def digests() -> list[Row]:
    """A thousand hosts that all run something; a router that hears what they have cached, after one that does not."""
    hosts = 1_000
    with Valkey() as broker, beside(simulated_hosts, broker.url, hosts, [Load.model]) as (_, registry):
        registry.recv()
        without, _, _ = _beside_hosts(broker, hosts, affinity=False)
        with beside(busy_hosts, broker.url, hosts) as (_, nodes):
            nodes.recv()
            with_them, heard, taken = _beside_hosts(broker, hosts, affinity=True)
            nodes.send("end")
            nodes.recv()
        registry.send("end")
        registry.recv()
    name = f"digests of {hosts:,} busy hosts"
    return [
        Row(name, "messages/s", "<= 200", heard),
        Row(name, "CPU to understand a message", "", 1e6 * taken / heard, "us"),
        Row(name, "router CPU, more than without", "<= 3", with_them[0] - without[0], "% of a core"),
        Row(name, "router CPU", "", with_them[0], "% of a core"),
        Row(name, "router memory, more than without", "<= 20", with_them[1] - without[1], "MB"),
    ]


def _beside_hosts(broker: Valkey, hosts: int, *, affinity: bool) -> tuple[_Usage, float, float]:
    """Return what a router uses that nobody asks anything, how many digests it hears a second, and the seconds of CPU
    that it takes for them in a second, without reading them from the broker."""
    with beside(listening_router, broker.url, hosts, affinity) as (router, told):
        told.recv()
        time.sleep(10)  # each host has told it something
        before, cpu, began = _asked(told), cpu_seconds(router.pid), time.monotonic()
        time.sleep(20)
        after, cpu, seconds = _asked(told), cpu_seconds(router.pid) - cpu, time.monotonic() - began
        usage = 100 * cpu / seconds, rss_mb(router.pid)
        told.send(None)
    return usage, (after[0] - before[0]) / seconds, (after[1] - before[1]) / seconds


def _asked(pipe: Pipe) -> Any:
    pipe.send(True)
    return pipe.recv()


SCENARIOS: dict[str, Callable[[], list[Row]]] = {
    "ten": ten,
    "hundred": hundred,
    "thousand": thousand,
    "rabbitmq": rabbitmq,
    "overload": overload,
    "idle": idle,
    "digests": digests,
}


def _one_router(kind: type[Broker], load: Load, cpu: str, *, p50: str, p99: str) -> list[Row]:
    with kind() as broker, _minis(broker.url, load) as minis, _router(broker.url) as router:
        broker_cpu = cpu_seconds(broker.pid) if isinstance(broker, Valkey) else 0.0
        got = asyncio.run(_read_all(router, load))
        broker_cpu = cpu_seconds(broker.pid) - broker_cpu if isinstance(broker, Valkey) else 0.0
        pushed = minis.recv()
    lags, count = got.lags(load, pushed), load.all_streams * load.tokens
    name = f"{_describe(load)}, {kind.name}"
    return [
        Row(name, "share of the demand", ">= 0.99", len(lags) / count * load.seconds / max(load.seconds, got.seconds)),
        Row(name, "token lag p50", p50, _p(lags, 50), "ms"),
        Row(name, "token lag p99", p99, _p(lags, 99), "ms"),
        Row(name, "router CPU s / 1,000 tokens", f"<= {cpu}" if cpu else "", 1000 * got.cpu / count, "s"),
        Row(name, "broker CPU s / 1,000 tokens", "", 1000 * broker_cpu / count, "s"),
        *_of_minis(name, load, pushed),
    ]


def _of_minis(name: str, load: Load, pushed: Pushed) -> list[Row]:
    count = load.all_streams * load.tokens
    return [
        Row(name, "messages / token", "", pushed.messages / count),
        Row(name, "minis: CPU s / 1,000 tokens", "", 1000 * pushed.cpu / count, "s"),
        Row(name, "minis: a message is late by itself, p99", "<= 2", _p(pushed.late, 99), "ms"),
    ]


def _describe(load: Load) -> str:
    return f"{load.minis:,} x {load.streams} x {load.rate:g} tokens/s"


# --- The parts -------------------------------------------------------------------------------------------------------


@contextmanager
def _minis(broker_url: str, load: Load) -> Iterator[Pipe]:
    with (
        beside(simulated_hosts, broker_url, load.minis, [load.model]) as (_, hosts),
        beside(run, broker_url, load) as (_, minis),
    ):
        hosts.recv()
        minis.recv()
        yield minis
        hosts.send("end")
        hosts.recv()


@contextmanager
def _router(broker_url: str, model: str = Load.model) -> Iterator[Router]:
    router_settings: Any = {"max_waiting": 10_000, "connect_timeout": 30}
    with Router(Settings(broker_url=broker_url, router=router_settings)) as router:
        deadline = time.monotonic() + 10
        while not router.registry.offerings(model=model) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield router


class _Arrivals:
    """What the readers of a load got."""

    def __init__(self) -> None:
        self.by_stream: dict[int, list[float]] = {}
        """`time.monotonic()` seconds."""
        self.began = self.began_cpu = self.seconds = self.cpu = 0.0

    async def read(self, router: Router, load: Load) -> None:
        arrived: list[float] = []
        number = ""
        async for delta in router.stream_chat(load.model, MESSAGES, timeout=load.seconds + 120):
            arrived.append(time.monotonic())
            number = number or delta.content or ""
            self.began = self.began or arrived[0]
            self.began_cpu = self.began_cpu or time.process_time()
        self.seconds, self.cpu = time.monotonic() - self.began, time.process_time() - self.began_cpu
        self.by_stream[int(number)] = arrived

    def lags(self, load: Load, pushed: Pushed) -> list[float]:
        """Seconds from the push of each token until its reader has it. Tokens of a stream arrive in order, and none is
        missing, or the router would have said so."""
        return self._since(load, pushed.at)

    def delays(self, load: Load, pushed: Pushed) -> list[float]:
        """Seconds from when each token came from its MLX server until its reader has it."""
        return self._since(load, array("d", load.due(pushed.began)))

    def _since(self, load: Load, moments: array[float]) -> list[float]:
        return [
            arrived - moments[token * load.all_streams + number]
            for number, arrivals in self.by_stream.items()
            for token, arrived in enumerate(arrivals)
        ]


async def _read_all(router: Router, load: Load) -> _Arrivals:
    arrivals = _Arrivals()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(load.all_streams):
            tasks.create_task(arrivals.read(router, load))
    return arrivals


def _calm_router(pipe: Pipe, broker_url: str) -> None:
    """Measure the lag of a light load twice: at once, and whenever it is told so."""
    for moment in ("alone", "beside"):
        load = Load(10, 4, 10, seconds=5, model=f"calm-{moment}")
        with _minis(broker_url, load) as minis, _router(broker_url, load.model) as router:
            if moment == "beside":
                pipe.recv()
            got = asyncio.run(_read_all(router, load))
            pipe.send(_p(got.lags(load, minis.recv()), 99))


def _p(seconds: Sequence[float], percent: int) -> float:
    """In milliseconds."""
    return 1000 * statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    main(__doc__, SCENARIOS)
