"""A host joins a fleet on RabbitMQ by the line that `fleet-worker invite` prints, and serves it. On Valkey:
`tests/unit/setup/test_join.py` and `tests/integration/test_quickstart.py`."""

import json
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import free_port
from fleet_worker.testing import SimulatedMLX
from tests.commands import fleet_worker
from tests.flow.test_readiness import wait_until
from tests.minis import UP
from tests.mlx_clients import HELLO
from tests.ups import running_up

pytestmark = [
    pytest.mark.rest,
    pytest.mark.timeout(120),
    pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True),
]

MODEL, HOST = "of-one-that-joins", "joins"


@pytest.fixture
def server(monkeypatch):
    with SimulatedMLX(flavour="vllm_batched", models=[MODEL]) as mlx:
        port = urlsplit(mlx.base_url).port
        monkeypatch.setattr("fleet_worker.setup.local_servers.local_servers.__defaults__", ((port,),))
        yield mlx


@pytest.fixture
def folder():
    """One whose path is short enough for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield Path(folder)


def invited(url, folder, options="", given=""):
    file = folder / "of-fleet.toml"
    file.write_text(f'broker_url = "{url}"\n', "utf-8")
    done = fleet_worker(f"invite --config {file} --address localhost {options}", given)
    assert done.returncode == 0, done
    return done


def joined(line, path, code=0):
    """Join by the whole line, as it was printed; return what was said."""
    done = fleet_worker(f"join - --yes --output {path}", given=line)
    assert done.returncode == code, done
    return done


def test_a_host_joins_and_serves_and_the_next_one_of_its_name_gets_a_number(broker, server, folder, monkeypatch):
    monkeypatch.setattr("fleet_worker.setup.join.own_host", lambda: HOST)
    path, other = folder / "one" / "worker.toml", folder / "two" / "worker.toml"
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "one"))
    line = invited(broker.url, folder)
    assert "this line holds the account of the broker, and stays valid" in line.stderr
    assert f"{HOST} belongs to the fleet at localhost:" in joined(line.stdout, path).stdout
    environment = {"FLEET_CONFIG": str(path), "XDG_STATE_HOME": str(folder / "one")}
    with running_up(UP, environment), Router(Settings(broker_url=broker.url)) as router:
        wait_until(lambda: MODEL in router.registry.models(ready=True), 60)
        assert router.chat(MODEL, HELLO, max_tokens=1, timeout=20).node == f"local@{HOST}"
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "two"))
        monkeypatch.setattr("fleet_worker.setup.join.ANSWERS_WITHIN", 3.0)
        again = joined(invited(broker.url, folder).stdout, other)
    assert f"{HOST}-2 belongs to the fleet" in again.stdout


def test_a_host_gets_an_account_of_its_own(broker, server, tmp_path):
    broker.control("add_user", "mini", "hush/hush")
    broker.control("set_permissions", "mini", r"llm\.", r"llm\.|^amq\.default$", r"llm\.")
    line = invited(broker.url, tmp_path, "--account", "mini:hush/hush")
    done = joined(line.stdout, path := tmp_path / "worker.toml")
    assert "hush" not in line.stdout + line.stderr + done.stdout + done.stderr
    found = [json.loads(each) for each in fleet_worker(f"doctor --json --config {path}").stdout.splitlines()]
    of_broker = [each for each in found if each["check"] == "broker"]
    assert (of_broker[0]["severity"], of_broker[0]["found"][:8]) == ("ok", "RabbitMQ")
    assert "mini:hush%2Fhush@localhost" in path.read_text("utf-8")
    assert "guest" not in path.read_text("utf-8")


def test_a_broker_that_is_away_leaves_no_file_and_a_wrong_account_is_told(broker, server, tmp_path):
    away = broker.url.replace(str(urlsplit(broker.url).port), str(free_port()))
    done = joined(invited(away, tmp_path).stdout, path := tmp_path / "worker.toml", code=69)
    assert "nothing listens there" in done.stderr
    assert not path.exists()
    wrong = joined(invited(broker.url, tmp_path, "--account", "nobody:hush-hush").stdout, path, code=1)
    assert "the user or the password" in wrong.stdout
    assert "hush" not in wrong.stdout + wrong.stderr
    assert path.exists()
