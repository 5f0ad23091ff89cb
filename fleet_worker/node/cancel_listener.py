"""A node's ear for routers: what they do not want any more, and what they have missed.

It has a thread and a connection of its own. Celery's remote control hears nothing while a worker connects again or
ends, which takes up to half a minute, and that is when cancels are needed most.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from kombu import Connection, Consumer

from fleet_worker.broker.connection import hear, open_channel, prove
from fleet_worker.broker.reconnecting import ReconnectingThread
from fleet_worker.broker.topology import Transport, cancel_queue
from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.control import ControlMessage

log = logging.getLogger(__name__)


class CancelListener:
    """Calls `cancel(request_id, attempt)` for all that is cancelled at `node`, or everywhere, and
    `publish_again(reply_to)` for a router that missed something.

    What is published while the broker is away is not heard: a router cancels again as long as it sees the work go on.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        transport: Transport,
        node: str,
        cancel: Callable[[str, int], object],
        publish_again: Callable[[str], object],
    ) -> None:
        self._transport = transport
        self._node = node
        self._cancel = cancel
        self._publish_again = publish_again
        self._link = ReconnectingThread("cancels", connect, self._listen)

    def start(self) -> None:
        self._link.start()

    def close(self, timeout: float = 0.0) -> None:
        self._link.close(timeout)

    def _listen(self, connection: Connection) -> None:
        queue = cancel_queue(self._transport)
        channel = open_channel(connection)
        Consumer(channel, [queue], on_message=self._receive, no_ack=True).consume()
        hear(connection, 0.01)  # only now kombu's Redis transport subscribes
        self._link.works()
        while not self._link.closed.is_set():
            hear(connection, 1.0)
            prove(connection, channel)

    def _receive(self, message: Any) -> None:
        try:
            notice = ControlMessage.decode(message.body)
        except InvalidRequest as error:
            log.error("what a router said was dropped: %s", error)
            return
        if notice.node in (None, self._node):
            for request_id, attempt in notice.cancelled:
                self._cancel(request_id, attempt)
            if notice.missed:
                self._publish_again(notice.missed)
