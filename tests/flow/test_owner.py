"""The owner of a mini comes first: two minis, each a real `up` with a managed server, and commands that say what a real
system would.
"""

import contextlib
import os
import queue
import re
import tempfile
import threading
import time
from contextlib import ExitStack

import httpx
import psutil
import pytest

from fleet_worker import Router, Settings
from fleet_worker.registry.view import SETTLED_AFTER
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import embedded_broker
from tests.gateways import running_gateway
from tests.minis import CHAT, HELLO, SLOTS, Mini
from tests.mlx_clients import until

pytestmark = [pytest.mark.flow, pytest.mark.rest, pytest.mark.timeout(120)]

TOKENS, HELD_AT = 24, 6
ANSWER = "".join(reply_tokens(HELLO, TOKENS, tokens=TOKENS))
WITHIN = 30.0
CONFIGURATION = """
[worker]
canary_interval = 1

[availability]
idle_user = 300
grace = 0.5
"""

LOGINCTL = """#!/bin/sh
[ -e "$HOME/user" ] || exit 0
case $1 in
list-sessions) echo " 2 1000 anna seat0 tty2" ;;
show-session) printf 'Class=user\\nType=wayland\\nTTY=tty2\\nState=active\\nIdleHint=no\\nLockedHint=no\\n' ;;
esac
"""
IOREG = """#!/bin/sh
[ -e "$HOME/user" ] && idle=0 || idle=900000000000
echo "  \\"HIDIdleTime\\" = $idle"
"""
GDBUS = """#!/bin/sh
while read -r asleep; do
    echo "/org/freedesktop/login1: org.freedesktop.login1.Manager.PrepareForSleep ($asleep,)"
done <>"$HOME/announced"
"""
INHIBIT = """#!/bin/sh
echo "$$ $@" >>"$HOME/inhibited"
while [ "${1#--}" != "$1" ]; do shift; done
"$@"
"""
PROGRAMS = {"loginctl": LOGINCTL, "ioreg": IOREG, "gdbus": GDBUS, "systemd-inhibit": INHIBIT}


class Owned(Mini):
    """A mini whose user sits at it if the file `user` is there."""

    def __init__(self, folder, name, broker_url):
        super().__init__(folder, name, broker_url, CONFIGURATION, programs=PROGRAMS)
        os.mkfifo(self.folder / "announced")
        self.configure("--flavour", "vllm_batched", "--token-interval", "0.01", "--tokens", str(TOKENS))

    def user_comes(self):
        (self.folder / "user").touch()

    def user_leaves(self):
        (self.folder / "user").unlink()

    def announce(self, asleep):
        with (self.folder / "announced").open("w") as pipe:
            pipe.write(f"{asleep}\n")

    def wait_for(self, text, times=1):
        until(lambda: len(re.findall(text, self.says)) >= times, WITHIN)

    @property
    def server_runs(self):
        """Whether any process of its server is there, by its command line."""
        needed = f"--port {self.port}"
        return any(needed in " ".join(words) for words in _command_lines())

    def inhibits(self, what):
        """Whether a process keeps it from sleeping in this way."""
        file = self.folder / "inhibited"
        calls = [line.split(" ", 1) for line in file.read_text().splitlines()] if file.exists() else []
        return any(f"--what={what} " in call and _is_running(int(pid)) for pid, call in calls)


def _is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _command_lines():
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            yield process.cmdline()


@pytest.fixture(scope="module")
def broker_url():
    with embedded_broker() as url:
        yield url


