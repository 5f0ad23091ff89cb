"""`fleet-worker demo` as a user sees it: what it prints, how it ends, and that nothing of it is left."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import anthropic
import openai
import pytest

from fleet_worker.demo.models import platform_problem
from fleet_worker.host.parent_pipe import OrphanKiller
from tests.brokers import Valkey, free_port, missing
from tests.processes import descendants, processes

DEMO = [str(Path(sys.executable).with_name("fleet-worker")), "demo"]
SIMULATED = [*DEMO, "--simulated"]
WITHIN = 60.0
BROKER, PREPARING, CHATTING = "broker", "server and node of", "Stream"
PARTS = {"simulator": "the server of smollm2-135m", "chat@demo": "the node chat@demo"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where it keeps what it needs while it runs."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@contextmanager
def started(command, terminal=False):
    """A running demo; yields its process and the end of a pipe, or of a terminal, from which its output is read."""
    ours, its = pty.openpty() if terminal else os.pipe()
    killer = OrphanKiller()
    process = subprocess.Popen(command, stdin=its if terminal else None, stdout=its, stderr=its, start_new_session=True)
    killer.watch(process.pid)
    os.close(its)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        killer.close()
        os.close(ours)


def read(output, until=None):
    """What it prints until it has printed this, or to its end."""
    deadline = time.monotonic() + WITHIN
    said = b""
    while until is None or until.encode() not in said:
        assert select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0], said.decode()
        try:
            piece = os.read(output, 65536)
        except OSError:  # the other side of a terminal is closed
            piece = b""
        said += piece
        if not piece:
            assert until is None, said.decode()
            break
    return said.decode()


def parts_of(family):
    """How many there are without the shells that would kill them if the demo were killed."""
    return sum("/bin/sh" not in command for command in family.values())


def assert_nothing_left(family, folder):
    assert_no_process_left(family)
    assert [path.name for path in folder.iterdir() if path.name != "mlx"] == []  # where MLX keeps compiled kernels


def assert_no_process_left(family):
    """An orphan needs a moment from its signal to its end."""
    deadline = time.monotonic() + 5
    while left := processes().keys() & family.keys():
        assert time.monotonic() < deadline, [family[pid] for pid in left]


def assert_conversation(said):
    timing = r"queue wait \d+ ms, first token \d+ ms, [\d.]+ tokens/s, [\d.]+ s in all, node chat@demo"
    assert len(re.findall(timing, said)) == 2
    assert len(re.findall(r"^  [+-]\d\.\d\d  .+ \| .+$", said, re.MULTILINE)) == 3
    assert re.search(r"queue wait \d+ ms, [\d.]+ s in all, node embed@demo", said)
    assert "All of it worked" in said
    assert "Traceback" not in said


def test_the_real_demo_answers_and_leaves_nothing(folder):
    """A real model on a real MLX server says where France's capital is, and finds the two cats alike."""
    if problem := platform_problem():
        missing(problem)
    with started(DEMO) as (process, output):
        said = read(output, until=CHATTING)
        family = descendants(process.pid)
        said += read(output)
        assert process.wait(WITHIN) == 0
    assert_conversation(said)
    assert "The capital of France is Paris." in said
    alike, *others = (float(number) for number in re.findall(r"^  ([+-]\d\.\d\d)  ", said, re.MULTILINE))
    assert alike > 0.6 > 0.3 > max(others)
    assert parts_of(family) == 5
    assert_nothing_left(family, folder)


def test_without_mlx_it_names_the_extra_and_the_simulation(folder, monkeypatch):
    (folder / "path" / "mlx").mkdir(parents=True)
    (folder / "path" / "mlx" / "__init__.py").touch()  # as where a wheel came without a backend
    monkeypatch.setenv("PYTHONPATH", str(folder / "path"))
    done = subprocess.run(DEMO, capture_output=True, text=True, timeout=WITHIN)
    assert (done.returncode, done.stdout) == (69, "")
    assert re.search(r"\.\[demo\].*fleet-worker demo --simulated", done.stderr)


@pytest.mark.rest
def test_a_broker_that_is_given_is_used_and_none_is_started(folder, monkeypatch):
    with Valkey() as broker:
        monkeypatch.setenv("FLEET_BROKER_URL", broker.url)
        with started(SIMULATED) as (process, output):
            read(output, until="first token")  # of the first answer
            family = descendants(process.pid)
            assert not any("valkey" in command for command in family.values())
            process.send_signal(signal.SIGTERM)
            assert process.wait(WITHIN) == 143
        assert_nothing_left(family, folder)


@pytest.mark.rest
def test_a_broker_that_is_given_and_dead_is_a_clear_failure(folder, monkeypatch):
    port = free_port()
    monkeypatch.setenv("FLEET_BROKER_URL", f"redis://:hush-hush@127.0.0.1:{port}/0")
    with started(SIMULATED) as (process, output):
        said = read(output)
        assert process.wait(WITHIN) == 69
    assert f"the broker at 127.0.0.1:{port} does not run" in said
    assert "hush-hush" not in said
    assert "Traceback" not in said
    assert_nothing_left({}, folder)


