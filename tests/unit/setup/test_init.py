"""`fleet-worker init`: what it writes, by options and by answers."""

import stat
import tomllib

import click
import pytest

from fleet_worker.ops import doctor
from fleet_worker.ops.findings import Finding
from fleet_worker.setup import init_command, instances, local_models, local_servers, next_steps
from fleet_worker.setup.local_models import LocalModel
from fleet_worker.setup.local_servers import LocalServer
from fleet_worker.testing import SimulatedMLX
from tests.brokers import free_port
from tests.commands import fleet_worker
from tests.unit.test_cli import assert_refused

BROKER = "redis://:hush@broker:6379/0"
URL = "http://127.0.0.1:8080"
QWEN = "mlx-community/Qwen3-4B-4bit"
SERVER = LocalServer(URL, "mlx_lm", ("a", "b"), QWEN)
LOADED = {"qwen3-4b-4bit": {"backend": "default_model", "chat_template": QWEN}}
SERVE = "mlx_lm.server --model " + QWEN + " --port {port}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A host with a home of its own; `here(...)` says what there is."""

    def found(*, servers=(), models=(), program=True):
        for module in (instances, local_servers):
            monkeypatch.setattr(module, "local_servers", lambda: list(servers))
        for module in (instances, local_models):
            monkeypatch.setattr(module, "local_models", lambda: [LocalModel(*each) for each in models])
        monkeypatch.setattr(instances, "has_program", lambda: program)
        monkeypatch.setattr(instances, "memory", lambda: 16 * 10**9)
        return tmp_path / "fleet" / "worker.toml"

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLEET_CONFIG", raising=False)
    monkeypatch.setattr(doctor, "examine", lambda **_: [])
    monkeypatch.chdir(tmp_path)
    found()
    return found


@pytest.fixture
def terminal(monkeypatch):
    """Answers are typed."""
    monkeypatch.setattr(init_command, "_is_terminal", lambda: True)

    def answered(line, *answers):
        return fleet_worker(f"init {line}", "".join(f"{answer}\n" for answer in answers))

    return answered


