"""The command line where it needs neither a broker nor a process of its own."""

from importlib.metadata import version

import pytest

from tests.brokers import free_port
from tests.commands import fleet_worker
from tests.mlx_clients import took_less_than

MODEL = "sim-chat"


def assert_refused(done, exit_code, *words):
    """One line says why, and nothing is on standard output."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (exit_code, "", 1), done.stderr
    for word in ("fleet-worker: ", *words):
        assert word in done.stderr


def test_help_shows_every_command_and_examples():
    done = fleet_worker("--help")
    assert done.returncode == 0
    for word in ("demo", "worker", "chat", "embed", "doctor", "status", "FLEET_CONFIG", "Examples:"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "name", ["demo", "worker", "up", "service", "chat", "embed", "doctor", "status", "drain", "restart"]
)
def test_every_command_explains_itself(name):
    done = fleet_worker(f"{name} --help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: fleet-worker {name}" in done.stdout


def test_the_version_is_that_of_the_package():
    assert fleet_worker("--version").stdout == f"fleet-worker, version {version('fleet-worker')}\n"


BAD_INPUT = {
    "an empty prompt": (f"chat {MODEL} ''", ""),
    "an empty standard input": (f"chat {MODEL} -", ""),
    "a standard input that is no text": (f"chat {MODEL} -", b"\xff\xfe"),
    "a model without a name": ("chat '' Hello", ""),
    "an endless timeout": (f"chat {MODEL} Hello --timeout inf", ""),
    "an embedding without an end": (f"embed {MODEL} a --timeout inf", ""),
    "a temperature that is no number": (f"chat {MODEL} Hello --temperature nan", ""),
    "an empty text": (f"embed {MODEL} a ''", ""),
    "no text at all": (f"embed {MODEL} -", ""),
}


@pytest.mark.parametrize(("line", "given"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_sent(line, given, monkeypatch):
    """Nothing could be sent: there is no broker."""
    monkeypatch.setenv("FLEET_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")
    assert_refused(fleet_worker(line, given), 64)


@pytest.mark.parametrize(
    "line",
    [
        "sing",
        "chat only-a-model",
        f"chat {MODEL} Hello --max-tokens 0",
        f"chat {MODEL} Hello --timeout nan",
        f"chat {MODEL} Hello --queue-timeout 0",
        f"embed {MODEL} a --queue-timeout soon",
        f"embed {MODEL}",
        "drain local@mini --wait=nan",
        "restart",
        "restart --all local@mini",
        "restart local@mini --timeout 0",
        "status --watch=nan",
        "status --watch=0",
    ],
)
def test_a_wrong_command_line_is_explained(line):
    done = fleet_worker(line)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: fleet-worker" in done.stderr
    assert "Error: " in done.stderr


@pytest.mark.parametrize(
    "line", [f"chat {MODEL} Hello", f"embed {MODEL} a", "status", "up", "reload", "drain a@b", "restart a@b"]
)
def test_a_configuration_that_is_not_there_is_one_line(line, monkeypatch, tmp_path):
    monkeypatch.setenv("FLEET_CONFIG", str(tmp_path / "nowhere.toml"))
    assert_refused(fleet_worker(line), 78, "FLEET_CONFIG", "nowhere.toml")


@pytest.mark.parametrize("line", [f"chat {MODEL} Hello", f"embed {MODEL} a"])
def test_a_broker_that_is_not_there_is_named_without_its_password(line, monkeypatch):
    port = free_port()
    monkeypatch.setenv("FLEET_BROKER_URL", f"redis://operator:hush-hush@127.0.0.1:{port}/0")
    monkeypatch.setenv("FLEET_ROUTER__CONNECT_TIMEOUT", "0.5")
    done = fleet_worker(line)
    assert_refused(done, 69, f"127.0.0.1:{port}", "FLEET_BROKER_URL")
    assert "hush" not in done.stderr


@pytest.mark.parametrize("line", [f"chat {MODEL} Hello", f"embed {MODEL} a", "status", "status --watch"])
def test_a_broker_that_does_not_run_is_told_at_once_with_its_cause(line, monkeypatch):
    monkeypatch.setenv("FLEET_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")
    monkeypatch.delenv("FLEET_CONFIG", raising=False)
    words = ("does not run: nothing listens there: start it", "which is not set")
    with took_less_than(5):  # router.connect_timeout is 10 s
        assert_refused(fleet_worker(line), 69, *words)


def test_a_host_without_a_file_is_told_to_name_one(monkeypatch):
    monkeypatch.delenv("FLEET_CONFIG", raising=False)
    assert_refused(fleet_worker("up"), 78, "FLEET_CONFIG is not set, so no file was read: export FLEET_CONFIG=")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "drain --wait local@mini",
            "it takes a number of seconds; put the node before it: fleet-worker drain local@",
        ),
        ("status --watch abc", "'--watch': it takes a number of seconds\n"),
    ],
)
def test_seconds_that_are_no_number_are_explained(line, said):
    assert said in fleet_worker(line).stderr


def test_no_summary_is_cut_in_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "..." not in fleet_worker("--help").stdout.partition("Commands:")[2]
