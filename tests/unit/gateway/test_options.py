"""What the router is asked for on behalf of a client."""

from types import SimpleNamespace

from fleet_worker.gateway.accounts.key import ANYONE
from fleet_worker.gateway.options import router_options


def test_the_id_of_a_request_is_that_of_its_logs_at_the_nodes():
    options = router_options(SimpleNamespace(headers={}, id="my-id"), ANYONE, None)
    assert options == {"caller": {"key": "anyone"}, "request_id": "my-id", "priority": "normal"}
