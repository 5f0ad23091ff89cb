"""A fleet for tests of faults: each part is a process of its own, which can be killed, frozen and started again."""

from __future__ import annotations

import http.client
import json
import signal
import statistics
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from fleet_worker import FleetError, Router
from fleet_worker.host.child_process import ChildProcess, python
from fleet_worker.simulator import Fault, reply_tokens
from fleet_worker.testing import worker_toml
from tests.brokers import free_port

READY_WITHIN = 60.0
CANARIES = {"FLEET_WORKER__CANARY_INTERVAL": "1"}
"""A server that was started again proves itself within a second."""


class Part:
    """One process, which may end and begin again as often as wanted. `says` is what it prints when it is ready."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str] | None = None, *, says: str) -> None:
        self.name = name
        self._command, self._env, self._says = command, env, says
        self._process: ChildProcess | None = None
        self.frozen = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Begin, or begin anew; what still runs of it is killed."""
        self.kill()
        self._process = ChildProcess(self.name, self._command, self._env)

    def wait_until_ready(self) -> None:
        self._running.wait_for(self._says, READY_WITHIN)

    def kill(self) -> None:
        """End it with SIGKILL, and wait until it is gone."""
        if self._process:
            self._process.signal(signal.SIGKILL)
            self._process.stop()
        self.frozen = False

    def freeze(self) -> None:
        self._running.signal(signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        self._running.signal(signal.SIGCONT)
        self.frozen = False

    def ask_to_stop(self) -> None:
        self._running.signal(signal.SIGTERM)

    def stop(self, grace: float = 60.0) -> int:
        """End it with SIGTERM; return its exit code."""
        return self._running.stop(grace)

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.ended

    @property
    def output(self) -> str:
        return self._running.output

    @property
    def _running(self) -> ChildProcess:
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process


class Server(Part):
    """A simulated MLX server, always at the same address. What it remembers ends with it."""

    def __init__(self, name: str, *, model: Sequence[str], **options: Any) -> None:
        self._port = free_port()
        self.base_url = f"http://127.0.0.1:{self._port}"
        given = [*(("model", each) for each in model), *options.items()]
        flags = [word for key, value in given for word in (f"--{key.replace('_', '-')}", *_argument(value))]
        command = python("-m", "fleet_worker.simulator", "--port", str(self._port), *flags)
        super().__init__(f"the MLX server {name}", command, says="base_url")

    @property
    def healthy(self) -> bool:
        """It is there, and says that it can generate."""
        try:
            return not self.ended and self._request("GET", "/health")[0] == 200
        except OSError:  # it has just died
            return False

    def counters(self) -> dict[str, int]:
        counters: dict[str, int] = self._ask("GET", "/simulated/counters")
        return counters

    def requests(self) -> list[dict[str, Any]]:
        """The accounts of its chats and embeddings, the canaries of its node left out."""
        return [each for each in self._ask("GET", "/simulated/requests") if each["method"] == "POST" and _asked(each)]

    @property
    def running(self) -> int:
        """Requests that it works on at the moment; none if it is away."""
        return 0 if self.ended else self.counters().get("running", 0)

    def fail(self, *faults: Fault) -> None:
        """Add faults to its plan, which is forgotten when it ends."""
        self._ask("POST", "/simulated/faults", json.dumps([asdict(fault) for fault in faults]))

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        status, answer = self._request(method, path, body)
        assert status == 200, answer
        return json.loads(answer)

    def _request(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _argument(value: object) -> list[str]:
    """Of an option; one that is only on or off has none."""
    return [] if value is True else [str(value)]


def _asked(request: Mapping[str, Any]) -> bool:
    said = request["body"] or {}
    return said.get("input") != ["canary"] and said.get("messages") != [{"role": "user", "content": "Hi"}]


class Fleet:
    """A simulated MLX server and a node for each of `flavours`, and the registry node of their one host.

    Each server serves one model, of a name that no other fleet has if none is given, and is started with `server` as
    its options; its node is called like it. `natural` is how many tokens an answer has that no `max_tokens` cuts. The
    one that `embeds` names serves a second model, for embeddings.
    """

    def __init__(
        self,
        broker_url: str,
        flavours: Mapping[str, str],
        *,
        slots: int = 8,
        natural: int = 100,
        env: Mapping[str, str] | None = None,
        embeds: str | None = None,
        model: str | None = None,
        **server: Any,
    ) -> None:
        self.model = model or f"sim-{uuid.uuid4().hex[:8]}"
        self.embedder = f"{self.model}-embed"
        self.host = f"host-{uuid.uuid4().hex[:8]}"
        self.natural = natural
        self._broker_url, self._slots, self._env = broker_url, slots, {**CANARIES, **(env or {})}
        self._models = {name: [self.model, self.embedder][: 1 + (name == embeds)] for name in flavours}
        self.servers = {
            name: Server(name, flavour=flavour, model=self._models[name], tokens=natural, **server)
            for name, flavour in flavours.items()
        }
        self.nodes: dict[str, Part] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-host-")))
            self.nodes = {name: self._node(name, folder) for name in self.servers}
            self.registry = self._node("registry", folder)
            for part in self.parts:
                stack.enter_context(part)
            for part in self.parts:
                part.wait_until_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _node(self, name: str, folder: Path) -> Part:
        config = folder / "worker.toml"
        instances = {
            each: {
                "base_url": server.base_url,
                "models": {model: {} for model in self._models[each]},
                "limits": {"concurrency": self._slots},
            }
            for each, server in self.servers.items()
        }
        config.write_text("\n".join(worker_toml(*instance) for instance in instances.items()), "utf-8")
        places = {"FLEET_CONFIG": str(config), "FLEET_STATE_DIR": str(folder), "FLEET_BROKER_URL": self._broker_url}
        node = self.node_name(name)
        command = python("-m", "celery", "-A", "fleet_worker", "worker", "-n", node, "--loglevel", "INFO")
        return Part(node, command, {**self._env, **places}, says="is ready")

    def node_name(self, name: str) -> str:
        return f"{name}@{self.host}"

    @property
    def parts(self) -> list[Part]:
        return [*self.servers.values(), *self.nodes.values(), self.registry]

    def busy(self) -> list[str]:
        """The names of those that work for somebody, the busiest first."""
        running = {name: server.running for name, server in self.servers.items()}
        return sorted((name for name in running if running[name]), key=lambda name: -running[name])

    def mend(self, router: Router) -> None:
        """Whatever was killed or frozen works again, and the router knows."""
        for part in self.parts:
            if part.frozen:
                part.thaw()
            if part.ended:
                part.start()
        for part in self.parts:
            part.wait_until_ready()
        self.wait_until_ready(router, self.servers)

    def wait_until_ready(self, router: Router, names: Iterable[str], within: float = READY_WITHIN) -> None:
        """Return when these nodes answer, and the registry says that they can."""
        for name in names:
            until(partial(self.answers, router, name), within)
        until(lambda: self.ready(router) >= set(names), within)

    def ready(self, router: Router) -> set[str]:
        """The names of those that the registry calls ready."""
        return {offered.instance.name for offered in router.registry.offerings(self.model, ready=True)}

    def answers(self, router: Router, name: str) -> bool:
        try:
            router.chat(self.model, conversation("proof"), max_tokens=1, node=self.node_name(name), timeout=5)
        except FleetError:
            return False
        return True

    def expected(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> str:
        """What every server of the fleet answers, as long as nobody interrupts it."""
        return "".join(reply_tokens(messages, max_tokens, tokens=self.natural))


def conversation(of: object) -> list[dict[str, str]]:
    """A conversation of its own, whose answer is like no other's."""
    return [{"role": "user", "content": f"What is to be said about {of}?"}]


def until(true: Callable[[], object], seconds: float = 10.0) -> float:
    """Wait until it is true; return the seconds that it took."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds, f"it did not come true within {seconds:g} s"
        time.sleep(0.02)
    return time.monotonic() - started


@dataclass
class Told:
    """What a caller got of one stream. `gap` is the longest time that it waited for a piece, the first included."""

    of: object
    expected: str
    text: str = ""
    whole: str | None = None
    gap: float = 0.0
    resumed: int = 0
    attempts: list[Any] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def identical(self) -> bool:
        """It came to its end, and nothing is missing or doubled."""
        return self.error is None and self.text == self.whole == self.expected

    @property
    def interrupted(self) -> bool:
        return len(self.attempts) > 1


class Served(Protocol):
    """What callers need of a fleet."""

    model: str
    natural: int

    def expected(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> str: ...


class Crowd:
    """Many streams of one router, `at_once` of them at a time, each reader a thread; leaving the block waits for all.

    `streams` are begun in all; without a number, more and more of them until `enough` is called. Every second one is
    cut by max_tokens, the others come to their natural end.
    """

    def __init__(self, router: Router, fleet: Served, *, at_once: int, streams: int | None = None) -> None:
        self._router, self._fleet, self._streams = router, fleet, streams
        self._lock = threading.Condition()
        self._begun = self.pieces = 0
        self._enough = False
        self._pool = ThreadPoolExecutor(at_once)
        self._mark = uuid.uuid4().hex[:8]
        self._readers = [self._pool.submit(self._read_on) for _ in range(at_once)]
        self.told: list[Told] = []
        """Those that have ended."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.enough()
        self._pool.shutdown()
        for reader in self._readers:
            reader.result()

    def enough(self) -> None:
        """No more streams without a number; those that run go on."""
        self._enough = True

    def wait_for_pieces(self, pieces: int, within: float = 60.0) -> None:
        """Return when so many more have arrived, whosever they are."""
        with self._lock:
            wanted = self.pieces + pieces
            assert self._lock.wait_for(lambda: self.pieces >= wanted, within), f"{self.pieces} of {wanted} pieces"

    def _read_on(self) -> None:
        while (number := self._next()) is not None:
            told = read(self._router, self._fleet, f"{self._mark}-{number}", number % 2 == 0, self._piece)
            with self._lock:
                self.told.append(told)

    def _next(self) -> int | None:
        with self._lock:
            if self._begun == self._streams or (self._enough and self._streams is None):
                return None
            self._begun += 1
            return self._begun

    def _piece(self) -> None:
        with self._lock:
            self.pieces += 1
            self._lock.notify_all()


def read(router: Router, fleet: Served, of: object, cut: bool, piece: Callable[[], object], **options: Any) -> Told:
    """Ask for a stream and read it to its end; `piece` is called at every piece."""
    messages, max_tokens = conversation(of), fleet.natural * 3 // 4 if cut else fleet.natural * 2
    told, last = Told(of, fleet.expected(messages, max_tokens)), time.monotonic()
    asked = {"max_tokens": max_tokens, "temperature": 0, "timeout": 240, **options}
    try:
        with router.stream_chat(fleet.model, messages, **asked) as stream:
            for delta in stream:
                told.resumed += bool(delta.resumed)
                if delta.content:
                    told.text += delta.content
                    last, before = time.monotonic(), last
                    told.gap = max(told.gap, last - before)
                    piece()
            told.whole, told.attempts = stream.response.content, stream.response.attempts
    except FleetError as error:
        told.error = error
    return told


def report(what: str, told: Sequence[Told]) -> str:
    """The figures of some streams, printed and returned."""
    gaps = [one.gap for one in told if one.interrupted] or [0.0]
    errors = Counter(type(one.error).__name__ for one in told if one.error)
    failed = Counter(attempt.error for one in told for attempt in one.attempts if attempt.error)
    text = (
        f"{what}: {len(told)} streams, {sum(one.error is None for one in told)} complete, "
        f"{sum(one.identical for one in told)} identical, {sum(one.interrupted for one in told)} interrupted, "
        f"their gap p50 {statistics.median(gaps):.2f} s, max {max(gaps):.2f} s; "
        f"errors: {dict(errors) or 'none'}; attempts that failed: {dict(failed) or 'none'}"
    )
    print(text)
    return text


class Load:
    """So many short answers a second, for the time of the block; leaving it waits for all."""

    def __init__(self, router: Router, fleet: Served, rate: float) -> None:
        self._router, self._fleet, self._rate = router, fleet, rate
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(128)
        self._asked: list[Future[bool]] = []
        self.seconds: list[float] = []
        """How long each took that was answered."""
        self._clock = threading.Thread(target=self._go_on)

    def __enter__(self) -> Self:
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._clock.join()
        wait(self._asked)
        self._pool.shutdown()

    @property
    def failed(self) -> list[str]:
        """What went wrong, for each that did not bring the right answer."""
        ended = [request for request in self._asked if request.done()]
        errors = [type(request.exception()).__name__ for request in ended if request.exception()]
        return errors + ["WrongText" for request in ended if not request.exception() and not request.result()]

    @property
    def asked(self) -> int:
        return len(self._asked)

    def _go_on(self) -> None:
        started = time.monotonic()
        while not self._over.wait(max(0.0, started + self.asked / self._rate - time.monotonic())):
            self._asked.append(self._pool.submit(self._ask, self.asked))

    def _ask(self, number: int) -> bool:
        messages, began = conversation(f"load {number}"), time.monotonic()
        reply = self._router.chat(self._fleet.model, messages, max_tokens=3, temperature=0, timeout=60)
        self.seconds.append(time.monotonic() - began)
        return reply.content == self._fleet.expected(messages, 3)
