"""Servers that `fleet-worker up` runs: they die, stall and grow under load, and no request fails."""

import http.client
import json
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import free_port, python
from fleet_worker.host.up_socket import UpLink, ask, socket_path
from fleet_worker.protocol.host_messages import HostStatus, Reload, Restart, Watch
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import embedded_broker, worker_toml
from tests.mlx_clients import until
from tests.ups import is_gone, running_up

pytestmark = [pytest.mark.flow, pytest.mark.rest, pytest.mark.timeout(120)]

CHAT = "sim-chat"
HELLO = [{"role": "user", "content": "Hello"}]
TOKENS = 40
ANSWER = "".join(reply_tokens(HELLO, TOKENS, tokens=TOKENS))
WITHIN = 30.0
QUICK = """
[worker]
stall_after = 1.5
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
        words = [*python("-P", "-m", "fleet_worker.simulator"), "--port", "{port}", "--model", CHAT]
        words += ["--token-interval", "0.02", "--tokens", str(TOKENS), "--old-health", *options]
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
        until(lambda: self.status.servers and self.server.stage == "serving" and self.server.restarts >= restarts, WITHIN)

    def strike(self, **fault):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("POST", "/simulated/faults", json.dumps(fault))
        assert connection.getresponse().status == 200
        connection.close()


@pytest.fixture
def minis(broker_url, tmp_path_factory):
    """Start so many, with the options of their simulators."""
    with ExitStack() as stack:

        def start(*names, options=(), **more):
            started = []
            for name in names:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp"))
                mini = Mini(folder, name, broker_url)
                mini.configure(*options, **more)
                started.append(stack.enter_context(mini.up()))
            for mini in started:
                mini.wait_until_served()
                mini.process.wait_for("is ready", WITHIN)
            return started

        yield start


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


def test_a_killed_server_is_started_at_once_and_no_request_fails(minis, router):
    """The other mini goes on meanwhile."""
    one, two = minis("mini-1", "mini-2")
    with load(router) as answered:
        killed_at = time.monotonic()
        os.kill(one.server.pid, signal.SIGKILL)
        one.wait_until_served(restarts=1)
        print("SERVES AFTER", time.monotonic() - killed_at)
        until(lambda: len([at for at in answered if at > killed_at + 2.0]) > 20, WITHIN)
    assert one.server.deaths == 1
    print(one.process.output)
