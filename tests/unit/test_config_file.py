"""The file that FLEET_CONFIG names, and what an error says about it."""

from pathlib import Path

import pytest

from fleet_worker.config_file import config_path
from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Settings


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Returns a function that makes a text the configuration file."""

    def write(text):
        path = tmp_path / "fleet.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        monkeypatch.setenv("FLEET_CONFIG", str(path))

    return write


def refused():
    with pytest.raises(ConfigurationError) as caught:
        Settings()
    return caught.value.message


def test_the_configuration_file_is_known_by_its_path(monkeypatch):
    assert config_path() is None
    monkeypatch.setenv("FLEET_CONFIG", "~/worker.toml")
    assert config_path() == Path.home() / "worker.toml"


def test_an_empty_fleet_config_names_no_file(monkeypatch):
    monkeypatch.setenv("FLEET_CONFIG", "")
    assert Settings().instances == {}


def test_the_file_may_be_named_from_the_home_directory(tmp_path, monkeypatch):
    (tmp_path / "mini.toml").write_text("host = 'mini-7'")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLEET_CONFIG", "~/mini.toml")
    assert Settings().host == "mini-7"


def test_a_file_that_is_missing_is_told_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEET_CONFIG", str(tmp_path / "missing.toml"))
    assert "missing.toml" in refused()


def test_a_folder_is_no_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEET_CONFIG", str(tmp_path))
    assert str(tmp_path) in refused()


def test_a_file_may_begin_with_the_mark_that_some_editors_write(configure):
    configure("\ufeffhost = 'mini-7'")
    assert Settings().host == "mini-7"


def test_a_file_without_end_is_not_read_into_memory(monkeypatch):
    monkeypatch.setenv("FLEET_CONFIG", "/dev/zero")
    assert refused() == "the file /dev/zero of --config or FLEET_CONFIG is larger than 1,000,000 bytes"


def test_deeply_nested_text_is_no_traceback(configure):
    configure("host = " + "[" * 10_000)
    assert "not valid TOML" in refused()


@pytest.mark.parametrize("text", ["host = ", "host = 'a'\nhost = 'b'", b"host = '\xff'"])
def test_a_file_that_is_not_toml_is_told_by_name(configure, text):
    configure(text)
    message = refused()
    assert "fleet.toml" in message
    assert "not valid TOML" in message


@pytest.mark.parametrize(
    ("text", "place", "meant"),
    [
        ("wroker = 1", "wroker", "worker"),
        ("broker = 1", "broker", "broker_url"),
        ("[router]\ntimout = 3", "router.timout", "timeout"),
        ("[instances.a]\nbase_uri = ''", "instances.a.base_uri", "base_url"),
        ("[instances.a.fleet]\nenable = true", "instances.a.fleet.enable", "enabled"),
        ("[instances.a.models.m]\ncontext = 8", "instances.a.models.m.context", "context_window"),
    ],
)
def test_a_key_that_is_not_known_is_said_with_the_nearest_that_is(configure, text, place, meant):
    configure(text)
    assert refused() == f"configuration: {place}: unknown key, the nearest that exists is {meant}"


def test_a_key_that_is_like_no_other_is_only_unknown(configure):
    configure("xyzzy = 1")
    assert refused() == "configuration: xyzzy: unknown key"


def test_a_secret_that_is_too_short_is_told_how_long_it_must_be(configure):
    configure("[router]\naffinity_secret = 'hunter2'")
    assert refused() == "configuration: router.affinity_secret: must have at least 8 characters"


def test_a_model_name_with_a_dot_is_told_to_be_quoted(configure):
    configure("[instances.a.models.qwen3.5-14b]\ncontext_window = 8")
    assert refused().endswith('unknown key; a name with a dot needs quotes: [instances.a.models."qwen3.5-14b"]')


@pytest.mark.parametrize("value", ['"4x"', "4.5", "[]"])
def test_a_value_of_a_wrong_kind_is_told_in_our_words(configure, value):
    configure(f"[instances.local]\nlimits = {{ concurrency = {value} }}\n")
    assert refused() == "configuration: instances.local.limits.concurrency: must be a whole number"
