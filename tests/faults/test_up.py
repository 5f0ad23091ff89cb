"""`fleet-worker up` with real nodes: whatever is killed, what runs is finished, and the fleet serves again."""

import os
import re
import signal

import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import python
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import SimulatedMLX, embedded_broker, worker_toml
from tests.ups import is_gone, running_up

CHAT = "sim-chat"
HELLO = [{"role": "user", "content": "Hello"}]
TOKENS = 40
WITHIN = 20.0


@pytest.fixture(scope="module")
def broker_url():
    with embedded_broker() as url:
        yield url


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(models=[CHAT], token_interval=0.02, tokens=1000) as server:
        yield server


@pytest.fixture
def router(broker_url):
    with Router(Settings(broker_url=broker_url)) as router:
        yield router


@pytest.fixture
def up(broker_url, mlx, tmp_path):
    """Start one, as often as wanted, on the same host."""
    config = tmp_path / "worker.toml"
    instance = {"base_url": mlx.base_url, "models": {CHAT: {}}}
    config.write_text('host = "mini"\n' + worker_toml("local", instance))
    environment = {
        "FLEET_CONFIG": str(config),
        "FLEET_STATE_DIR": str(tmp_path / "state"),
        "FLEET_BROKER_URL": broker_url,
    }

    return lambda: running_up(python("-m", "fleet_worker", "up"), environment)


def pid_of(process, node):
    return int(re.findall(rf"{node} starts, pid (\d+)", process.output)[-1])


def answered(router):
    return router.chat(CHAT, HELLO, max_tokens=3, timeout=WITHIN).content == "".join(
        reply_tokens(HELLO, 3, tokens=1000)
    )


def test_a_killed_node_serves_again_and_a_stop_delivers_what_is_running(up, router):
    with up() as process:
        process.wait_for("local@mini is ready", WITHIN)
        assert answered(router)
        os.kill(pid_of(process, "local@mini"), signal.SIGKILL)
        process.wait_for("local@mini was killed by signal 9, starts again at once", WITHIN)
        process.wait_for(lambda _: process.output.count("local@mini is ready") == 2, WITHIN)
        assert answered(router)
        stream = router.stream_chat(CHAT, HELLO, max_tokens=TOKENS, timeout=WITHIN)
        next(stream)
        process.signal(signal.SIGTERM)
        assert delivered(stream)
        assert process.wait(WITHIN) == 0
        assert is_gone(process)
        assert "/local@mini] Task fleet.stream_chat" in process.output  # every line says whose it is


def delivered(stream):
    for _ in stream:
        pass
    return stream.response.content == "".join(reply_tokens(HELLO, TOKENS, tokens=1000))


@pytest.mark.rest
def test_when_up_is_killed_its_nodes_finish_their_work_and_end_and_another_up_waits_for_that(up, router, mlx):
    with up() as killed, mlx.held(at_token=5):
        killed.wait_for("local@mini is ready", WITHIN)
        stream = router.stream_chat(CHAT, HELLO, max_tokens=TOKENS, timeout=WITHIN)
        next(stream)
        killed.signal(signal.SIGKILL)
        with up() as successor:
            successor.wait_for("local@mini waits until its earlier process has ended", WITHIN)
            assert "local@mini is ready" not in successor.output
            mlx.release()
            assert delivered(stream)
            assert is_gone(killed)
            assert "local@mini ended\n" in killed.output
            successor.wait_for("local@mini is ready", WITHIN)
            assert answered(router)


def test_nodes_that_still_start_when_up_is_killed_end_too(up):
    with up() as process:
        process.wait_for("local@mini starts, pid", WITHIN)
        process.signal(signal.SIGKILL)
        assert is_gone(process)
        assert "is ready" not in process.output
