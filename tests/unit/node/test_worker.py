"""What makes a worker of our application a node, and leaves the workers of others as they are."""

import signal
from types import SimpleNamespace

import celery.apps.worker
import celery.worker.consumer.consumer as celery_consumer
import pytest
from celery import Celery
from celery.worker import request as celery_request
from celery.worker.control import Panel

from fleet_worker.errors import ConfigurationError
from fleet_worker.node.consumer import Consumer
from fleet_worker.node.task_request import Request
from fleet_worker.node.worker import _node_name, serve_with
from fleet_worker.settings import Settings


@pytest.fixture
def app():
    with Celery("ours", broker="memory://", set_as_current=False) as app:
        serve_with(app, Settings())
        yield app


def test_another_celery_application_of_the_process_is_as_without_us():
    """What Celery has for all applications is the same object after ours was set up."""

    def shared():
        owners = (celery.apps.worker, celery_consumer, celery_consumer.Consumer, celery_request.Request)
        return [dict(vars(owner)) for owner in owners] + [dict(Panel.data)]

    before = shared()
    with Celery("ours", broker="memory://", set_as_current=False) as ours:
        serve_with(ours, Settings())
    with Celery("other", broker="memory://", set_as_current=False) as other:
        assert other.Task.Request == "celery.worker.request:Request"
        assert other.conf.worker_consumer == "celery.worker.consumer:Consumer"
        assert other.Worker.__mro__[1] is celery.apps.worker.Worker
        assert not {step.__module__ for step in other.steps["consumer"]}
    for ours_now, as_before in zip(shared(), before, strict=True):
        assert ours_now == as_before


def test_every_task_of_ours_even_one_of_celery_itself_hides_its_arguments(app):
    @app.task(name="ours", shared=False)
    def ours():
        """Never runs."""

    app.finalize()
    assert {task.Request for task in app.tasks.values()} == {Request}
    assert app.conf.worker_consumer is Consumer


@pytest.fixture
def handlers():
    """Handlers of signals that a test can tell from each other; those of before are put back."""
    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1)
    before = {each: signal.getsignal(each) for each in signals}
    mine = dict.fromkeys(signals, signal.default_int_handler)
    for each, handler in mine.items():
        signal.signal(each, handler)
    yield mine
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("is_macos", [False, True])
def test_celery_handles_ctrl_c_and_leaves_sigterm_and_sighup_to_the_node(app, handlers, is_macos, monkeypatch):
    monkeypatch.setenv("celery_dummy_proxy", "set by Celery on macOS")
    worker = object.__new__(app.Worker)
    worker.app = SimpleNamespace(IS_macOS=is_macos)
    worker.install_platform_tweaks(worker)
    changed = {each.name for each, handler in handlers.items() if signal.getsignal(each) is not handler}
    assert changed == {"SIGINT", "SIGQUIT", "SIGUSR1"}


def test_a_worker_of_ours_has_neither_gossip_nor_mingle(app):
    arguments = object.__new__(app.Worker).prepare_args(without_gossip=False, loglevel="INFO")
    assert arguments == {"without_gossip": True, "without_mingle": True, "loglevel": "INFO"}


def test_an_instance_that_has_not_opted_in_is_named_with_those_that_have():
    opted_in = {"enabled": True, "respond_to_requests": True}
    settings = Settings(instances={name: {"base_url": "http://127.0.0.1:1", "fleet": opted_in} for name in "ab"})
    for name, words in {"nosuch@h": 'no instance "nosuch" has opted in', "celery@h": "-n NAME@%h"}.items():
        with pytest.raises(ConfigurationError, match=": a, b") as caught:
            _node_name(settings, name)
        assert words in caught.value.message
