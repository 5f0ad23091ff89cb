"""`fleet-worker doctor` as an operator runs it: a process, a real broker with a password, simulated MLX servers."""

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import redis

from fleet_worker.ops.availability_checks import availability
from fleet_worker.ops.doctor import CHECKS
from fleet_worker.testing import SimulatedMLX, running_node, worker_toml
from tests.brokers import Valkey, free_port

PASSWORD, API_KEY = "hush-hush-4711", "sk-never-shown-0815"
MODEL = "sim-chat"
DOCTOR = str(Path(sys.executable).with_name("fleet-worker"))
WITHIN = 30.0


@pytest.fixture(scope="module")
def valkey():
    """A broker that keeps what it has, and asks for a password."""
    with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
        client.config_set("appendonly", "yes")
        client.acl_setuser(
            "operator", enabled=True, passwords=[f"+{PASSWORD}"], keys="*", channels="*", commands=["+@all"]
        )
        yield valkey


@pytest.fixture(scope="module")
def broker_url(valkey):
    return valkey.url.replace("//", f"//operator:{PASSWORD}@")


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(flavour="vllm_batched", models=[MODEL], api_key=API_KEY) as server:
        yield server


@pytest.fixture(autouse=True)
def pmset(tmp_path, monkeypatch):
    """What a Mac says of its sleep, on any machine."""
    path = tmp_path / "bin" / "pmset"
    path.parent.mkdir()

    def says(minutes):
        path.write_text(f"#!/bin/sh\n[ \"$1\" = -g ] && echo 'Currently in use:\n sleep                {minutes}'\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    says(0)
    return says


@pytest.fixture
def configured(tmp_path, monkeypatch, broker_url):
    """Write a FLEET_CONFIG that only its owner may read."""
    monkeypatch.setenv("FLEET_BROKER_URL", broker_url)

    def write(text="", **instance):
        path = tmp_path / "worker.toml"
        table = worker_toml("local", {"api_key": API_KEY, "models": {MODEL: {}}, **instance}) if instance else ""
        path.write_text(f"{text}\n{table}")
        path.chmod(0o600)
        monkeypatch.setenv("FLEET_CONFIG", str(path))
        return path

    return write


def doctor(*options, command=(DOCTOR, "doctor")):
    """Its exit code, and what it prints: no secret and no traceback in any case."""
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=WITHIN)
    assert PASSWORD not in done.stdout + done.stderr
    assert API_KEY not in done.stdout + done.stderr
    assert "operator" not in done.stdout
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def findings(*options, command=(DOCTOR, "doctor")):
    code, lines = doctor("--json", *options, command=command)
    return code, [tuple(json.loads(line).values()) for line in lines]


def complaints(found):
    return {(severity, check): f"{text} -> {advice}" for severity, check, text, advice in found if severity != "ok"}


def test_where_all_is_well_every_check_has_one_good_word(configured, broker_url, mlx):
    instance = {"base_url": mlx.base_url, "api_key": API_KEY, "models": {MODEL: {}}}
    configured('host = "mini"', **instance)
    with running_node(broker_url, "local@mini", **instance):
        code, lines = doctor()
    assert (code, {line.split()[0] for line in lines}) == (0, {"ok"}), lines
    said = iter(lines)
    for check in CHECKS:
        if check is availability:  # it says nothing without its section
            continue
        assert any(line.split(maxsplit=1)[1].startswith(check.__name__.replace("_", " ")) for line in said), lines
    assert lines[1].endswith(" ms")
    assert "Valkey" in lines[1]
    assert "nodes that answer: 1 (local@mini)" in lines[-1]


@pytest.mark.rest
def test_an_instance_of_this_host_whose_node_does_not_answer_is_named(configured, broker_url, mlx):
    instance = {"base_url": mlx.base_url, "api_key": API_KEY, "models": {MODEL: {}}}
    configured('host = "mini"', **instance)
    with running_node(broker_url, "local@mini-2", **instance):
        code, found = findings()
    assert (code, complaints(found).keys()) == (1, {("warning", "fleet")})
    assert found[-1][2] == "no answer from this host's local@mini"


def test_where_much_is_wrong_all_of_it_is_said_at_once(configured, valkey, mlx, pmset):
    path = configured(base_url=f"http://127.0.0.1:{free_port()}")
    path.chmod(0o644)
    pmset(10)
    shell = ["/bin/sh", "-c", 'ulimit -Sn 512; exec "$0" doctor "$@"', DOCTOR]
    with redis.Redis.from_url(valkey.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            code, found = findings(command=shell)
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    said = complaints(found)
    assert code == 2
    assert f"chmod 600 {path}" in said["warning", "configuration"]
    assert "maxmemory-policy is allkeys-lru" in said["error", "broker"]
    assert "does not accept connections" in said["error", "instances.local"]
    assert "512" in said["warning", "open files"]
    assert "sleep after 10 min" in said["warning", "sleep"]
    assert "no node answers" in said["warning", "fleet"]
    assert len(said) == 6


def test_a_broker_that_is_down_is_an_error_at_once(configured, mlx, monkeypatch):
    port = free_port()
    monkeypatch.setenv("FLEET_BROKER_URL", f"redis://operator:{PASSWORD}@127.0.0.1:{port}/0")
    configured(base_url=mlx.base_url)
    started = time.monotonic()
    code, found = findings()
    assert time.monotonic() - started < 5
    said = complaints(found)
    assert (code, said.keys()) == (2, {("error", "broker"), ("warning", "clock"), ("warning", "fleet")})
    assert f"127.0.0.1:{port}" in said["error", "broker"]
    assert "start it" in said["error", "broker"]
    assert ("ok", "instances.local") in {finding[:2] for finding in found}


@pytest.mark.rest
def test_a_frozen_broker_and_a_frozen_server_are_told_in_time(configured, valkey):
    with closing(socket.create_server(("127.0.0.1", 0))) as frozen:
        configured(base_url=f"http://127.0.0.1:{frozen.getsockname()[1]}")
        valkey.signal(signal.SIGSTOP)
        started = time.monotonic()
        try:
            code, found = findings()
        finally:
            valkey.signal(signal.SIGCONT)
    assert time.monotonic() - started < 9
    said = complaints(found)
    assert code == 2
    assert "does not answer in time" in said["error", "broker"]
    assert "does not answer in time" in said["error", "instances.local"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (f"broker_url = '{PASSWORD}'", "broker_url"),
        pytest.param(f"[instances.local]\napi_keyy = '{API_KEY}'", "api_keyy", marks=pytest.mark.rest),
        pytest.param("[instances.local", "not valid TOML", marks=pytest.mark.rest),
    ],
)
def test_a_configuration_that_cannot_be_used_is_told_first(text, word, configured, monkeypatch, pmset):
    configured(text)
    monkeypatch.delenv("FLEET_BROKER_URL")
    pmset(1)
    code, found = findings()
    assert code == 78
    checks = [finding[1] for finding in found]
    assert list(dict.fromkeys(checks)) == ["configuration", "versions", "open files", "sleep", "boot"]
    assert word in found[0][2]
    assert found[checks.index("sleep")][0] == "warning"


@pytest.mark.rest
def test_a_router_has_a_warning_only(configured, broker_url):
    configured("[router]\ntimeout = 60.0")
    code, found = findings()
    assert (code, complaints(found).keys()) == (1, {("warning", "configuration"), ("warning", "fleet")})
