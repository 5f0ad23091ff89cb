"""One simulated machine: its options, its planned faults, its counts, and its one generation thread."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

from fleet_worker.simulator.flavours import Flavour
from fleet_worker.simulator.prompt_cache import PromptCache
from fleet_worker.simulator.refusals import Body
from fleet_worker.simulator.replies import Fault
from fleet_worker.simulator.servers import FLAVOURS


@dataclass
class Request:
    """What is recorded of one request while it runs; tests get copies."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any = None
    fault: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these
    generated: int = 0  # tokens
    generated_after_leave: int = 0
    finished: bool = False  # answered to the end, if only with an error
    disconnected: bool = False  # the client left before

    @property
    def model(self) -> str | None:
        return self.body.get("model") if isinstance(self.body, dict) else None


@dataclass(kw_only=True, eq=False)
class Machine:
    """A simulated server without its sockets."""

    flavour: str | Flavour = "mlx_lm"
    models: Sequence[str] = ("sim-chat",)
    listed: Sequence[str] | None = None  # what /v1/models says, if it does not say `models`
    port: int = 0
    backlog: int = 128  # mlx_lm.server 0.32 has 5; a client that finds it full waits a second
    slots: int = 0  # requests that generate at the same time; 0: as many as the flavour has
    ttft: float = 0.0  # seconds to the first token
    token_interval: float = 0.0  # seconds between tokens; 0: as fast as it goes
    tokens_per_write: int = 8  # when the interval is 0
    flush_each: bool = False  # every token, and every other event, is written and sent by itself, as real servers do
    tokens: int = 32  # the natural length of a reply
    drift: int | None = None  # after so many tokens a continued reply differs: real ones do, as their tokens differ
    stamped: bool = False  # every token is the monotonic time at which it was written, in seconds
    separators: bool = False  # replies contain U+2028 and its like
    reasoning: Sequence[str] = ()  # tokens of reasoning before every reply
    think_tags: bool = False  # reasoning is in the content, in <think> tags
    tool_calls: Sequence[Body] = ()  # the reply to requests with tools, but not to results of tools
    dimensions: int = 384
    api_key: str = ""
    prefill_rate: float = 0.0  # prompt tokens a second that are not cached; 0: prefill takes no time
    prompt_cache_size: int = 10  # sequences that its prompt cache holds; 0: no cache
    trimmable: bool = True  # any beginning of a cached sequence can be used, else only a whole one
    load_delay: float = 0.0  # seconds to make another model the resident one
    old_health: bool = False  # as mlx_lm.server up to 0.32.0: healthy with a dead thread, and requests hang
    keep_alive: float = 5.0  # seconds until an idle connection is closed
    heartbeat: float = 5.0  # seconds between comments of a silent stream
    history: int = 10_000  # requests remembered
    leak: int = 0  # bytes that every chat or embedding leaves in memory, for good
    faults: Sequence[Fault] = ()

    def __post_init__(self) -> None:
        self.behaviour = FLAVOURS[self.flavour] if isinstance(self.flavour, str) else self.flavour
        self.engine = Engine(self)
        self.held_at: int | None = None
        self._plan = list(self.faults)
        self._records: deque[Request] = deque(maxlen=self.history)
        self._counts: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._watchers = 0
        self._leaked: list[bytes] = []

    # --- for tests, from any thread

    def fail(self, *faults: Fault) -> None:
        """Plan faults. Each strikes the first request that it fits."""
        with self._changed:
            self._plan.extend(faults)

    def hold(self, at_token: int) -> None:
        """Generate no more than this many tokens of any reply until `release`; the token clock stands still meanwhile.

        With at least 1, the canary of a node, which asks for one token, is not held.
        """
        self.held_at = at_token

    def release(self) -> None:
        self.held_at = None

    @contextmanager
    def held(self, at_token: int) -> Iterator[None]:
        """Hold all replies at this token until the end of the block, or until `release`."""
        self.hold(at_token)
        try:
            yield
        finally:
            self.release()

    def forget(self) -> None:
        """Empty the prompt cache."""
        self.engine.prompts = self.empty_cache()

    def empty_cache(self) -> PromptCache:
        return PromptCache(self.prompt_cache_size if self.behaviour.caches else 0, trimmable=self.trimmable)

    @property
    def requests(self) -> list[Request]:
        """Snapshots of the last requests, oldest first."""
        with self._changed:
            return [replace(record) for record in self._records]

    @property
    def counters(self) -> Mapping[str, int]:
        """Totals since the start: connections, requests, finished, disconnected, generated, generated_after_leave,
        prompt_tokens, cached_tokens, loads, evictions; and current values: open_connections, running, and
        cached_sequences of the prompt cache."""
        return Counter({**self._counts, "running": self.engine.running, "cached_sequences": len(self.engine.prompts)})

    @property
    def generated_after_leave(self) -> int:
        """Tokens generated for clients that had left."""
        return self._counts["generated_after_leave"]

    def wait_for(self, predicate: Callable[[Self], bool], timeout: float = 5.0) -> None:
        """Return when the predicate holds. It is evaluated whenever a count changes.

        Raises:
            TimeoutError: it does not hold in time.
        """
        with self._changed:
            self._watchers += 1
            try:
                if not self._changed.wait_for(lambda: predicate(self), timeout):
                    raise TimeoutError(f"not within {timeout} s: {dict(self._counts)}")
            finally:
                self._watchers -= 1

    # --- for the server

    @property
    def dies_loudly(self) -> bool:
        """Whether the server reports a dead generation thread, as of these servers only mlx_lm.server 0.32.2 does."""
        return self.behaviour.batches_by_model and not self.old_health

    def name_of(self, model: str) -> str:
        """The name of the model that a request asks for."""
        return self.models[0] if model == "default_model" else model

    def next_fault(self, path: str, raw: bytes) -> Fault | None:
        """Return the first planned fault that fits this request, and count it as used."""
        with self._changed:
            for at, fault in enumerate(self._plan):
                if fault.fits(path, raw):
                    self._plan[at : at + 1] = fault.used()
                    return fault
        return None

    def begin(self, record: Request) -> None:
        """Record a request."""
        with self._changed:
            self._records.append(record)
            if self.leak and record.method == "POST":
                self._leaked.append(b"x" * self.leak)
        self.count(requests=1)

    def count(self, **changes: int) -> None:
        """Add to some counts, and wake the threads in `wait_for`."""
        for name, change in changes.items():
            self._counts[name] += change
        if self._watchers:
            with self._changed:
                self._changed.notify_all()