@pytest.fixture(scope="module")
def minis(broker_url):
    """Two of them. Users sit at both."""
    with ExitStack() as stack:
        started = []
        for name in ("mini-1", "mini-2"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp"))
            mini = Owned(folder, name, broker_url)
            mini.user_comes()
            started.append(stack.enter_context(mini.up()))
        for mini in started:
            mini.wait_for("this host is away: a user is at it")
        yield started


@pytest.fixture
def router(broker_url):
    with Router(Settings(broker_url=broker_url)) as router:
        yield router


def state(router, node):
    instance = router.registry.instance(node)
    return instance and (instance.status, instance.reason)


class Streams:
    """Some streams at once. `begun` counts those that have a first token."""

    def __init__(self, router):
        self._router = router
        self.begun = threading.Semaphore(0)
        self._answers = queue.Queue()
        for _ in range(SLOTS):
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            with self._router.stream_chat(CHAT, HELLO, max_tokens=TOKENS, timeout=60.0) as stream:
                first = next(stream).content or ""
                self.begun.release()
                self._answers.put(first + "".join(delta.content or "" for delta in stream))
        except Exception as error:
            self._answers.put(error)

    def wait_until_begun(self):
        for _ in range(SLOTS):
            assert self.begun.acquire(timeout=WITHIN)

    def answers(self):
        return [self._answers.get(timeout=60.0) for _ in range(SLOTS)]


@pytest.fixture
def gateway(broker_url):
    with running_gateway(broker_url) as process:
        time.sleep(SETTLED_AFTER)  # until it believes that it knows all hosts
        with httpx.Client(base_url=process.url, timeout=20.0) as http:
            yield http


REFUSALS = {
    "/v1/chat/completions": lambda body: body["error"]["code"] == "no_capacity" and body["error"]["message"],
    "/v1/responses": lambda body: body["error"]["code"] == "no_capacity" and body["error"]["message"],
    "/v1/messages": lambda body: body["type"] == "error" and body["error"]["message"],
    "/api/chat": lambda body: body["error"],
}
"""By path: the text of an error in the form of its API."""


def test_a_gateway_tells_at_once_that_all_minis_are_away_and_waits_if_it_is_asked_to(minis, router, gateway):
    for name in ("mini-1", "mini-2"):
        until(lambda node=f"local@{name}": state(router, node) == ("away", "a user is at it"), WITHIN)
    why = "all 2 instances of it are away (a user is at it)"
    for path, text in REFUSALS.items():
        asked = time.monotonic()
        body = {"model": CHAT, "messages": HELLO, "input": "Hello", "max_tokens": 5, "stream": True}
        reply = gateway.post(path, json=body)
        assert time.monotonic() - asked < 10.0
        told = [reply.headers[name] for name in ("retry-after", "x-should-retry", "x-fleet-model")]
        assert (reply.status_code, told) == (503, ["60", "false", CHAT])
        assert why in text(reply.json()), path
    assert gateway.get(f"/v1/models/{CHAT}").json()["not_ready_because"] == why
    assert gateway.get("/health/readiness").json()["not_ready"] == {CHAT: {"away": 2}}
    asked, patient = time.monotonic(), {"x-fleet-queue-timeout": "1"}
    reply = gateway.post("/v1/chat/completions", json={"model": CHAT, "messages": HELLO}, headers=patient)
    assert (reply.status_code, reply.headers["x-should-retry"]) == (503, "false")
    assert time.monotonic() - asked > 1.0
    assert "within its queue_timeout of 1 s" in reply.json()["error"]["message"]


def test_a_user_returns_while_streams_run_and_none_fails(minis, router):
    one, two = minis
    assert not one.server_runs
    assert not two.server_runs, "while a user is there, no server starts"
    until(lambda: state(router, "local@mini-1") == ("away", "a user is at it"), WITHIN)
    one.user_leaves()
    one.wait_for("local@mini-1 is ready")
    one.simulated("held", at_token=HELD_AT)
    streams = Streams(router)
    streams.wait_until_begun()
    until(lambda: one.inhibits("idle:sleep"), WITHIN)
    came = time.monotonic()
    one.user_comes()
    one.wait_for("this host is away: a user is at it", times=2)
    assert time.monotonic() - came < 5.0, "2 s, and some for a busy machine"
    two.user_leaves()
    assert streams.answers() == [ANSWER] * SLOTS
    until(lambda: not one.server_runs, 10.0)
    until(lambda: state(router, "local@mini-1") == ("away", "a user is at it"), WITHIN)


def test_the_mini_works_again_when_its_user_has_left(minis, router):
    one, two = minis
    two.user_comes()
    two.wait_for("this host is away: a user is at it", times=2)
    until(lambda: not two.server_runs, 10.0)
    one.user_leaves()
    assert Streams(router).answers() == [ANSWER] * SLOTS
    assert one.says.count("local@mini-1 starts, pid") == 1, "its node has lived on"


def test_the_notice_of_sleep_hands_over_at_once_and_then_lets_the_machine_sleep(minis, router):
    one, two = minis
    one.simulated("held", at_token=HELD_AT)
    streams = Streams(router)
    streams.wait_until_begun()
    assert one.inhibits("sleep")
    one.announce("true")
    one.wait_for("this host is away: it goes to sleep")
    until(lambda: not one.inhibits("sleep"), 10.0)
    two.user_leaves()
    assert streams.answers() == [ANSWER] * SLOTS
    one.announce("false")
    one.wait_for("this host is away: it has just woken up")
    until(lambda: one.inhibits("sleep"), 10.0)
