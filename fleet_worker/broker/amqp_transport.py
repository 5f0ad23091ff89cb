"""kombu's AMQP transport, subclassed for the connections of our own applications: every message comes through the door.

Other kombu and Celery applications of the process are not touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from struct import pack, unpack_from
from typing import Any

import amqp
from amqp import spec
from amqp.exceptions import Blocked
from amqp.method_framing import frame_handler
from kombu.transport import pyamqp

from fleet_worker.broker import amqp_socket
from fleet_worker.broker.door import FOREIGN, MOST_FANOUT_BYTES, OpenedMessage, Refused

REDELIVERED = "fleet-redelivered"
"""The header of a message that a consumer had before, which ended or lost its connection."""
LOST_TWICE = "it was redelivered twice: two nodes ended, or lost the broker, while they had it"
_HEADER, _BODY = 2, 3
"""Types of AMQP frames."""
_WITHOUT_CONTENT = pack(">HHQH", spec.Basic.CLASS_ID, 0, 0, 0)
"""The header frame of a message without properties and without a body."""


class Message(OpenedMessage, pyamqp.Message):  # type: ignore[misc]
    pass


class Channel(pyamqp.Channel):  # type: ignore[misc]
    Message = Message

    def __init__(self, *args: Any, **options: Any) -> None:
        # By itself py-amqp decodes each body with the encoding that its sender names.
        super().__init__(*args, **{**options, "auto_decode": False})

    def basic_consume(self, queue: str = "", *args: Any, callback: Any = None, **options: Any) -> Any:
        door = self.connection.client.door
        most_bytes = MOST_FANOUT_BYTES if options.get("no_ack") else door.most_bytes
        callback = callback and partial(self._hand_over, callback, queue, most_bytes)
        return super().basic_consume(queue, *args, callback=callback, **options)

    def _hand_over(self, callback: Callable[[Any], object], queue: str, most_bytes: int, message: amqp.Message) -> None:
        """Open a message and give it to the consumer of its queue, or drop it."""
        sent = message.properties
        try:
            message.body, headers = self.connection.client.door.check(
                message.body,
                sent.get("application_headers"),
                content_type=sent.get("content_type"),
                content_encoding=sent.get("content_encoding"),
                most_bytes=most_bytes,
            )
            message.properties = {"application_headers": headers, "priority": sent.get("priority")}
            message.properties |= {"content_type": "application/json", "content_encoding": "utf-8"}
            message.delivery_info |= {"exchange": "", "routing_key": queue}
            callback(message)
        except Refused as refused:
            self._drop(message.delivery_info["consumer_tag"], message.delivery_tag, refused)

    def dispatch_method(self, method_sig: Any, payload: Any, content: Any) -> None:
        """Drop a message whose routing key is no text: py-amqp would end the connection, and get it again. Ignore what
        comes while the connection closes: RabbitMQ delivers it again, and kombu has taken the client away by then."""
        if method_sig == spec.Basic.Deliver:
            if self.connection.is_closing:
                return
            tag_at = 5 + payload[4]
            names = bytes(payload[tag_at + 9 :])
            if not names.isascii() and not _is_text(names):
                (delivery_tag,) = unpack_from(">Q", payload, tag_at)
                self._drop(bytes(payload[5:tag_at]).decode(), delivery_tag, Refused(FOREIGN))
                return
        super().dispatch_method(method_sig, payload, content)

    def _drop(self, consumer_tag: str, delivery_tag: int, refused: Refused) -> None:
        self.connection.client.door.drop(refused)
        if consumer_tag not in self.no_ack_consumers:
            self.basic_ack(delivery_tag)

    def send_again(self, message: Any) -> None:
        """Replace a redelivered message by a copy behind the others in its queue, which tells what it is.

        RabbitMQ does not count how often a message was redelivered.

        Raises:
            Refused: it is such a copy, and was redelivered itself.
        """
        if message.headers.get(REDELIVERED):
            raise Refused(LOST_TWICE)
        properties = {**message.properties, "application_headers": {**message.headers, REDELIVERED: 1}}
        copy = amqp.Message(message.body, delivery_mode=2, **properties)
        self.basic_publish(copy, exchange="", routing_key=message.delivery_info["routing_key"])
        message.ack()


class Connection(amqp_socket.Connection):
    Channel = Channel

    def __init__(self, **options: Any) -> None:
        super().__init__(frame_handler=_bounded_frame_handler, **options)

    def _on_blocked(self) -> None:
        """Raise an error in whoever waits: RabbitMQ is short of memory or disk space, and reads nothing more that is
        sent on this connection. By itself each publish would wait for its timeout."""
        raise Blocked("the broker takes no messages")


def _bounded_frame_handler(connection: Any, callback: Callable[..., object]) -> Callable[[Any], bool]:
    """Return the function that py-amqp calls with each frame that arrives.

    It reads over the body of a message that is larger than any of ours, and of one whose properties cannot be read: for
    these py-amqp would end the connection. The consumer gets a message without a body, which is refused at the door.
    """
    handle, most_bytes = frame_handler(connection, callback), connection.client.door.most_bytes
    skipped: dict[int, int] = {}
    """By channel: bytes of a body that are still to come."""

    def on_frame(frame: Any) -> bool:
        kind, channel, payload = frame
        if kind == _BODY and channel in skipped:
            skipped[channel] -= len(payload)
            if skipped[channel] <= 0:
                del skipped[channel]
            return False
        if kind != _HEADER:
            return bool(handle(frame))
        (size,) = unpack_from(">Q", payload, 4)
        if 0 < size <= most_bytes:
            # This reads the properties only: the consumer is called with the last part of the body.
            with contextlib.suppress(Exception):  # of any kind: lengths, Unicode, nesting, dates
                return bool(handle(frame))
        if size:
            skipped[channel] = size
        return bool(handle((kind, channel, _WITHOUT_CONTENT)))

    return on_frame


def _is_text(names: bytes) -> bool:
    """Tell whether both the exchange and the routing key, each with its length before it, are UTF-8."""
    ends = 1 + names[0]
    try:
        names[1:ends].decode()
        names[ends + 1 :].decode()
    except UnicodeDecodeError:
        return False
    return True


class Transport(pyamqp.Transport):  # type: ignore[misc]
    Connection = Connection


class SSLTransport(pyamqp.SSLTransport):  # type: ignore[misc]
    Connection = Connection
