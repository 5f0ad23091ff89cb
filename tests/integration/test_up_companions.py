"""`fleet-worker up` with its own broker and gateway, which are real, and with nodes that are programs of a line."""

import re
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fleet_worker.host.child_process import free_port
from fleet_worker.host.up_socket import ask
from fleet_worker.protocol.host_messages import Reload
from fleet_worker.settings import Settings
from fleet_worker.testing import worker_toml
from tests.mlx_clients import until
from tests.ups import is_gone, running_up, up_with

pytestmark = [pytest.mark.integration, pytest.mark.rest]

WITHIN = 20.0
NODE = """
import os, time
os.read(int(os.environ["FLEET_PARENT_PIPE"]), 1)
while os.path.exists(os.environ["LINGERS"]):
    time.sleep(0.01)
"""


class Host:
    """One with a broker, a gateway, and an instance."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.gateway_port, self.broker_port = free_port(), free_port()
        self.environment = {
            "FLEET_CONFIG": str(self.folder / "worker.toml"),
            "FLEET_STATE_DIR": str(self.folder / "state"),
            "LINGERS": str(self.folder / "lingers"),
        }
        self.settings = Settings(state_dir=self.folder / "state", host="mini")
        self.configure()

    def configure(self, password="a-password-of-this-test", **gateway):
        tables = [
            f'host = "mini"\nbroker_url = "redis://:{password}@127.0.0.1:{self.broker_port}/0"',
            "[up]\nbroker = true\ngateway = true\n[gateway]",
            *(f"{name} = {value}" for name, value in {"port": self.gateway_port, **gateway}.items()),
            worker_toml("local", {"base_url": "http://127.0.0.1:1"}),
        ]
        (self.folder / "worker.toml").write_text("\n".join(tables))

    @contextmanager
    def up(self):
        with running_up(up_with(NODE), self.environment) as process:
            yield process

    def broker(self):
        """The process ids of its broker."""
        shown = f"127.0.0.1:{self.broker_port}"  # in place of its arguments
        return [each.pid for each in psutil.process_iter(["cmdline"]) if shown in " ".join(each.info["cmdline"] or [])]


@pytest.fixture
def host():
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield Host(folder)


def at(process, text):
    process.wait_for(text, WITHIN)
    return process.output.index(text)


def test_everything_starts_after_the_broker_and_ends_before_it(host):
    """The gateway reads its keys again at a reload, or starts anew if it has to."""
    with host.up() as process:
        at(process, "gateway] serves http")
        accepts = at(process, "the server of up.broker accepts connections")
        assert accepts < min(at(process, f"{name} starts, pid") for name in ("local@mini", "registry@mini", "gateway"))
        assert len(host.broker()) == 1

        assert ask(host.settings, Reload(), WITHIN).text == "gateway reads its keys again"
        host.configure(drain_grace=3)
        assert ask(host.settings, Reload(), WITHIN).text == "gateway starts anew"
        process.wait_for(lambda _: process.output.count("gateway] serves http") == 2, WITHIN)
        host.configure(password="another-password")
        refused = ask(host.settings, Reload(), WITHIN).error
        assert "change by a restart of fleet-worker up only" in refused

        process.signal(signal.SIGTERM)
        assert process.wait(WITHIN) == 0
        assert is_gone(process)
        ends = process.output.index("the server of up.broker is told to end")
        for name in ("local@mini", "registry@mini", "gateway"):
            *_, ended = re.finditer(f"{name} (ended with exit code 0|was killed by signal 15)\n", process.output)
            assert ended.start() < ends
    assert host.broker() == []


def test_a_broker_outlives_an_up_that_is_killed_until_the_next_one_takes_it_over(host):
    """Or until all nodes have ended, if none comes."""
    with host.up() as first:
        at(first, "gateway] serves http")
        broker = host.broker()
        (host.folder / "lingers").touch()  # so do its nodes: they may have work
        first.signal(signal.SIGKILL)
        first.wait(WITHIN)
        with host.up() as second:
            at(second, f"the server of up.broker runs already, pid {broker[0]}")
            (host.folder / "lingers").unlink()
            at(second, "gateway] serves http")
            assert host.broker() == broker
            second.signal(signal.SIGKILL)
            second.wait(WITHIN)
            assert is_gone(second)
            until(lambda: host.broker() == [], WITHIN)
