"""Two Macs, as a new operator gets them: `quickstart` on the first one, the line that it prints on the second one."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from fleet_worker.host.child_process import ChildProcess
from tests.ups import is_gone

COMMAND = [sys.executable, "-m", "fleet_worker"]
WITHIN = 40.0
GREETING = "To have it start by itself"
pytestmark = [pytest.mark.rest, pytest.mark.timeout(120)]


class Mac:
    """A home of its own. The path is short: it is that of sockets."""

    def __init__(self, home):
        self.env = {"HOME": home, "XDG_STATE_HOME": f"{home}/s", "XDG_CACHE_HOME": f"{home}/c"}
        self.files = Path(home, "fleet")

    def run(self, *words, code=0):
        environment = {**os.environ, **self.env}
        environment.pop("FLEET_CONFIG", None)  # an empty one means: no file
        done = subprocess.run([*COMMAND, *words], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done
        return done.stdout

    @contextmanager
    def running(self, *words):
        """A command that runs `up` in the end. SIGINT ends it, and all that it started, with exit code 130."""
        unset = ["env", "-u", "FLEET_CONFIG"]
        process = ChildProcess(words[0], [*unset, *COMMAND, *words], self.env)
        try:
            yield process
            process.signal(signal.SIGINT)
            assert process.wait(WITHIN) == 130
            assert is_gone(process)
        finally:
            process.stop()

    def content(self):
        return {file.name: file.read_bytes() for file in self.files.iterdir()}


@pytest.fixture
def macs(monkeypatch):
    with (
        tempfile.TemporaryDirectory(prefix="fq", dir="/tmp") as one,
        tempfile.TemporaryDirectory(prefix="fq", dir="/tmp") as other,
    ):
        yield Mac(one), Mac(other)


def greeted(process):
    """What it has printed when the fleet answers."""
    process.wait_for(GREETING, WITHIN)
    return process.output


def ask(text, key):
    url = re.search(r"^URL +(http://\S+)/v1 for OpenAI", text, re.MULTILINE)[1]
    body = {"model": "simulated", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-fleet-node"]


def test_a_fleet_of_two_macs_takes_two_lines_and_goes_on_where_it_was(macs):
    first, second = macs
    with first.running("quickstart", "--simulated", "--address", "127.0.0.1") as process:
        text = greeted(process)
        (key,) = set(re.findall(r"sk-fleet-\w+-\w+", text))
        written = first.content()
        assert key.encode() not in b"".join(written.values())
        node = ask(text, key)
        findings = [json.loads(line) for line in first.run("doctor", "--json", code=1).splitlines()]
        (complaint,) = (found for found in findings if found["severity"] != "ok")
        assert "the embedded broker has no TLS" in complaint["found"]
        line = shlex.split(re.search(r"^fleet-worker (join \S+) --up$", text, re.MULTILINE)[1])
        with second.running(*line, "--up") as joined:
            joined.wait_for("is ready, 4 slots", WITHIN)
            hosts = {each["node"].partition("@")[2] for each in json.loads(first.run("status", "--json"))["instances"]}
            assert hosts == {node.partition("@")[2], f"{node.partition('@')[2]}-2"}  # two names, on one machine
    with first.running("quickstart") as process:
        again = greeted(process)
        assert "sk-fleet" not in again
        assert "fleet-worker join fleet1" in again
        assert first.content() == written
        assert ask(again, key) == node
