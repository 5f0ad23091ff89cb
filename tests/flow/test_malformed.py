"""Messages that nobody should send: a node, a registry node and a router go on as if there were none."""

import bz2
import contextlib
import json
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fleet_worker import Router, Settings
from fleet_worker.broker.amqp_transport import LOST_TWICE
from fleet_worker.broker.app import create_app, door_of
from fleet_worker.broker.topology import lane, lane_queue
from fleet_worker.testing import SimulatedMLX, running_host
from tests.envelopes import envelope
from tests.mlx_clients import until
from tests.strangers import Stranger

CHAT = "sim-chat"
LANE = lane("chat", CHAT)
HELLO = [{"role": "user", "content": "Hello"}]
SLOTS = 4
USUAL = 2.0
"""Seconds within which a request is answered, also on a busy machine."""
MB = 1024 * 1024
MOST_GROWTH = 64 * MB
TASK = {"task": "fleet.chat", "id": "x"}
ADDRESSED = {"request_id": "r-1", "attempt": 1, "reply_to": "llm.fleet.reply.nobody.abc.5"}
FANOUTS = (
    *("llm.fleet.cancel", "llm.fleet.control.pidbox"),
    *("llm.registry", "llm.registry.ask", "llm.registry.digest"),
)
BODIES = [
    *(b"{}", b"5", b"null", b"[1]", b"[]", b"[[], {}]", b"[5, {}, {}]", b'[[{"a": 1}], {}, {}]', b"[[], {}, {}]"),
    *(b"\xff", b"[", b'"\\ud83d"', b"NaN", b"[[1],{},1]", b"\x80\x04K\x05.", b"[" * 100_000, b"9" * 10_000),
]
HEADERS = [
    *({**TASK, "id": each} for each in ([1], {"a": {}}, 5)),
    *({**TASK, "task": each} for each in ([1], {"a": {}}, 5, "celery.backend_cleanup", "celery.chord", "x" * 100_000)),
    *({**TASK, "timelimit": each} for each in (5, "x", [1], {"a": 1})),
    *({**TASK, "shadow": each} for each in ({"a": {}}, [1])),
    *({**TASK, "eta": each} for each in ("2099-01-01T00:00:00", [1], 5)),
    *({**TASK, "expires": each} for each in ("2001-01-01T00:00:00", {"a": 1})),
    *({**TASK, "stamped_headers": each} for each in (5, ["x"])),
    *({**TASK, "compression": each} for each in ("zlib", "bzip2", "nothing")),
    *({**TASK, "fleet_prefixes": each} for each in (5, ["x"], "x" * 900)),
    {},
]
CONTENT = [
    *({"content-type": each} for each in ("application/data", "text/plain", "application/x-python-serialize")),
    *({"content-type": "application/data", "content-encoding": each} for each in ("bz2_codec", "zlib_codec", "hex")),
    *({"content-encoding": each} for each in ("utf-16", "unicode_escape", "binary")),
]
ITEMS = [b"[]", b"1", b"null", b'"x"', b"{}", b"[" * 50_000, b"\xff", b'{"body": "e30="}', b'{"properties": {}}']
"""What only Redis can carry."""


def good(**changes):
    return json.dumps([[envelope(**ADDRESSED, model=CHAT, **changes)], {}, {}]).encode()


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(flavour="vllm_batched", models=[CHAT], token_interval=0.002) as server:
        yield server


@pytest.fixture(scope="module")
def host(broker, mlx):
    instance = {"base_url": mlx.base_url, "limits": {"concurrency": SLOTS}, "models": {CHAT: {}}}
    with running_host(broker.url, {"sim": instance}) as processes:
        yield processes


@pytest.fixture(scope="module")
def router(broker):
    with Router(Settings(broker_url=broker.url)) as router:
        yield router


@pytest.fixture
def stranger(broker):
    with Stranger(broker.url) as stranger:
        yield stranger


@pytest.fixture(scope="module")
def nothing_happened(host, router):
    """Returns a function that fails unless every slot answers in its usual time, in the same processes."""

    def ask(number=0):
        began = time.monotonic()
        assert router.chat(CHAT, HELLO, max_tokens=1, timeout=20).finish_reason == "length"
        return time.monotonic() - began

    def memory():
        return {name: resident(process.pid) for name, process in host.items()}

    ask()
    before = memory()

    def check():
        with ThreadPoolExecutor(SLOTS) as threads:
            assert max(threads.map(ask, range(SLOTS))) < USUAL
        assert not any(process.ended for process in host.values())
        for name, grown in memory().items():
            assert grown - before[name] < MOST_GROWTH, name
        until(lambda: router.registry.instances()[0].status == "available")

    return check


