"""A worker as the inference node of an instance. A registry node imports none of this: it would keep 8 MB of it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from celery import Celery

from fleet_worker.broker.control_commands import Command
from fleet_worker.broker.topology import lane_queue, transport_of
from fleet_worker.node.lane_consumer import lanes_of
from fleet_worker.node.node import Node
from fleet_worker.node.remote_control import commands_of
from fleet_worker.node.restart_commands import restart_commands
from fleet_worker.node.server_discovery import find_server
from fleet_worker.node.tasks import register_tasks
from fleet_worker.settings import Settings


def create_node(app: Celery, settings: Settings, node_name: str) -> Node:
    """Create the node once its MLX server answers, and set the worker of `app` up for it.

    Raises:
        FleetError: the server does not answer in time, or the settings are wrong.
    """
    instance = settings.instances[node_name.partition("@")[0]]
    node = Node(app, settings, node_name, find_server(instance, settings.worker.start_timeout))
    register_tasks(app, node)
    # With Python's 5 ms the thread that takes messages waits too long for its turn among busy slots: a fifth fewer
    # requests a second.
    sys.setswitchinterval(0.001)
    app.conf.worker_concurrency = node.slots
    lanes, transport = lanes_of(node_name, node.models.by_name, settings), transport_of(settings.broker_url)
    app.conf.task_queues = [lane_queue(each, transport) for each in lanes]
    app.amqp.queues.deselect(lanes)  # joined when the instance has proved that it works
    return node


def all_commands_of(node: Node, restart: Callable[[], None]) -> dict[str, Command]:
    """Return the control commands of the node by name. `restart` ends its process so that `up` starts it again."""
    return {**commands_of(node), **restart_commands(node, restart)}
