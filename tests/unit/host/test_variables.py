"""Variables whose names are mistyped are said, by `up` and by the doctor, and never their values."""

import pytest

from fleet_worker.host.variables import mistyped
from fleet_worker.settings import Settings


@pytest.fixture
def configure(tmp_path, monkeypatch):
    def write(text):
        path = tmp_path / "worker.toml"
        path.write_text(text)
        monkeypatch.setenv("FLEET_CONFIG", str(path))

    return write


def said(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = list(mistyped(Settings()))
    assert "hush" not in str(found)
    return found


@pytest.mark.parametrize(
    ("name", "meant"),
    {
        "FLEET_BROKER": "FLEET_BROKER_URL",
        "FLEET_BROKERURL": "FLEET_BROKER_URL",
        "fleet_broker_ulr": "FLEET_BROKER_URL",
        "FLEET_ROUTER_TIMEOUT": "FLEET_ROUTER",
        "FLEET_INSTANCE__LOCAL__API_KEY": "FLEET_INSTANCES",
    }.items(),
)
def test_a_variable_that_nothing_reads_is_said_with_the_nearest_name(name, meant, monkeypatch):
    (found,) = said(monkeypatch, **{name: "hush"})
    assert found.startswith(f"the variable {name} is not read, the nearest that exists is {meant}")


def test_a_variable_that_is_like_no_other_is_only_not_read(monkeypatch):
    assert said(monkeypatch, FLEET_XYZZY="hush") == ["the variable FLEET_XYZZY is not read"]


@pytest.mark.parametrize("rest", ["API_KEY", "BASE_URL", "LIMITS__CONCURRENCY"])
def test_a_variable_for_an_instance_that_is_not_configured_is_said_with_the_nearest(rest, configure, monkeypatch):
    configure("[instances.local]\nfleet = { enabled = true, respond_to_requests = true }")
    name = f"FLEET_INSTANCES__LOCL__{rest}"
    value = {"API_KEY": "hush", "BASE_URL": "http://h", "LIMITS__CONCURRENCY": "2"}[rest]
    assert said(monkeypatch, **{name: value}) == [
        f"the variable {name} is for an instance 'locl', which is not in the configuration, "
        "the nearest that exists is local"
    ]


def test_the_name_of_an_instance_in_capitals_cannot_be_met_by_a_variable(configure, monkeypatch):
    """Names in variables have no case: they make another instance."""
    configure("[instances.Local]\nfleet = { enabled = true, respond_to_requests = true }")
    (found,) = said(monkeypatch, FLEET_INSTANCES__LOCAL__API_KEY="hush")
    assert found.endswith("the nearest that exists is Local")


def test_an_instance_may_be_configured_by_variables_alone(monkeypatch):
    fleet = '{"enabled": true, "respond_to_requests": true}'
    assert said(monkeypatch, FLEET_INSTANCES__LOCAL__FLEET=fleet, FLEET_INSTANCES__LOCAL__API_KEY="hush") == []


def test_what_is_right_is_not_said(configure, monkeypatch):
    configure("[instances.local]\nbase_url = 'http://h'")
    variables = {
        "FLEET_HOST": "mini",
        "fleet_router__timeout": "5",
        "FLEET_INSTANCES__LOCAL__API_KEY": "hush",
        "FLEET_PARENT_PIPE": "3",
        "FLEET_BROKER_PASSWORD": "hush",
        "FLEETING": "hush",
    }
    assert said(monkeypatch, **variables) == []