def resident(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024


def reply_queue_of(router):
    return router._session.replies.name


def send_everything(stranger, router):
    for queue in (LANE, reply_queue_of(router)):
        for body in BODIES:
            stranger.send(queue, body, TASK)
        for headers in HEADERS:
            for body in (good(), b"[[1],{},1]"):
                stranger.send(queue, body, headers)
        for changes in CONTENT:
            stranger.send(queue, good(), TASK, **changes)
        stranger.send(queue, zlib.compress(b" " * 50 * MB), {**TASK, "compression": "zlib"})
        stranger.send(queue, bz2.compress(b" " * 50 * MB), TASK, **{"content-encoding": "bz2_codec"})
        stranger.send(queue, b"[[" + b"[]," * MB + b"[]],{},{}]", TASK)
    for exchange in FANOUTS:
        for body in (*BODIES, *WRONG):
            stranger.broadcast(exchange, body, key="llm.registry.x")
        stranger.broadcast(exchange, zlib.compress(b" " * 50 * MB), {"compression": "zlib"}, key="llm.registry.x")
    for item in ITEMS if stranger.on_redis else ():
        stranger.push(LANE, item)
        stranger.push(reply_queue_of(router), item)
        for exchange in FANOUTS:
            stranger.publish(exchange, item)


WRONG = [
    *(
        b'{"cancelled": [["r", "many"]]}',
        b'{"missed": "llm.fleet.reply.x.nan"}',
        b'{"missed": "llm.fleet.reply.x.1e9"}',
    ),
    *(b'{"v": 1, "host": "h", "interval": 1e300, "events": [5]}', b'{"method": "shutdown"}', b'{"destination": 5}'),
    b'{"method": "rate_limit", "arguments": {"task_name": "fleet.chat", "rate_limit": "1/h"}}',
    b'{"method": "cancel_consumer", "arguments": {"queue": "%s"}}' % LANE.encode(),
]


def test_no_message_of_a_stranger_does_any_harm(stranger, router, nothing_happened):
    send_everything(stranger, router)
    nothing_happened()


@pytest.mark.rest
@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_no_request(stranger, router, nothing_happened, body):
    for _ in range(2 * SLOTS):
        stranger.send(LANE, body, TASK)
        stranger.send(reply_queue_of(router), body)
    nothing_happened()


@pytest.mark.rest
@pytest.mark.parametrize("headers", HEADERS, ids=range(len(HEADERS)))
def test_headers_of_a_stranger(stranger, nothing_happened, headers):
    for _ in range(2 * SLOTS):
        stranger.send(LANE, good(), headers)
        stranger.send(LANE, b"[[1],{},1]", headers)
    nothing_happened()


@pytest.mark.rest
def test_a_reply_queue_that_cannot_exist_stops_no_replies(stranger, nothing_happened):
    for number, rest in enumerate((".nope", "x.nan", "x.0", "x.1e9", "x.99999999999", "x.5\n", "\ud83d.5", "x" * 300)):
        address = {**ADDRESSED, "request_id": f"r-{number}", "reply_to": f"llm.fleet.reply.{rest}"}
        stranger.send(LANE, json.dumps([[{**envelope(), **address}], {}, {}]).encode(), TASK)
    nothing_happened()


@pytest.mark.rest
def test_refused_requests_are_not_remembered(stranger, nothing_happened):
    for number in range(150):
        one = {**envelope(), **ADDRESSED, "request_id": f"{number}" + "x" * MB}
        stranger.send(LANE, json.dumps([[one], {}, {}]).encode(), TASK)
        stranger.broadcast("llm.fleet.cancel", json.dumps({"cancelled": [[f"{number}" + "x" * (MB // 2), 1]]}).encode())
    nothing_happened()


@pytest.mark.rest
def test_messages_that_are_larger_than_any_of_ours(stranger, router, nothing_happened):
    for queue in (LANE, reply_queue_of(router)):
        stranger.send(queue, b" " * 60 * MB, TASK)
        stranger.send(queue, b'[[{"text": "' + b"x" * 15 * MB + b'"}],{},{}]', TASK)
    for exchange in FANOUTS:
        stranger.broadcast(exchange, b" " * 10 * MB, key="llm.registry.x")
    nothing_happened()


@pytest.mark.rest
@pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True)
def test_a_message_that_was_redelivered_twice_is_dropped(broker):
    """Redis delivers nothing a second time."""
    queue = lane_queue("llm.fleet.chat.poison", "amqp")
    with create_app(Settings(broker_url=broker.url)) as app:

        def take(seconds):
            """Consume as a node does, and end without an acknowledgement."""
            taken = []

            def handle(message):
                if message.delivery_info["redelivered"]:
                    message.channel.send_again(message)
                else:
                    taken.append(bytes(message.body))

            with app.connection_for_read() as connection, contextlib.suppress(TimeoutError):
                app.amqp.Consumer(connection.channel(), [queue], on_message=handle).consume()
                while not taken:
                    connection.drain_events(timeout=seconds)
            return taken

        with Stranger(broker.url) as stranger, app.connection_for_write() as connection:
            queue(connection).declare()
            stranger.send(queue.name, b"{}", TASK)
        assert [take(10), take(10), take(1), take(1)] == [[b"{}"], [b"{}"], [], []]
        assert door_of(app).dropped == {LOST_TWICE: 1}
