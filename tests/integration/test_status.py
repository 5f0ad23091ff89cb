"""`fleet-worker status` as an operator runs it: a process, a real broker with a password, a real host."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
from kombu import Connection, Consumer, Producer

from fleet_worker import Router, Settings
from fleet_worker.broker.topology import ask_queue, registry_exchange
from fleet_worker.cli import main
from fleet_worker.host.child_process import ChildProcess
from fleet_worker.ops.status import NO_REGISTRY_NODE, UNSERVED
from fleet_worker.protocol.registry_event import READINESS, Announcement, RegistryEvent
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import Valkey, free_port

PASSWORD, API_KEY, PROMPT = "hush-hush-4711", "sk-never-shown-0815", "the secret of the sphinx"
MODEL, UNKNOWN = "sim-chat", "llm.fleet.stream_chat.never-served"
STATUS = [str(Path(sys.executable).with_name("fleet-worker")), "status"]
WITHIN = 20.0


@contextmanager
def guarded_broker():
    """With a user and a password, which no output may show."""
    with Valkey() as broker:
        guard(broker)
        yield broker, broker.url.replace("//", f"//operator:{PASSWORD}@")


def guard(broker):
    may = {"keys": "*", "channels": "*", "commands": ["+@all"]}
    with redis.Redis.from_url(broker.url) as client:
        client.acl_setuser("operator", enabled=True, passwords=[f"+{PASSWORD}"], **may)


@pytest.fixture(scope="module")
def broker_url():
    with guarded_broker() as (_, url):
        yield url


@pytest.fixture(scope="module")
def host(broker_url):
    with SimulatedMLX(flavour="vllm_batched", models=[MODEL], api_key=API_KEY) as mlx:
        instances = {"local": {"base_url": mlx.base_url, "api_key": API_KEY, "models": {MODEL: {}}}}
        with running_host(broker_url, instances, host="mini-7") as processes:
            yield processes


@pytest.fixture
def unserved(broker_url):
    """A request that waits in a lane that nobody serves."""
    with Router(Settings(broker_url=broker_url)) as router, waiting_request(router):
        yield
    with redis.Redis.from_url(broker_url) as client:
        client.delete(*client.keys(f"{UNKNOWN}*"))


@contextmanager
def waiting_request(router):
    router.registry.require_offered = lambda *_: None
    with router.stream_chat("never-served", [{"role": "user", "content": PROMPT}], timeout=WITHIN):
        yield


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def status(url, *options):
    """Its exit code, and what it prints."""
    environ = {**os.environ, "FLEET_BROKER_URL": url}
    done = subprocess.run([*STATUS, *options], env=environ, capture_output=True, text=True, timeout=WITHIN)
    assert_discreet(done.stdout + done.stderr)
    return done


@contextmanager
def watched(url, *options):
    """A watch as a child of ours, until it is interrupted with SIGINT."""
    process = ChildProcess("fleet-worker status", [*STATUS, *options], {"FLEET_BROKER_URL": url})
    try:
        yield process
        process.signal(signal.SIGINT)
        assert process.wait(WITHIN) == 130
    finally:
        process.stop()
    assert_discreet(process.output)


def assert_discreet(output):
    for word in (PASSWORD, API_KEY, PROMPT, "Traceback"):
        assert word not in output


def test_it_shows_instances_and_lanes(host, unserved, broker_url):
    done = status(broker_url)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert next(row for row in rows if row[:1] == ["local@mini-7"])[1:5] == ["available", MODEL, "0", "1"]
    assert [f"llm.fleet.chat.{MODEL}", "0", "-", "1"] in rows
    marked = next(row for row in rows if row[:1] == [UNKNOWN])
    assert (marked[1], marked[3:]) == ("1", ["0", *UNSERVED.split()])
    assert "\x1b" not in done.stdout


def test_its_json_is_one_object(host, unserved, broker_url):
    done = status(broker_url, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    seen = json.loads(done.stdout)
    assert list(seen) == ["instances", "models", "lanes"]
    assert (seen["instances"][0]["node"], seen["instances"][0]["ready"]) == ("local@mini-7", True)
    assert seen["models"][0]["model"] == MODEL
    (marked,) = [each for each in seen["lanes"] if each["unserved"]]
    assert (marked["lane"], marked["depth"], marked["nodes"]) == (UNKNOWN, 1, 0)
    assert 0 < marked["oldest_age"] < WITHIN


@pytest.mark.rest
def test_a_watch_goes_on_until_ctrl_c(host, broker_url):
    """In JSON it is an object per line."""
    with watched(broker_url, "--watch", "0.1") as tables, watched(broker_url, "--json", "--watch", "0.1") as in_json:
        tables.wait_for(lambda _: tables.output.count("local@mini-7") > 2, WITHIN)
        in_json.wait_for(lambda _: len(in_json.lines) > 2, WITHIN)
    assert "\x1b" not in tables.output
    seen = [json.loads(line) for line in in_json.lines if line.strip()]
    assert {each["instances"][0]["node"] for each in seen} == {"local@mini-7"}


@pytest.mark.rest
def test_a_terminal_is_redrawn_and_left_as_it_was(host, unserved, broker_url, monkeypatch):
    monkeypatch.setenv("FLEET_BROKER_URL", broker_url)
    terminal, theirs = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
    process = subprocess.Popen([*STATUS, "--watch", "0.1"], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        shown = read_until(terminal, lambda text: text.count("local@mini-7") > 2)
        process.send_signal(signal.SIGINT)
        shown += read_until(terminal, lambda text: False)
        assert process.wait(WITHIN) == 130
    finally:
        process.kill()
        process.wait(WITHIN)
        os.close(terminal)
    assert_discreet(shown)
    assert any("\x1b[1;31m" in line and UNSERVED in line for line in shown.splitlines())
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


def read_until(terminal, true):
    """What a terminal shows, up to then or to the end."""
    shown = b""
    while not true(shown.decode(errors="replace")):
        try:
            more = os.read(terminal, 65536)
        except OSError:  # so Linux says that the process has ended
            break
        if not more:
            break
        shown += more
    return shown.decode(errors="replace")


@pytest.mark.rest
def test_a_watch_that_loses_its_broker_says_so_and_goes_on():
    with guarded_broker() as (broker, url), watched(url, "--watch", "0.1") as watch:
        watch.wait_for("No registry node answers", WITHIN)
        broker.stop()
        watch.wait_for("does not run: nothing listens there", WITHIN)
        broker.start()
        guard(broker)
        count = watch.output.count("No registry node answers")
        watch.wait_for(lambda _: watch.output.count("No registry node answers") > count, WITHIN)


@pytest.mark.rest
def test_the_host_that_answers_last_is_seen_too():
    """It may be the only one that serves a lane."""
    with guarded_broker() as (_, url), answering_hosts(url, {"mini-1": 0.0, "mini-2": 0.6}):
        seen = json.loads(status(url, "--json").stdout)
    assert [each["host"] for each in seen["instances"]] == ["mini-1", "mini-2"]


@contextmanager
def answering_hosts(url, pauses):
    """Registry nodes that each answer a router so many seconds after the one before."""
    ended = threading.Event()

    def answer(channel):
        for host, pause in pauses.items():
            ended.wait(pause)
            instance = {"offering": {"instance": "local", "model": READINESS}, "health": {"status": "available"}}
            event = RegistryEvent.of("offering_available", **instance, runtime={"node": f"local@{host}"}, capacity={})
            announcement = Announcement(v=1, host=host, interval=15.0, events=[event])
            producer = Producer(channel, registry_exchange("redis"), routing_key="llm.registry.offering_available")
            producer.publish(announcement.encode(), content_type="application/json", content_encoding="utf-8")

    def listen():
        with connection, Consumer(channel, [ask_queue("redis")], on_message=lambda _: answer(channel), no_ack=True):
            while not ended.is_set():
                with suppress(TimeoutError):
                    connection.drain_events(timeout=0.2)

    connection = Connection(url)
    channel = connection.channel()
    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(WITHIN)


@pytest.mark.rest
def test_without_a_registry_node_the_lanes_are_shown_all_the_same():
    with guarded_broker() as (_, url), Router(Settings(broker_url=url)) as router, waiting_request(router):
        text, in_json = at_once([url], [url, "--json"])
    assert (text.returncode, text.stderr) == (0, "")
    assert NO_REGISTRY_NODE in text.stdout
    row = next(line.split() for line in text.stdout.splitlines() if line.startswith(UNKNOWN))
    assert (row[1], row[3:]) == ("1", ["?"])  # perhaps it is served
    seen = json.loads(in_json.stdout)
    assert (seen["instances"], seen["lanes"][0]["lane"], seen["lanes"][0]["nodes"]) == ([], UNKNOWN, None)
    assert NO_REGISTRY_NODE in in_json.stderr


@pytest.mark.rest
def test_a_broker_that_is_not_there_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("FLEET_ROUTER__CONNECT_TIMEOUT", "0.3")
    port = free_port()
    url = f"redis://operator:{PASSWORD}@127.0.0.1:{port}/0"
    for done in at_once([url], [url, "--json"], [url, "--watch"]):
        assert (done.returncode, done.stdout) == (69, "")
        assert f"127.0.0.1:{port}" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "often"])
def test_seconds_that_make_no_sense_are_refused(monkeypatch, capsys, seconds):
    monkeypatch.setattr(sys, "argv", ["fleet-worker", "status", "--watch", seconds])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().out) == (2, "")


def at_once(*calls):
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda call: status(*call), calls))
