import socket
import threading
import time
from contextlib import closing

import pytest

from fleet_worker import BrokerUnavailable, Expired, Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import transport_of
from fleet_worker.router.submitter import Submitter
from fleet_worker.testing import embedded_broker
from tests.brokers import free_port
from tests.clients import HELLO, took_less_than

SCHEMES = ["redis", "amqp"]
LANE = "llm.fleet.chat.m"


def request_of(**options):
    return (
        Router(Settings())._request("chat", "m", {"messages": HELLO}, **options)[0].addressed_to("llm.fleet.reply.a.1")
    )


def submitter_of(url):
    return Submitter(create_app(Settings(broker_url=url)), transport_of(url))


def unavailable(url, patience):
    with closing(submitter_of(url)) as submitter, pytest.raises(BrokerUnavailable) as caught:
        submitter.submit(request_of(), LANE, patience=patience)
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None
    return caught.value


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_broker_that_is_not_there_is_waited_for(scheme):
    started = time.monotonic()
    with took_less_than(1.5):
        error = unavailable(f"{scheme}://user:hush-hush@127.0.0.1:{free_port()}//", patience=0.5)
    assert time.monotonic() - started > 0.3
    assert error.retryable
    assert "within 0.5 s" in error.message


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_broker_that_says_nothing_is_asked_twice(scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        callers = []

        def count():
            while True:
                try:
                    callers.append(silent.accept()[0])
                except OSError:
                    return

        counting = threading.Thread(target=count)
        counting.start()
        with took_less_than(1.6):
            assert "TimeoutError" in unavailable(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}//", 0.6).message
        silent.shutdown(socket.SHUT_RDWR)
        counting.join()
    for caller in callers:
        caller.close()
    assert len(callers) == 2


def test_what_the_broker_refuses_is_not_tried_again():
    with embedded_broker() as url, took_less_than(5):
        error = unavailable(url.replace("//", "//user:hush-hush@"), patience=20)
    assert not error.retryable
    place = url.partition("://")[2].partition("/")[0]
    assert error.message == f"the broker at {place} refuses the user or the password"


def test_nothing_is_sent_after_the_deadline(monkeypatch):
    request = request_of()
    monkeypatch.setattr(time, "time", lambda: request.expires_at)
    with pytest.raises(Expired):
        submitter_of(f"redis://127.0.0.1:{free_port()}/0").submit(request, LANE, patience=1.0)


def test_no_request_waits_for_the_broker_beyond_its_deadline():
    with took_less_than(1.5), pytest.raises(BrokerUnavailable):
        submitter_of(f"redis://127.0.0.1:{free_port()}/0").submit(request_of(timeout=0.5), LANE, patience=20.0)
