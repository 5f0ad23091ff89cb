"""What a worker process becomes by its name: the inference node of one instance, or the registry node of its host."""

from __future__ import annotations

import logging
import sys
from typing import Any, NoReturn

import celery.apps.worker as celery_worker
from celery import Celery
from celery.concurrency import get_implementation

from fleet_worker.broker.topology import lane_queue, transport_of
from fleet_worker.errors import ConfigurationError, FleetError, where
from fleet_worker.exit_codes import AGAIN, CONFIGURATION, INTERRUPTED, SOFTWARE, UNAVAILABLE
from fleet_worker.host.parent_pipe import attach_to_parent
from fleet_worker.mlx.client import MLXClient
from fleet_worker.mlx.offering import Offering, no_offerings_advice, offerings_of
from fleet_worker.node.cancel_listener import CancelListener
from fleet_worker.node.lane_consumer import LaneConsumer
from fleet_worker.node.lifecycle import Lifecycle, Reconnecting, Startup
from fleet_worker.node.log_privacy import Consumer, Request, begin_log, protect_logs
from fleet_worker.node.node import Node, can_follow, lanes_of
from fleet_worker.node.remote_control import answer_operators
from fleet_worker.node.reply_publisher import ReplyPublisher
from fleet_worker.node.router_presence import RouterPresence
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.node.server_discovery import _find_server_of
from fleet_worker.node.task_events import BatchedEvents
from fleet_worker.node.tasks import register_tasks
from fleet_worker.registry import node as registry_node
from fleet_worker.registry.node import RegistryNode
from fleet_worker.settings import REGISTRY, Instance, Settings, as_host

log = logging.getLogger(__name__)


def serve_with(app: Celery, settings: Settings) -> None:
    """Make every worker that is started from `app` a node. Other applications of the process are not changed."""
    app.Worker = app.subclass_with_self(Worker, settings=settings)
    app.Task.Request = Request
    app.conf.worker_consumer = Consumer
    app.steps["consumer"].update((BatchedEvents, Reconnecting))


class Worker(celery_worker.Worker):  # type: ignore[misc]
    """A Celery worker that is a node: the inference node of one instance, or the registry node of its host."""

    settings: Settings
    hostname: str

    def on_before_init(self, quiet: bool = False, **options: Any) -> None:
        """Become the node that the worker's name stands for, before Celery reads its pool, concurrency and queues.

        Raises:
            SystemExit: it cannot be that node.
        """
        _refuse_options(options)
        protect_logs()
        try:
            self.hostname = _node_name(self.settings, self.hostname)
        except ConfigurationError as error:
            refuse(error)
        super().on_before_init(quiet, **options)
        startup = _startup(self.settings, self.hostname)
        try:
            begin_log(self.app, self.hostname, options)
            attach_to_parent(self.hostname, grace=self.settings.worker.killed_after)
            _begin(self.app, self.settings, self, startup)
        except ConfigurationError as error:
            _give_up(error.message, AGAIN if startup.reloads else CONFIGURATION)  # which may be right by now
        except FleetError as error:
            _give_up(error.message, UNAVAILABLE)
        except Exception as error:
            _give_up(f"the node cannot begin: {type(error).__name__} at {where(error)}", SOFTWARE)

    def prepare_args(self, **options: Any) -> dict[str, Any]:
        """Leave out gossip and mingle: each node would hear every other node of the fleet, and start a second later."""
        return {**super().prepare_args(**options), "without_gossip": True, "without_mingle": True}

    def install_platform_tweaks(self, worker: Any) -> None:
        """Handle signals as Celery does, but leave SIGTERM and SIGHUP to `Lifecycle`.

        Celery's handler of SIGTERM stops to listen to the broker at once, that of SIGHUP replaces the process.
        """
        if self.app.IS_macOS:
            self.macOS_proxy_detection_workaround()
        celery_worker.install_worker_term_hard_handler(worker)
        celery_worker.install_worker_int_handler(worker, exitcode=INTERRUPTED)
        celery_worker.install_cry_handler()


def _refuse_options(options: dict[str, Any]) -> None:
    """The settings say all this; a command line that says otherwise would be obeyed in parts."""
    if options.get("concurrency") or options.get("autoscale"):
        refuse(ConfigurationError("slots are set by limits.concurrency of the instance: leave out -c"))
    if options.get("queues"):
        refuse(ConfigurationError("queues are the lanes of what the instance serves: leave out -Q"))
    if options.get("pool") not in (None, get_implementation("threads")):
        refuse(ConfigurationError("a node works with threads, whatever it waits for is elsewhere: leave out -P"))


