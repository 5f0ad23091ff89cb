"""One instance: its node, which is a real small process, and a server that does what the test says."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from fleet_worker.host import node_process
from fleet_worker.host.node_process import NEVER, Backoff
from fleet_worker.host.up import hosted_instance as module
from fleet_worker.host.up.hosted_instance import HostedInstance
from fleet_worker.host.up.server_plan import Away
from fleet_worker.protocol.host_messages import NodeNews, Pause, Resume
from fleet_worker.settings import Settings

SERVE = {"serve": "server --port {port}", "fleet": {"enabled": True, "respond_to_requests": True}}
NODE = [sys.executable, "-S", "-c", "import signal; signal.pause()"]
USER = Away("user", 5.0, stops_server=True)


class Server:
    """What `HostedInstance` needs of a managed server."""

    def __init__(self):
        self.heard, self.serves, self.gone, self.changed = [], False, True, False
        self.due, self.restarts_from, self.wants_restart, self.guard_fd, self.status = NEVER, 0.0, "", 99, "status"

    def start(self):
        self.heard.append("start")
        self.gone = False

    def stop(self):
        self.heard.append("stop")
        self.serves = False

    def restart(self, reason, *, by_operator=False):
        self.heard.append((reason, by_operator))
        self.serves = False

    def configure(self, _settings):
        return self.changed

    def reap(self):
        pass

    def close(self):
        self.heard.append("close")

    def kill(self):
        self.heard.append("kill")


class Client:
    def __init__(self):
        self.orders = []

    def send(self, order):
        self.orders.append(order)


class Scene:
    def __init__(self, monkeypatch, **instance):
        self.server = Server()
        monkeypatch.setattr(module, "ManagedServer", SimpleNamespace(of=lambda *_: self.server))
        self.processes, self.inherited = [], []
        self.hosted = HostedInstance("local", self._launch, Backoff())
        self.settle(**(instance or SERVE))
        self.client = Client()

    def settle(self, **instance):
        return self.hosted.settle(Settings(instances={"local": instance}))

    def _launch(self, name, inherited):
        self.inherited.append(inherited)
        self.processes.append(subprocess.Popen(NODE, start_new_session=True))
        return self.processes[-1]

    def act(self):
        self.hosted.act("local@mini")

    def serve(self):
        self.server.serves = True
        self.act()
        self.tell()

    def tell(self, **news):
        order = self.client.orders[-1].order if self.client.orders else 0
        self.hosted.hear(self.client, NodeNews("local@mini", **{"order": order, "pid": self.hosted.node.pid, **news}))
        self.act()

    @property
    def node_runs(self):
        return self.hosted.node.runs


@pytest.fixture
def scene(monkeypatch):
    made = []

    def make(**instance):
        made.append(Scene(monkeypatch, **instance))
        made[-1].act()
        return made[-1]

    yield make
    for each in made:
        for process in each.processes:
            process.kill()
            process.wait(5)


def test_a_node_starts_when_its_server_accepts_connections(scene):
    """And the server ends with neither of `up` and the node."""
    one = scene()
    assert one.server.heard == ["start"]
    assert not one.node_runs
    assert one.hosted.due == NEVER
    one.serve()
    assert one.node_runs
    assert one.inherited == [(99,)]
    assert one.client.orders == [Resume(0)]


def test_a_node_lives_on_when_its_server_does_not(scene):
    """It may have to be started itself meanwhile."""
    one = scene()
    one.serve()
    one.server.serves = False
    one.act()
    one.processes[0].kill()
    one.processes[0].wait(5)
    one.act()
    assert one.node_runs
    assert len(one.processes) == 2
    assert one.server.heard == ["start"]


def test_without_a_managed_server_a_node_starts_at_once(scene):
    """And is paused for the owner of the host all the same."""
    one = scene(fleet={"enabled": True, "respond_to_requests": True})
    assert one.node_runs
    assert one.inherited == [()]
    assert one.server.heard == []
    one.tell()
    one.hosted.make_way(USER)
    one.act()
    assert one.client.orders == [Resume(0), Pause("away", "user", 5.0, 1)]
    assert not one.hosted.is_idle
    one.tell(idle=True)
    assert one.hosted.is_idle
    one.hosted.make_way(None)
    one.act()
    assert one.client.orders[-1] == Resume(2)
    assert "is not managed" in one.hosted.restart_server()


def test_nothing_starts_before_there_is_a_broker(scene):
    """But a server may load meanwhile."""
    one = scene()
    one.hosted.may_start_node = False
    one.server.serves = True
    one.act()
    assert not one.node_runs
    one.hosted.may_start_node = True
    assert one.hosted.due <= time.monotonic()
    one.act()
    assert one.node_runs


def test_a_fault_restarts_the_server_when_its_node_has_handed_over(scene):
    """At once: what runs there will not end."""
    one = scene()
    one.serve()
    one.tell(running=3, fault="no token")
    assert one.client.orders[-1] == Pause("restarting", "no token", 0.0, 1)
    assert one.server.heard == ["start"]
    one.tell(idle=True)
    assert one.server.heard[-1] == ("no token", False)
    one.server.serves = True
    one.act()
    assert one.client.orders[-1] == Resume(2)


def test_a_fault_of_the_server_before_is_not_one_of_this(scene):
    """The node has told it before it took the last order, or its server may not be restarted yet."""
    one = scene()
    one.serve()
    one.server.restarts_from = NEVER
    one.tell(fault="no token")
    assert one.client.orders == [Resume(0)]
    one.server.restarts_from = time.monotonic() + 60
    assert 50 < one.hosted.due - time.monotonic() <= 60
    one.server.restarts_from = 0.0
    one.tell(fault="no token")
    one.tell(idle=True)
    one.server.serves = True
    one.tell(order=1, fault="no token")
    assert one.server.heard == ["start", ("no token", False)]
    assert one.client.orders[-1] == Resume(2)


def test_a_server_that_has_grown_is_restarted_between_requests(scene):
    """They have the grace of a drain."""
    one = scene()
    one.serve()
    one.server.wants_restart = "it uses 13 GB"
    one.act()
    assert one.client.orders[-1] == Pause("restarting", "it uses 13 GB", 30.0, 1)
    one.tell(idle=True)
    assert one.server.heard[-1] == ("it uses 13 GB", False)


def test_an_operator_restarts_a_server_but_not_one_that_is_off(scene):
    """Its memory is the owner's then."""
    one = scene()
    one.serve()
    assert one.hosted.restart_server() == ""
    one.act()
    one.tell(idle=True)
    assert one.server.heard[-1] == ("an operator restarts its MLX server", True)
    one.hosted.make_way(USER)
    one.act()
    one.tell(idle=True)
    assert one.server.heard[-1] == "stop"
    assert "this host is away (user)" in one.hosted.restart_server()


