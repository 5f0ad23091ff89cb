"""Malformed messages of each kind that nodes and routers receive, beside real requests.

    python -m tests.faults.fuzz --messages 100000 --seed 1 --broker valkey
    python -m tests.faults.fuzz --only 4711 --seed 1        # one of them again, with what it cost
    python -m tests.faults.fuzz --each --seed 1             # one after the other: memory and CPU of each

An inference node, a registry node and a router are real processes. Afterwards none has ended, each slot takes work, and
each real request was answered.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet_worker import Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.host.child_process import ChildProcess, child, python
from fleet_worker.host.up.programs import ALLOCATOR
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import BROKERS, RabbitMQ, Valkey
from tests.faults.fuzz_messages import MB, Message, message
from tests.faults.fuzz_samples import CHAT, EMBED, samples
from tests.faults.fuzz_targets import NODE, REGISTRY_NODE, TARGETS, Target, Waiting

SLOTS = 4
BATCH = 100
"""Messages that are sent before it is looked whether all of them were taken."""
TAKEN_WITHIN = 60.0
ANSWERED_WITHIN = 30.0
GROWTH = 64 * MB
"""The most that a process may grow by, at any moment."""
CPU_OF_ONE = 0.050
"""Seconds of a node's time that one message may cost."""
GOOD = re.compile(r"\] Task (fleet\.\w+|registry\.\w+)\[\S+\] (received|succeeded|raised expected)")
"""Lines about tasks that were done."""
MOST_COMPLAINTS = 500
"""Lines about bad messages that a process may log, however many there are."""


@dataclass
class Outcome:
    """What became of everything; `problems` is what must not be."""

    sent: Counter[str] = field(default_factory=Counter)
    impossible: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    growth: dict[str, int] = field(default_factory=dict)
    complaints: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: float = 0.0
    costs: list[tuple[float, float, int, str]] = field(default_factory=list)
    """With `--each`: seconds of CPU, MB at most, the message's number, what it was and where."""
    jumps: list[tuple[int, str]] = field(default_factory=list)
    """By how many bytes a process became larger than ever before, and after which messages."""
    problems: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        yield f"{self.sent.total()} messages in {self.seconds:.0f} s ({self.impossible} that this broker cannot carry)"
        yield f"real requests: {dict(sorted(self.answered.items()))}"
        yield f"growth in MB: { {name: round(size / MB, 1) for name, size in self.growth.items()} }"
        yield f"lines logged: { {name: lines.total() for name, lines in self.complaints.items()} }"
        for name, lines in self.complaints.items():
            yield from (f"    {name}: {number} {line.strip()}" for line, number in lines.most_common(3) if number > 20)
        for seconds, grown, number, what in sorted(self.costs, reverse=True)[:5]:
            yield f"CPU    {seconds * 1000:7.1f} ms, {grown:6.1f} MB  {number} {what}"
        for seconds, grown, number, what in sorted(self.costs, key=lambda cost: -cost[1])[:5]:
            yield f"memory {seconds * 1000:7.1f} ms, {grown:6.1f} MB  {number} {what}"
        yield from (f"    +{size / MB:.0f} MB {what}" for size, what in sorted(self.jumps, reverse=True)[:8])
        yield from (f"PROBLEM {problem}" for problem in self.problems)


class Victims:
    """The processes that receive the messages, and the simulated server behind the node."""

    def __init__(self, url: str, processes: dict[str, ChildProcess], mlx: SimulatedMLX) -> None:
        self.url, self.processes, self.mlx = url, processes, mlx
        self._before: dict[str, int] = {}

    @property
    def reply_to(self) -> str:
        return self.processes["router"].wait_for("replies come to ", 30).split()[-1]

    def begin(self) -> None:
        for process in self.processes.values():
            Path(f"/proc/{process.pid}/clear_refs").write_text("5", "ascii")  # the peak begins anew
        self._before = {name: memory(process.pid, "VmRSS") for name, process in self.processes.items()}

    def growth(self) -> dict[str, int]:
        """By process: bytes between its size at the beginning and its largest size since then."""
        alive = {name: process for name, process in self.processes.items() if not process.ended}
        return {name: memory(process.pid, "VmHWM") - self._before[name] for name, process in alive.items()}

    def cpu(self) -> dict[str, float]:
        """By process: seconds of CPU so far."""
        return {name: cpu(process.pid) for name, process in self.processes.items() if not process.ended}

    def ended(self) -> list[str]:
        return [process.report_end() for process in self.processes.values() if process.ended]

    def complaints(self) -> dict[str, Counter[str]]:
        """By process: the lines that it logged, without what differs in them, apart from those about good tasks."""
        return {
            name: Counter(
                re.sub(r"[\d:,.-]+|'.*?'", "*", line)[:100] for line in process.lines if not GOOD.search(line)
            )
            for name, process in self.processes.items()
        }


