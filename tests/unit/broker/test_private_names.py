"""Names of kombu, Celery, redis, amqp and uvicorn that are not documented, and that this package uses.

If one of these tests fails after an upgrade, its text says what of ours does not work any more; nothing else may fail.
"""

import ast
import functools
import importlib
import inspect
from pathlib import Path

import pytest

import fleet_worker

source = functools.cache(inspect.getsource)  # which reads a whole module each time
REDIS, VIRTUAL = "kombu.transport.redis", "kombu.transport.virtual.base"
CONSUMER, WORKER = "celery.worker.consumer.consumer", "celery.apps.worker"
SILENT = "a node does not notice a broker that fell silent"
GIVEN_BACK = "a message that is given back to its lane is lost, or goes behind others, or into the wrong list"
SHARED = "a node opens more sockets to Redis, or one channel cuts off the others"
LEAK = "each new connection of a worker leaks memory or open files"
MORE_CONNECTIONS = "a node, or a control command, opens one connection more"
ARGUMENTS = "arguments of tasks appear in events and Flower"
QUOTED = "bad messages are quoted in the log"
LANES = "no lane is joined or left"
CANCELLED = "a lane whose queue was deleted is joined again late"
DOOR = "messages of strangers do not come through the door, and end nodes"
BULK = "a router receives no replies"
BOUND = "a message of 500 MB is read into memory"
LOG = "the log shows the user of broker_url, and the texts of errors"
TRUST = "other CAs than broker_ca are trusted"
SPINS = "a network that is cut in the middle of a frame stops a node"
IDLE = "an idle connection to the gateway is never closed, or closed at once"
UNSEEN = "a client of the gateway that leaves is not noticed if it has sent a second request; HTTP/1.0 gets chunks"
SIGNALS = "signals do not end a node, or lose requests"

