"""A soak: many requests, while what they need is killed, frozen, drained, restarted and cut off, all of it drawn from
one seed.

    python -m tests.faults.soak --requests 10000 --faults 1000 --seed 7 [--broker rabbitmq] | tee soak.log
    python -m tests.faults.soak --replay soak.log

The faults are printed as they strike, a line of JSON each, after one line with what they were drawn from. `--replay`
takes these lines, as they are or with some of them deleted, and ignores all others. What is drawn is the same every
time; when it happens is exact only in the number of requests that have begun by then.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import heapq
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fleet_worker import FleetError, Router, Settings
from fleet_worker.host.child_process import python
from fleet_worker.simulator import embedding
from tests.brokers import BROKERS, RabbitMQ, Valkey
from tests.fleets import Fleet, Part, conversation, until

FLAVOURS = {"one": "mlx_lm", "two": "vllm_batched", "three": "openai"}
EMBEDS = "three"
AT_ONCE, SLOTS = 16, 4
NATURAL = 60
AHEAD = 20
"""Requests that may begin before a fault that was to come first has struck, and the other way round."""
RECOVERS_WITHIN = 60.0
A_LITTLE = 5.0
"""Seconds that an answer may be late."""
LOST = ("expired", "timeout")
"""How a request ends that had a minute, if nobody noticed that its message or its node was gone."""
GROWTH = {"MiB of the router": 100.0, "threads of the router": 10, "open files of the router": 80}
MOST_SHOWN = 50
COMPLETE = 0.9
"""The least share of the requests that nobody cancelled and that had time, which has to be answered."""


@dataclass(frozen=True)
class Plan:
    """What a soak is drawn from; `broker` is valkey or rabbitmq."""

    seed: int
    requests: int
    faults: int
    broker: str


@dataclass(frozen=True)
class Strike:
    """A fault: it strikes when `after` requests have begun, and is mended `seconds` later."""

    after: int
    kind: str
    target: str
    seconds: float


@dataclass(frozen=True)
class Ask:
    """A request, and how its caller behaves: slow by `pause` seconds a piece, gone after `leaves` pieces."""

    number: int
    kind: str
    max_tokens: int
    timeout: float
    pause: float = 0.0
    leaves: int | None = None
    on_interrupt: str = "resume"


# --- what there is to draw --------------------------------------------------------------------------------------------


class Scene:
    """The parts, and what is broken of them at the moment."""

    def __init__(self, broker: Valkey | RabbitMQ, fleet: Fleet, router: Router) -> None:
        self.broker, self.fleet, self.router = broker, fleet, router
        self.problems: list[str] = []
        self.restarts = 0
        self.mends: list[tuple[float, int, Strike]] = []
        self._order = itertools.count()

    def strike(self, strike: Strike) -> None:
        """Break it. What is broken of the same node or server already is mended first."""
        for each in [each for each in self.mends if each[2].target == strike.target]:
            self._mend(each)
        self._spare(strike.target)
        print(json.dumps(asdict(strike)), flush=True)
        KINDS[strike.kind].strike(self, strike)
        heapq.heappush(self.mends, (time.monotonic() + strike.seconds, next(self._order), strike))

    def mend(self, *, due: bool = True) -> None:
        """Mend what has been broken long enough, or everything."""
        while self.mends and (not due or self.mends[0][0] <= time.monotonic()):
            self._mend(self.mends[0])

    def _mend(self, entry: tuple[float, int, Strike]) -> None:
        self.mends.remove(entry)
        heapq.heapify(self.mends)
        KINDS[entry[2].kind].mend(self, entry[2])

    def _spare(self, target: str) -> None:
        """Wait until somebody else works: a fleet that is gone as a whole answers nobody."""
        deadline = time.monotonic() + RECOVERS_WITHIN
        while not (self.fleet.ready(self.router) - {target} - {strike.target for _, _, strike in self.mends}):
            self.mend()
            if time.monotonic() > deadline:
                self.problems.append(f"nobody but {target} became ready within {RECOVERS_WITHIN:g} s")
                return
            time.sleep(0.05)

    def look(self) -> None:
        """Nothing ends by itself."""
        for name, node in [*self.fleet.nodes.items(), ("registry", self.fleet.registry)]:
            broken = any(strike.target == name for _, _, strike in self.mends)
            if node.ended and not broken:
                self.problems.append(f"{node.name} ended by itself")
                print(node.output[-4000:], flush=True)
                node.start()

    def node(self, strike: Strike) -> Part:
        return self.fleet.registry if strike.target == "registry" else self.fleet.nodes[strike.target]

    def server(self, strike: Strike) -> Part:
        return self.fleet.servers[strike.target]


def start(part: Part, scene: Scene) -> None:
    scene.restarts += 1
    part.start()


def end_node(scene: Scene, strike: Strike) -> None:
    """After a SIGTERM: it hands over what it has, and ends with 0, or at once if it was only starting."""
    node = scene.node(strike)
    if (code := node.stop(grace=40.0)) not in (0, -signal.SIGTERM):
        scene.problems.append(f"{node.name} ended with {code} after SIGTERM")
        print(node.output[-4000:], flush=True)
    start(node, scene)


def restart_broker(scene: Scene, strike: Strike) -> None:
    scene.broker.stop()
    time.sleep(strike.seconds)
    scene.broker.start()


def command_line(command: str) -> Callable[[Scene, Strike], None]:
    """`fleet-worker drain NODE` and its like; whether the node hears it is not sure, with all that happens to it."""

    def run(scene: Scene, strike: Strike) -> None:
        environment = {**os.environ, "FLEET_BROKER_URL": scene.broker.url}
        words = python("-m", "fleet_worker", command, scene.node(strike).name)
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(words, env=environment, capture_output=True, timeout=15)

    return run


def nothing(scene: Scene, strike: Strike) -> None:
    pass


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how often it is drawn, for how long it lasts, what it strikes, and what is done."""

    weight: int
    seconds: tuple[float, float]
    targets: Sequence[str]
    strike: Callable[[Scene, Strike], None]
    mend: Callable[[Scene, Strike], None] = nothing


