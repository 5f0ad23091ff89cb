"""The owner of a mini comes first: two minis, each a real `up` with a managed server, and commands that say what a real
system would.
"""

import contextlib
import http.client
import json
import os
import queue
import re
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import free_port, python
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import embedded_broker, worker_toml
from tests.mlx_clients import until
from tests.ups import running_up

pytestmark = [pytest.mark.flow, pytest.mark.rest, pytest.mark.timeout(120)]

CHAT = "sim-chat"
HELLO = [{"role": "user", "content": "Hello"}]
TOKENS, HELD_AT = 24, 6
ANSWER = "".join(reply_tokens(HELLO, TOKENS, tokens=TOKENS))
STREAMS = 4
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


class Mini:
    """One mini, whose user sits at it if the file `user` is there."""

    def __init__(self, folder, name, broker_url):
        self.name, self._folder, self._port = name, Path(folder), free_port()
        for program, script in PROGRAMS.items():
            (self._folder / program).write_text(script)
            (self._folder / program).chmod(0o755)
        os.mkfifo(self._folder / "announced")
        words = [*python("-P", "-m", "fleet_worker.simulator"), "--port", "{port}", "--model", CHAT]
        words += ["--flavour", "vllm_batched", "--token-interval", "0.01", "--tokens", str(TOKENS)]
        instance = {"serve": words, "base_url": f"http://127.0.0.1:{self._port}", "models": {CHAT: {}}}
        text = CONFIGURATION + worker_toml("local", {**instance, "limits": {"concurrency": STREAMS}})
        (self._folder / "worker.toml").write_text(f'host = "{name}"\n{text}')
        self.environment = {
            "FLEET_CONFIG": str(self._folder / "worker.toml"),
            "FLEET_STATE_DIR": str(self._folder / "state"),
            "FLEET_BROKER_URL": broker_url,
            "HOME": str(self._folder),
            "PATH": os.pathsep.join([str(self._folder), os.environ["PATH"]]),
        }

    def user_comes(self):
        (self._folder / "user").touch()

    def user_leaves(self):
        (self._folder / "user").unlink()

    def announce(self, asleep):
        with (self._folder / "announced").open("w") as pipe:
            pipe.write(f"{asleep}\n")

    @property
    def says(self):
        return self.up.output

    def wait_for(self, text, times=1):
        until(lambda: len(re.findall(text, self.says)) >= times, WITHIN)

    def hold(self, at_token):
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        connection.request("POST", "/simulated/held", json.dumps({"at_token": at_token}))
        assert connection.getresponse().status == 200
        connection.close()

    @property
    def server_runs(self):
        """Whether any process of its server is there, by its command line."""
        needed = f"--port {self._port}"
        return any(needed in " ".join(words) for words in _command_lines())

    def inhibits(self, what):
        """Whether a process keeps it from sleeping in this way."""
        file = self._folder / "inhibited"
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
            mini = Mini(folder, name, broker_url)
            mini.user_comes()
            mini.up = stack.enter_context(running_up(python("-m", "fleet_worker", "up"), mini.environment))
            started.append(mini)
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
        for _ in range(STREAMS):
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
        for _ in range(STREAMS):
            assert self.begun.acquire(timeout=WITHIN)

    def answers(self):
        return [self._answers.get(timeout=60.0) for _ in range(STREAMS)]


def test_a_user_returns_while_streams_run_and_none_fails(minis, router):
    one, two = minis
    assert not one.server_runs
    assert not two.server_runs, "while a user is there, no server starts"
    until(lambda: state(router, "local@mini-1") == ("away", "a user is at it"), WITHIN)
    one.user_leaves()
    one.wait_for("local@mini-1 is ready")
    one.hold(HELD_AT)
    streams = Streams(router)
    streams.wait_until_begun()
    until(lambda: one.inhibits("idle:sleep"), WITHIN)
    came = time.monotonic()
    one.user_comes()
    one.wait_for("this host is away: a user is at it", times=2)
    assert time.monotonic() - came < 5.0, "2 s, and some for a busy machine"
    two.user_leaves()
    assert streams.answers() == [ANSWER] * STREAMS
    until(lambda: not one.server_runs, 10.0)
    until(lambda: state(router, "local@mini-1") == ("away", "a user is at it"), WITHIN)


def test_the_mini_works_again_when_its_user_has_left(minis, router):
    one, two = minis
    two.user_comes()
    two.wait_for("this host is away: a user is at it", times=2)
    until(lambda: not two.server_runs, 10.0)
    one.user_leaves()
    assert Streams(router).answers() == [ANSWER] * STREAMS
    assert one.says.count("local@mini-1 starts, pid") == 1, "its node has lived on"


def test_the_notice_of_sleep_hands_over_at_once_and_then_lets_the_machine_sleep(minis, router):
    one, two = minis
    one.hold(HELD_AT)
    streams = Streams(router)
    streams.wait_until_begun()
    assert one.inhibits("sleep")
    one.announce("true")
    one.wait_for("this host is away: it goes to sleep")
    until(lambda: not one.inhibits("sleep"), 10.0)
    two.user_leaves()
    assert streams.answers() == [ANSWER] * STREAMS
    one.announce("false")
    one.wait_for("this host is away: it has just woken up")
    until(lambda: one.inhibits("sleep"), 10.0)
