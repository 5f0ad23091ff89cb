"""What doctor says about managed MLX servers that are not started."""

import pytest

from fleet_worker.ops.quarantine_checks import unstarted_servers
from fleet_worker.protocol.status import InstanceStatus


def node(stage, reason="why"):
    return InstanceStatus(
        host="mini", name="local", node="local@mini", status="unavailable", reason=reason, server_stage=stage
    )


@pytest.mark.parametrize("stage", ["", "starting", "serving", "stopping", "waiting", "off", "of a newer version"])
def test_a_server_that_is_started_is_no_finding(stage):
    assert list(unstarted_servers([node(stage)])) == []


@pytest.mark.parametrize(
    ("stage", "advice"),
    [("quarantined", "fleet-worker restart local@mini --server"), ("blocked", "on mini, end that program")],
)
def test_one_that_is_not_is_told_with_what_to_do(stage, advice):
    (finding,) = unstarted_servers([node(stage), node("serving")])
    assert (finding.severity, finding.check, finding.found) == ("error", "managed servers", "local@mini: why")
    assert advice in finding.advice
