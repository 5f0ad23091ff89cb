"""What routers tell all nodes: what they cancel, and what they have missed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.request import ControlMessage

log = logging.getLogger(__name__)


class CancelListener:
    """Is called with each message of the cancel exchange: cancels what is meant for `node` or all nodes, and publishes
    replies again for a router that missed some.

    A message may be lost while the broker is away. A router repeats a cancel as long as it sees the request go on.
    """

    def __init__(self, node: str, cancel: Callable[[str, int], object], publish_again: Callable[[str], object]) -> None:
        self._node = node
        self._cancel = cancel
        self._publish_again = publish_again

    def __call__(self, message: Any) -> None:
        try:
            notice = ControlMessage.decode(message.body)
        except InvalidRequest as error:
            log.error("a notice of a router was dropped: %s", error)
            return
        if notice.node in (None, self._node):
            for request_id, attempt in notice.cancelled:
                self._cancel(request_id, attempt)
            if notice.missed:
                self._publish_again(notice.missed)