NAMES = (*FLAVOURS,)
KINDS: Mapping[str, Kind] = {
    "kill node": Kind(12, (0.1, 2.0), NAMES, lambda s, f: s.node(f).kill(), lambda s, f: start(s.node(f), s)),
    "freeze node": Kind(12, (0.5, 5.0), NAMES, lambda s, f: s.node(f).freeze(), lambda s, f: s.node(f).thaw()),
    "restart node": Kind(8, (0.5, 2.0), NAMES, lambda s, f: s.node(f).ask_to_stop(), end_node),
    "drain node": Kind(6, (1.0, 3.0), NAMES, command_line("drain"), command_line("undrain")),
    "kill server": Kind(14, (0.1, 3.0), NAMES, lambda s, f: s.server(f).kill(), lambda s, f: start(s.server(f), s)),
    "freeze server": Kind(8, (0.5, 4.0), NAMES, lambda s, f: s.server(f).freeze(), lambda s, f: s.server(f).thaw()),
    "kill registry": Kind(3, (0.1, 2.0), ["registry"], lambda s, f: s.node(f).kill(), lambda s, f: start(s.node(f), s)),
    "drop connections": Kind(14, (0.0, 0.0), ["broker"], lambda s, f: s.broker.drop_connections()),
    "restart broker": Kind(3, (0.0, 1.5), ["broker"], restart_broker),
}


def drawn_strikes(plan: Plan) -> list[Strike]:
    draw = random.Random(f"strikes {plan.seed}")
    kinds = draw.choices(list(KINDS), [kind.weight for kind in KINDS.values()], k=plan.faults)
    return [
        Strike(
            after=number * plan.requests // plan.faults,
            kind=kind,
            target=draw.choice(KINDS[kind].targets),
            seconds=round(draw.uniform(*KINDS[kind].seconds), 2),
        )
        for number, kind in enumerate(kinds)
    ]


