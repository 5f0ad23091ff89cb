"""The one clock that all hosts can read, if the broker is Redis. RabbitMQ does not tell the time."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from kombu.transport.redis import Channel as RedisChannel
from redis.exceptions import ResponseError

from fleet_worker.protocol import clock

ASKED_AGAIN_AFTER = 60.0
"""Seconds after which the broker is asked again what time it is."""


class BrokerClock:
    """Safe for any number of threads."""

    def __init__(self) -> None:
        self._ahead = 0.0
        """Seconds by which the broker's clock is ahead of ours."""
        self._next_question = float("-inf")

    def now(self, channel: Any) -> float:
        """Return the time of the broker in epoch seconds; that of this host if the broker does not tell.

        Raises:
            one of BROKER_ERRORS
        """
        if isinstance(channel, RedisChannel) and time.monotonic() >= self._next_question:
            with contextlib.suppress(ResponseError), channel.conn_or_acquire() as client:  # refused to this user
                before = clock.now()
                seconds, microseconds = client.time()
                self._ahead = seconds + microseconds / 1e6 - (before + clock.now()) / 2
            self._next_question = time.monotonic() + ASKED_AGAIN_AFTER
        return clock.now() + self._ahead