def written(path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return tomllib.loads(path.read_text())


def test_the_servers_that_run_here_are_taken(here):
    path = here(servers=[SERVER, LocalServer("http://127.0.0.1:8081", "vllm_mlx", ("bge-m3",))])
    done = fleet_worker(f"init --yes --broker {BROKER} --host mini-7")
    assert (done.returncode, done.stderr) == (0, "")
    file = written(path)
    assert (file["broker_url"], file["host"]) == (BROKER, "mini-7")
    local, embed = file["instances"]["local"], file["instances"]["embed"]
    assert (local["base_url"], local["models"], local["limits"]) == (URL, LOADED, {"concurrency": 4})
    assert embed["fleet"]["capabilities"] == ["embed"]
    assert "hush" not in done.stdout
    assert done.stdout.splitlines()[-4:] == [
        "Next:",
        "  fleet-worker doctor           # what is wrong here",
        "  fleet-worker up               # run it in this terminal",
        "  fleet-worker service install  # or for good",
    ]


def test_without_a_server_one_is_proposed_for_the_largest_model_that_fits(here):
    path = here(models=[("org/large", "chat", 60 * 10**9), (QWEN, "chat", 2 * 10**9), ("a", "embedding", 5)])
    assert fleet_worker(f"init --yes --broker {BROKER}").returncode == 0
    local = written(path)["instances"]["local"]
    assert (local["serve"], local["models"], "base_url" in local) == (SERVE, LOADED, False)


OPTIONS = {
    "a server, its name and its slots": (
        "--server {url}/v1/ --name chats --concurrency 2",
        {"chats": ("{url}", None, {"sim-chat": {"backend": "sim-chat"}}, 2)},
    ),
    "a server that is not there now": (
        "--server http://127.0.0.1:{free} --model org/M",
        {"local": ("http://127.0.0.1:{free}", None, {"m": {"backend": "org/M"}}, 4)},
    ),
    "a command line of mlx_lm": (
        f"--serve '{SERVE}'",
        {"local": (None, SERVE, LOADED, 4)},
    ),
    "another command line": (
        "--serve 'vllm-mlx serve x --port {{port}}' --model org/M",
        {"local": (None, "vllm-mlx serve x --port {port}", {"m": {"backend": "org/M"}}, 4)},
    ),
    "a model": (f"--model {QWEN}", {"local": (None, SERVE, LOADED, 4)}),
}


@pytest.mark.parametrize(("options", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_each_answer_is_an_option(options, expected, here):
    path = here()
    with SimulatedMLX(flavour="vllm_batched", models=["sim-chat"]) as mlx:
        places = {"url": mlx.base_url, "free": free_port()}
        options = options if "mlx_lm" in options else options.format(**places)
        done = fleet_worker(f"init --yes --broker {BROKER} {options}")
    assert (done.returncode, done.stderr) == (0, "")
    assert {
        name: (each.get("base_url"), each.get("serve"), each["models"], each["limits"]["concurrency"])
        for name, each in written(path)["instances"].items()
    } == {name: (url and url.format(**places), *rest) for name, (url, *rest) in expected.items()}


def test_the_file_is_the_one_that_is_named(here, tmp_path):
    here(servers=[SERVER])
    done = fleet_worker(f"init --yes --broker {BROKER} --output 'a b.toml'")
    assert written(tmp_path / "a b.toml")["broker_url"] == BROKER
    assert f"fleet-worker up --config '{tmp_path}/a b.toml' " in done.stdout
    assert fleet_worker(f"--config c.toml init --yes --broker {BROKER}").returncode == 0
    assert written(tmp_path / "c.toml")["broker_url"] == BROKER


def test_a_broker_is_read_from_standard_input(here):
    path = here(servers=[SERVER])
    assert fleet_worker("init --yes --broker -", f"{BROKER}\n").returncode == 0
    assert written(path)["broker_url"] == BROKER


def test_what_is_no_broker_on_standard_input_is_refused(here):
    path = here(servers=[SERVER])
    done = fleet_worker("init --yes --broker -", "http://h:hush@x\n")
    assert (done.returncode, path.exists()) == (2, False)
    assert "the URL of the broker must begin with redis://" in done.stderr
    assert "hush" not in done.stderr


def test_a_file_that_is_there_stays_without_force(here, tmp_path):
    path = here(servers=[SERVER])
    path.parent.mkdir()
    path.write_text("mine")
    assert_refused(fleet_worker(f"init --yes --broker {BROKER}"), 78, f"{path} exists already: --force replaces it")
    assert path.read_text() == "mine"
    assert fleet_worker(f"init --yes --broker {BROKER} --force").returncode == 0
    assert written(path)["broker_url"] == BROKER


WRONG = {
    "no terminal": ("--broker {broker}", "there is no terminal to ask at: add --yes, and --broker URL; --server URL"),
    "no broker": ("--yes", "--broker URL is needed"),
    "a broker that is none": (
        "--yes --broker http://h:hush@x",
        "Invalid value for '--broker': it must begin with redis",
    ),
    "two kinds of server": ("--yes --broker {broker} --server http://h --serve x", "give one of them"),
    "a server that is no URL": ("--yes --broker {broker} --server 8080", "it must be an http:// or https:// URL"),
    "a host with a space": ("--yes --broker {broker} --host 'a b'", "Invalid value for '--host'"),
    "a name for two": ("--yes --broker {broker} --name a", "--name is for one instance, and there are 2"),
}


@pytest.mark.parametrize(("line", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_command_line_is_explained(line, said, here):
    path = here(servers=[SERVER, SERVER])
    done = fleet_worker(f"init {line.format(broker=BROKER)}")
    assert (done.returncode, done.stdout, path.exists()) == (2, "" if "name" not in line else done.stdout, False)
    assert said in done.stderr
    assert "hush" not in done.stderr


REFUSED = {
    "nothing here": ("", "no MLX server runs on this host"),
    "no server there": ("--server http://127.0.0.1:{free}", "start it, or name its model too: --model NAME"),
    "a command line without a model": ("--serve 'x --port {{port}}'", "--serve names no model: add --model NAME"),
    "half a command line": ("--serve 'x \"' --model m", "--serve has a quote that is not closed"),
    "a command line without a port": ("--serve x --model m", "serve must contain {port}"),
    "an instance with a space": ("--model m --name 'a b'", "an instance is named with letters"),
}


@pytest.mark.parametrize(("line", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_written(line, said, here):
    path = here()
    done = fleet_worker(f"init --yes --broker {BROKER} {line.format(free=free_port())}")
    assert (done.returncode, path.exists()) == (78, False)
    assert said in done.stderr


def test_on_a_terminal_it_asks(here, terminal):
    path = here(servers=[SERVER, LocalServer("http://127.0.0.1:8081", "mlx_lm", ("a", "b"))])
    done = terminal("", "nonsense", BROKER, "mini-9", "y", "y", "org/B", "n")
    assert done.returncode == 0, done.stderr
    file = written(path)
    assert (file["broker_url"], file["host"]) == (BROKER, "mini-9")
    assert [each["models"] for each in file["instances"].values()] == [
        LOADED,
        {"b": {"backend": "default_model", "chat_template": "org/B"}},
    ]
    assert "the URL of the broker must begin with redis://" in done.stdout + done.stderr


def test_on_a_terminal_it_proposes_a_model(here, terminal):
    path = here(models=[("org/large", "chat", 60 * 10**9), (QWEN, "chat", 2 * 10**9)])
    done = terminal(f"--broker {BROKER} --no-service", "", "")
    assert done.returncode == 0, done.stderr
    assert written(path)["instances"]["local"]["serve"] == SERVE
    assert f"  {QWEN}    2.0 GB\n" in done.stdout


def test_the_service_can_be_installed_at_once(here, monkeypatch):
    here(servers=[SERVER])
    monkeypatch.setenv("PATH", "/nowhere")
    done = fleet_worker(f"init --yes --broker {BROKER} --service")
    assert done.returncode == 69
    assert "nothing was installed: there is no systemctl on the PATH" in done.stderr


@pytest.mark.parametrize(("severity", "code"), [("ok", 0), ("warning", 0), ("error", 1)])
def test_an_error_of_the_check_is_an_exit_code_and_the_file_stays(severity, code, here, monkeypatch):
    path = here(servers=[SERVER])
    monkeypatch.setattr(doctor, "examine", lambda **_: [Finding("ok", "here"), Finding(severity, "the broker")])
    done = fleet_worker(f"init --yes --broker {BROKER}")
    assert (done.returncode, done.stderr) == (code, "")
    assert ("the broker" in done.stdout) is (severity != "ok")
    assert written(path)["broker_url"] == BROKER
    assert "Next:\n" in done.stdout


def test_a_service_is_installed_whatever_the_check_finds(here, monkeypatch):
    here(servers=[SERVER])
    installed = []
    monkeypatch.setattr(next_steps, "install_service", click.Command("install", callback=lambda: installed.append(1)))
    monkeypatch.setattr(doctor, "examine", lambda **_: [Finding("error", "the broker")])
    done = fleet_worker(f"init --yes --broker {BROKER} --service")
    assert (done.returncode, installed) == (1, [1])
