import stat

import pytest

from fleet_worker.ops.doctor import ALWAYS, CHECKS, compare_nodes, configuration, examine
from fleet_worker.ops.findings import exit_code
from fleet_worker.settings import Settings
from fleet_worker.testing import worker_toml


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Write a FLEET_CONFIG that only its owner may read, and load it."""

    def write(text):
        path = tmp_path / "worker.toml"
        path.write_text(text)
        path.chmod(0o600)
        monkeypatch.setenv("FLEET_CONFIG", str(path))
        return path

    return write


def test_a_host_that_serves_says_what(configured):
    path = configured(worker_toml("local", {}) + "\n" + worker_toml("idle", {"fleet": {"enabled": False}}))
    (finding,) = configuration(Settings())
    assert (finding.severity, finding.advice) == ("ok", "")
    assert str(path) in finding.found
    assert finding.found.endswith("instances: local")


def test_a_variable_that_nothing_reads_is_named_without_its_value(configured, monkeypatch):
    configured(worker_toml("local", {}))
    for name in ("FLEET_BROKERURL", "fleet_router_timeout", "FLEET_XYZZY__ZYX"):
        monkeypatch.setenv(name, "hush-hush")
    known = {"FLEET_HOST": "mini", "fleet_router__timeout": "5", "FLEET_INSTANCES__LOCAL__API_KEY": "hush-hush"}
    for name, value in {**known, "FLEET_PARENT_PIPE": "3", "FLEET_BROKER_PASSWORD": "hush-hush"}.items():
        monkeypatch.setenv(name, value)
    _, *found = configuration(Settings())
    assert {(finding.severity, bool(finding.advice)) for finding in found} == {("warning", True)}
    assert [finding.found for finding in found] == [
        "the variable FLEET_BROKERURL is not read, the nearest that exists is FLEET_BROKER_URL",
        "the variable FLEET_XYZZY__ZYX is not read",
        "the variable fleet_router_timeout is not read, the nearest that exists is FLEET_ROUTER",
    ]


@pytest.mark.parametrize("file", [True, False])
def test_a_host_that_serves_nothing_may_be_a_router(file, configured):
    if file:
        configured("")
    first, warning = configuration(Settings())
    assert (first.severity, "FLEET_CONFIG is not set" in first.found) == ("ok", not file)
    assert (warning.severity, "router" in warning.advice) == ("warning", True)


SECRETS = {
    "a key": ("", {"api_key": "hush-hush"}),
    "a key by another name": ("", {"mlx_api_key": "hush-hush"}),
    "a password": ('broker_url = "valkey://operator:hush%2Fhush@broker:6379"\n', {}),
}


@pytest.mark.parametrize(("text", "instance"), SECRETS.values(), ids=SECRETS)
def test_a_file_with_a_secret_is_not_for_everybody(text, instance, configured):
    path = configured(text + worker_toml("local", instance))
    assert len(list(configuration(Settings()))) == 1
    path.chmod(0o644)
    _, warning = configuration(Settings())
    assert warning.severity == "warning"
    assert warning.advice == f"chmod 600 {path}"
    assert "hush" not in str(warning)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_file_without_a_secret_may_be_read_by_all(configured, monkeypatch):
    """A key in a variable is not in the file."""
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__API_KEY", "hush-hush")
    configured('broker_url = "redis://broker"\n' + worker_toml("local", {})).chmod(0o644)
    assert len(list(configuration(Settings()))) == 1


def test_a_configuration_that_cannot_be_used_is_the_first_finding_and_no_broker_is_asked(configured):
    configured("api_keyy = 'hush-hush'")
    first, *others = examine()
    assert (first.severity, first.check, first.found.split()[0]) == ("error", "configuration", "api_keyy:")
    assert {finding.check for finding in others} >= {"versions", "open files"}
    assert {finding.check for finding in others} <= {check.__name__.replace("_", " ") for check in ALWAYS}
    assert exit_code([first, *others]) == 78


def test_nodes_are_counted_by_their_names():
    (nobody,) = compare_nodes([])
    assert (nobody.severity, nobody.found) == ("warning", "no node answers")
    assert "fleet-worker up" in nobody.advice
    (both,) = compare_nodes(["local@mini-2", "local@mini-1"])
    assert (both.severity, both.found) == ("ok", "nodes that answer: 2 (local@mini-1, local@mini-2)")
    (many,) = compare_nodes([f"local@mini-{number}" for number in range(10, 100)])
    assert many.found.startswith("nodes that answer: 90 (local@mini-10, ")
    assert many.found.endswith("local@mini-29, ...)")


def test_a_node_of_this_host_that_does_not_answer_is_named():
    counted, silent = compare_nodes(["local@mini-1", "registry@mini-2"], ["local@mini-2", "embed@mini-2"])
    assert (counted.severity, silent.severity) == ("ok", "warning")
    assert silent.found == "no answer from this host's local@mini-2, embed@mini-2"
    (counted,) = compare_nodes(["local@mini-1", "local@mini-2"], ["local@mini-2"])
    assert counted.severity == "ok"


def test_two_nodes_of_one_name_are_an_error():
    counted, error = compare_nodes(["local@mini-1", "local@mini", "local@mini"])
    assert "2 (local@mini, local@mini-1)" in counted.found
    assert (error.severity, error.found) == ("error", "2 nodes are called local@mini")


def test_the_checks_that_need_nothing_are_among_the_others():
    assert set(ALWAYS) < set(CHECKS)