def test_only_the_node_that_up_has_started_is_heard(scene):
    """That of an earlier `up` may still be ending."""
    one = scene()
    one.serve()
    stranger = Client()
    one.hosted.hear(stranger, NodeNews("local@mini", fault="no token", pid=1))
    one.act()
    assert (stranger.orders, one.server.heard) == ([], ["start"])
    one.hosted.forget(stranger)
    one.tell(running=1)
    assert one.hosted.running == 1


def test_each_connection_of_a_node_hears_the_order_that_counts(scene):
    """As after its process was killed."""
    one = scene()
    one.serve()
    one.hosted.make_way(USER)
    one.act()
    one.hosted.forget(one.client)
    one.client = Client()
    one.tell(order=0)
    assert one.client.orders == [Pause("away", "user", 5.0, 1)]


def test_an_instance_that_leaves_ends_its_node_and_then_its_server(scene, monkeypatch):
    """And is gone when both have ended."""
    one = scene()
    one.serve()
    monkeypatch.setattr(node_process, "terminate", lambda _: None)  # it ends when the test says so
    one.hosted.leave(30.0)
    one.act()
    assert one.server.heard == ["start"]
    one.processes[0].kill()
    one.processes[0].wait(5)
    one.act()
    assert one.server.heard == ["start", "stop"]
    assert not one.hosted.gone
    one.server.gone = True
    one.act()
    assert one.hosted.gone
    assert one.server.heard[-1] == "close"


def test_a_changed_command_restarts_a_server_and_a_changed_limit_does_not(scene):
    """`configure` tells which it is."""
    one = scene()
    one.serve()
    assert one.settle(**SERVE) == ""
    one.server.changed = True
    assert one.settle(**SERVE) == "its server is restarted"
    one.act()
    one.tell(idle=True)
    assert one.server.heard[-1] == ("the configuration of its MLX server has changed", True)


def test_a_server_may_be_managed_no_longer_and_again(scene):
    """Its node lives through both."""
    one = scene()
    one.serve()
    unmanaged = {"fleet": SERVE["fleet"]}
    assert one.settle(**unmanaged) == "its server is not managed any more"
    one.act()
    one.tell(idle=True)
    assert one.server.heard == ["start", "stop"]
    one.server.gone = True
    one.act()
    assert one.server.heard[-1] == "close"
    assert one.hosted.status is None
    one.act()
    assert isinstance(one.client.orders[-1], Resume)
    one.server.heard.clear()
    assert one.settle(**SERVE) == "its server is managed now"
    assert one.server.heard == ["start"]
    assert len(one.processes) == 1
