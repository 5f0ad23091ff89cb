"""Servers that `fleet-worker up` runs: they die, stall and grow under load, and no request fails."""

import http.client
import json
import os
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import free_port, python
from fleet_worker.host.up_socket import UpLink, ask, socket_path
from fleet_worker.protocol.host_messages import HostStatus, Reload, Restart, Watch
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import embedded_broker, worker_toml
from tests.mlx_clients import until
from tests.ups import running_up

pytestmark = [pytest.mark.flow, pytest.mark.rest, pytest.mark.timeout(120)]

CHAT = "sim-chat"
HELLO = [{"role": "user", "content": "Hello"}]
TOKENS = 40
TOKEN_INTERVAL = 0.02
STALL_AFTER = 1.5
ANSWER = "".join(reply_tokens(HELLO, TOKENS, tokens=TOKENS))
WITHIN = 30.0
QUICK = f"""
[worker]
stall_after = {STALL_AFTER}
canary_interval = 1
drain_grace = 3
"""


@pytest.fixture(scope="module")
def broker_url():
    with embedded_broker() as url:
        yield url


class Mini:
    """One host: its up, with one managed simulator."""

    def __init__(self, folder, name, broker_url):
        self.name, self._folder, self.port = name, Path(folder), free_port()
        self.environment = {
            "FLEET_CONFIG": str(self._folder / "worker.toml"),
            "FLEET_STATE_DIR": str(self._folder / "state"),
            "FLEET_BROKER_URL": broker_url,
        }
        self.settings = Settings(state_dir=self._folder / "state", host=name, broker_url=broker_url)
        self.status = HostStatus()
        self.configure()

    def configure(self, *options, **more):
        """With these options of its simulator, and other settings of its instance."""
        words = [*python("-P", "-m", "fleet_worker.simulator"), "--port", "{port}", "--model", CHAT]
        words += ["--token-interval", str(TOKEN_INTERVAL), "--tokens", str(TOKENS), "--old-health", *options]
        instance = {"serve": words, "base_url": f"http://127.0.0.1:{self.port}", "models": {CHAT: {}}, **more}
        instance["limits"] = {"concurrency": 4}
        text = f'host = "{self.name}"\n{QUICK}' + worker_toml("local", instance)
        (self._folder / "worker.toml").write_text(text)

    @contextmanager
    def up(self):
        link = UpLink(socket_path(self.settings.state_dir, self.name), self._take)
        link.start()
        link.send(Watch())
        with running_up(python("-m", "fleet_worker", "up"), self.environment) as self.process:
            try:
                yield self
            finally:
                link.close()

    def _take(self, message):
        if isinstance(message, HostStatus):
            self.status = message

    @property
    def server(self):
        return self.status.servers[0]

    def wait_until_served(self, restarts=0):
        """By a server that was started so many times again, and its node."""
        until(
            lambda: self.status.servers and self.server.stage == "serving" and self.server.restarts >= restarts, WITHIN
        )

    def simulated(self, what, **body):
        """Ask its simulator, or tell it something."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            connection.request("POST" if body else "GET", f"/simulated/{what}", json.dumps(body))
            return json.loads(connection.getresponse().read())


@pytest.fixture(scope="module")
def minis(broker_url):
    """Two of them."""
    with ExitStack() as stack:
        started = []
        for name in ("mini-1", "mini-2"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp"))
            started.append(stack.enter_context(Mini(folder, name, broker_url).up()))
        for mini in started:
            mini.wait_until_served()
            mini.process.wait_for("is ready", WITHIN)
        yield started


@pytest.fixture
def router(broker_url):
    with Router(Settings(broker_url=broker_url)) as router:
        yield router


@contextmanager
def load(router, count=8):
    """Chats all the time, so many at once; each has the right answer."""
    stopped, answered = [], []

    def chat():
        while not stopped:
            answer = router.chat(CHAT, HELLO, max_tokens=TOKENS, timeout=WITHIN).content
            assert answer == ANSWER
            answered.append(time.monotonic())

    with ThreadPoolExecutor(count) as pool:
        callers = [pool.submit(chat) for _ in range(count)]
        try:
            until(lambda: len(answered) >= count or any(caller.done() for caller in callers), WITHIN)
            yield answered
        finally:
            stopped.append(True)
        for caller in callers:
            caller.result(WITHIN)


def test_a_server_that_is_killed_serves_again_after_its_start(minis, router):
    """And no request fails: the other mini goes on meanwhile."""
    one, _ = minis
    restarts = one.server.restarts
    with load(router):
        killed_at = time.monotonic()
        os.kill(one.server.pid, signal.SIGKILL)
        one.wait_until_served(restarts + 1)
        started = time.monotonic() - killed_at
        until(lambda: one.simulated("counters").get("generated", 0) > TOKENS, WITHIN)
        took = time.monotonic() - killed_at
    assert took < started + 1.0 + TOKENS * TOKEN_INTERVAL
    assert one.server.deaths == 1


def test_a_zombie_under_load_is_restarted(minis, router):
    """It answers 200 on /health, and generates nothing any more."""
    one, _ = minis
    restarts = one.server.restarts
    with load(router):
        struck_at = time.monotonic()
        one.simulated("faults", kind="thread_death", at_token=3)
        one.wait_until_served(restarts + 1)
        took = time.monotonic() - struck_at
    assert took < STALL_AFTER + 10.0


def test_an_operator_restarts_a_server_under_load(minis, router):
    """Its node lives on."""
    one, _ = minis
    restarts, pid = one.server.restarts, one.server.pid
    with load(router):
        assert ask(one.settings, Restart("local", server=True), WITHIN).error == ""
        one.wait_until_served(restarts + 1)
    assert one.server.pid != pid
    assert one.process.output.count("local@mini-1 starts, pid") == 1


def test_a_server_that_grows_is_restarted_between_requests(minis, router):
    """Its configuration changes under load, too: a new limit of memory needs no restart, a new command line one."""
    one, _ = minis
    restarts = one.server.restarts
    with load(router):
        one.configure("--leak", str(20 * 2**20))
        assert ask(one.settings, Reload(), WITHIN).text.startswith("local: its server is restarted")
        one.wait_until_served(restarts + 1)
        pid = one.server.pid
        one.configure("--leak", str(20 * 2**20), max_memory="500 MB")
        assert ask(one.settings, Reload(), WITHIN).error == ""
        assert one.server.pid == pid
        one.wait_until_served(restarts + 2)
        assert "more than max_memory" in one.process.output


def test_an_up_that_is_stopped_under_load_fails_nothing(minis, router):
    """The node ends before its server. What the other mini then runs alone waits for its server when that dies."""
    one, two = minis
    with load(router) as answered:
        two.process.signal(signal.SIGTERM)
        assert two.process.wait(WITHIN) == 0
        os.kill(one.server.pid, signal.SIGKILL)
        died_at = time.monotonic()
        until(lambda: len([at for at in answered if at > died_at + 1.0]) > 8, WITHIN)
    lines = [
        line
        for line in two.process.output.splitlines()
        if "ended with exit code 0" in line or "the server of local ended" in line
    ]
    print(lines)
