"""What a client is told of each error: the status, and whether and when to try again."""

import pytest

from fleet_worker import errors
from fleet_worker.gateway.problems import Problem, only, refuse


def told(error):
    problem = Problem.of(error)
    return problem.status, {name.decode(): value.decode() for name, value in problem.headers}


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (502, errors.NodeLost("it fell silent")),
        (502, errors.ProviderError("the server failed")),
        (502, errors.ConnectionFailure("refused")),
        (502, errors.StreamInterrupted("in a tool call")),
        (502, errors.MalformedOutput("no JSON")),
        (504, errors.Expired("its time is over")),
        (504, errors.RequestTimeout("no token")),
        (422, errors.PoisonSuspected("two deaths")),
    ],
)
def test_what_the_router_has_tried_is_not_to_be_tried_again(status, error):
    """The SDKs would try each 5xx twice more."""
    assert told(error) == (status, {} if status == 422 else {"x-should-retry": "false"})


@pytest.mark.parametrize(
    ("status", "error", "seconds"),
    [
        (429, errors.FleetSaturated("full", retry_after=7.2), "8"),
        (429, errors.FleetSaturated("full", retry_after=4000.0), "120"),
        (429, errors.FleetSaturated("full", retry_after=0.0), "1"),
        (503, errors.BrokerUnavailable("away"), "2"),
        (503, errors.QueueTimeout("nobody is there"), "5"),
    ],
)
def test_what_may_pass_is_to_be_tried_again(status, error, seconds):
    got, headers = told(error)
    assert (got, headers["retry-after"], headers["x-should-retry"]) == (status, seconds, "true")
    assert 0 <= int(headers["retry-after-ms"]) <= 120_000


def test_what_the_owners_of_all_machines_prevent_is_told_to_the_user_at_once():
    """An SDK would sleep for a minute, twice."""
    error = errors.QueueTimeout("all are away", away_for=1.0, by_owner=True, retry_after=60.0)
    status, headers = told(error)
    assert (status, headers["retry-after"], headers["x-should-retry"]) == (503, "60", "false")
    assert Problem.of(error).code == "no_capacity"


@pytest.mark.parametrize("wrong", [-1, True, "soon", None, float("nan"), float("inf")])
def test_a_time_that_is_none_is_not_told(wrong):
    _, headers = told(errors.FleetSaturated("full", retry_after=wrong))
    assert "retry-after" not in headers or int(headers["retry-after"]) <= 120


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "invalid_request", errors.InvalidRequest("wrong", param="messages")),
        (404, "model_not_found", errors.ModelUnavailable("none")),
        (403, "not_allowed", errors.PolicyError("no")),
    ],
)
def test_what_the_client_did_wrong_has_no_word_on_another_try(status, code, error):
    problem = Problem.of(error)
    assert (problem.status, problem.code, problem.headers) == (status, code, [])
    assert refuse(413, "too_large", "too large").problem.headers == []


@pytest.mark.parametrize(
    ("argument", "message", "header", "told"),
    [
        ("timeout", "timeout: must be at most 3600", "x-fleet-timeout", "x-fleet-timeout: must be at most 3600"),
        ("node", "no node of that name is known", "x-fleet-node", "no node of that name is known"),
        ("idempotency_key", "the idempotency_key is taken", "idempotency-key", "the idempotency-key is taken"),
        ("messages.0", "messages.0: must be an object", "messages.0", "messages.0: must be an object"),
    ],
)
def test_clients_are_told_the_header_that_an_argument_of_the_router_came_from(argument, message, header, told):
    problem = Problem.of(errors.InvalidRequest(message, param=argument))
    assert (problem.param, problem.message) == (header, told)


def test_all_methods_that_a_path_has_are_named():
    assert only("POST").problem.message == "only POST is answered here"
    both = only("GET", "HEAD").problem
    assert (both.message, both.more_headers) == ("only GET and HEAD are answered here", ((b"allow", b"GET, HEAD"),))


def test_nobody_is_told_where_the_broker_is():
    problem = Problem.of(errors.BrokerUnavailable("the broker at 10.0.0.7:6379 does not run"))
    assert "10.0.0.7" not in problem.message
    assert (problem.status, problem.may_retry) == (503, True)
