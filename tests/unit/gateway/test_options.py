"""What the router is asked for on behalf of a client."""

from types import SimpleNamespace

import pytest

from fleet_worker.errors import InvalidRequest
from fleet_worker.gateway.accounts.key import ANYONE
from fleet_worker.gateway.options import router_options


def test_the_id_of_a_request_is_that_of_its_logs_at_the_nodes():
    options = router_options(SimpleNamespace(headers={}, id="my-id"), ANYONE, None)
    expected = {"caller": {"key": "anyone"}, "request_id": "my-id", "priority": "normal", "if_absent": "refuse"}
    assert options == expected


def test_a_request_that_says_how_long_it_waits_is_not_refused_at_once():
    options = router_options(SimpleNamespace(headers={"x-fleet-queue-timeout": "7"}, id="1"), ANYONE, None)
    assert options["queue_timeout"] == 7.0
    assert "if_absent" not in options


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon", ""])
@pytest.mark.parametrize("name", ["x-fleet-timeout", "x-fleet-queue-timeout", "x-fleet-max-wait"])
def test_a_time_is_a_number_of_seconds(name, text):
    with pytest.raises(InvalidRequest, match=f"{name}: must be a number of seconds") as raised:
        router_options(SimpleNamespace(headers={name: text}, id="1"), ANYONE, None)
    assert raised.value.param == name


def test_a_request_may_refuse_to_wait_at_all():
    options = router_options(SimpleNamespace(headers={"x-fleet-max-wait": "0"}, id="1"), ANYONE, 30.0)
    assert options["max_wait"] == 0.0
    with pytest.raises(InvalidRequest, match="more than 0"):
        router_options(SimpleNamespace(headers={"x-fleet-timeout": "0"}, id="1"), ANYONE, None)
