"""The Celery worker of a node: by its name it is the inference node of one instance, or the registry node of a host."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import celery.apps.worker as celery_worker
from celery import Celery
from celery.concurrency import get_implementation

from fleet_worker.broker.app import create_app
from fleet_worker.broker.control_commands import Command
from fleet_worker.broker.control_listener import ControlListener, Subscription
from fleet_worker.broker.topology import is_node_name
from fleet_worker.errors import ConfigurationError, FleetError, where
from fleet_worker.exit_codes import CONFIGURATION, INTERRUPTED, RESTART, SOFTWARE, UNAVAILABLE
from fleet_worker.host.lossy_output import lose_what_cannot_be_written
from fleet_worker.host.parent_pipe import attach_to_parent, is_supervised
from fleet_worker.node import new_settings
from fleet_worker.node.consumer import Consumer
from fleet_worker.node.lifecycle import Lifecycle, Startup
from fleet_worker.node.log_privacy import begin_log, drop_beats, protect_logs
from fleet_worker.node.name_claim import NameClaim
from fleet_worker.node.task_request import Request
from fleet_worker.registry import node as registry_node
from fleet_worker.registry.node import RegistryNode
from fleet_worker.settings import REGISTRY, Settings, as_host

if TYPE_CHECKING:
    from fleet_worker.node.node import Node

log = logging.getLogger(__name__)


def node_app() -> Celery:
    """Return an application whose workers are nodes, with the settings of this process; end it if these are wrong."""
    try:
        settings = Settings()
    except ConfigurationError as error:
        refuse(error)
    app = create_app(settings, is_node=True)
    serve_with(app, settings)
    return app


def serve_with(app: Celery, settings: Settings) -> None:
    """Make every worker that is started from `app` a node. Other applications of the process are not changed."""
    app.Worker = app.subclass_with_self(Worker, settings=settings)
    app.Task.Request = Request
    app.conf.worker_consumer = Consumer


def refuse(error: ConfigurationError) -> NoReturn:
    """End this process with one line that says why, before logging is set up."""
    lose_what_cannot_be_written()
    print(f"fleet-worker: {error.message}", file=sys.stderr, flush=True)  # noqa: T201
    raise SystemExit(CONFIGURATION)


class Worker(celery_worker.Worker):  # type: ignore[misc]
    """A Celery worker that is a node."""

    settings: Settings
    hostname: str

    def on_before_init(self, quiet: bool = False, **options: Any) -> None:
        """Become the node that the worker's name stands for, before Celery reads its pool, concurrency and queues.

        Raises:
            SystemExit: it cannot be that node.
        """
        lose_what_cannot_be_written()
        try:
            _check_options(options)
            protect_logs()
            self.hostname = _node_name(self.settings, self.hostname)
        except ConfigurationError as error:
            refuse(error)
        startup = Startup(self.hostname, lambda new: _can_follow(new, self.settings, self.hostname))
        try:
            begin_log(self.app, self.hostname, options)
            attach_to_parent(self.hostname, grace=self.settings.worker.killed_after)
            _check_name_is_free(self.app, self.hostname)
            self._become_node(startup)
        except ConfigurationError as error:
            # It may have been corrected meanwhile.
            _give_up(error.message, RESTART if startup.reloads else CONFIGURATION)
        except FleetError as error:
            _give_up(error.message, UNAVAILABLE)
        except Exception as error:
            _give_up(f"the node cannot begin: {type(error).__name__} at {where(error)}", SOFTWARE)
        super().on_before_init(quiet or is_supervised(), **options)  # the log of `up` has no banners

    def _become_node(self, startup: Startup) -> None:
        name, _, host = self.hostname.partition("@")
        if name == REGISTRY:
            logging.getLogger("celery.app.trace").addFilter(drop_beats)
            registry = RegistryNode(self.app, self.settings, host)
            self._begin(startup, registry, registry.subscription, registry.connected, commands=lambda _: {})
        else:
            # Imported here, as a registry node would keep 8 MB of it.
            from fleet_worker.node.inference_node import all_commands_of, create_node
            from fleet_worker.node.remote_control import subscription_of

            node = create_node(self.app, self.settings, self.hostname)
            commands = partial(all_commands_of, node)
            self._begin(startup, node, subscription_of(node), node.confirmations.connected, commands)

    def _begin(
        self,
        startup: Startup,
        node: Node | RegistryNode,
        subscription: Subscription,
        connected: Callable[[bool], None],
        commands: Callable[[Callable[[], None]], dict[str, Command]],
    ) -> None:
        lifecycle = Lifecycle(self, node, grace=self.settings.worker.drain_grace)
        claim = NameClaim(self.app, node.name, lifecycle.name_is_taken)
        all_commands = {"process": claim.process, **commands(lifecycle.restart)}
        ControlListener(self.app, node.name, subscription, all_commands, partial(_connected, connected, claim))
        lifecycle.begin(startup)

    def prepare_args(self, **options: Any) -> dict[str, Any]:
        """Leave out gossip and mingle: each node would hear every other node of the fleet, and start a second later."""
        return {**super().prepare_args(**options), "without_gossip": True, "without_mingle": True}

    def install_platform_tweaks(self, worker: Any) -> None:
        """Handle signals as Celery does, except that `Lifecycle` handles SIGTERM and SIGHUP, and that no signal starts
        a debugger.

        Celery's handler of SIGTERM would stop listening to the broker at once, that of SIGHUP replace the process.
        """
        if self.app.IS_macOS:
            self.macOS_proxy_detection_workaround()
        celery_worker.install_worker_term_hard_handler(worker)
        celery_worker.install_worker_int_handler(worker, exitcode=INTERRUPTED)
        celery_worker.install_cry_handler()


def _check_options(options: dict[str, Any]) -> None:
    """Raise `ConfigurationError` for options of the command line that would contradict the settings."""
    if options.get("concurrency") or options.get("autoscale"):
        raise ConfigurationError("slots are set by limits.concurrency of the instance: leave out -c")
    if options.get("queues"):
        raise ConfigurationError("queues are the lanes of what the instance serves: leave out -Q")
    if options.get("pool") not in (None, get_implementation("threads")):
        raise ConfigurationError("a node works with threads: leave out -P")


def _node_name(settings: Settings, worker_name: str) -> str:
    """Return `<instance>@<host>` or `registry@<host>` for a worker of this name.

    Raises:
        ConfigurationError: no instance has opted in, or the name does not tell which one is meant.
    """
    serving = settings.serving()
    name, _, host = worker_name.partition("@")
    if name == "celery" and len(serving) == 1:  # Celery's default name: the worker was started without -n
        name = next(iter(serving))
    if name not in (REGISTRY, *serving):
        known = ", ".join(sorted(serving))
        unknown = "" if name == "celery" else f'no instance "{name}" has opted in; '
        raise ConfigurationError(f"{unknown}name one that has opted in, as in -n NAME@%h: {known}")
    node_name = f"{name}@{settings.host if 'host' in settings.model_fields_set else as_host(host)}"
    if not is_node_name(node_name):
        raise ConfigurationError("the name of the node is too long: give the instance, or the host, a shorter one")
    return node_name


def _can_follow(new: Settings, old: Settings, node_name: str) -> bool:
    name = node_name.partition("@")[0]
    return registry_node.can_follow(new, old) if name == REGISTRY else new_settings.can_follow(new, old, name)


def _check_name_is_free(app: Celery, node_name: str) -> None:
    """Raise `ConfigurationError` if another process of this name answers: it began earlier, settled or not. What begins
    at the same time is left to `NameClaim`."""
    try:
        taken = app.control.ping(destination=[node_name], limit=1, timeout=0.5)
    except Exception:  # the broker is away, and Celery will wait for it
        return
    if taken:
        raise ConfigurationError(f"another node is named {node_name}: give the instance, or the host, another name")


def _connected(node: Callable[[bool], None], claim: NameClaim, connected: bool, has_commands: bool) -> None:
    node(connected)
    claim.connected(connected, has_commands)


def _give_up(reason: str, exit_code: int) -> NoReturn:
    """End this process with one line in its log that says why."""
    log.critical("%s", reason)
    raise SystemExit(exit_code)
