import logging
import os
import sys
from pathlib import Path

import pytest

from fleet_worker import Settings
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.servers.server_command import MARK, ServerCommand

SECRET = "sk-do-not-show-this"


def command(**instance):
    return ServerCommand.of(Settings(instances={"local": instance}).instances["local"])


def test_a_text_is_split_as_a_shell_would_and_the_port_is_put_in():
    found = command(serve="""mlx_lm.server --model 'a b' --port {port} --args '{"enable_thinking": false}'""")
    assert found.words[1:] == ("--model", "a b", "--port", "8080", "--args", '{"enable_thinking": false}')
    assert (found.host, found.port) == ("127.0.0.1", 8080)


def test_a_list_is_taken_as_it_is_but_for_the_port_and_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/mini")
    found = command(serve=["~/bin/server", "--at=:{port}", "~/models/x", "it's"])
    assert found.words == ("/home/mini/bin/server", "--at=:8080", "/home/mini/models/x", "it's")


def test_the_port_is_that_of_base_url():
    assert command(serve="x {port}", base_url="http://localhost:9999/v1").words == ("x", "9999")
    assert command(serve="x", base_url="http://[::1]:9999").host == "::1"


def test_programs_of_this_environment_are_found_first_and_others_with_the_short_path_of_launchd(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command(serve="python3 {port}").located()[0] == str(Path(sys.executable).parent / "python3")
    own = tmp_path / ".local" / "bin" / "a-server"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    assert command(serve="a-server {port}").located() == [str(own), "8080"]


def test_a_program_that_does_not_exist_is_named_and_only_the_log_has_the_path(caplog):
    caplog.set_level(logging.INFO)
    text = "there is no program {}, which serve names: install it, or {}"
    with pytest.raises(ConfigurationError, match=text.format("mlx_lm.sevrer", "give its whole path") + "$"):
        command(serve=f"mlx_lm.sevrer --api-key {SECRET} {{port}}").located()
    assert "mlx_lm.sevrer was looked for in /" in caplog.text
    assert SECRET not in caplog.text
    with pytest.raises(ConfigurationError, match=text.format("/opt/none", "correct its path") + "$"):
        command(serve="/opt/none {port}").located()


def test_a_server_gets_its_variables_and_none_of_our_settings(monkeypatch):
    monkeypatch.setenv("FLEET_BROKER_URL", f"redis://:{SECRET}@broker")
    monkeypatch.setenv("LANG", "C")
    environment = command(serve="x {port}", environment={"HF_HOME": "~/hub", "N": 1}).environment("ours/1")
    assert SECRET not in str(environment)
    assert {name for name in environment if name.startswith("FLEET_")} == {MARK}
    assert (environment["HF_HOME"], environment["N"]) == (os.path.expanduser("~/hub"), "1")
    assert environment["LANG"] == "C"


def test_its_own_path_comes_before_that_of_up():
    found = command(serve="x {port}", environment={"PATH": "/only/here"}).environment("m")["PATH"].split(os.pathsep)
    assert found[:2] == [str(Path(sys.executable).parent), "/only/here"]


def test_nothing_of_it_is_shown():
    shown = repr(command(serve=f"x {SECRET} {{port}}", environment={"KEY": SECRET}))
    assert SECRET not in shown
    assert "KEY" not in shown


def test_the_fingerprint_changes_with_everything_that_the_server_is_told():
    instances = [
        {"serve": "x {port}"},
        {"serve": "y {port}"},
        {"serve": "x {port}", "environment": {"A": "1"}},
        {"serve": "x {port}", "environment": {"A": "2"}},
        {"serve": "x {port}", "base_url": "http://127.0.0.1:9"},
    ]
    assert len({command(**each).fingerprint for each in instances}) == len(instances)
    assert command(**instances[0]).fingerprint == command(serve=["x", "{port}"]).fingerprint


def test_values_that_look_like_secrets_are_known_to_be_hidden():
    named = {"HF_TOKEN": SECRET, "API_KEY": "short", "HF_HOME": "/models/hub"}
    assert command(serve="x {port}", environment=named).secrets == (SECRET,)


@pytest.mark.parametrize("words", [f"--api-key {SECRET}", f"--api-key={SECRET}", f"--hf_token {SECRET}"])
def test_options_that_look_like_secrets_are_known_to_be_hidden(words):
    shown = "--max-tokens 1000000 --tokenizer-config /a/long/path"
    assert command(serve=f"mlx_lm.server {shown} {words} --port {{port}}").secrets == (SECRET,)
    assert command(serve=f"env HF_TOKEN={SECRET} mlx_lm.server {shown} {{port}}").secrets == (SECRET,)


HUBS = {
    "that of a home": ({}, ".cache/huggingface/hub"),
    "that of a setting": ({"HF_HOME": "{home}/models"}, "models/hub"),
    "that of a setting, whole": ({"HF_HUB_CACHE": "~/hub", "HF_HOME": "{home}/models"}, "hub"),
}


@pytest.mark.parametrize("serve", ["mlx_lm.server {port}", "python3 -m mlx_lm server --port {port}"])
@pytest.mark.parametrize(("environment", "folder"), HUBS.values(), ids=HUBS)
def test_mlx_lm_gets_the_folder_of_its_models(serve, environment, folder, monkeypatch, tmp_path):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    made = command(serve=serve, environment={name: text.format(home=tmp_path) for name, text in environment.items()})
    made.make_model_cache()
    made.make_model_cache()
    assert [each for each in tmp_path.rglob("*") if not any(each.iterdir())] == [tmp_path / folder]


def test_a_folder_of_models_that_cannot_be_made_is_none(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    command(serve="mlx_lm.server {port}", environment={"HF_HOME": str(file)}).make_model_cache()


def test_the_home_of_an_unknown_user_is_left_as_it_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command(serve="mlx_lm.server {port}", environment={"HF_HUB_CACHE": "~no-such-user/hub"}).make_model_cache()
    assert (tmp_path / "~no-such-user" / "hub").is_dir()


def test_other_servers_need_no_folder_of_models(tmp_path):
    command(serve="a-server {port}", environment={"HF_HOME": str(tmp_path)}).make_model_cache()
    assert not list(tmp_path.iterdir())
