"""Signals before a node is ready."""

import logging
import queue
import signal

import pytest

from fleet_worker.exit_codes import INTERRUPTED
from fleet_worker.node import lifecycle as module
from fleet_worker.node.lifecycle import Startup


@pytest.fixture
def exits(monkeypatch):
    """The exit codes, where no process ends."""
    codes = queue.SimpleQueue()
    monkeypatch.setattr(module, "end_process", codes.put)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    Startup("one@test", lambda settings: True)
    yield codes
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_that_comes_while_a_line_is_logged_ends_the_node(exits, number, exit_code):
    """A log handler of Python swallows what is raised while it writes."""

    class Stream:
        def write(self, text):
            signal.raise_signal(number)
            raise RuntimeError("reentrant call inside a BufferedWriter")

        def flush(self):
            pass

    log = logging.getLogger("tests.startup")
    log.addHandler(handler := logging.StreamHandler(Stream()))
    handler.handleError = lambda record: None
    try:
        log.error("waits for a server")
    finally:
        log.removeHandler(handler)
    assert exits.get(timeout=5) == exit_code