USED = [
    # Module, class or none, name: where it is used, and what depends on it.
    (REDIS, "Channel", "_create_client", ["Channel"], "each publish costs two thirds more time"),
    (REDIS, "Channel", "_get_pool", ["Channel"], SHARED),
    (REDIS, "Channel", "_pool", ["Channel"], SHARED),
    (REDIS, "Channel", "_disconnect_pools", ["Channel"], SHARED),
    (REDIS, "Channel", "async_pool", ["Channel"], SHARED),
    (REDIS, "Channel", "subclient", ["Channel"], SILENT),
    (REDIS, "Channel", "_get_subscribe_topics", ["Channel"], "a missing right to subscribe is found late"),
    (REDIS, "Channel", "maybe_refresh_binding_expiry", ["Transport"], "a full broker fills the log with tracebacks"),
    (REDIS, "Channel", "_q_for_pri", ["Channel"], GIVEN_BACK),
    (REDIS, "Channel", "_put", ["Channel"], "sending a request takes a fifth longer"),
    (VIRTUAL, "Channel", "_get_message_priority", ["Channel"], "requests are sent with another priority"),
    ("celery.app.amqp", "AMQP", "as_task_v2", ["AMQP"], "no request is sent"),
    ("celery.app.amqp", "AMQP", "send_task_message", ["AMQP"], "no request is sent"),
    (REDIS, "Channel", "_expires", ["Channel"], GIVEN_BACK),
    (REDIS, "Channel", "_brpop_read", ["Channel"], DOOR),
    (REDIS, "Channel", "_brpop_start", ["Channel", "MultiChannelPoller"], BULK),
    (REDIS, "Channel", "_brpop_sent_at", ["Channel"], BULK),
    (REDIS, "Channel", "_update_queue_cycle", ["Channel"], "a lane that is joined is served, or left, 4 s late"),
    (REDIS, "Channel", "active_queues", ["Channel", "MultiChannelPoller"], "lanes are not read"),
    (REDIS, "Channel", "_closing", ["Channel"], "a router that ends, or lost the broker, waits a second more"),
    ("redis._parsers.resp2", "_RESP2Parser", "_read_response", ["_RESP2Parser"], BULK),
    ("redis._parsers.resp3", "_RESP3Parser", "_read_response", ["_RESP3Parser"], BULK),
    ("redis.connection", "AbstractConnection", "_parser", ["AbstractConnection"], BULK),
    ("amqp.transport", "TCPTransport", "_quick_recv", ["TCPTransport", "SSLTransport"], BULK),
    ("amqp.transport", "TCPTransport", "_read_buffer", ["TCPTransport", "SSLTransport"], BULK),
    (REDIS, "Channel", "_receive_one", ["Channel"], DOOR),
    (REDIS, "Channel", "_handle_message", ["Channel"], DOOR),
    (REDIS, "Channel", "_fanout_to_queue", ["Channel"], DOOR),
    (REDIS, "Channel", "_queue_cycle", ["Channel"], "a busy lane starves the others of its node"),
    (REDIS, "Channel", "_in_poll", ["Channel", "MultiChannelPoller"], "nothing is received after the first message"),
    (REDIS, "Channel", "_in_listen", ["Channel", "MultiChannelPoller"], "no cancels arrive after a lost connection"),
    (REDIS, "Channel", "_connparams", ["Channel"], BOUND),
    (REDIS, "Channel", "connection_class", ["Channel"], BOUND),
    (VIRTUAL, "Channel", "Message", ["Channel", "Transport"], DOOR),
    (VIRTUAL, "Transport", "_deliver", ["Transport"], DOOR),
    ("kombu.message", "Message", "_decode", ["Message"], "kombu changes what callers send: objects with a __type__"),
    ("kombu.transport.pyamqp", "Channel", "Message", ["Channel"], DOOR),
    ("kombu.transport.pyamqp", "Transport", "Connection", ["Transport"], DOOR),
    ("amqp.abstract_channel", "AbstractChannel", "dispatch_method", [], DOOR),
    ("amqp.channel", "Channel", "no_ack_consumers", ["Channel"], DOOR),
    ("amqp.channel", "Channel", "auto_decode", ["Channel"], DOOR),
    ("amqp.method_framing", None, "frame_handler", [], BOUND),
    ("amqp.connection", None, "frame_handler_cls", ["Connection"], BOUND),
    ("redis._parsers.base", "_RESPBase", "_buffer", ["_RESPBase"], BOUND),
    ("redis._parsers.base", "_RESPBase", "_sock", ["_RESPBase"], BOUND),
    ("redis._parsers.socket", "SocketBuffer", "_buffer", ["SocketBuffer"], BOUND),
    ("redis._parsers.socket", "SocketBuffer", "_read_from_socket", ["SocketBuffer"], BOUND),
    ("redis.connection", "AbstractConnection", "_socket_read_size", ["AbstractConnection"], BOUND),
    ("redis.connection", "AbstractConnection", "set_parser", ["AbstractConnection"], BOUND),
    (REDIS, "Channel", "priority_steps", ["Channel"], "waiting requests are counted wrongly"),
    (REDIS, "Channel", "get_table", ["Channel"], "status does not see lanes that no node offers any more"),
    (REDIS, "Transport", "register_with_event_loop", ["Transport"], LEAK),
    (REDIS, None, "on_tick", ["Transport"], LEAK),
    (REDIS, "Channel", "QoS", ["Channel"], LEAK),
    (VIRTUAL, "QoS", "_on_collect", ["QoS"], LEAK),
    (VIRTUAL, "Channel", "_restore_at_beginning", ["QoS"], GIVEN_BACK),
    (VIRTUAL, "Channel", "do_restore", ["QoS"], "a lost connection starts all running tasks a second time"),
    ("redis.connection", "SSLConnection", "_wrap_socket_with_ssl", ["SSLConnection"], TRUST),
    ("redis.connection", "SSLConnection", "cert_reqs", ["SSLConnection"], TRUST),
    ("redis.connection", "SSLConnection", "check_hostname", ["SSLConnection"], TRUST),
    ("kombu.transport.redis", "Channel", "connection_class_ssl", ["Channel"], TRUST),
    ("amqp.transport", "SSLTransport", "_wrap_socket", ["SSLTransport"], "a node asks for the passphrase of a key"),
    ("amqp.transport", "SSLTransport", "_shutdown_transport", ["_AbstractTransport"], "a frozen broker is waited for"),
    ("amqp.transport", "SSLTransport", "_read", ["SSLTransport", "_AbstractTransport"], SPINS),
    ("amqp.transport", "TCPTransport", "_read", ["TCPTransport", "_AbstractTransport"], SPINS),
    ("amqp.transport", "TCPTransport", "raise_on_initial_eintr", ["TCPTransport", "SSLTransport"], SPINS),
    ("amqp.connection", "Connection", "Transport", ["Connection"], "a node asks for the passphrase of a key"),
    ("redis.client", "PubSub", "check_health", ["PubSub"], SILENT),
    ("redis.client", None, "next_health_check", ["PubSub"], SILENT),
    ("redis.connection", "AbstractConnection", "next_health_check", ["AbstractConnection"], SILENT),
    ("redis.connection", "BlockingConnectionPool", "pool", ["BlockingConnectionPool"], SHARED),
    (
        "redis.connection",
        "Connection",
        "register_connect_callback",
        [],
        "replies in a lost connection are not repeated",
    ),
    ("redis.connection", "Connection", "update_current_socket_timeout", [], "operators wait long for a frozen broker"),
    (
        "amqp.connection",
        "Connection",
        "_on_blocked",
        ["Connection"],
        "a RabbitMQ that is short of memory is waited for in silence",
    ),
    ("kombu.connection", "Connection", "get_transport_cls", ["Connection"], "none of the above is in effect"),
    (
        "kombu.connection",
        "Connection",
        "__eqhash__",
        [],
        "other applications get our connections from the pool",
    ),
    ("kombu.connection", "Connection", "ensure_connection", [], "a node waits up to 30 s between two tries to connect"),
    ("kombu.pidbox", "Mailbox", "producer_or_acquire", ["Mailbox"], MORE_CONNECTIONS),
    ("kombu.pidbox", "Mailbox", "get_queue", ["Node"], "nodes hear no commands"),
    ("kombu.pidbox", "Mailbox", "reply_exchange", ["Mailbox"], "`drain`, `celery inspect` and Flower get no answers"),
    ("celery.app.amqp", "AMQP", "Connection", [], "none of the above is in effect"),
    ("celery.app.control", "Control", "Mailbox", ["Control"], MORE_CONNECTIONS),
    ("celery.app.events", "Events", "dispatcher_cls", ["Events"], "a node hangs on RabbitMQ when it has many events"),
    ("celery.events.dispatcher", "EventDispatcher", "buffer_limit", ["EventDispatcher"], "see above"),
    (
        "celery.events.dispatcher",
        "EventDispatcher",
        "_publish",
        ["EventDispatcher"],
        "a node may be deaf after an outage",
    ),
    ("celery.utils.threads", None, "bound_open_broker_sockets", [], "a frozen broker is waited for without an end"),
    ("celery.worker.control", "Panel", "data", ["Panel"], "`celery inspect` and Flower get no answers"),
    ("celery.worker.consumer.control", None, "worker_enable_remote_control", [], "control commands are obeyed twice"),
    ("celery.worker.consumer.events", None, "connection_for_write", [], MORE_CONNECTIONS),
    ("celery.worker.consumer.events", None, "on_send_event_buffered", [], "each request sends three events"),
    (CONSUMER, "Consumer", "connection_for_read", ["Consumer"], "the event loop waits for confirmations of RabbitMQ"),
    (CONSUMER, "Consumer", "register_with_event_loop", [], "no task events are sent after an outage"),
    (CONSUMER, "Consumer", "connection_errors", ["Consumer"], "a connection that breaks at its start ends the node"),
    ("celery.worker.consumer.tasks", None, "task_consumer", [], LANES),
    (CONSUMER, "Consumer", "add_task_queue", [], LANES),
    (CONSUMER, "Consumer", "cancel_task_queue", [], LANES),
    (CONSUMER, "Consumer", "call_soon", [], LANES),
    (CONSUMER, "Consumer", "call_soon_ack", [], "a node does more for each request"),
    (VIRTUAL, "QoS", "can_consume", ["QoS"], "a slot that becomes free is noticed half a second late"),
    (
        "kombu.messaging",
        "Consumer",
        "_active_tags",
        ["Consumer"],
        CANCELLED,
    ),
    ("amqp.channel", None, "cancel_callbacks", ["Channel"], CANCELLED),
    (CONSUMER, "Consumer", "connect", [], "a node asks a broker that refuses it ten times a second"),
    (CONSUMER, "Consumer", "on_connection_error_before_connected", ["Consumer"], "see above"),
    (CONSUMER, "Consumer", "on_connection_error_after_connected", ["Consumer"], "see above"),
    (CONSUMER, "Consumer", "create_task_handler", [], "a message that is no task ends the worker"),
    (CONSUMER, "Consumer", "on_unknown_message", ["Consumer"], QUOTED),
    (CONSUMER, "Consumer", "on_unknown_task", ["Consumer"], QUOTED),
    (CONSUMER, "Consumer", "on_invalid_task", ["Consumer"], QUOTED),
    (CONSUMER, "Consumer", "on_decode_error", [], QUOTED),
    (CONSUMER, None, "CONNECTION_ERROR", ["Consumer"], LOG),
    (CONSUMER, None, "CONNECTION_RETRY", ["Consumer"], LOG),
    ("celery.worker.request", "Request", "_argsrepr", ["Request"], ARGUMENTS),
    ("celery.worker.request", "Request", "_kwargsrepr", ["Request"], ARGUMENTS),
    ("celery.worker.state", None, "reserved_requests", [], "a node ends before its requests have"),
    ("celery.worker.state", None, "should_stop", ["maybe_shutdown"], SIGNALS),
    ("celery.worker.loops", None, "maybe_shutdown", ["asynloop"], SIGNALS),
    (WORKER, "Worker", "install_platform_tweaks", ["Worker"], SIGNALS),
    (WORKER, None, "install_worker_term_hard_handler", ["Worker"], SIGNALS),
    (WORKER, None, "install_worker_int_handler", ["Worker"], SIGNALS),
    (WORKER, None, "install_cry_handler", ["Worker"], SIGNALS),
    (
        "uvicorn.protocols.http.httptools_impl",
        "HttpToolsProtocol",
        "_unset_keepalive_if_required",
        ["HttpToolsProtocol"],
        IDLE,
    ),
    ("uvicorn.protocols.http.httptools_impl", "HttpToolsProtocol", "_start_asgi_task", ["HttpToolsProtocol"], UNSEEN),
]


@pytest.mark.parametrize(
    ("module", "owner", "name", "users", "broken"), USED, ids=[".".join(filter(None, each[:3])) for each in USED]
)
def test_a_name_that_is_not_documented_is_there_and_is_used_as_before(module, owner, name, users, broken):
    there = importlib.import_module(module)
    of = getattr(there, owner) if owner else there
    defined = (f"{name} = ", f"{name}: ") if owner else (f".{name}",)
    found = hasattr(of, name) or any(each in source(of) for each in defined)
    assert found, f"{module} has no {owner or ''} {name} any more: {broken}"
    for user in users:
        code = source(getattr(there, user))
        assert name in code, f"{user} of {module} does not use {name} any more: {broken}"


def test_every_private_name_that_this_package_does_not_define_is_checked_here():
    folder = Path(fleet_worker.__file__).parent
    files = [file for file in folder.rglob("*.py") if file.parent.name not in ("mlx", "demo")]  # they know no broker
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    used = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    ours = {node.attr for node in used if isinstance(node.ctx, ast.Store)}
    ours |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    ours |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    foreign = {node.attr for node in used if not node.attr.startswith("__")} - ours
    assert foreign - {name for _, _, name, _, _ in USED} == {"_exit"}  # of os, and documented
