import socket

import pytest
from amqp.exceptions import AccessRefused, ConnectionForced, MessageNacked, NotAllowed, PreconditionFailed
from kombu.exceptions import OperationalError
from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError, OutOfMemoryError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from fleet_worker.broker.connection import BROKER_ERRORS, is_away, place_of, refuses, unavailable

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
    NoPermissionError(),
    NotAllowed(),
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


@pytest.mark.parametrize("error", [AuthenticationError(), NoPermissionError(), AccessRefused(), NotAllowed()])
def test_a_broker_that_will_not_have_a_user_is_told_from_one_that_cannot_do_what_is_asked(error):
    assert refuses(error)
    assert refuses(wrapped(error))
    assert not any(refuses(other) for other in [OutOfMemoryError(), PreconditionFailed(), RedisConnectionError()])


@pytest.mark.parametrize(
    ("error", "said", "advice"),
    [
        (AuthenticationError("hush"), "refuses the user or the password", "correct them in broker_url"),
        (AccessRefused("hush"), "refuses the user or the password", "correct them in broker_url"),
        (OutOfMemoryError("hush"), "has no room for more", "raise it"),
        (NoPermissionError("hush"), "refuses what a node asks of it", "rights"),
        (ConnectionRefusedError("hush"), "does not run", "start it"),
        (PreconditionFailed("hush"), "does not tell (PreconditionFailed)", "look at its log"),
    ],
)
def test_what_time_does_not_mend_is_said_with_what_to_do(error, said, advice):
    for each in (error, wrapped(error)):
        told = unavailable("redis://u:hush@h:1/0", "does not tell", each)
        assert told.message.startswith(f"the broker at h:1 {said}")
        assert advice in told.metadata["advice"]
        assert "hush" not in f"{told} {told.metadata}"


def test_what_time_may_mend_is_said_in_the_words_of_who_waited():
    told = unavailable("redis://h:1/0", "did not answer within 3 s", ConnectionResetError(), retryable=True)
    assert (told.message, told.metadata) == ("the broker at h:1 did not answer within 3 s (ConnectionResetError)", {})


def test_a_known_cause_is_named_although_time_may_mend_it():
    told = unavailable("redis://h:1/0", "did not answer within 3 s", wrapped(ConnectionRefusedError()), retryable=True)
    assert told.message == "the broker at h:1 does not run: nothing listens there (it did not answer within 3 s)"
    assert "start it" in told.metadata["advice"]


@pytest.mark.parametrize(
    ("url", "place"),
    {
        "redis://broker:6379/0": "broker:6379",
        "rediss://operator:hush@hush@broker/0?ssl_cert_reqs=none": "broker",
        "redis://:12/hush@broker:6379": "broker:6379",
        "amqps://guest:hush@[::1]:5671//": "[::1]:5671",
        "redis://broker:1?password=hush": "broker:1",
        "redis:///0": "",
    }.items(),
)
def test_the_place_of_a_broker_shows_no_password(url, place):
    assert place_of(url) == place
