"""What is wrong with a broker is named, with what to do, and nothing else of the text of its error."""

import socket

import pytest
from amqp.exceptions import (
    AccessRefused,
    Blocked,
    ConnectionForced,
    MessageNacked,
    NotAllowed,
    NotFound,
    PreconditionFailed,
)
from kombu.exceptions import OperationalError
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from fleet_worker.broker.faults import BROKER_ERRORS, describe, is_away, needs_operator, place_of, refusal, unavailable

SECRET = "hush-hush"


def access(what, method=(60, 40)):
    return AccessRefused(f"ACCESS_REFUSED - access to {what} in vhost '{SECRET}' refused for user '{SECRET}'", method)


RIGHTS = {
    NoPermissionError(f"User {SECRET} has no permissions to run the 'pubsub|numsub' command"): "command PUBSUB NUMSUB",
    NoPermissionError("No permissions to access a key"): "keys of our names",
    NoPermissionError(f"User {SECRET} has no permissions to access the '{SECRET}' key"): "keys of our names",
    NoPermissionError("No permissions to access a channel"): "channels of our names",
    access("exchange 'llm.fleet'"): "Basic.publish of exchange llm.fleet",
    access("queue 'llm.fleet.chat.m'", (60, 20)): "Basic.consume of queue llm.fleet.chat.m",
    access("queue 'llm.fleet.cancel.0847081af3a2'", (50, 20)): "Queue.bind of queue llm.fleet.cancel.*",
    access("queue 'llm.fleet.reply.mini.0847081af3a2.120'", (50, 10)): "Queue.declare of queue llm.fleet.reply.mini.*",
}
FOR_NOW = {
    OutOfMemoryError(SECRET): "maxmemory is reached",
    ReadOnlyError(SECRET): "replica of another",
    MasterDownError(SECRET): "its master is gone",
    BusyLoadingError(SECRET): "loading its data",
    ResponseError(f"MISCONF Valkey is configured to save {SECRET}"): "cannot save its data",
    ResponseError(f"NOREPLICAS {SECRET}"): "too few replicas",
    RedisConnectionError("max number of clients reached"): "one more connection",
    NotAllowed("NOT_ALLOWED - access to vhost refused : connection limit (1) is reached"): "one more connection",
    Blocked(SECRET): "short of memory or of disk space",
}
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


def wrapped(error):
    wrapper = OperationalError(SECRET)
    wrapper.__cause__ = error
    return wrapper


@pytest.mark.parametrize(("error", "named"), [*RIGHTS.items(), *FOR_NOW.items()])
def test_what_is_refused_is_named_with_what_to_do(error, named):
    for each in (error, wrapped(error)):
        refused = refusal(each)
        assert named in refused.found
        assert refused.advice
        assert SECRET not in str(refused)
        assert refused.passes == (error in FOR_NOW)


def test_a_queue_that_exists_with_other_properties_is_named():
    text = f"PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'llm.fleet.chat.m' in '{SECRET}': received"
    refused = refusal(PreconditionFailed(text, (50, 10)))
    assert refused.found == "has the queue llm.fleet.chat.m with other properties"
    assert not refused.passes


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(SECRET),
        RedisConnectionError(SECRET),
        AuthenticationError(SECRET),
        NotFound(SECRET),
        ResponseError(SECRET),
        access("queue 'a b'"),
        NoPermissionError(SECRET),
    ],
)
def test_a_broker_that_is_away_refuses_nothing(error):
    assert refusal(error) is None


def test_causes_that_go_round_in_a_circle_end():
    one, other = OSError(), OSError()
    one.__cause__, other.__cause__ = other, one
    assert refusal(one) is None


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
    assert needs_operator(error)
    assert needs_operator(wrapped(error))
    assert not any(
        needs_operator(other) for other in [OutOfMemoryError(), PreconditionFailed(), RedisConnectionError()]
    )


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


@pytest.mark.parametrize(
    "error",
    [
        OSError(65, "No route to host"),
        RedisConnectionError(f"Error 65 connecting to {SECRET}:6379. No route to host."),
        OperationalError(SECRET),
    ],
)
def test_a_host_without_a_route_is_said_in_logs_too_since_a_person_may_have_to_allow_it(error):
    """macOS keeps an agent from the local network until somebody allows Python."""
    if isinstance(error, OperationalError):
        error.__cause__ = OSError(113, "No route to host")
    assert is_away(error)
    said = describe(error)
    assert said.startswith("is on a host to which there is no route: check the network; on a Mac allow Python")
    assert SECRET not in said
