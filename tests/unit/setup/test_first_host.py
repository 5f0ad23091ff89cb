"""What quickstart writes on the first Mac."""

import re
import socket
import stat
import tomllib

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.gateway.accounts.keys import Keys
from fleet_worker.host import embedded_broker
from fleet_worker.settings import Settings
from fleet_worker.setup import first_host
from fleet_worker.setup.first_host import FirstHost, simulated


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Of a file in a folder that is not there yet, and has a name that needs quotes."""
    monkeypatch.setattr(first_host, "is_taken", lambda host, port: False)
    path = tmp_path / 'my "fleet" folder' / "worker.toml"
    monkeypatch.setenv("FLEET_CONFIG", str(path))
    return path


def written(path, **values):
    return FirstHost("mini-1", instances=simulated(), **values).write(path), Settings()


def test_it_is_a_configuration_that_runs_everything(path):
    _, settings = written(path, address="mini-1.local")
    assert (settings.up.broker, settings.up.gateway, settings.up.address) == (True, True, "mini-1.local")
    assert re.fullmatch(r"redis://:[0-9a-f]{48}@127\.0\.0\.1:6379/0", settings.broker_url)
    assert (settings.gateway.host, settings.gateway.port) == ("0.0.0.0", 4000)
    assert settings.host == "mini-1"
    assert list(settings.serving()) == ["local"]


def test_the_first_key_is_a_hash_in_a_file_for_its_owner_only(path):
    key, settings = written(path)
    assert Keys.load(settings.gateway.keys).find(key).name == "first"
    for file in path.parent.iterdir():
        assert key not in file.read_text("utf-8")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_fleet_for_this_host_only_listens_on_loopback(path):
    _, settings = written(path)
    assert (settings.gateway.host, settings.up.address) == ("127.0.0.1", "")
    assert "bind 127.0.0.1 -::1" in embedded_broker._configuration(settings)


def test_a_broker_of_ones_own_is_not_started(path):
    _, settings = written(path, broker_url="amqps://me:hush@rabbit//", address="mini-1")
    assert (settings.broker_url, settings.up.broker) == ("amqps://me:hush@rabbit//", False)


def test_a_file_that_exists_stays_and_gets_no_key(path):
    written(path)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(ConfigurationError, match="exists already"):
        FirstHost("mini-2").write(path)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_keys_that_are_there_already_stay(path):
    first, _ = written(path)
    path.unlink()
    second, settings = written(path)
    keys = Keys.load(settings.gateway.keys)
    assert [keys.find(key).name for key in (first, second)] == ["first", "first-2"]
    assert len(tomllib.loads(settings.gateway.keys.read_text("utf-8"))["keys"]) == 2


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_port_that_is_taken_is_replaced_by_the_next_free_one(everywhere):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert port < first_host.free_port(port, everywhere=everywhere) < port + first_host.TRIED_PORTS


def test_without_any_free_port_it_says_so(monkeypatch):
    monkeypatch.setattr(first_host, "is_taken", lambda host, port: True)
    with pytest.raises(ConfigurationError, match="from 4000 to 4099 are taken"):
        first_host.free_port(4000, everywhere=True)
