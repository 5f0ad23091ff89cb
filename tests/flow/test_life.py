"""One node of a name, and a node that follows its configuration while it works."""

import signal

import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import child, python
from fleet_worker.testing import SimulatedMLX, running_node, worker_toml
from tests.brokers import free_port

HELLO = [{"role": "user", "content": "Hello"}]
WITHIN = 20.0


@pytest.fixture(scope="module")
def server():
    with SimulatedMLX(models=["m"], token_interval=0.02, tokens=1000) as server:
        yield server


def started(broker, config):
    environment = {"FLEET_CONFIG": str(config), "FLEET_BROKER_URL": broker.url, "FLEET_STATE_DIR": str(config.parent)}
    command = python("-m", "celery", "-A", "fleet_worker", "worker", "-n", "one@test", "--loglevel", "INFO")
    return child("one@test", command, environment)


@pytest.mark.rest
def test_the_second_node_of_a_name_ends_with_a_clear_error(broker, server, tmp_path):
    instance = {"base_url": server.base_url, "models": {"m": {}}}
    config = tmp_path / "worker.toml"
    config.write_text(worker_toml("one", instance), "utf-8")
    with running_node(broker.url, "one@test", **instance) as first:
        with started(broker, config) as second:
            assert second.wait(WITHIN) == 78
            assert "another node is named one@test" in second.output
        assert not first.ended
        with Router(Settings(broker_url=broker.url)) as router:
            assert router.chat("m", HELLO, max_tokens=1, timeout=20).node == "one@test"


@pytest.fixture
def reloadable(broker, server, tmp_path):
    """A node, and how to give it another configuration."""
    config = tmp_path / "worker.toml"

    def configure(**values):
        config.write_text(worker_toml("one", {"base_url": server.base_url, **values}), "utf-8")

    configure(models={"m": {}})
    with started(broker, config) as node:
        node.wait_for("is ready", WITHIN)
        yield node, configure


@pytest.fixture
def held(router, server):
    """A stream that is held after some of its 20 tokens until the server releases it."""
    with server.held(at_token=5), router.stream_chat("m", HELLO, max_tokens=20, timeout=30) as stream:
        next(stream)
        yield stream


def test_a_reload_changes_what_is_offered_and_not_what_is_running(reloadable, held, server, router):
    node, configure = reloadable
    configure(models={"n": {"backend": "m"}})
    node.signal(signal.SIGHUP)
    node.wait_for("serves lane llm.fleet.chat.n", WITHIN)
    node.wait_for("leaves lane llm.fleet.chat.m", WITHIN)
    server.release()
    assert len([*held]) == 19
    assert router.chat("n", HELLO, max_tokens=1, timeout=20).model == "n"


def test_a_wrong_configuration_changes_nothing(reloadable, router):
    node, configure = reloadable
    configure(models={"m": {"context_window": -1}})
    node.signal(signal.SIGHUP)
    node.wait_for("keeps its old configuration", WITHIN)
    configure(models={}, model_whitelist=["nothing-like-it"])
    node.signal(signal.SIGHUP)
    node.wait_for("keeps its old configuration: instance one has nothing to offer", WITHIN)
    assert router.chat("m", HELLO, max_tokens=1, timeout=20).model == "m"
    assert "follows the new configuration" not in node.output


def test_what_a_running_node_cannot_change_ends_it_warmly(reloadable, held, server):
    node, configure = reloadable
    configure(models={"m": {}}, limits={"concurrency": 2})
    node.signal(signal.SIGHUP)
    node.wait_for("needs a new process", WITHIN)
    server.release()
    assert len([*held]) == 19
    assert node.wait(WITHIN) == 75


def test_a_node_that_was_asked_to_end_is_not_to_be_started_again_whatever_it_learns_meanwhile(reloadable, held, server):
    node, configure = reloadable
    node.signal(signal.SIGTERM)
    node.wait_for("leaves lane", WITHIN)
    configure(models={"m": {}}, limits={"concurrency": 2})
    node.signal(signal.SIGHUP)
    node.wait_for("needs a new process", WITHIN)
    server.release()
    assert len([*held]) == 19
    assert node.wait(WITHIN) == 0


ENDED_BY = [(signal.SIGTERM, 0), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "exit_code"), [ENDED_BY[0], pytest.param(*ENDED_BY[1], marks=pytest.mark.rest)])
def test_a_signal_ends_a_node_when_its_work_is_done(reloadable, held, server, number, exit_code):
    node, _ = reloadable
    node.signal(number)
    node.wait_for("leaves lane", WITHIN)
    server.release()
    assert len([*held]) == 19
    assert node.wait(WITHIN) == exit_code


@pytest.fixture
def waiting(broker, tmp_path):
    """A node whose MLX server is not there yet, how to give it another configuration, and where it looks."""
    config, port = tmp_path / "worker.toml", free_port()

    def configure(port=port, **values):
        config.write_text(worker_toml("one", {"base_url": f"http://127.0.0.1:{port}", **values}), "utf-8")

    configure(models={"m": {}})
    with started(broker, config) as node:
        node.wait_for("waits up to 60 s for an MLX server", WITHIN)
        yield node, configure, port


@pytest.mark.parametrize(("number", "exit_code"), ENDED_BY)
def test_a_signal_ends_a_node_that_waits_for_its_server_at_once(waiting, number, exit_code):
    node, _, _ = waiting
    node.signal(number)
    assert node.wait(WITHIN) == exit_code
    _, last = node.output.splitlines()
    assert last.endswith("INFO/one@test] one@test ends before it was ready")


def test_a_node_that_waits_for_its_server_follows_its_newest_configuration_once_it_is_ready(waiting):
    node, configure, port = waiting
    configure(models={"n": {"backend": "m"}})
    node.signal(signal.SIGHUP)
    node.wait_for("follows the new configuration when it is ready", WITHIN)
    configure(models={"m": {"context_window": -1}})
    node.signal(signal.SIGHUP)
    node.wait_for("keeps its old configuration", WITHIN)
    configure(models={"n": {"backend": "m"}})
    with SimulatedMLX(models=["m"], port=port):
        node.wait_for("serves lane llm.fleet.chat.n", WITHIN)
        assert not node.ended


def test_a_node_does_not_go_on_waiting_for_a_server_that_is_not_meant_any_more(waiting):
    node, configure, _ = waiting
    configure(port=free_port(), models={"m": {}})
    node.signal(signal.SIGHUP)
    assert node.wait(WITHIN) == 75


def test_an_old_configuration_that_turns_out_wrong_is_no_reason_not_to_try_the_new_one(broker, tmp_path):
    config, port = tmp_path / "worker.toml", free_port()
    instance = {"base_url": f"http://127.0.0.1:{port}"}
    config.write_text(worker_toml("one", {**instance, "model_whitelist": ["nothing-like-it"]}), "utf-8")
    with started(broker, config) as node:
        node.wait_for("waits up to", WITHIN)
        config.write_text(worker_toml("one", instance), "utf-8")
        node.signal(signal.SIGHUP)
        node.wait_for("follows the new configuration when it is ready", WITHIN)
        with SimulatedMLX(models=["m"], port=port):
            assert node.wait(WITHIN) == 75
    assert "has nothing to offer" in node.output
