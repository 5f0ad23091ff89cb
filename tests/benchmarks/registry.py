"""How soon the fleet follows the truth, and what it costs to know it.

    python -m tests.benchmarks.registry [SCENARIO ...] [--runs 3] [--broker valkey|rabbitmq]

Broker, nodes and registry nodes are processes of their own; so is a router whose figures are its process's. Medians of
the runs. Failover and fresh run on either broker, the others on Valkey only. All of it takes 20 minutes with 3 runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import heapq
import multiprocessing
import random
import socket
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from datetime import datetime
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from typing import Any

import redis
from kombu import Connection, Consumer, Producer

from fleet_worker import Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import ask_queue, direct_lane, lane, registry_exchange, transport_of
from fleet_worker.protocol.registry_event import READINESS, Announcement, RegistryEvent
from fleet_worker.registry.view import Registry
from fleet_worker.testing import SimulatedMLX, running_host
from tests.benchmarks.table import Row, measure
from tests.benchmarks.usage import cpu_seconds, descriptors, rss_mb, threads
from tests.brokers import BROKERS, RabbitMQ, Valkey

Broker = Valkey | RabbitMQ

HELLO = [{"role": "user", "content": "Hello"}]
READY_WITHIN = 90.0
RATE = 50
"""Requests a second of the steady load."""
OUTAGE = 10.0


# --- A server dies, and comes back -----------------------------------------------------------------------------------


def failover(broker: Broker) -> list[Row]:
    """Two instances of one model, and the server of one is away for OUTAGE seconds."""
    with (
        SimulatedMLX(models=["m"], ttft=0.02, token_interval=0.005) as one,
        SimulatedMLX(models=["m"], ttft=0.02, token_interval=0.005) as two,
        running_host(broker.url, _instances(one=one, two=two), ready_within=READY_WITHIN) as host,
        tasks_taken(broker.url) as taken,
        Router(Settings(broker_url=broker.url)) as router,
        steady_load(router) as asked,
    ):
        away, back = _moments(router, "one")
        _sleep_until(lambda: len(asked) >= 50 and taken["one@test"])
        killed = time.time()
        one.kill()
        wait(asked[:200], 30)
        time.sleep(max(0.0, killed + OUTAGE - time.time()))
        last = max(taken["one@test"])
        left = _logged_at(host["one"].wait_for("leaves lane", 10))
        listening = time.time()
        one.restart()
        _sleep_until(lambda: taken["one@test"][-1] > listening)
        first = min(moment for moment in taken["one@test"] if moment > listening)
    name = f"1 of 2 servers dies, {RATE} requests/s, {broker.name}"
    return [
        Row(name, "last task taken after", "<= 1", last - killed, "s"),
        Row(name, "lanes left after", "", left - killed, "s"),
        Row(name, "router knows after", "", away.result(10) - killed, "s"),
        Row(name, "requests failed, of 200", "0", sum(request.exception() is not None for request in asked[:200])),
        Row(
            name,
            "slowest that did not fail",
            "",
            max(request.result() for request in asked[:200] if not request.exception()),
            "s",
        ),
        Row(name, f"up again after {OUTAGE:g} s: first task taken after", "<= 2", first - listening, "s"),
        Row(name, f"up again after {OUTAGE:g} s: router knows after", "", back.result(10) - listening, "s"),
    ]


def _instances(**servers: SimulatedMLX) -> dict[str, dict[str, Any]]:
    return {
        name: {"base_url": server.base_url, "models": {"m": {}}, "limits": {"concurrency": 4}}
        for name, server in servers.items()
    }


@contextmanager
def steady_load(router: Router) -> Iterator[list[Future[float]]]:
    """RATE requests a second, for the time of the block; yields how long each took, more and more of them."""
    asked: list[Future[float]] = []
    over = threading.Event()

    def ask() -> float:
        started = time.monotonic()
        router.chat("m", HELLO, max_tokens=2, timeout=20)
        return time.monotonic() - started

    def go_on() -> None:
        with ThreadPoolExecutor(64) as pool:
            started = time.monotonic()
            while not over.wait(max(0.0, started + len(asked) / RATE - time.monotonic())):
                asked.append(pool.submit(ask))

    with _thread(go_on):
        try:
            yield asked
        finally:
            over.set()


@contextmanager
def tasks_taken(broker_url: str) -> Iterator[dict[str, list[float]]]:
    """When each node took a task, more and more, as Celery's events tell."""
    taken: dict[str, list[float]] = defaultdict(list)
    app = create_app(Settings(broker_url=broker_url))
    with app.connection_for_read() as connection:
        handlers = {"task-received": lambda event: taken[event["hostname"]].append(event["timestamp"])}
        receiver = app.events.Receiver(connection, handlers)
        with _thread(lambda: receiver.capture(wakeup=False)):
            try:
                yield taken
            finally:
                receiver.should_stop = True