INTERRUPTIONS = [
    (signal.SIGINT, BROKER, 130),
    pytest.param(signal.SIGTERM, BROKER, 143, marks=pytest.mark.rest),
    pytest.param(signal.SIGINT, PREPARING, 130, marks=pytest.mark.rest),
    (signal.SIGHUP, PREPARING, 129),
    pytest.param(signal.SIGTERM, CHATTING, 143, marks=pytest.mark.rest),
]


@pytest.mark.parametrize(("number", "moment", "exit_code"), INTERRUPTIONS)
def test_a_signal_ends_all_of_it_at_any_moment(number, moment, exit_code, folder):
    with started(SIMULATED) as (process, output):
        read(output, until=moment)
        family = descendants(process.pid)
        assert parts_of(family) == 5 or moment == BROKER
        process.send_signal(number)
        said = read(output)
        assert process.wait(WITHIN) == exit_code
    assert "Interrupted; everything was stopped." in said
    assert "Traceback" not in said
    assert_nothing_left(family, folder)


@pytest.mark.rest
def test_with_a_gateway_it_serves_any_client_until_ctrl_c(folder):
    with started([*SIMULATED, "--gateway"]) as (process, output):
        said = read(output, until="Ctrl-C stops everything.")
        family = descendants(process.pid)
        commands = [line for line in said.splitlines() if line.startswith(("curl ", "python3 "))]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        for command in commands:
            ran = subprocess.run(command, shell=True, capture_output=True, text=True, env={**os.environ, "PATH": path})
            assert ran.returncode == 0, ran.stderr
            assert ran.stdout.strip()
        process.send_signal(signal.SIGINT)
        read(output)
        assert process.wait(WITHIN) == 130
    assert len(commands) == 2
    assert_nothing_left(family, folder)


@pytest.mark.rest
def test_clients_talk_to_real_servers_through_its_gateway():
    if problem := platform_problem():
        missing(problem)
    with started([*DEMO, "--gateway"]) as (process, output):
        said = read(output, until="Ctrl-C stops everything.")
        url = re.search(r"http://127\.0\.0\.1:\d+", said)[0]
        question = [{"role": "user", "content": "What is the capital of France?"}]
        asked = {"model": "smollm2-135m", "messages": question, "max_tokens": 20, "extra_body": {"temperature": 0}}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:
            whole = client.chat.completions.create(**asked)
            pieces = [
                chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
            ]
            vectors = client.embeddings.create(model="all-minilm-l6-v2", input=["a cat", "a dog"]).data
        with anthropic.Anthropic(base_url=url, api_key="none", timeout=60) as client:
            message = client.messages.create(**asked)
        process.send_signal(signal.SIGINT)
        read(output)
    assert "Paris" in whole.choices[0].message.content
    assert "".join(pieces) == whole.choices[0].message.content == message.content[0].text
    assert [len(each.embedding) for each in vectors] == [384, 384]


@pytest.mark.rest
def test_even_a_demo_that_is_killed_leaves_no_process(folder):
    with started(SIMULATED) as (process, output):
        read(output, until=CHATTING)
        family = descendants(process.pid)
        process.kill()
        process.wait(WITHIN)
    assert parts_of(family) == 5
    assert_no_process_left(family)


@pytest.mark.rest
@pytest.mark.parametrize(("part", "name"), PARTS.items())
def test_a_part_that_dies_ends_all_of_it_with_a_clear_message(part, name, folder):
    with started(SIMULATED) as (process, output):
        read(output, until=CHATTING)
        family = descendants(process.pid)
        os.kill(min(pid for pid, command in family.items() if part in command), signal.SIGKILL)
        said = read(output)
        assert process.wait(WITHIN) == 1
    assert f"The demo failed: {name} was killed by signal 9:" in said
    assert "Traceback" not in said
    assert_nothing_left(family, folder)


@pytest.mark.rest
def test_on_a_terminal_progress_is_shown_and_the_answer_stays_readable(folder, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with started(SIMULATED, terminal=True) as (process, output):
        said = read(output)
        assert process.wait(WITHIN) == 0
    progress, _, conversation = said.partition("Stream")
    assert "\x1b[2K" in progress  # a line that is drawn again and again
    assert PREPARING in progress
    assert progress.endswith("\x1b[2K\r\n\x1b[1m")  # and is gone before the conversation begins
    plain = re.sub(r"\x1b\[[\d;]*m", "", conversation).replace("\r\n", "\n")
    assert "\x1b" not in plain
    assert_conversation(plain)
    assert_nothing_left({}, folder)


@pytest.mark.rest
def test_an_impatient_user_of_a_terminal_leaves_nothing_either(folder):
    """Ctrl-C goes to everything in the foreground of a terminal, and the second one comes while all is stopping."""
    with started([sys.executable, "-c", ON_TERMINAL, *SIMULATED], terminal=True) as (process, output):
        read(output, until=CHATTING)
        family = descendants(process.pid)
        os.write(output, b"\x03")
        said = read(output, until="Stopping everything")
        os.write(output, b"\x03\x03")
        said += read(output)
        assert process.wait(WITHIN) == 130
    assert "Interrupted; everything was stopped." in said
    assert "Traceback" not in said
    assert_nothing_left(family, folder)


ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal is ours: its Ctrl-C is a signal to us
os.execv(sys.argv[1], sys.argv[1:])
"""