def drawn_asks(plan: Plan) -> list[Ask]:
    """Most are streams that somebody reads to the end; some callers leave, are slow, or have little time."""
    draw = random.Random(f"asks {plan.seed}")
    return [
        Ask(
            number=number,
            kind=draw.choices(["stream", "chat", "embed"], [8, 2, 1])[0],
            max_tokens=draw.choice([1, 10, 40, 200]),
            timeout=draw.choices([60.0, 1.0], [19, 1])[0],
            pause=draw.choices([0.0, draw.uniform(0.02, 0.2)], [9, 1])[0],
            leaves=draw.choices([None, draw.randrange(0, 30)], [9, 1])[0],
            on_interrupt=draw.choices(["resume", "fail"], [19, 1])[0],
        )
        for number in range(plan.requests)
    ]


# --- the requests -----------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What became of the requests; `problems` is what must not be."""

    ended: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    retried: int = 0
    restarts: int = 0
    latest: float = 0.0
    figures: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        yield from (f"{number:>8}  {what}" for what, number in sorted(self.ended.items()))
        yield f"{self.retried:>8}  of them needed more than one attempt"
        yield f"{self.resumed:>8}  times a stream went on elsewhere"
        yield f"{self.restarts:>8}  processes were started again"
        yield f"{self.latest:>8.2f}  seconds after its deadline the latest ended"
        yield from (f"{figure:>8}  {what}" for what, figure in self.figures.items())
        yield from (f"PROBLEM   {problem}" for problem in self.problems[:MOST_SHOWN])
        if (more := len(self.problems) - MOST_SHOWN) > 0:
            yield f"PROBLEM   and {more} more"


