import socket

import pytest
from amqp.exceptions import AccessRefused, ConnectionForced, MessageNacked, PreconditionFailed
from kombu.exceptions import OperationalError
from redis.exceptions import AuthenticationError, BusyLoadingError, OutOfMemoryError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from fleet_worker.connections import BROKER_ERRORS, is_away

AWAY = [
    ConnectionRefusedError(),
    socket.gaierror(),
    TimeoutError(),
    RedisConnectionError(),
    RedisTimeoutError(),
    BusyLoadingError(),
    ConnectionForced(),
]
REFUSING = [
    AuthenticationError(),
    OutOfMemoryError(),
    ReadOnlyError(),
    AccessRefused(),
    PreconditionFailed(),
    MessageNacked(),
]


def wrapped(cause):
    """As kombu does it."""
    error = OperationalError(str(cause))
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", AWAY, ids=lambda error: type(error).__name__)
def test_a_broker_that_is_away_may_come_back(error):
    assert is_away(error)
    assert is_away(wrapped(error))
    assert isinstance(error, BROKER_ERRORS)


@pytest.mark.parametrize("error", REFUSING, ids=lambda error: type(error).__name__)
def test_a_broker_that_refuses_will_do_so_again(error):
    assert not is_away(error)
    assert not is_away(wrapped(error))
    assert isinstance(error, BROKER_ERRORS)
