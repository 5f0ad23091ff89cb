import gc
import socket
import threading
import time
import weakref
from contextlib import ExitStack, closing, suppress

import pytest
import redis
from kombu.exceptions import LimitExceeded

from fleet_worker import BrokerUnavailable, Cancelled, Expired, Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import LANE_EXPIRES, priority, transport_of
from fleet_worker.protocol import clock
from fleet_worker.router import submitter as submitter_module
from fleet_worker.router.submitter import MAX_CONNECTIONS, Submitter
from fleet_worker.testing import embedded_broker
from tests.brokers import free_port
from tests.envelopes import request_of
from tests.mlx_clients import HELLO, took_less_than, until

SCHEMES = ["redis", "amqp"]
LANE = "llm.fleet.chat.m"


def request(**options):
    return request_of(Router(Settings()), "chat", "m", messages=HELLO, **options).addressed_to("llm.fleet.reply.a.1")


def submitter_of(url):
    return Submitter(create_app(Settings(broker_url=url)), transport_of(url))


def unavailable(url, patience):
    with closing(submitter_of(url)) as submitter, pytest.raises(BrokerUnavailable) as caught:
        submitter.submit(request(), LANE, patience=patience)
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
def test_the_body_of_a_request_that_was_not_sent_is_freed_without_the_garbage_collector(scheme):
    """A gateway collects seldom: hundreds of megabytes waited for that while its broker was away."""
    asked = request()
    kept = weakref.ref(asked)
    with closing(submitter_of(f"{scheme}://127.0.0.1:{free_port()}//")) as submitter:
        gc.disable()
        try:
            with suppress(BrokerUnavailable):
                submitter.submit(asked, LANE, patience=0.01)
            del asked
            assert kept() is None
        finally:
            gc.enable()


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

        counting = threading.Thread(target=count, daemon=True)
        counting.start()
        with took_less_than(1.6):
            assert (
                "does not answer in time"
                in unavailable(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}//", 0.6).message
            )
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
    sent = request()
    monkeypatch.setattr(clock, "now", lambda: sent.expires_at)
    with pytest.raises(Expired):
        submitter_of(f"redis://127.0.0.1:{free_port()}/0").submit(sent, LANE, patience=1.0)


def test_no_request_waits_for_the_broker_beyond_its_deadline():
    with took_less_than(1.5), pytest.raises(BrokerUnavailable):
        submitter_of(f"redis://127.0.0.1:{free_port()}/0").submit(request(timeout=0.5), LANE, patience=20.0)


def test_a_request_waits_in_the_list_of_its_priority_until_the_lane_expires():
    with embedded_broker() as url, closing(submitter_of(url)) as submitter, redis.Redis.from_url(url) as client:
        submitter.submit(request(priority="low"), LANE, patience=5.0)
        (waiting,) = client.scan_iter(f"{LANE}*")
        assert waiting.decode().endswith("\x16" + str(priority("low", "redis")))
        assert LANE_EXPIRES - 60 < client.ttl(waiting) <= LANE_EXPIRES


def test_a_connection_is_used_again_until_it_was_idle_for_a_while(monkeypatch):
    with embedded_broker() as url, closing(submitter_of(url)) as submitter, redis.Redis.from_url(url) as client:
        before = len(client.client_list())
        opened = client.info("stats")["total_connections_received"]
        for _ in range(5):
            submitter.submit(request(), LANE, patience=5.0)
            submitter.close_idle()
        assert len(client.client_list()) == before + 1
        assert client.info("stats")["total_connections_received"] <= opened + 2  # kombu asks PING on one of its own
        monkeypatch.setattr(submitter_module, "IDLE_AFTER", 0.0)
        submitter.close_idle()
        until(lambda: len(client.client_list()) == before)
        submitter.submit(request(), LANE, patience=5.0)


def test_a_connection_on_which_something_failed_is_not_used_again():
    with embedded_broker() as url, closing(submitter_of(url)) as submitter:
        with pytest.raises(ZeroDivisionError), submitter.producer(5.0) as first:
            _ = 1 / 0
        with submitter.producer(5.0) as second:
            assert second.connection is not first.connection
        with submitter.producer(5.0) as third:
            assert third.connection is second.connection


def test_no_more_connections_are_lent_than_there_are():
    with embedded_broker() as url, closing(submitter_of(url)) as submitter, ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(submitter.producer(5.0))
        with took_less_than(1), pytest.raises(LimitExceeded), submitter.producer(0.1):
            pass


def test_what_is_closed_lends_nothing_and_keeps_nothing():
    with embedded_broker() as url, redis.Redis.from_url(url) as client:
        submitter, before = submitter_of(url), len(client.client_list())
        with submitter.producer(5.0):
            submitter.close()
        with pytest.raises(Cancelled), submitter.producer(5.0):
            pass
        until(lambda: len(client.client_list()) == max(1, before))