class Callers:
    """AT_ONCE threads that ask one request after the other, and judge what they get."""

    def __init__(self, router: Router, fleet: Fleet, asks: Sequence[Ask], summary: Summary) -> None:
        self._router, self._fleet, self._summary = router, fleet, summary
        self._asks = iter(asks)
        self._moved = threading.Condition()
        self.begun = 0
        self._allowed = AHEAD

    def run(self) -> None:
        """Ask everything; return when all of it has ended."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for caller in [pool.submit(self._go_on) for _ in range(AT_ONCE)]:
                caller.result()

    def allow(self, begun: int) -> None:
        """So many requests may begin now."""
        with self._moved:
            self._allowed = begun
            self._moved.notify_all()

    def wait_until_begun(self, begun: int, within: float) -> None:
        """Return when so many have, or when that much time has passed."""
        with self._moved:
            self._moved.wait_for(lambda: self.begun >= begun, within)

    def _go_on(self) -> None:
        while ask := self._next():
            self._judge(ask)

    def _next(self) -> Ask | None:
        with self._moved:
            self._moved.wait_for(lambda: self.begun < self._allowed)
            self.begun += 1
            self._moved.notify_all()
            return next(self._asks, None)

    def _judge(self, ask: Ask) -> None:
        started, ended, problem = time.monotonic(), "", ""
        try:
            problem, ended = {"stream": self._stream, "chat": self._chat, "embed": self._embed}[ask.kind](ask)
        except FleetError as error:
            ended = self._failed(ask, error)
        except Exception as error:
            ended, problem = f"{ask.kind}: {type(error).__name__}", f"ended with {error!r}, which is no FleetError"
        late = time.monotonic() - started - ask.timeout
        lost = ended.endswith(LOST) and ask.timeout > 1 and not ask.pause
        with self._moved:
            self._summary.ended[f"{ended}{'' if ask.timeout > 1 else ', having a second'}"] += 1
            if not ask.pause:
                self._summary.latest = max(self._summary.latest, late)
                problem = problem or ("" if late < A_LITTLE else f"ended {late:.1f} s after its deadline")
            problem = problem or ("came to nothing, while others were answered" if lost else "")
            if problem:
                self._summary.problems.append(f"request {ask.number}, {ask.kind}: {problem}")

    def _stream(self, ask: Ask) -> tuple[str, str]:
        messages, asked = self._asked(ask, on_interrupt=ask.on_interrupt)
        expected, text, resumed = self._fleet.expected(messages, ask.max_tokens), "", 0
        ended = "stream: whole"
        try:
            with self._router.stream_chat(self._fleet.model, messages, **asked) as stream:
                for number, delta in enumerate(stream):
                    resumed += bool(delta.resumed)
                    text += delta.content or ""
                    time.sleep(ask.pause)
                    if number == ask.leaves:
                        stream.cancel()
                        ended = "stream: left"
                        break
                else:
                    self._note(stream.response.attempts, resumed)
                    if not text == stream.response.content == expected:
                        return "its text is wrong", ended
        except FleetError as error:
            ended = self._failed(ask, error)
        return ("" if expected.startswith(text) else "what came before it ended is wrong"), ended

    def _chat(self, ask: Ask) -> tuple[str, str]:
        messages, asked = self._asked(ask)
        reply = self._router.chat(self._fleet.model, messages, **asked)
        self._note(reply.attempts, 0)
        right = reply.content == self._fleet.expected(messages, ask.max_tokens)
        return ("" if right else "its text is wrong"), "chat: whole"

    def _embed(self, ask: Ask) -> tuple[str, str]:
        texts = [f"{ask.number} {word}" for word in ("sea", "wind", "salt")]
        reply = self._router.embed(self._fleet.embedder, texts, timeout=ask.timeout)
        self._note(reply.attempts, 0)
        right = reply.vectors == [embedding(text) for text in texts]
        return ("" if right else "its vectors are wrong"), "embed: whole"

    def _asked(self, ask: Ask, **also: Any) -> tuple[list[dict[str, str]], dict[str, Any]]:
        options = {"max_tokens": ask.max_tokens, "temperature": 0, "timeout": ask.timeout, **also}
        return conversation(f"request {ask.number}"), options

    def _failed(self, ask: Ask, error: FleetError) -> str:
        if ask.timeout > 1:
            print(f"request {ask.number} after {self.begun}, {ask.kind}: {error} {error.metadata}", flush=True)
        return f"{ask.kind}: {error.code}"

    def _note(self, attempts: Sequence[Any], resumed: int) -> None:
        with self._moved:
            self._summary.retried += len(attempts) > 1
            self._summary.resumed += resumed


# --- the soak ---------------------------------------------------------------------------------------------------------


def soak(broker: Valkey | RabbitMQ, asks: Sequence[Ask], strikes: Sequence[Strike]) -> Summary:
    """Run it on this broker, and return what came of it: `problems` is empty if everything held."""
    summary = Summary()
    patient = {"lost_after": 2.0, "accept_timeout": 2.0, "connect_timeout": 30.0, "reply_expires": 10.0}
    env = {"FLEET_WORKER__DRAIN_GRACE": "1", "FLEET_WORKER__ABANDONED_AFTER": "5"}
    with (
        Fleet(broker.url, FLAVOURS, slots=SLOTS, natural=NATURAL, env=env, token_interval=0.02, embeds=EMBEDS) as fleet,
        Router(Settings(broker_url=broker.url, router=patient)) as router,
    ):
        fleet.wait_until_ready(router, fleet.servers)
        scene, callers = Scene(broker, fleet, router), Callers(router, fleet, asks, summary)
        left_before, used_before = broker.inventory(), used(router)
        asking = threading.Thread(target=callers.run)
        asking.start()
        try:
            strike_all(scene, callers, strikes, len(asks))
        finally:
            asking.join()
        summary.restarts, summary.problems = scene.restarts, summary.problems + scene.problems
        settle(scene, summary, left_before, used_before)
    judge(summary, len(asks))
    return summary


def strike_all(scene: Scene, callers: Callers, strikes: Sequence[Strike], requests: int) -> None:
    """Each when its number of requests has begun; then the last requests have the fleet to themselves."""
    try:
        for strike in strikes:
            callers.allow(strike.after + AHEAD)
            while callers.begun < strike.after:
                callers.wait_until_begun(strike.after, 0.1)
                scene.mend()
            scene.look()
            scene.strike(strike)
        scene.mend(due=False)
    finally:
        callers.allow(requests + AT_ONCE)


def settle(scene: Scene, summary: Summary, left_before: Mapping[str, int], used_before: Mapping[str, float]) -> None:
    """When all is mended and nobody asks any more: what is left behind?"""
    fleet, broker = scene.fleet, scene.broker
    try:
        fleet.mend(scene.router)
        until(lambda: fleet.busy() == [], 30)
    except (AssertionError, OSError) as error:
        summary.problems.append(f"afterwards the fleet is not idle and well: {error}")
    deadline = time.monotonic() + 40
    while (grown := growth(left_before, broker.inventory())) and time.monotonic() < deadline:
        time.sleep(0.5)
    if grown:
        summary.problems.append(f"the broker has more than before: {grown}")
    for what, now in used(scene.router).items():
        summary.figures[what] = f"{now - used_before[what]:+.0f}"
        if now - used_before[what] > GROWTH[what]:
            summary.problems.append(f"growth: {what}, from {used_before[what]:.0f} to {now:.0f}")
    for node in fleet.nodes.values():
        summary.figures[f"MiB of {node.name.partition('@')[0]}, from its last start"] = f"{resident(node.pid):.0f}"


def growth(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """What there is more of, counted by name: a subscriber that comes back has a queue with another random part."""
    return dict(counted(now) - counted(before))


def counted(inventory: Mapping[str, int]) -> Counter[str]:
    names: Counter[str] = Counter()
    for name, size in inventory.items():
        names[re.sub("[0-9a-f]{12}", "*", name)] += 1 + size
    return names


def used(router: Router) -> dict[str, float]:
    """What the router's process, which is this one, uses."""
    gc.collect()
    values = (resident(os.getpid()), threading.active_count(), len(os.listdir("/dev/fd")))
    return dict(zip(GROWTH, values, strict=True))