@contextmanager
def _thread(target: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=target)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _moments(router: Router, instance: str) -> tuple[Future[float], Future[float]]:
    """When the router hears that this instance is not available, and when that it is so again."""
    away: Future[float] = Future()
    back: Future[float] = Future()

    def hear(event: RegistryEvent) -> None:
        if (event.instance, event.model) == (instance, READINESS):
            if event.health["ready"] and away.done() and not back.done():
                back.set_result(time.time())
            elif not event.health["ready"] and not away.done():
                away.set_result(time.time())

    router.registry.subscribe(hear)
    return away, back


def _logged_at(line: str) -> float:
    return datetime.strptime(line[1:24], "%Y-%m-%d %H:%M:%S,%f").timestamp()


# --- A new router ----------------------------------------------------------------------------------------------------


def fresh(broker: Broker) -> list[Row]:
    """Four hosts of three models each; ten new routers, one after the other."""
    models = {f"model-{number}": {} for number in range(3)}
    with SimulatedMLX(flavour="vllm_batched", models=list(models)) as server, ExitStack() as hosts:
        for number in range(4):
            instances = {"local": {"base_url": server.base_url, "models": models}}
            host = running_host(broker.url, instances, host=f"mini-{number}", ready_within=READY_WITHIN)
            hosts.enter_context(host)
        seconds = [_seconds_until_known(broker.url, 12) for _ in range(10)]
    name = f"new router, 4 hosts x 3 models, {broker.name}"
    return [
        Row(name, "all 12 offerings known after", "<= 1", statistics.median(each[0] for each in seconds), "s"),
        Row(name, "the slowest of 10", "", max(each[0] for each in seconds), "s"),
        Row(name, "router.registry returns after", "", statistics.median(each[1] for each in seconds), "s"),
    ]


def _seconds_until_known(broker_url: str, offerings: int) -> tuple[float, float]:
    """From the creation of a router until it knows so many offerings, and until it lets its caller look at them."""
    known: set[tuple[str, str, str]] = set()
    all_known: Future[float] = Future()

    def hear(event: RegistryEvent) -> None:
        if event.model != READINESS and not all_known.done():
            known.add((event.runtime["host"], event.instance, event.model))
            if len(known) == offerings:
                all_known.set_result(time.monotonic())

    started = time.monotonic()
    with Router(Settings(broker_url=broker_url)) as router:
        router._registry.subscribe(hear)  # before it connects
        registry = router.registry
        settled = time.monotonic()
        seconds = all_known.result(30) - started
        if len(registry.offerings()) != offerings:
            raise RuntimeError(f"a new router offers {len(registry.offerings())} of {offerings}")
    return seconds, settled - started


# --- A thousand hosts ------------------------------------------------------------------------------------------------

HOSTS = 1_000
CATALOGUE = [f"mlx-community/model-{number}-instruct-4bit" for number in range(12)]


def thousand(broker: Valkey) -> list[Row]:
    """A router that has heard nothing yet, then a thousand hosts at their default intervals for a minute."""
    with beside(_listening_router, broker.url) as (router, told):
        told.recv()
        rss = rss_mb(router.pid)
        with beside(simulated_hosts, broker.url) as (_, fleet):
            fleet.recv()
            with beside(_new_router, broker.url, 3 * HOSTS) as (_, new):
                known, settled = new.recv()
            time.sleep(5)
            before, cpu = _asked(told), cpu_seconds(router.pid)
            time.sleep(10)
            memory = _used_memory(broker)
            time.sleep(50)
            memory, cpu = _used_memory(broker) - memory, cpu_seconds(router.pid) - cpu
            after, growth = _asked(told), rss_mb(router.pid) - rss
            answering = _asked(fleet)
    name = f"{HOSTS:,} hosts x 3 models"
    return [
        Row(name, "CPU of the router", "< 5", 100 * cpu / 60, "% of a core"),
        Row(name, "growth of the router", "< 50", growth, "MB"),
        Row(name, "growth of the broker, 10 to 60 s", "flat", memory / 1024**2, "MB"),
        Row(name, "messages heard", "", (after["heard"] - before["heard"]) / 60, "/s"),
        Row(name, "offerings known at the end", "3,000", after["offerings"]),
        Row(name, "a new router knows all after", "", known, "s"),
        Row(name, "its router.registry returns after", "", settled, "s"),
        Row(name, "of this: all have answered after", "", answering, "s"),
    ]


def _new_router(pipe: Pipe, broker_url: str, offerings: int) -> None:
    pipe.send(_seconds_until_known(broker_url, offerings))


