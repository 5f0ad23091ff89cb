"""What this package does to kombu and Celery is for its own applications: others of the process are as without it."""

import subprocess
import sys

import pytest
from celery import Celery
from celery.events.dispatcher import EventDispatcher
from celery.worker.control import Panel
from kombu import pidbox
from kombu.transport import redis, virtual

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.node.worker import serve_with

PATCHED = """
import celery.app.amqp, celery.app.control, celery.app.events, celery.app.task, celery.apps.worker, celery.beat
import celery.events.dispatcher, celery.worker.consumer, celery.worker.control, celery.worker.request
import celery.worker.state, celery.worker.strategy, celery.worker.worker
import kombu.asynchronous.hub, kombu.pidbox, kombu.transport.pyamqp, kombu.transport.redis
import inspect, sys

def names():
    for module in list(modules):
        for name, value in list(vars(module).items()):
            yield (module.__name__, name), value
            if inspect.isclass(value) and value.__module__ == module.__name__:
                yield from (((module.__name__, name, inner), of) for inner, of in list(vars(value).items()))

modules = [each for name, each in sys.modules.items() if name.partition(".")[0] in ("celery", "kombu", "amqp", "redis")]
before = dict(names())
registered = {**celery.worker.control.Panel.data}, {**kombu.transport.TRANSPORT_ALIASES}

import fleet_worker.celery, fleet_worker.ops.status, fleet_worker.ops.drain, fleet_worker.router.router
from fleet_worker.broker.app import create_app
from fleet_worker.node.worker import serve_with
from fleet_worker.settings import Settings

for scheme in ("redis", "amqp"):
    app = create_app(Settings(broker_url=f"{scheme}://127.0.0.1:1//"), is_node=True)
    serve_with(app, Settings())
    app.finalize()
    app.connection_for_read().transport, app.control.mailbox, app.events.Dispatcher, app.Worker
EDIT
after = dict(names())
assert registered == (celery.worker.control.Panel.data, kombu.transport.TRANSPORT_ALIASES)
for name in before:
    if name not in after or after[name] is not before[name]:
        print(*name)
for name in after.keys() - before.keys():
    if len(name) == 3:
        print(*name)
print(len(before), file=sys.stderr)
"""


def patched(edit=""):
    """The names in kombu, Celery, amqp and redis that stand for something else once this package is in use."""
    command = [sys.executable, "-c", PATCHED.replace("EDIT", edit)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert int(done.stderr) > 5_000
    return set(done.stdout.splitlines())


def test_nothing_in_kombu_celery_amqp_and_redis_is_replaced():
    assert patched() == {"kombu.utils.compat _environment"}  # what kombu itself remembers


@pytest.mark.parametrize(
    "edit",
    ["kombu.transport.redis.Channel.do_restore = False", "celery.worker.consumer.consumer.dump_body = print"],
)
def test_what_is_replaced_is_found(edit):
    assert len(patched(edit)) == 2


@pytest.fixture
def ours():
    with create_app(Settings(broker_url="redis://127.0.0.1:1/0"), is_node=True) as app:
        serve_with(app, Settings())
        yield app


@pytest.fixture
def other(ours):
    """An application that has the broker and all transport options of ours."""
    with Celery("other", broker=ours.conf.broker_url, set_as_current=False) as app:
        app.conf.broker_transport_options = ours.conf.broker_transport_options
        yield app


def test_another_application_of_the_process_has_the_transport_of_kombu(ours, other):
    assert type(ours.connection_for_read().transport) is not redis.Transport
    transport = other.connection_for_read().transport
    assert type(transport) is redis.Transport
    assert transport.Channel is redis.Channel
    assert redis.Channel.QoS is redis.QoS
    assert redis.QoS.__mro__[1] is virtual.QoS


def test_another_application_of_the_process_does_not_get_our_connections_from_kombus_pool(ours, other):
    assert type(ours.pool.connection) is not type(other.pool.connection)
    assert ours.pool is not other.pool


def test_another_application_of_the_process_has_the_remote_control_and_the_events_of_celery(ours, other):
    assert type(other.control.mailbox) is pidbox.Mailbox
    assert other.events.Dispatcher.__mro__[1] is EventDispatcher
    assert other.conf.worker_enable_remote_control
    assert "drain" not in Panel.data
