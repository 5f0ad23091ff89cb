"""The life of an inference node: a Celery worker that serves exactly one instance."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from celery import Celery, signals
from celery.concurrency import get_implementation
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential, wait_random

from fleet_worker.errors import ConfigurationError, FleetError, InstanceUnavailable
from fleet_worker.intake import Intake
from fleet_worker.lanes import lane_queue, transport_of
from fleet_worker.logs import protect_logs
from fleet_worker.mlx import DEFAULT_URLS, Health, MLXClient
from fleet_worker.monitoring import BatchedEvents
from fleet_worker.node import Node, lanes_of
from fleet_worker.offerings import Offering, offerings_of
from fleet_worker.registry_node import NAME, RegistryNode
from fleet_worker.replies import ReplySender
from fleet_worker.settings import Instance, Settings
from fleet_worker.tasks import register_tasks

__all__ = ["EXIT_CONFIGURATION", "EXIT_UNAVAILABLE", "refuse", "select_instance", "serve_with"]

log = logging.getLogger(__name__)

EXIT_CONFIGURATION = 78  # sysexits.h EX_CONFIG
EXIT_UNAVAILABLE = 69  # sysexits.h EX_UNAVAILABLE
LEAVE_AFTER = 15.0
"""Seconds that Celery gets to say goodbye to the broker once a stopping node has no more work."""


def serve_with(app: Celery, settings: Settings) -> None:
    """Make every worker that is started from `app` an inference node."""

    def begin(sender: str, instance: Any, options: dict[str, Any], **_: Any) -> None:
        if instance.app is app:
            _refuse_options(options)
            name, _, host = instance.hostname.partition("@")
            host = settings.host if "host" in settings.model_fields_set else host
            protect_logs()
            try:
                if name == NAME:
                    _begin_registry(app, settings, host, worker=instance)
                else:
                    _begin(app, settings, host, worker=instance)
            except ConfigurationError as error:
                refuse(error)
            except FleetError as error:
                refuse(error, EXIT_UNAVAILABLE)

    signals.celeryd_init.connect(begin, weak=False)
    app.steps["consumer"].add(BatchedEvents)


def _refuse_options(options: dict[str, Any]) -> None:
    """The settings say all this; a command line that says otherwise would be obeyed in parts."""
    if options.get("concurrency") or options.get("autoscale"):
        refuse(ConfigurationError("slots are set by limits.concurrency of the instance: leave out -c"))
    if options.get("queues"):
        refuse(ConfigurationError("queues are the lanes of what the instance serves: leave out -Q"))
    if options.get("pool") not in (None, get_implementation("threads")):
        refuse(ConfigurationError("a node works with threads, whatever it waits for is elsewhere: leave out -P"))


def _begin_registry(app: Celery, settings: Settings, host: str, *, worker: Any) -> None:
    opted_in(settings)
    node = RegistryNode(app, settings, host)
    worker.hostname = node.name
    _watch_life(worker, node)


def _begin(app: Celery, settings: Settings, host: str, *, worker: Any) -> None:
    """Set the worker up before Celery reads its pool, concurrency and queues."""
    name, instance = select_instance(settings, worker.hostname)
    mlx, offerings, server = _find_models(settings, name, instance)
    node_name = worker.hostname = f"{name}@{host}"
    transport = transport_of(settings.broker_url)
    node = Node(
        settings,
        name=node_name,
        instance=name,
        server=server,
        mlx=mlx,
        offerings=offerings,
        sender=ReplySender(app.connection_for_write, node_name, max_pending=settings.worker.max_pending),
        intake=Intake(app, transport),
    )
    register_tasks(app, node)
    # With Python's 5 ms, the thread that takes messages waits too long for its turn among busy slots: a fifth fewer
    # requests a second.
    sys.setswitchinterval(0.001)
    app.conf.worker_concurrency = node.slots
    lanes = lanes_of(node_name, offerings)
    app.conf.task_queues = [lane_queue(each, transport) for each in lanes]
    app.amqp.queues.deselect(lanes)  # joined when the instance has shown that it works
    _watch_life(worker, node)


def refuse(error: FleetError, exit_code: int = EXIT_CONFIGURATION) -> NoReturn:
    """End this process with one line that says why."""
    print(f"fleet-worker: {error.message}", file=sys.stderr, flush=True)  # noqa: T201 - logging is not set up yet
    raise SystemExit(exit_code)


def opted_in(settings: Settings) -> dict[str, Instance]:
    """Return the instances that this host serves; raises `ConfigurationError` if there is none."""
    serving = {name: instance for name, instance in settings.instances.items() if instance.opted_in}
    if not serving:
        raise ConfigurationError(
            "no instance has opted in: set fleet = { enabled = true, respond_to_requests = true } for an instance "
            "in the file that FLEET_CONFIG names"
        )
    return serving


def select_instance(settings: Settings, node_name: str) -> tuple[str, Instance]:
    """Return the instance that a worker of this name serves: `local@mini-7` serves `local`.

    Raises:
        ConfigurationError: no instance has opted in, or the name does not tell which one is meant.
    """
    serving = opted_in(settings)
    wanted = node_name.partition("@")[0]
    if wanted == "celery" and len(serving) == 1:  # Celery's default name: the worker was started without -n
        wanted = next(iter(serving))
    if wanted not in serving:
        known = ", ".join(sorted(serving))
        raise ConfigurationError(
            f"the node's name must begin with an instance that has opted in, as -n NAME@%h: {known}"
        )
    return wanted, serving[wanted]


def _find_models(settings: Settings, name: str, instance: Instance) -> tuple[MLXClient, dict[str, Offering], str]:
    """Wait for the MLX server, and return its client, what it offers, and what kind it is.

    Raises:
        InstanceUnavailable: it did not become ready within `worker.start_timeout`.
        ConfigurationError: it serves nothing that this instance may offer.
    """
    url, health = _find_server(instance, settings.worker.start_timeout)
    server = health.server if instance.server == "auto" else instance.server
    client = MLXClient(instance, url, server=server)
    reported = [] if instance.models else client.models()
    offerings = offerings_of(instance, settings.features, reported)
    if not offerings:
        client.close()
        raise ConfigurationError(
            f"instance {name} has nothing to offer: list its models under [instances.{name}.models], "
            "and check fleet.capabilities, usage, and the model lists"
        )
    return client, offerings, server


def _find_server(instance: Instance, timeout: float) -> tuple[str, Health]:
    urls = (instance.base_url,) if instance.base_url else DEFAULT_URLS
    attempts = Retrying(
        retry=retry_if_exception_type(InstanceUnavailable),
        stop=stop_after_delay(timeout),
        wait=wait_exponential(multiplier=0.1, max=2.0) + wait_random(max=0.1),
        reraise=True,
    )
    return attempts(_ready_server, instance, urls, timeout)


def _ready_server(instance: Instance, urls: Sequence[str], timeout: float) -> tuple[str, Health]:
    for url in urls:
        if health := _health(instance, url):
            return url, health
    where = " or ".join(urls)
    raise InstanceUnavailable(
        f"no MLX server became ready at {where} within {timeout:g} s: start it, or correct base_url"
    )


def _health(instance: Instance, url: str) -> Health | None:
    client = MLXClient(instance, url)
    try:
        health = client.health()
    except FleetError:
        return None
    finally:
        client.close()
    return health if health.ready else None


def _watch_life(worker: Any, node: Node | RegistryNode) -> None:
    ended = threading.Event()

    def ready(sender: Any, **_: Any) -> None:
        node.start()

    def stopping(sender: str, **_: Any) -> None:
        if sender == node.name:
            node.drain()
            threading.Thread(target=_leave_a_silent_broker, args=(node, ended), daemon=True).start()

    def stopped(sender: Any, **_: Any) -> None:
        """All tasks have ended by now."""
        if sender is worker:
            node.close()
            ended.set()
            log.info("%s ended", node.name)

    signals.worker_ready.connect(ready, weak=False)
    signals.worker_shutting_down.connect(stopping, weak=False)
    signals.worker_shutdown.connect(stopped, weak=False)


def _leave_a_silent_broker(node: Node | RegistryNode, ended: threading.Event) -> None:
    """Exit when the work is done, even if the broker is frozen: Celery would wait for it without an end."""
    node.wait_until_idle()
    if not ended.wait(LEAVE_AFTER):
        log.warning("%s leaves: its work is done, and the broker does not answer", node.name)
        node.close(timeout=1.0)
        logging.shutdown()
        os._exit(0)