def resident(pid: int) -> float:
    """MiB of memory, as `ps` tells on Linux and macOS."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def judge(summary: Summary, requests: int) -> None:
    if (ended := summary.ended.total()) != requests:
        summary.problems.append(f"{ended} requests ended, of {requests}")
    fair = {what: number for what, number in summary.ended.items() if "left" not in what and "second" not in what}
    whole = sum(number for what, number in fair.items() if "whole" in what)
    if whole < COMPLETE * sum(fair.values()):
        summary.problems.append(f"only {whole} of {sum(fair.values())} were answered")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--faults", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--broker", choices=BROKERS, default="valkey")
    parser.add_argument("--replay", type=Path, metavar="LOG")
    options = parser.parse_args(arguments)
    plan, strikes = planned(options.replay.read_text("utf-8")) if options.replay else (None, None)
    plan = plan or Plan(options.seed, options.requests, options.faults, options.broker)
    print(json.dumps(asdict(plan)), flush=True)
    started = time.monotonic()
    with BROKERS[plan.broker]() as broker:
        summary = soak(broker, drawn_asks(plan), drawn_strikes(plan) if strikes is None else strikes)
    print(
        f"{plan.requests} requests on {plan.broker} in {time.monotonic() - started:.0f} s", *summary.lines(), sep="\n"
    )
    return 1 if summary.problems else 0


def planned(log: str) -> tuple[Plan, list[Strike]]:
    """What was drawn, and what struck, of the log of a soak."""
    first, *others = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return Plan(**first), [Strike(**each) for each in others]


if __name__ == "__main__":
    sys.exit(main())