def simulated_hosts(pipe: Pipe, broker_url: str, hosts: int = HOSTS, models: Sequence[str] = ()) -> None:
    """What so many registry nodes publish, at their default intervals and to a router that asks. Each host has these
    models, or three of the catalogue.

    Bodies are made before, so that this process is no slower than a thousand.
    """
    said = [_said_by(f"mini-{number:04}", models or random.sample(CATALOGUE, 3)) for number in range(hosts)]
    registry, transport = Settings(broker_url=broker_url).registry, transport_of(broker_url)
    intervals = {"readiness": registry.readiness_interval, "models": registry.models_interval}
    due = [
        (time.monotonic() + interval * random.uniform(0.1, 1.0), number, kind)
        for number in range(hosts)
        for kind, interval in intervals.items()
    ]
    heapq.heapify(due)
    answering = 0.0
    with Connection(broker_url) as publishing, Connection(broker_url) as listening:
        producer = Producer(publishing.channel(), registry_exchange(transport))

        def publish(body: bytes) -> None:
            key = "llm.registry.offering_heartbeat"
            producer.publish(body, routing_key=key, content_type="application/json", content_encoding="utf-8")

        def answer(message: Any) -> None:
            nonlocal answering
            if message.payload:  # it is no question for the status
                return
            started = time.monotonic()
            for bodies in said:
                for body in bodies.values():
                    publish(body)
            answering = time.monotonic() - started

        with Consumer(listening.channel(), [ask_queue(transport)], on_message=answer, no_ack=True):
            drain(listening, 0.01)
            pipe.send("listening")
            while not pipe.poll():
                drain(listening, max(0.001, due[0][0] - time.monotonic()))
                while due[0][0] <= time.monotonic():
                    moment, number, kind = due[0]
                    publish(said[number][kind])
                    heapq.heapreplace(due, (moment + intervals[kind] * random.uniform(0.8, 1.2), number, kind))
    pipe.send(answering)


def _said_by(host: str, models: Sequence[str]) -> dict[str, bytes]:
    """Both messages of a host whose one instance has these models."""
    lanes = [lane(capability, model) for model in models for capability in ("chat", "stream_chat")]
    offering = {"provider": "mlx", "instance": "local", "usage": "inference"}
    of_model = {
        "capabilities": ["chat", "stream_chat"],
        "features": ["streaming", "tools", "thinking"],
        "limits": {"context_window": 32768, "max_output_tokens": 4096},
    }
    event = functools.partial(
        RegistryEvent.of,
        "offering_heartbeat",
        runtime={"node": f"local@{host}", "host": host, "version": "0.1.0", "server": "mlx_lm", "pid": 4711},
        capacity={"slots": 4, "running": 2, "tokens_per_second": 51.3, "last_token_age": 0.021},
        health={"ready": True, "status": "available", "checked": True},
        lane=sorted([*lanes, direct_lane(f"local@{host}")]),
        metadata={"extension": "fleet_worker", "configured": True, "live": True},
    )
    registry = Settings().registry
    readiness = [event(offering={**offering, "model": READINESS})]
    of_models = [event(offering={**offering, "model": model, **of_model}) for model in models]
    return {
        "readiness": Announcement(v=1, host=host, interval=registry.readiness_interval, events=readiness).encode(),
        "models": Announcement(v=1, host=host, interval=registry.models_interval, events=of_models).encode(),
    }


def drain(connection: Connection, seconds: float) -> None:
    with contextlib.suppress(socket.timeout):
        connection.drain_events(timeout=seconds)


def _used_memory(broker: Valkey) -> int:
    with redis.Redis.from_url(broker.url) as client:
        return int(client.info("memory")["used_memory"])


# --- At rest ---------------------------------------------------------------------------------------------------------


def rest(broker: Valkey) -> list[Row]:
    """A host of two instances that nobody asks anything, for half a minute."""
    with (
        SimulatedMLX(models=["m"]) as one,
        SimulatedMLX(models=["m"]) as two,
        running_host(broker.url, _instances(one=one, two=two), ready_within=READY_WITHIN) as host,
    ):
        time.sleep(5)
        cpu = {name: cpu_seconds(process.pid) for name, process in host.items()}
        time.sleep(30)
        cpu = {name: cpu_seconds(process.pid) - cpu[name] for name, process in host.items()}
        rss = {name: rss_mb(process.pid) for name, process in host.items()}
    name = "at rest, registry node and 2 nodes"
    return [
        Row(name, "registry node, memory", "< 80", rss["registry"], "MB"),
        Row(name, "registry node, CPU", "< 1", 100 * cpu["registry"] / 30, "% of a core"),
        Row(name, "inference node, memory", "", rss["one"], "MB"),
        Row(name, "inference node, CPU", "", 100 * cpu["one"] / 30, "% of a core"),
    ]


