"""The configuration file of commands for which none is named."""

import json

import pytest

from tests.commands import fleet_worker


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "fleet" / "worker.toml"
    file.parent.mkdir()
    file.write_text("worker.stal_after = 3\n", "utf-8")
    return tmp_path


def findings(line="doctor --json"):
    return [json.loads(found) for found in fleet_worker(line).stdout.splitlines()]


def was_read(found):
    return any("stal_after" in each["found"] for each in found)


def test_it_is_the_one_in_the_home_directory(home, monkeypatch):
    monkeypatch.delenv("FLEET_CONFIG")
    assert was_read(findings())


def test_it_is_not_read_if_fleet_config_is_empty(home):
    assert not was_read(findings())


def test_it_is_not_read_if_another_one_is_named(home, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text('broker_url = "redis://127.0.0.1:1/0"\n', "utf-8")
    assert not was_read(findings(f"doctor --json --config {other}"))
