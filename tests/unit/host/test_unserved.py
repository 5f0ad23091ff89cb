"""Instances that are configured and not served."""

import pytest

from fleet_worker.host.unserved import unserved
from fleet_worker.settings import Settings

ON = {"enabled": True, "respond_to_requests": True}


@pytest.mark.parametrize(
    ("fleet", "said"),
    [
        (ON, []),
        ({"enabled": True}, ["its fleet needs respond_to_requests = true"]),
        ({}, ["its fleet needs enabled = true and respond_to_requests = true"]),
        (ON | {"capabilities": []}, ["its fleet.capabilities name nothing that its usage allows"]),
    ],
)
def test_it_is_said_why_an_instance_is_not_served(fleet, said):
    found = list(unserved(Settings(instances={"local": {"fleet": fleet}})))
    assert found == [f"the instance 'local' is not served: {each}" for each in said]
