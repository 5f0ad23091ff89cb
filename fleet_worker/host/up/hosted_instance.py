"""One instance on this host: the process of its node, its MLX server if that is managed, and what they do together."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable

from fleet_worker.host.node_process import Backoff, NodeProcess
from fleet_worker.host.servers.managed_server import ManagedServer
from fleet_worker.host.up.server_plan import Away, Seen, ServerPlan, Wish
from fleet_worker.host.up.up_server import Client
from fleet_worker.protocol.host_messages import NodeNews, Order, Resume, ServerStatus
from fleet_worker.settings import Settings

log = logging.getLogger(__name__)

Launch = Callable[[str, tuple[int, ...]], subprocess.Popen[bytes]]
"""Starts the process of the node of that name, which inherits these file descriptors."""


class HostedInstance:
    """The processes of one instance; of the registry node, which has no server, too. No method waits: call `act` after
    whatever has happened, and at the time `due`.

    A node whose server is managed is started when that accepts connections for the first time, and lives on when it is
    restarted. When the instance leaves, its node ends first.
    """

    def __init__(self, instance: str, launch: Launch, backoff: Backoff, server: ManagedServer | None = None) -> None:
        self.node = NodeProcess(instance, self._start_node, backoff)
        self.may_start_node = True
        """False while there is no broker yet."""
        self._launch = launch
        self._server = server
        self._leaves_server = False
        """Its server is not managed any more."""
        self._has_served = server is None
        self._plan = ServerPlan()
        self._client: Client | None = None
        self._news: NodeNews | None = None
        self._told: Order | None = None
        self._grace = 0.0
        """Seconds that running requests have before a restart."""

    # --- What it is

    @property
    def gone(self) -> bool:
        """True if the instance is not wanted any more, and all of it has ended."""
        return self.node.gone and (self._server is None or self._server.gone)

    @property
    def running(self) -> int:
        """How many requests its node runs, as far as it has told."""
        return self._news.running if self._news else 0

    @property
    def is_idle(self) -> bool:
        """True if its node runs nothing, and will not before it is told to."""
        return not self.node.runs or self._completed_pause == self._plan.order.order != 0

    @property
    def status(self) -> ServerStatus | None:
        return self._server.status if self._server else None

    @property
    def due(self) -> float:
        """The time.monotonic() at which `act` has something to do, unless something happens before."""
        dues = [self._plan.due]
        if self.node.runs or self._node_may_start:
            dues.append(self.node.due)
        if self._server:
            dues.append(self._server.due)
            if self._fault:
                dues.append(self._server.restarts_from)
        return min(dues)

    # --- What it is told

    def settle(self, settings: Settings) -> str:
        """Take these settings, also after `leave`; return what that changes for its server."""
        self._plan.wanted = self.node.wanted = True
        self._grace = settings.worker.drain_grace
        instance = settings.instances.get(self.node.instance)
        if instance and instance.serve:
            return self._manage(settings)
        if self._server and not self._leaves_server:
            self._leaves_server = True
            self._plan.wish(Wish("configuration", "its MLX server is not managed any more", self._grace))
            return "its server is not managed any more"
        return ""

    def _manage(self, settings: Settings) -> str:
        if not self._server:
            self._server = ManagedServer.of(settings, self.node.instance)
            self._has_served = self.node.runs
            if not self._plan.off:
                self._server.start()
            return "its server is managed now"
        if self._leaves_server:
            self._leaves_server = False
            if not self._plan.off:
                self._server.start()
        if not self._server.configure(settings):
            return ""
        self._plan.wish(Wish("configuration", "the configuration of its MLX server has changed", self._grace))
        return "its server is restarted"

    def leave(self, grace: float) -> None:
        """End its node within `grace` seconds, and its server after that."""
        self._plan.wanted = self.node.wanted = False
        self.node.stop(grace)

    def kill(self) -> None:
        """End all of it at once. Only after `leave`."""
        self.node.kill()
        if self._server:
            self._server.stop()  # or it would start again
            self._server.kill()

    def make_way(self, away: Away | None) -> None:
        """The owner comes first, or has left."""
        self._plan.away = away

    def restart_server(self) -> str:
        """Restart its server for an operator; return why not, or an empty text."""
        name = self.node.instance
        if not self._server:
            return (
                f"the MLX server of {name} is not managed: only one that instances.{name}.serve starts can be restarted"
            )
        if self._plan.away and self._plan.off:
            return f"this host is away ({self._plan.away.reason}): the MLX server of {name} starts after that"
        self._plan.wish(Wish("operator", "an operator restarts its MLX server", self._grace))
        return ""

    def restart_node(self, grace: float) -> str:
        """Restart its node; return why not, or an empty text."""
        if not self.node.runs and not self._node_may_start:
            return f"{self.node.instance} has no node yet: its MLX server does not accept connections"
        self.node.replace(grace)
        return ""

    def hear(self, client: Client, news: NodeNews) -> None:
        """Its node tells something. Each new connection of it is told the order that counts.

        The node of an `up` that was killed may still be ending; it is not heard.
        """
        if news.pid != self.node.pid:
            return
        if client is not self._client:
            self._client, self._told = client, None
        self._news = news

    def forget(self, client: Client) -> None:
        """The connection has ended."""
        if client is self._client:
            self._client = self._news = None

    # --- What happens

    def act(self, node_name: str) -> None:
        """Do all that is due; the node is started under this name."""
        self.node.reap()
        if self._server:
            self._server.reap()
        now = time.monotonic()
        if self._server:
            if self._server.due <= now:
                self._server.act()
            self._has_served = self._has_served or self._server.serves
        if self.node.due <= now and (self.node.runs or self._node_may_start):
            self.node.act(node_name)
        self._wish_for_restart(now)
        self._follow_plan(now)
        self._give_order()

    @property
    def _node_may_start(self) -> bool:
        return self.may_start_node and self._has_served

    def _start_node(self, name: str) -> subprocess.Popen[bytes]:
        return self._launch(name, (self._server.guard_fd,) if self._server else ())

    @property
    def _fault(self) -> str:
        """Why its node wants a restart of the server, which has not happened since."""
        news = self._news
        is_new = news and isinstance(self._plan.order, Resume) and news.order == self._plan.order.order
        return news.fault if news and is_new and self._server and self._server.serves else ""

    def _wish_for_restart(self, now: float) -> None:
        if not self._server:
            return
        if (fault := self._fault) and self._server.restarts_from <= now:
            log.warning("the server of %s is restarted: %s", self.node.instance, fault)
            self._plan.wish(Wish("fault", fault, 0.0))
        elif overgrown := self._server.wants_restart:
            self._plan.wish(Wish("memory", overgrown, self._grace))

    def _follow_plan(self, now: float) -> None:
        while step := self._plan.step(self._seen(now)):
            if not (server := self._server):
                continue
            if step == "start" and not self._leaves_server:
                server.start()
            elif isinstance(step, Wish) and not self._leaves_server:
                server.restart(step.reason, by_operator=step.cause in ("operator", "configuration"))
            else:
                server.stop()
        if self._server and self._server.gone and (self._leaves_server or self.node.gone):
            self._server.close()
            self._server, self._leaves_server, self._has_served = None, False, True

    def _seen(self, now: float) -> Seen:
        return Seen(now, self.node.runs, self._completed_pause, self._server is None or self._server.serves)

    @property
    def _completed_pause(self) -> int:
        return self._news.order if self._news and self._news.idle else 0

    def _give_order(self) -> None:
        if self._client and self._told != self._plan.order:
            self._told = self._plan.order
            self._client.send(self._told)