# --- Twelve hours of beats -------------------------------------------------------------------------------------------

BEATS, INTERVAL = 2_880, 0.05
"""As many as there are in twelve hours, in some 150 seconds."""
MESSAGES = 2 * BEATS
"""Each beat says something about the instances and something about the models."""
NONE = {"memory": "< 3", "open files": "<= 3"}
"""What counts as no growth: Python's own, and what waits for its garbage collector. All else must not grow."""


def beats(broker: Valkey) -> list[Row]:
    """The broker is restarted three times meanwhile; nothing may have grown since the first ten seconds."""
    intervals = {f"FLEET_REGISTRY__{kind}_INTERVAL": str(INTERVAL) for kind in ("READINESS", "MODELS")}
    with (
        SimulatedMLX(models=["m"]) as one,
        SimulatedMLX(models=["m"]) as two,
        running_host(broker.url, _instances(one=one, two=two), env=intervals, ready_within=READY_WITHIN) as host,
        beside(_listening_router, broker.url) as (router, told),
    ):
        told.recv()
        pids = {"registry node": host["registry"].pid, "inference node": host["one"].pid, "router": router.pid}
        time.sleep(10)
        before = _sizes(pids, broker)
        for quarter in (1, 2, 3):
            _sleep_until(lambda: _asked(told)["heard"] >= quarter * MESSAGES / 4, every=0.1)  # noqa: B023
            broker.stop()
            time.sleep(1)
            broker.start()
        _sleep_until(lambda: _asked(told)["heard"] >= MESSAGES, every=0.1)
        after = _sizes(pids, broker)
    name = f"{BEATS:,} beats, 3 restarts of the broker"
    return [
        Row(
            name,
            f"growth: {who}, {what}",
            NONE.get(what, "<= 0"),
            after[who, what] - size,
            "MB" if what == "memory" else "",
        )
        for (who, what), size in before.items()
    ]


def _sizes(pids: dict[str, int], broker: Valkey) -> dict[tuple[str, str], float]:
    measures = {"memory": rss_mb, "open files": descriptors, "threads": threads}
    sizes = {(who, what): float(of(pid)) for who, pid in pids.items() for what, of in measures.items()}
    with redis.Redis.from_url(broker.url) as client:
        sizes["broker", "keys"] = client.dbsize()
        sizes["broker", "clients"] = client.info("clients")["connected_clients"]
    return sizes


# --- Processes beside this one ---------------------------------------------------------------------------------------


@contextmanager
def beside(function: Callable[..., None], *arguments: Any) -> Iterator[tuple[BaseProcess, Pipe]]:
    """Run this function in a process of its own, with a pipe to this one before its arguments."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _listening_router(pipe: Pipe, broker_url: str) -> None:
    """Say when it listens, and what it knows whenever it is asked."""
    with Router(Settings(broker_url=broker_url)) as router:
        router._registry = registry = _CountingRegistry()
        pipe.send(len(router.registry.instances()))
        with contextlib.suppress(EOFError):
            while pipe.recv():
                pipe.send({"heard": registry.heard, "offerings": len(registry.offerings())})


class _CountingRegistry(Registry):
    heard = 0

    def apply(self, announcement: Announcement, event_bytes: int = 0) -> None:
        self.heard += 1
        super().apply(announcement, event_bytes)


def _asked(pipe: Pipe) -> Any:
    pipe.send(True)
    return pipe.recv()


def _sleep_until(true: Callable[[], bool], every: float = 0.005) -> None:
    while not true():
        time.sleep(every)


SCENARIOS: dict[str, Callable[[Any], list[Row]]] = {
    "failover": failover,
    "fresh": fresh,
    "thousand": thousand,
    "rest": rest,
    "beats": beats,
}
ON_ANY_BROKER = ("failover", "fresh")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", choices=[*SCENARIOS, []], metavar="SCENARIO")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--broker", choices=BROKERS, default="valkey")
    options = parser.parse_args()
    possible = SCENARIOS if options.broker == "valkey" else ON_ANY_BROKER
    names = options.scenarios or list(possible)
    if other := set(names) - set(possible):
        parser.error(f"on Valkey only: {', '.join(other)}")

    def on_a_broker(scenario: Callable[[Any], list[Row]]) -> list[Row]:
        with BROKERS[options.broker]() as broker:
            return scenario(broker)

    measure({name: functools.partial(on_a_broker, SCENARIOS[name]) for name in names}, options.runs)


if __name__ == "__main__":
    main()
