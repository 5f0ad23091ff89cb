"""Servers that `fleet-worker up` runs: they die, stall and grow under load, and no request fails."""

import os
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.up_socket import ask
from fleet_worker.protocol.host_messages import Reload, Restart
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import embedded_broker
from tests.minis import CHAT, HELLO, Mini
from tests.mlx_clients import until

pytestmark = [pytest.mark.flow, pytest.mark.rest, pytest.mark.timeout(120)]

TOKENS = 40
TOKEN_INTERVAL = 0.02
STALL_AFTER = 1.5
LEAK = str(50 * 2**20)
"""Bytes that each request leaves behind."""
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


def mini(folder, name, broker_url):
    """A mini, configured."""
    made = Mini(folder, name, broker_url, QUICK)
    configure(made)
    return made


def configure(mini, *options, **settings):
    pace = ("--token-interval", str(TOKEN_INTERVAL), "--tokens", str(TOKENS))
    mini.configure(*pace, "--old-health", *options, **settings)


@pytest.fixture(scope="module")
def minis(broker_url):
    """Two of them."""
    with ExitStack() as stack:
        started = []
        for name in ("mini-1", "mini-2"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp"))
            started.append(stack.enter_context(mini(folder, name, broker_url).up()))
        for each in started:
            each.process.wait_for("is ready", WITHIN)
            until(each.serves)
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
        until(lambda: one.serves(restarts + 1), WITHIN)
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
        until(lambda: one.serves(restarts + 1), WITHIN)
        took = time.monotonic() - struck_at
    assert took < STALL_AFTER + 10.0


def test_an_operator_restarts_a_server_under_load(minis, router):
    """Its node lives on."""
    one, _ = minis
    restarts, pid = one.server.restarts, one.server.pid
    with load(router):
        assert ask(one.settings, Restart("local", server=True), WITHIN).error == ""
        until(lambda: one.serves(restarts + 1), WITHIN)
    assert one.server.pid != pid
    assert one.process.output.count("local@mini-1 starts, pid") == 1


def test_a_server_that_grows_is_restarted_between_requests(minis, router):
    """Its configuration changes under load, too: a new limit of memory needs no restart, a new command line one."""
    one, _ = minis
    restarts = one.server.restarts
    with load(router):
        configure(one, "--leak", LEAK)
        assert ask(one.settings, Reload(), WITHIN).text.startswith("local: its server is restarted")
        until(lambda: one.serves(restarts + 1), WITHIN)
        pid = one.server.pid
        configure(one, "--leak", LEAK, max_memory="500 MB")
        assert ask(one.settings, Reload(), WITHIN).error == ""
        assert one.server.pid == pid
        until(lambda: one.serves(restarts + 2), WITHIN)
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
    node_ended, server_ended = map(two.says.index, ("local@mini-2 ended with exit code 0", "the server of local ended"))
    assert node_ended < server_ended
