"""What a broker refuses is named, and nothing else of the text of its error."""

import pytest
from amqp.exceptions import AccessRefused, Blocked, NotAllowed, NotFound, PreconditionFailed
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

from fleet_worker.broker.refusal import refusal

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