def _refuse_a_taken_name(app: Celery, settings: Settings, node_name: str) -> None:
    """On RabbitMQ the second of two nodes of one name would end with a traceback: Celery's control queue is exclusive.

    (On Redis nothing stops it, and it notices when it is ready.)
    """
    if transport_of(settings.broker_url) != "amqp":
        return
    try:
        taken = app.control.ping(destination=[node_name], limit=1, timeout=0.7)
    except Exception:  # the broker is away: it is waited for later
        return
    if taken:
        raise ConfigurationError(f"another node is named {node_name}: give the instance, or the host, another name")


def _node_name(settings: Settings, worker_name: str) -> str:
    """What a worker of this name is called as a node of this host; raises `ConfigurationError` if it cannot be one."""
    name, _, host = worker_name.partition("@")
    if name == REGISTRY:
        settings.serving()
    else:
        name, _ = select_instance(settings, worker_name)
    return f"{name}@{settings.host if 'host' in settings.model_fields_set else as_host(host)}"


def _startup(settings: Settings, node_name: str) -> Startup:
    name = node_name.partition("@")[0]
    if name == REGISTRY:
        return Startup(node_name, lambda new: registry_node.can_follow(new, settings))
    return Startup(node_name, lambda new: can_follow(new, settings, name))


def _begin(app: Celery, settings: Settings, worker: Any, startup: Startup) -> None:
    name, _, host = worker.hostname.partition("@")
    _refuse_a_taken_name(app, settings, worker.hostname)
    node = RegistryNode(app, settings, host) if name == REGISTRY else _begin_node(app, settings, worker.hostname)
    Lifecycle(worker, node, grace=settings.worker.drain_grace).begin(startup)


def _begin_node(app: Celery, settings: Settings, node_name: str) -> Node:
    """Set the worker up before Celery reads its pool, concurrency and queues."""
    name = node_name.partition("@")[0]
    instance = settings.instances[name]
    mlx, server, reported = _find_server_of(instance, settings.worker.start_timeout)
    offerings = offerings_of(instance, settings.features, reported)
    if not offerings:
        mlx.close()
        raise ConfigurationError(
            f"instance {name} has nothing to offer: {no_offerings_advice(f'instances.{name}', instance)}"
        )
    node = _node(app, settings, node_name, mlx, server, offerings, reported)
    register_tasks(app, node)
    answer_operators(node)
    # With Python's 5 ms, the thread that takes messages waits too long for its turn among busy slots: a fifth fewer
    # requests a second.
    sys.setswitchinterval(0.001)
    app.conf.worker_concurrency = node.slots
    lanes, transport = lanes_of(node.name, offerings), transport_of(settings.broker_url)
    app.conf.task_queues = [lane_queue(each, transport) for each in lanes]
    app.amqp.queues.deselect(lanes)  # joined when the instance has shown that it works
    return node


def _node(
    app: Celery,
    settings: Settings,
    name: str,
    mlx: MLXClient,
    server: str,
    offerings: dict[str, Offering],
    reported: list[str],
) -> Node:
    """With its connections to the broker, none of which is opened yet."""
    transport, running = transport_of(settings.broker_url), RunningAttempts()
    sender = ReplyPublisher(app.connection_for_write, name, max_pending=settings.worker.max_pending)
    return Node(
        settings,
        name=name,
        instance=name.partition("@")[0],
        server=server,
        mlx=mlx,
        offerings=offerings,
        reported=reported,
        sender=sender,
        intake=LaneConsumer(app, transport),
        running=running,
        listeners=RouterPresence(
            app.connection_for_read, transport, running, abandoned_after=settings.worker.abandoned_after
        ),
        control=CancelListener(app.connection_for_read, transport, name, running.cancel, sender.publish_again),
    )


def refuse(error: ConfigurationError) -> NoReturn:
    """End this process, which has no name yet, with one line that says why."""
    print(f"fleet-worker: {error.message}", file=sys.stderr, flush=True)  # noqa: T201 - logging is not set up yet
    raise SystemExit(CONFIGURATION)


def _give_up(reason: str, exit_code: int) -> NoReturn:
    """End this node before it is one, with one line of its log that says why."""
    log.critical("%s", reason)
    raise SystemExit(exit_code)


def select_instance(settings: Settings, node_name: str) -> tuple[str, Instance]:
    """Return the instance that a worker of this name serves: `local@mini-7` serves `local`.

    Raises:
        ConfigurationError: no instance has opted in, or the name does not tell which one is meant.
    """
    serving = settings.serving()
    wanted = node_name.partition("@")[0]
    if wanted == "celery" and len(serving) == 1:  # Celery's default name: the worker was started without -n
        wanted = next(iter(serving))
    if wanted not in serving:
        known = ", ".join(sorted(serving))
        raise ConfigurationError(
            f"the node's name must begin with an instance that has opted in, as -n NAME@%h: {known}"
        )
    return wanted, serving[wanted]