class Engine:
    """The one generation thread: whose turn it is, which model is resident, and whether it is alive."""

    def __init__(self, machine: Machine) -> None:
        self.slots = machine.slots or machine.behaviour.slots
        self.dead = False
        self.resident: str | None = machine.models[0]
        self.prompts = machine.empty_cache()
        self.step_ends = 0.0  # of the current step of prefill: no stream sends tokens before
        self.running = 0
        self._machine = machine
        self._key: object = None
        self._waiting: deque[tuple[object, asyncio.Future[None]]] = deque()
        self._prefill = asyncio.Lock()
        self._loading = asyncio.Lock()

    @asynccontextmanager
    async def turn(self, key: object) -> AsyncIterator[None]:
        """Wait for a slot, first come first served. Requests with another key wait until the others are done."""
        if self._waiting or not self._fits(key):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((key, turn))
            await turn
        else:
            self._take(key)
        try:
            yield
        finally:
            self.running -= 1
            self._admit()
            self._machine.count()

    def full(self) -> bool:
        return self.running >= self.slots

    def _fits(self, key: object) -> bool:
        return self.running == 0 or (key == self._key and not self.full())

    def _take(self, key: object) -> None:
        self.running, self._key = self.running + 1, key
        self._machine.count()

    def _admit(self) -> None:
        while self._waiting and (self.dead or self._fits(self._waiting[0][0])):
            key, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._take(key)
                turn.set_result(None)

    def die(self) -> None:
        """End the generation thread: only a restart brings it back."""
        self.dead = True
        self._admit()

    async def load(self, model: str) -> bool:
        """Make this model the resident one; return whether it exists. If not, no model is resident."""
        wanted = self._machine.name_of(model)
        async with self._loading:
            if wanted not in self._machine.models:
                self.resident = None
                self._machine.count(evictions=1)
                return False
            if wanted != self.resident:
                await asyncio.sleep(self._machine.load_delay)
                self.resident = wanted
                self._machine.count(loads=1)
            return True

    @asynccontextmanager
    async def prefill(self, tokens: int) -> AsyncIterator[float]:
        """Take the machine for one step of prefill, in turn with other prompts; yield the time at which it ends."""
        async with self._prefill:
            begin = max(asyncio.get_running_loop().time(), self.step_ends)
            self.step_ends = begin + tokens / self._machine.prefill_rate
            yield self.step_ends
