"""Asks the broker how many requests wait in the lanes. No request is taken out of its lane or read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from amqp.exceptions import NotFound
from celery import Celery

from fleet_worker.broker.broker_clock import BrokerClock
from fleet_worker.broker.connection import connect
from fleet_worker.broker.faults import BROKER_ERRORS, unavailable
from fleet_worker.broker.topology import EXCHANGE, Transport, direct_lane
from fleet_worker.settings import REGISTRY

SUBMITTED_AT = "submitted_at"
"""The header of a request with the time when this attempt was submitted, by the broker's clock (`broker_clock`)."""
MOST_LANES = 1_000
BATCH = 100
"""Lanes in one question to Redis."""
REGISTRY_NODES = direct_lane(f"{REGISTRY}@")
"""The prefix of the lanes of registry nodes, which hold beats and no requests."""

_DEPTH_AND_OLDEST = f"""
local depth, oldest = 0, nil
for _, list in ipairs(KEYS) do
  local length = redis.call('LLEN', list)
  if length > 0 then
    depth = depth + length
    local message = redis.call('LINDEX', list, -1)
    local _, name_ends = string.find(message, '"{SUBMITTED_AT}"', 1, true)
    local moment = name_ends and tonumber(string.match(message, '^%s*:%s*([%d.]+)', name_ends + 1))
    if moment and (not oldest or moment < oldest) then oldest = moment end
  end
end
return {{depth, oldest and string.format('%.6f', oldest) or ''}}
"""
"""For the lists of one lane: kombu pushes at the left and pops at the right. A message holds a prompt, perhaps of
megabytes, so it stays in Redis. Its body is base64, and quotes inside JSON strings are escaped, so the quoted name of
the header can be nothing else."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The requests that wait in one lane. Those that nodes hold are not counted; expired ones are, until a node drops
    them."""

    depth: int
    oldest_age: float | None = None
    """Seconds since the oldest was submitted. None if nothing waits or its header is missing, and always on RabbitMQ,
    where reading a message means to take it out and put it back."""
    consumers: int | None = None
    """The number of nodes that consume the lane; None on Redis, which does not know."""


def waiting(app: Celery, transport: Transport, lanes: Iterable[str], *, timeout: float = 5.0) -> dict[str, Waiting]:
    """Return what waits in these lanes, by lane; on Redis also in all others that were used and have not expired.

    RabbitMQ has to be asked for each lane by name, so a lane that no node offers any more is not seen there; and each
    question delays the expiry of the lane by LANE_EXPIRES. A lane that does not exist counts as empty. At most
    MOST_LANES are read, those of models first; those that were not read within `timeout` seconds are left out.

    Raises:
        BrokerUnavailable: there is no broker, or it was silent for `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    with app.connection_for_read() as connection:
        try:
            channel = connect(connection, timeout).default_channel
            if transport == "amqp":
                return dict(_ask_rabbitmq(channel, _chosen(lanes), deadline))
            known = {queue for *_, queue in channel.get_table(EXCHANGE.name)}
            return dict(_ask_redis(channel, _chosen(known.union(lanes)), deadline))
        except BROKER_ERRORS as error:
            raise unavailable(app.conf.broker_url, "does not tell what waits", error) from None


def depths(channel: Any, transport: Transport, lane: str) -> tuple[int, ...]:
    """Return how many requests wait in one lane, in one round trip: on Redis by priority, the highest first; on
    RabbitMQ one number for all.

    Raises:
        one of BROKER_ERRORS
    """
    if transport == "amqp":
        return (next(_ask_rabbitmq(channel, [lane], math.inf))[1].depth,)
    with channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
        for step in channel.priority_steps:
            pipe.llen(channel._q_for_pri(lane, step))
        return tuple(pipe.execute())


def _chosen(lanes: Iterable[str]) -> list[str]:
    """Return the lanes of requests, those of models before those of single nodes."""
    of_requests = (name for name in lanes if not name.startswith(REGISTRY_NODES))
    return sorted(of_requests, key=lambda name: (name.startswith(direct_lane("")), name))[:MOST_LANES]


def _ask_redis(channel: Any, lanes: list[str], deadline: float) -> Iterator[tuple[str, Waiting]]:
    with channel.conn_or_acquire() as client:
        ask = client.register_script(_DEPTH_AND_OLDEST)
        now = BrokerClock().now(channel)
        for first in range(0, len(lanes), BATCH):
            if time.monotonic() > deadline:
                return
            batch = lanes[first : first + BATCH]
            with client.pipeline(transaction=False) as pipe:
                for name in batch:
                    ask(keys=[channel._q_for_pri(name, step) for step in channel.priority_steps], client=pipe)
                answers = pipe.execute()
            for name, (depth, oldest) in zip(batch, answers, strict=True):
                yield name, Waiting(depth, max(0.0, now - float(oldest)) if oldest else None)


def _ask_rabbitmq(channel: Any, lanes: list[str], deadline: float) -> Iterator[tuple[str, Waiting]]:
    for name in lanes:
        if time.monotonic() > deadline:
            return
        try:
            _, depth, consumers = channel.queue_declare(name, passive=True)
        except NotFound:  # RabbitMQ closes the channel, which opens again by itself
            depth, consumers = 0, 0
        yield name, Waiting(depth, consumers=consumers)