def memory(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def cpu(pid: int) -> float:
    used = Path(f"/proc/{pid}/schedstat") if not Path(f"/proc/{pid}/task").exists() else None
    files = [used] if used else [Path(task, "schedstat") for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int(each.read_text("ascii").split()[0]) for each in files) / 1e9


@contextmanager
def victims(broker: Valkey | RabbitMQ) -> Iterator[Victims]:
    models: dict[str, Any] = {CHAT: {}, EMBED: {}}
    with (
        SimulatedMLX(flavour="vllm_batched", models=[CHAT, EMBED], token_interval=0.005, tokens=8) as mlx,
        running_host(
            broker.url,
            {"one": {"base_url": mlx.base_url, "limits": {"concurrency": SLOTS}, "models": models}},
            env=ALLOCATOR,  # as `fleet-worker up` starts them
        ) as nodes,
        child("the router", python("-m", "tests.faults.fuzz", "--ask", broker.url)) as router,
    ):
        processes = {**nodes, "router": router}
        for process in processes.values():
            process.lines = collections.deque(process.lines, maxlen=1_000_000)
        yield Victims(broker.url, processes, mlx)


# --- sending ----------------------------------------------------------------------------------------------------------


class Fuzz:
    """Sends messages to victims, and looks after each batch whether all is well."""

    def __init__(self, broker: Valkey | RabbitMQ, them: Victims, seed: int, outcome: Outcome) -> None:
        self._victims, self._seed, self._outcome = them, seed, outcome
        self._samples = samples()
        self._app = create_app(Settings(broker_url=broker.url))
        self._target: Target = TARGETS[broker.name](broker.url, them.reply_to)
        self._waiting = Waiting(self._app, broker.url)
        self._grown: dict[str, int] = {}

    def close(self) -> None:
        self._target.close()
        self._waiting.close()
        self._app.close()

    def send(self, numbers: Sequence[int]) -> bool:
        """Send the messages of these numbers, and wait until they were taken; return whether all is well."""
        for number in numbers:
            self._send(message(self._seed, number, self._samples))
        is_well = self._look(f"messages {numbers[0]} to {numbers[-1]}")
        grown = self._victims.growth()
        for name, size in grown.items():
            if (jump := size - self._grown.get(name, 0)) > 3 * MB:
                self._outcome.jumps.append((jump, f"in {name} after messages {numbers[0]} to {numbers[-1]}"))
        self._grown = grown
        return is_well

    def send_each(self, numbers: Iterable[int]) -> bool:
        """Send them one after the other, and note what each has cost the processes."""
        for number in numbers:
            each = message(self._seed, number, self._samples)
            before = self._victims.cpu()
            self._victims.begin()
            self._send(each)
            if not self._look(f"message {number}, {each.recipe} of {each.kind}"):
                return False
            grown, used = self._victims.growth(), self._victims.cpu()
            for name, seconds in used.items():
                cost = (seconds - before[name], grown[name] / MB, number, f"{each.recipe} of {each.kind} in {name}")
                self._outcome.costs.append(cost)
        return True

    def _send(self, each: Message) -> None:
        if self._target.send(each):
            self._outcome.sent[each.recipe] += 1
        else:
            self._outcome.impossible += 1

    def _look(self, after: str) -> bool:
        problems = self._victims.ended()
        if not problems and (left := self._waiting.wait_until_none(TAKEN_WITHIN)):
            problems.append(f"{left} messages were not taken within {TAKEN_WITHIN:g} s")
        if not problems:
            problems += self._silent()
        self._outcome.problems += [f"after {after}: {problem}" for problem in problems + self._victims.ended()]
        return not self._outcome.problems

    def _silent(self) -> list[str]:
        """The nodes that do not answer a command: what was published before it has been received by then."""
        names, deadline = {NODE, REGISTRY_NODE}, time.monotonic() + TAKEN_WITHIN
        while names and time.monotonic() < deadline:
            for answer in self._app.control.ping(destination=sorted(names), limit=len(names), timeout=2.0):
                names -= answer.keys()
        return [f"{name} answers no command" for name in sorted(names)]


def fuzz(
    broker: Valkey | RabbitMQ, numbers: Sequence[int], *, seed: int, each: bool = False, report_every: int = 0
) -> Outcome:
    """Send the messages of these numbers beside real requests; return what became of all."""
    outcome, began = Outcome(), time.monotonic()
    with victims(broker) as them, ExitStack() as stack:
        sender = Fuzz(broker, them, seed, outcome)
        stack.callback(sender.close)
        them.processes["router"].wait_for("20 answered", 60)
        them.begin()
        if each:
            sender.send_each(numbers)
        for first in () if each else range(0, len(numbers), BATCH):
            if not sender.send(numbers[first : first + BATCH]):
                break
            if report_every and first % report_every == 0:
                growth = {name: round(size / MB) for name, size in them.growth().items()}
                print(f"{first} messages, {time.monotonic() - began:.0f} s, growth in MB {growth}", flush=True)
        if not outcome.problems:
            outcome.problems += lost_slots(them)
        judge(outcome, them)
    outcome.seconds = time.monotonic() - began
    return outcome


def lost_slots(them: Victims) -> list[str]:
    """Let each slot hold a stream at the same time."""
    settings = Settings(broker_url=them.url, router={"max_attempts": 1})
    with Router(settings) as router, ThreadPoolExecutor(SLOTS) as pool, them.mlx.held(at_token=1):

        def stream(number: int) -> bool:
            options: dict[str, Any] = {"max_tokens": 4, "timeout": ANSWERED_WITHIN, "priority": "critical"}
            with router.stream_chat(CHAT, [{"role": "user", "content": f"slot {number}"}], **options) as pieces:
                begun.release()
                return len(list(pieces)) > 0

        begun = threading.Semaphore(0)
        asked = [pool.submit(stream, number) for number in range(SLOTS)]
        try:
            them.mlx.wait_for(lambda mlx: mlx.counters["running"] >= SLOTS, ANSWERED_WITHIN)
        except AssertionError:
            return [f"only {them.mlx.counters['running']} of {SLOTS} slots take work"]
        finally:
            them.mlx.release()
        return [f"slot {number} came to nothing" for number, each in enumerate(asked) if not each.result(60)]


def judge(outcome: Outcome, them: Victims) -> None:
    router = them.processes["router"]
    outcome.growth, outcome.complaints = them.growth(), them.complaints()
    ended = them.ended()
    router.stop(grace=ANSWERED_WITHIN + 10)
    told = [line for line in router.lines if line.startswith("answered: ")]
    outcome.answered = Counter(json.loads(told[-1].partition(": ")[2])) if told else Counter()
    if failed := {what: number for what, number in outcome.answered.items() if what not in OPERATIONS}:
        outcome.problems.append(f"real requests failed: {failed}")
    if not all(outcome.answered[each] for each in OPERATIONS):
        outcome.problems.append(f"not all kinds of requests were answered: {dict(outcome.answered)}")
    for name, size in {} if outcome.costs else outcome.growth.items():
        if size > GROWTH:
            outcome.problems.append(f"{name} grew by {size / MB:.0f} MB")
    for name, lines in outcome.complaints.items():
        if lines.total() > MOST_COMPLAINTS:
            outcome.problems.append(f"{name} logged {lines.total()} lines")
    outcome.problems += [f"ended: {each}" for each in ended if not outcome.problems]


# --- the router, a process of its own ---------------------------------------------------------------------------------

OPERATIONS = ("chat", "stream_chat", "embed")


def ask(url: str) -> int:
    """Ask until SIGTERM, one request of each operation at a time; then print what became of all."""
    ending, answered = threading.Event(), Counter[str]()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    with Router(Settings(broker_url=url, router={"max_attempts": 1})) as router, ThreadPoolExecutor(3) as pool:
        while not {CHAT, EMBED} <= set(router.registry.models()):
            time.sleep(0.01)
        print(f"replies come to {router._connected().replies.name}", flush=True)
        for operation in OPERATIONS:
            pool.submit(_go_on, router, operation, ending, answered)
        while not ending.wait(0.05):
            if sum(answered.values()) >= 20:
                print("20 answered", flush=True)
                ending.wait()
    print(f"answered: {json.dumps(answered)}", flush=True)
    return 0


def _go_on(router: Router, operation: str, ending: threading.Event, answered: Counter[str]) -> None:
    hello, options = [{"role": "user", "content": "Hello"}], {"max_tokens": 4, "timeout": ANSWERED_WITHIN}
    ask: dict[str, Any] = {
        "chat": lambda: router.chat(CHAT, hello, **options),
        "stream_chat": lambda: list(router.stream_chat(CHAT, hello, **options)),
        "embed": lambda: router.embed(EMBED, ["Hello"], timeout=ANSWERED_WITHIN),
    }
    while not ending.wait(0.05):
        try:
            ask[operation]()
        except Exception as error:
            answered[f"{operation}: {type(error).__name__}"] += 1
            print(f"{operation} failed: {error!r}", flush=True)
        else:
            answered[operation] += 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first message")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER")
    parser.add_argument("--each", action="store_true", help="send one after the other, and tell what each costs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--broker", choices=BROKERS, default="valkey")
    parser.add_argument("--ask", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.ask:
        return ask(options.ask)
    numbers = options.only or range(options.first, options.first + options.messages)
    with BROKERS[options.broker]() as broker:
        each = options.each or options.only is not None
        outcome = fuzz(broker, numbers, seed=options.seed, each=each, report_every=5_000)
    print(*outcome.lines(), sep="\n")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    os.environ.pop("FLEET_CONFIG", None)
    sys.exit(main())
