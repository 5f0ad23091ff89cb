"""Instances that are configured and not served."""

import pytest

from fleet_worker.host.unserved import unserved
from fleet_worker.settings import Settings


@pytest.fixture
def configure(tmp_path, monkeypatch):
    def write(fleet):
        path = tmp_path / "worker.toml"
        path.write_text(f"[instances.local]\nfleet = {{ {fleet} }}\n")
        monkeypatch.setenv("FLEET_CONFIG", str(path))

    return write


@pytest.mark.parametrize(
    ("fleet", "said"),
    [
        ("enabled = true, respond_to_requests = true", []),
        ("enabled = true", ["its fleet needs respond_to_requests = true"]),
        ("", ["its fleet needs enabled = true and respond_to_requests = true"]),
        (
            "enabled = true, respond_to_requests = true, capabilities = []",
            ["its fleet.capabilities name nothing that its usage allows"],
        ),
    ],
)
def test_it_is_said_why_an_instance_is_not_served(fleet, said, configure):
    configure(fleet)
    assert list(unserved(Settings())) == [f"the instance 'local' is not served: {each}" for each in said]


def test_of_an_instance_that_a_mistyped_variable_makes_only_the_variable_is_said(configure, monkeypatch):
    configure("enabled = true, respond_to_requests = true")
    monkeypatch.setenv("FLEET_INSTANCES__LOCL__API_KEY", "hush")
    assert list(unserved(Settings())) == []
