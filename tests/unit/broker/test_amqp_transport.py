"""What arrives from RabbitMQ, frame by frame: what cannot be read ends no connection, and what is too large is not
kept."""

import tracemalloc
from struct import pack
from types import SimpleNamespace

import pytest
from amqp import Message, spec

from fleet_worker.broker.amqp_transport import LOST_TWICE, REDELIVERED, Channel, _bounded_frame_handler
from fleet_worker.broker.door import COMPRESSED, EMPTY, FOREIGN, Door, Refused

METHOD, HEADER, BODY = 1, 2, 3
DOOR_BYTES = 1_000


@pytest.fixture
def door():
    return Door(DOOR_BYTES)


@pytest.fixture
def arrived():
    return []


@pytest.fixture
def on_frame(door, arrived):
    connection = SimpleNamespace(client=SimpleNamespace(door=door), bytes_recv=0)

    def on_method(channel, method, payload, message):
        arrived.append((channel, message.properties, bytes(message.body or b"")))

    return _bounded_frame_handler(connection, on_method)


def deliver(on_frame, header, *parts, channel=1):
    on_frame((METHOD, channel, pack(">HH", *spec.Basic.Deliver)))
    on_frame((HEADER, channel, header))
    for part in parts:
        on_frame((BODY, channel, part))


def header(size, flags=0, properties=b""):
    return pack(">HHQH", spec.Basic.CLASS_ID, 0, size, flags) + properties


def text(value):
    return bytes([len(value)]) + value


JSON = text(b"application/json")


def test_a_message_arrives_in_its_parts(on_frame, arrived):
    deliver(on_frame, header(6, 0x8000, JSON), b"abc", b"def")
    assert arrived == [(1, {"content_type": "application/json"}, b"abcdef")]


def test_a_body_that_is_too_large_is_not_kept_and_the_next_message_arrives(on_frame, arrived):
    part = b"x" * 100_000
    tracemalloc.start()
    try:
        deliver(on_frame, header(100_000_000, 0x8000, JSON), *[part] * 1_000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    deliver(on_frame, header(2, 0x8000, JSON), b"{}")
    assert arrived == [(1, {}, b""), (1, {"content_type": "application/json"}, b"{}")]


def test_other_channels_are_read_meanwhile(on_frame, arrived):
    deliver(on_frame, header(2_000, 0x8000, JSON), b"x" * 1_000)
    deliver(on_frame, header(2, 0x8000, JSON), b"{}", channel=2)
    on_frame((BODY, 1, b"x" * 1_000))
    deliver(on_frame, header(2, 0x8000, JSON), b"[]")
    assert [(channel, body) for channel, _, body in arrived] == [(1, b""), (2, b"{}"), (1, b"[]")]


NESTED = b"\x01a" + b"F"
DEEP = b""
for _ in range(10_000):
    DEEP = NESTED + pack(">I", len(DEEP)) + DEEP


@pytest.mark.parametrize(
    ("flags", "properties"),
    [
        (0x8000, text(b"\xff\xfe")),
        (0x2000, pack(">I", 10) + b"\x01aT" + pack(">Q", 2**64 - 1)[:7]),
        (0x2000, pack(">I", 11) + b"\x01aT" + pack(">Q", 2**64 - 1)),
        (0x2000, pack(">I", len(DEEP)) + DEEP),
        (0x2000, pack(">I", 4) + b"\x01a?x"),
        (0x2000, pack(">I", 2**31)),
        (0x0040, b"\x00"),
    ],
)
@pytest.mark.parametrize("size", [0, 2])
def test_properties_that_cannot_be_read_end_no_connection(on_frame, arrived, flags, properties, size):
    deliver(on_frame, header(size, flags, properties), *[b"{}"] * bool(size))
    deliver(on_frame, header(2, 0x8000, JSON), b"{}")
    assert arrived[-1] == (1, {"content_type": "application/json"}, b"{}")
    assert (1, {}, b"") in arrived


@pytest.fixture
def channel(door):
    channel = object.__new__(Channel)
    channel.connection = SimpleNamespace(client=SimpleNamespace(door=door), is_closing=False)
    channel.no_ack_consumers = {"fanout"}
    channel.is_closing, channel.auto_decode = False, False
    channel.acknowledged, channel.published = [], []
    channel.basic_ack = channel.acknowledged.append
    channel.basic_publish = lambda message, **to: channel.published.append((message, to))
    return channel


def message(body=b"{}", consumer="lane", **properties):
    made = Message(body, **{"content_type": "application/json", "content_encoding": "utf-8", **properties})
    made.delivery_info = {"consumer_tag": consumer, "delivery_tag": 7, "exchange": "theirs", "routing_key": "their key"}
    return made


def hand_over(channel, sent):
    taken = []
    channel._hand_over(taken.append, "the lane", DOOR_BYTES, sent)
    return taken


def test_a_consumer_gets_what_was_checked_and_where_it_came_from(channel, door):
    (taken,) = hand_over(channel, message(application_headers={"task": "t", "long": "x" * 9_999}, reply_to="elsewhere"))
    assert (taken.body, taken.headers, taken.properties.get("reply_to")) == (b"{}", {"task": "t"}, None)
    assert (taken.delivery_info["exchange"], taken.delivery_info["routing_key"]) == ("", "the lane")
    assert (channel.acknowledged, door.dropped) == ([], {})


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (message(b""), EMPTY),
        (message(b" " * (DOOR_BYTES + 1)), EMPTY),
        (message(application_headers={"compression": "zlib"}), COMPRESSED),
        (message(content_type="text/plain"), FOREIGN),
        (message(content_encoding="bz2_codec"), FOREIGN),
    ],
)
def test_what_is_refused_is_acknowledged_at_its_first_delivery(channel, door, sent, kind):
    assert hand_over(channel, sent) == []
    assert (channel.acknowledged, door.dropped) == ([7], {kind: 1})


