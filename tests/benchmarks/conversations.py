"""Conversations through several routers, with prompt-cache affinity and without, on the same minis.

    python -m tests.benchmarks.conversations [--minis 4] [--routers 2] [--conversations 8] [--turns 6] [--pause 1.5]
    python -m tests.benchmarks.conversations --speeds

Broker and nodes are processes of their own. Each turn goes through a router chosen at random. With --speeds: how many
of 32 short requests of 4 clients each of two minis answers, of which one is four times slower.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from fleet_worker import Router, Settings
from fleet_worker.protocol.reply import ChatResponse
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import Valkey

SYSTEM_WORDS, TURN_WORDS, ANSWER_TOKENS = 800, 40, 20
PREFILL_RATE = 400.0
"""Tokens a second of a simulated server."""
DIGESTS_WITHIN = 2.5
"""Seconds after which a new router has heard of all nodes."""


@dataclass(frozen=True)
class Turn:
    """One answer, the number of its turn from 0, and seconds from its submission to its first token."""

    number: int
    ttft: float
    response: ChatResponse

    @property
    def cached_share(self) -> float:
        usage = self.response.usage
        return (usage.cached_tokens or 0) / (usage.prompt_tokens or 1)


@dataclass(frozen=True)
class Minis:
    broker_url: str
    model: str
    servers: dict[str, SimulatedMLX]
    """By the name of the instance."""


@contextmanager
def minis(broker_url: str, count: int, *, slots: int = 4, **server: Any) -> Iterator[Minis]:
    """Run nodes for so many simulated servers, which prefill at `PREFILL_RATE`."""
    model = f"talk-{uuid.uuid4().hex[:8]}"
    options = {"prefill_rate": PREFILL_RATE, "token_interval": 0.002, "tokens": ANSWER_TOKENS, **server}
    with ExitStack() as stack:
        servers = {
            f"mini-{number}": stack.enter_context(SimulatedMLX(models=[model], **options)) for number in range(count)
        }
        limits = {"limits": {"concurrency": slots}, "models": {model: {}}}
        instances = {name: {"base_url": each.base_url, **limits} for name, each in servers.items()}
        stack.enter_context(running_host(broker_url, instances, host=model))
        yield Minis(broker_url, model, servers)


@contextmanager
def routers(fleet: Minis, count: int, settle: float = DIGESTS_WITHIN, **settings: Any) -> Iterator[list[Router]]:
    """Connect so many routers, and give them some seconds to hear of all nodes."""
    with ExitStack() as stack:
        made = [
            stack.enter_context(Router(Settings(broker_url=fleet.broker_url, router=settings))) for _ in range(count)
        ]
        for router in made:
            router.registry.wait_for(fleet.model, 10)
        time.sleep(settle)
        yield made


def words(seed: object, count: int) -> str:
    rng = random.Random(str(seed))
    return " ".join(f"{rng.randrange(10**6):06}" for _ in range(count))


def conversation(
    model: str, routers: Sequence[Router], name: object, turns: int, pause: float, system: str | None = None
) -> list[Turn]:
    """Ask so many questions one after the other, each with all that was said before."""
    rng = random.Random(str(name))
    messages = [{"role": "system", "content": system or words((name, "system"), SYSTEM_WORDS)}]
    done = []
    for number in range(turns):
        time.sleep(pause if number else rng.random() * pause)
        messages.append({"role": "user", "content": words((name, number), TURN_WORDS)})
        began, said = time.monotonic(), []
        with rng.choice(routers).stream_chat(model, messages, max_tokens=ANSWER_TOKENS, timeout=120) as stream:
            for delta in stream:
                said.append((time.monotonic(), delta.content or ""))
        done.append(Turn(number, said[0][0] - began, stream.response))
        messages.append({"role": "assistant", "content": "".join(text for _, text in said)})
    return done


def talk(fleet: Minis, routers: Sequence[Router], count: int, turns: int, pause: float) -> list[Turn]:
    """Have so many conversations at the same time."""
    names = [f"{uuid.uuid4().hex}-{number}" for number in range(count)]
    with ThreadPoolExecutor(count) as pool:
        talks = pool.map(lambda name: conversation(fleet.model, routers, name, turns, pause), names)
        return [turn for each in talks for turn in each]


def later(turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn.number]


def _name(affinity: bool) -> str:
    return "affinity" if affinity else "shared lane"


def row(name: str, turns: Sequence[Turn]) -> str:
    ttft = [turn.ttft for turn in later(turns)]
    warm = statistics.fmean(turn.cached_share > 0.5 for turn in later(turns))
    said = ", ".join(f"{count} {outcome}" for outcome, count in Counter(turn.response.cache for turn in turns).items())
    return f"{name:14} {warm:10.1%} {statistics.fmean(ttft):10.3f} {statistics.median(ttft):10.3f}   {said}"


def two_speeds(broker_url: str, affinity: bool) -> Counter[str]:
    """Return how many requests each mini answered, after both have shown their speed."""
    hello = [{"role": "user", "content": "Hello"}]
    with minis(broker_url, 2, slots=4, prefill_rate=0.0, token_interval=0.01, tokens=64) as fleet:
        fleet.servers["mini-1"].token_interval = 0.04
        with routers(fleet, 1, affinity=affinity) as (router,):
            for node in (each.node for each in router.registry.offerings(fleet.model)):
                router.chat(fleet.model, hello, node=node)
            time.sleep(DIGESTS_WITHIN)
            with ThreadPoolExecutor(4) as clients:
                answers = clients.map(lambda _: router.chat(fleet.model, hello), range(32))
                return Counter(answer.instance for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("minis", 4), ("routers", 2), ("conversations", 8), ("turns", 6), ("runs", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pause", type=float, default=1.5, help="seconds before each following turn")
    parser.add_argument("--speeds", action="store_true")
    args = parser.parse_args()
    if args.speeds:
        with Valkey() as valkey:
            for affinity in (False, True):
                answered = two_speeds(valkey.url, affinity)
                print(f"{_name(affinity):14} slow : fast = {answered['mini-1']} : {answered['mini-0']}", flush=True)
        return
    print(f"{'later turns':14} {'> .5 cached':>10} {'TTFT mean':>10} {'p50':>10}   all turns")
    with Valkey() as valkey, minis(valkey.url, args.minis) as fleet:
        for _ in range(args.runs):
            for affinity in (False, True):
                with routers(fleet, args.routers, affinity=affinity) as made:
                    done = talk(fleet, made, args.conversations, args.turns, args.pause)
                    print(row(_name(affinity), done), flush=True)


if __name__ == "__main__":
    main()
