"""`fleet-worker up`: runs all that the configuration of this host asks for, and restarts what ends.

One thread waits for signals, messages and deadlines only. The nodes write to the output of `up` themselves, so that a
supervisor that is slow, stopped or killed neither blocks a node nor loses a line of its log.

    embedded broker -> MLX servers -> nodes -> gateway          is how they start;
    gateway and nodes, which drain -> MLX servers -> broker     is how they end.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fleet_worker import exit_codes
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.file_lock import Held, hold
from fleet_worker.host.node_process import Backoff
from fleet_worker.host.parent_pipe import parent_pipe
from fleet_worker.host.unserved import unserved
from fleet_worker.host.up.companions import Companions, check_broker
from fleet_worker.host.up.event_loop import EventLoop
from fleet_worker.host.up.hosted_instance import HostedInstance
from fleet_worker.host.up.owner import Owner
from fleet_worker.host.up.programs import Launcher, node_command
from fleet_worker.host.up.switchboard import Switchboard
from fleet_worker.host.up.up_server import Client
from fleet_worker.host.up_socket import lock_path, socket_path
from fleet_worker.host.variables import mistyped
from fleet_worker.instance_settings import OF_MANAGED_SERVER
from fleet_worker.protocol.host_messages import Done, HostStatus, NodeNews, Restart
from fleet_worker.settings import NOT_OF_NODES, REGISTRY, Settings

log = logging.getLogger(__name__)


class Supervisor:
    """The supervisor of one host.

    It restarts a node that ends, after a growing delay if the node keeps failing. A node that ends with exit code 78
    waits for another configuration; exit code 75 asks for a restart at once.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        command: Callable[[str], Sequence[str]] = node_command,
        backoff: Backoff = Backoff(),  # noqa: B008 - it is frozen
    ) -> None:
        self._settings = settings
        self._command = command
        self._backoff = backoff
        self._instances: dict[str, HostedInstance] = {}
        """The registry node is one of them."""
        self._exit_code: int | None = None
        """Set as soon as all of it is being stopped."""
        self._stop_requested = False

    def run(self) -> int:
        """Run until a signal stops it, or no instance can be served; return the exit code. For the main thread only.

        SIGTERM (0) and SIGINT (130) stop all nodes, a second one kills them; SIGHUP reads the configuration again.
        78 means that no instance has opted in any more, or that all their nodes have ended with 78.

        Raises:
            ConfigurationError: no instance has opted in; or a file or the embedded broker cannot be used.
            Held: an `up` of this host runs already.
        """
        self._settings.serving()
        with EventLoop(self._handle_signal) as self._loop, parent_pipe() as pipe:
            self._lock = hold(lock_path(self._settings.state_dir, self._settings.host))
            self._launcher = Launcher(pipe, self._command)
            self._companions = Companions(self._launcher, self._backoff)
            self._owner = Owner(self._loop)
            self._switchboard = Switchboard(
                self._loop.selector, hear=self._hear, forget=self._forget, restart=self._restart, reload=self._reload
            )
            try:
                self._run()
            finally:
                self._owner.close()
                self._switchboard.close()
                self._lock.close()
        return self._exit_code or 0

    def _run(self) -> None:
        log.info("fleet-worker up, pid %d, runs the nodes of %s", os.getpid(), self._settings.host)
        self._switchboard.listen(socket_path(self._settings.state_dir, self._settings.host))
        for _ in self._apply(self._settings):
            pass  # all of it is new
        while self._act():
            self._loop.wait(self._due)
        log.info("fleet-worker up ends: all of its nodes have ended")

    # --- The configuration

    def _apply(self, settings: Settings) -> Iterator[str]:
        """Run a node for each instance that has opted in, the registry node, and what else is asked for. Disturb none
        whose settings have not changed. Yield what changes.

        Raises:
            ConfigurationError: no instance has opted in, or the embedded broker cannot be started.
        """
        for found in (*mistyped(settings), *unserved(settings)):
            log.warning("%s", found)
        instances = [*settings.serving(), REGISTRY]
        old, self._settings, self._launcher.settings = self._settings, settings, settings
        yield from self._companions.settle(old, settings)
        self._owner.settle(settings.availability)
        if old.availability != settings.availability:
            yield "availability has changed"
        for instance in set(self._instances).difference(instances):
            self._instances[instance].leave(settings.worker.killed_after)
            yield f"{instance} ends"
        for instance in instances:
            if instance not in self._instances:
                self._instances[instance] = HostedInstance(instance, self._launcher.node, self._backoff)
                self._instances[instance].settle(settings)
                yield f"{instance} starts"
            else:
                yield from self._settle(self._instances[instance], old)

    def _settle(self, hosted: HostedInstance, old: Settings) -> Iterator[str]:
        """Make one instance follow the settings."""
        settings, name = self._settings, hosted.node.instance
        if change := hosted.settle(settings):  # it may be one that is being removed
            yield f"{name}: {change}"
        if _place(old) != _place(settings):
            hosted.node.replace(settings.worker.killed_after)
            yield f"{name} starts anew"
        elif hosted.node.given_up or _settings_of(name, old) != _settings_of(name, settings):
            hosted.node.reload()
            yield f"{name} reads its settings again"

    def _reload(self) -> Done:
        """A wrong configuration changes nothing; one in which no instance has opted in stops all nodes."""
        if self._exit_code is not None:
            return Done("fleet-worker up is ending")
        try:
            settings = Settings()
            check_broker(self._settings, settings)
            self._move(settings)
        except (ConfigurationError, Held) as error:
            log.error("the configuration stays as it was: %s", error)
            return Done(str(error))
        log.info("the configuration has been read again")
        try:
            changes = list(self._apply(settings))
        except ConfigurationError as error:
            log.error("%s", error)
            self._stop(exit_codes.CONFIGURATION)
            return Done(str(error))
        return Done(text=", ".join(changes))

    def _move(self, settings: Settings) -> None:
        """Take the lock and the socket of another name of this host. Raises `Held` or `ConfigurationError`."""
        path = lock_path(settings.state_dir, settings.host)
        if path == lock_path(self._settings.state_dir, self._settings.host):
            return
        new_socket = socket_path(settings.state_dir, settings.host)
        lock = hold(path)
        try:
            self._switchboard.listen(new_socket)
        except ConfigurationError:
            lock.close()
            raise
        self._lock.close()
        self._lock = lock

    # --- What it is told

    def _handle_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._reload()
            return
        if self._stop_requested:
            log.warning("%s again: all nodes that still run are killed", signal.Signals(number).name)
            for instance in self._instances.values():
                instance.kill()
            self._companions.kill()
        self._stop_requested = True
        self._stop(0 if number == signal.SIGTERM else 128 + number)

    def _hear(self, client: Client, news: NodeNews) -> None:
        instance, _, host = news.node.partition("@")
        if host == self._settings.host and instance in self._instances:
            self._instances[instance].hear(client, news)

    def _forget(self, client: Client) -> None:
        for instance in self._instances.values():
            instance.forget(client)

    def _restart(self, message: Restart) -> Done:
        if not (instance := self._instances.get(message.instance)) or self._exit_code is not None:
            return Done(f"no instance {message.instance} runs on {self._settings.host}")
        if message.server:
            return Done(instance.restart_server())
        return Done(instance.restart_node(self._settings.worker.killed_after))

    # --- What it does

    @property
    def _due(self) -> float:
        instances = (instance.due for instance in self._instances.values())
        return min([*instances, self._companions.due, self._owner.due])

    def _act(self) -> bool:
        """Do all that is due; return False if all has ended."""
        self._companions.act()
        for name, instance in list(self._instances.items()):
            instance.make_way(self._owner.away)
            instance.may_start_node = self._companions.broker_is_ready
            instance.act(f"{name}@{self._settings.host}")
            if instance.gone:
                del self._instances[name]
        self._check_that_one_serves()
        self._tell()
        if self._exit_code is not None and not self._instances and self._companions.gateway_is_gone:
            self._companions.stop_broker()
            self._companions.act()
        return bool(self._instances) or not self._companions.gateway_is_gone or not self._companions.broker_is_gone

    def _check_that_one_serves(self) -> None:
        nodes = [instance.node for name, instance in self._instances.items() if name != REGISTRY]
        if self._exit_code is None and all(node.given_up for node in nodes):
            log.error("no instance can be served with this configuration")
            self._stop(exit_codes.CONFIGURATION)

    def _tell(self) -> None:
        """Tell watchers and the owner's side what the instances do."""
        instances = self._instances.values()
        statuses = tuple(status for instance in instances if (status := instance.status))
        away = self._owner.away.reason if self._owner.away else ""
        self._switchboard.publish(HostStatus(statuses, away))
        running = sum(instance.running for instance in instances)
        all_idle = all(instance.is_idle for name, instance in self._instances.items() if name != REGISTRY)
        self._owner.act(running=running, all_idle=all_idle)

    def _stop(self, exit_code: int) -> None:
        """Stop all nodes at the same time; what they need ends after them."""
        if self._exit_code is None:
            self._exit_code = exit_code
            for instance in self._instances.values():
                instance.leave(self._settings.worker.killed_after)
            self._companions.leave()


def _place(settings: Settings) -> tuple[Any, ...]:
    """Return what a node is named by, and where it works: another one needs a new process."""
    return settings.broker_url, settings.host, settings.state_dir


def _settings_of(instance: str, settings: Settings) -> Any:
    """Return the part of the settings that a node reads; the registry node reads all instances."""
    common = settings.model_dump(exclude={"instances", *NOT_OF_NODES})
    names = settings.instances if instance == REGISTRY else {instance} & set(settings.instances)
    return common, {name: settings.instances[name].model_dump(exclude={*OF_MANAGED_SERVER}) for name in names}