def test_what_its_consumer_refuses_is_acknowledged_too(channel, door):
    def refuse(_):
        raise Refused("it is no task")

    channel._hand_over(refuse, "the lane", DOOR_BYTES, message())
    channel._hand_over(refuse, "a fanout", DOOR_BYTES, message(consumer="fanout"))
    assert (channel.acknowledged, door.dropped) == ([7], {"it is no task": 2})


@pytest.mark.parametrize("names", [text(b"\xff") + text(b"key"), text(b"") + text(b"llm.registry.\xff")])
@pytest.mark.parametrize(("consumer", "acknowledged"), [(b"lane", [7]), (b"fanout", [])])
def test_a_routing_key_that_is_no_text_ends_no_connection(channel, door, names, consumer, acknowledged):
    payload = pack(">HH", *spec.Basic.Deliver) + text(consumer) + pack(">QB", 7, 0) + names
    channel.dispatch_method(spec.Basic.Deliver, payload, message())
    assert (channel.acknowledged, door.dropped) == (acknowledged, {FOREIGN: 1})


def test_a_redelivered_message_is_replaced_by_a_copy_and_the_copy_is_not(channel):
    acknowledged = []
    sent = SimpleNamespace(
        body=b"{}",
        headers={"task": "t"},
        properties={"priority": 6, "content_type": "application/json"},
        delivery_info={"routing_key": "the lane"},
        ack=lambda: acknowledged.append(True),
    )
    channel.send_again(sent)
    ((copy, to),) = channel.published
    assert (bytes(copy.body), to) == (b"{}", {"exchange": "", "routing_key": "the lane"})
    assert copy.properties["application_headers"] == {"task": "t", REDELIVERED: 1}
    assert copy.properties["priority"] == 6
    assert acknowledged == [True]
    sent.headers = copy.properties["application_headers"]
    with pytest.raises(Refused, match=LOST_TWICE):
        channel.send_again(sent)
