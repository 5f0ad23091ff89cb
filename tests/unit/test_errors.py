import builtins
import pickle
import re

import pytest

from fleet_worker import errors
from fleet_worker.errors import (
    Cancelled,
    ConnectionFailure,
    Expired,
    FleetError,
    FleetSaturated,
    InstanceUnavailable,
    NodeLost,
    Overloaded,
    RequestTimeout,
)

ALL = [getattr(errors, name) for name in errors.__all__]
CODES_OF_THE_WIRE = {
    "fleet_error",
    "broker_unavailable",
    "model_unavailable",
    "fleet_saturated",
    "node_lost",
    "poison_suspected",
    "stream_interrupted",
    "reply_lost",
    "reply_overflow",
    "configuration_error",
    "policy_error",
    "provider_error",
    "invalid_request",
    "context_length_exceeded",
    "model_not_served",
    "unsupported_capability",
    "unauthorized",
    "instance_unavailable",
    "overloaded",
    "timeout",
    "connection_failure",
    "malformed_output",
    "cancelled",
    "expired",
    "queue_timeout",
    "invalid_output",
    "unsupported_parameter",
}


def test_the_drawn_tree_is_the_real_one():
    drawn = {}
    branch = []
    for line in errors.__doc__.splitlines():
        if found := re.match(r"([│├└─ ]*)([A-Z]\w+)(?: {2,}|$)", line):
            depth = len(found[1]) // 4
            branch = [*branch[:depth], found[2]]
            drawn[found[2]] = branch[depth - 1] if depth else "Exception"
    assert drawn == {error.__name__: error.__base__.__name__ for error in ALL}


def test_every_code_of_the_wire_has_one_error():
    assert sorted(error.code for error in ALL) == sorted(CODES_OF_THE_WIRE)


def test_no_error_hides_a_builtin():
    assert not [name for name in errors.__all__ if hasattr(builtins, name)]


def test_only_faults_that_another_machine_may_not_have_are_retryable():
    faults = {InstanceUnavailable, Overloaded, ConnectionFailure, NodeLost, FleetSaturated}
    assert {error for error in ALL if error.retryable} == faults


@pytest.mark.parametrize("kind", ALL)
def test_an_error_without_words_says_what_its_kind_means(kind):
    assert kind().message == str(kind()) == kind.__doc__.splitlines()[0] != ""


@pytest.mark.parametrize("retryable", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_an_error_is_rebuilt_as_the_same_kind(kind, retryable):
    rebuilt = FleetError.rebuild(kind.code, "busy", retryable=retryable, metadata={"retry_after": 2.5})
    assert type(rebuilt) is kind
    assert rebuilt.message == "busy"
    assert rebuilt.retryable is retryable
    assert rebuilt.metadata["retry_after"] == 2.5


def test_an_error_of_a_later_version_is_a_plain_one_that_keeps_its_code():
    rebuilt = FleetError.rebuild("out_of_cheese", "none left", retryable=True, metadata={"shop": "any"})
    assert type(rebuilt) is FleetError
    assert rebuilt.retryable is True
    assert rebuilt.metadata == {"shop": "any", "code": "out_of_cheese"}


def test_metadata_from_the_wire_may_have_any_name():
    metadata = {"message": "a", "retryable": "b", "self": "c"}
    assert FleetError.rebuild("expired", "late", retryable=False, metadata=metadata).metadata == metadata


def test_a_rebuilt_error_does_not_share_its_metadata():
    metadata = {"tries": 1}
    error = FleetError.rebuild("expired", "late", retryable=False, metadata=metadata)
    metadata["tries"] = 2
    assert error.metadata == {"tries": 1}


def test_one_error_can_be_retryable_when_its_kind_is_not():
    assert RequestTimeout("prefill", retryable=True).retryable is True
    assert RequestTimeout("prefill").retryable is False
    assert Overloaded("poison", retryable=False).retryable is False
    assert Overloaded("later").retryable is True


def test_metadata_is_what_is_named():
    assert Overloaded("busy", retry_after=3.0).metadata == {"retry_after": 3.0}
    assert Expired("late").metadata == {}


def test_an_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(Overloaded("busy", retryable=False, retry_after=3.0)))
    assert type(error) is Overloaded
    assert (error.message, error.retryable, error.metadata) == ("busy", False, {"retry_after": 3.0})


def test_one_except_clause_catches_them_all():
    for kind in ALL:
        with pytest.raises(FleetError, match="told"):
            raise kind("told")


def test_giving_up_is_not_a_fault_of_the_server():
    assert not issubclass(Cancelled, errors.ProviderError)
    assert not issubclass(Expired, errors.ProviderError)
