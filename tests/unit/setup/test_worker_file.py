"""worker.toml as `init`, `join` and `quickstart` write it."""

import os
import stat
import tempfile
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_worker.errors import ConfigurationError
from fleet_worker.settings import Settings
from fleet_worker.setup import worker_file
from fleet_worker.setup.worker_file import WorkerFile, WorkerInstance

BROKER = "redis://:pass%2Fword@broker:6379/0"
SERVE = 'mlx_lm.server --model "/Users/me/My Models/qwen" --port {port}'
QWEN = {"backend": "default_model", "chat_template": "mlx-community/Qwen2.5-7B"}
FULL = WorkerFile(
    BROKER,
    host="mini-7",
    max_body_bytes=1_000_000,
    more="# Ours.\n[gateway]\nport = 4001",
    instances={
        "local": WorkerInstance(base_url="http://127.0.0.1:8080", models={"qwen2.5-7b": QWEN}),
        "embed": WorkerInstance(
            base_url="http://127.0.0.1:8000", models={"minilm": {}}, capabilities=("embed",), concurrency=2
        ),
    },
)
TEXTS = st.text(st.characters(codec="utf-8"))


def test_the_file_is_a_configuration(tmp_path, monkeypatch):
    worker_file.write(tmp_path / "worker.toml", FULL.text())
    monkeypatch.setenv("FLEET_CONFIG", str(tmp_path / "worker.toml"))
    monkeypatch.delenv("FLEET_BROKER_URL", raising=False)
    read = Settings()
    assert (read.broker_url, read.host, read.gateway.port) == (BROKER, "mini-7", 4001)
    assert read.max_body_bytes == 1_000_000
    assert list(read.serving()) == ["local", "embed"]
    local, embed = read.instances.values()
    assert (local.base_url, local.limits.concurrency, local.capabilities) == (
        "http://127.0.0.1:8080",
        4,
        ("chat", "stream_chat"),
    )
    assert (local.models["qwen2.5-7b"].backend, local.models["qwen2.5-7b"].chat_template) == tuple(QWEN.values())
    assert (embed.limits.concurrency, embed.capabilities, list(embed.models)) == (2, ("embed",), ["minilm"])


@settings(max_examples=50)
@given(broker=TEXTS, host=TEXTS.filter(bool), name=TEXTS, serve=TEXTS.filter(bool), backend=TEXTS)
def test_every_value_is_read_back_as_it_was(broker, host, name, serve, backend):
    instances = {"local": WorkerInstance(serve=serve, models={name: {"backend": backend}})}
    read = tomllib.loads(WorkerFile(broker, host=host, instances=instances).text())
    assert (read["broker_url"], read["host"]) == (broker, host)
    assert read["instances"]["local"]["serve"] == serve
    assert read["instances"]["local"]["models"] == {name: {"backend": backend}}


def test_a_command_line_with_quotes_stays_readable():
    text = WorkerFile(BROKER, instances={"local": WorkerInstance(serve=SERVE)}).text()
    assert f"serve = '{SERVE}'\n" in text


def test_only_its_owner_may_read_it_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "worker.toml"
    worker_file.write(path, FULL.text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["worker.toml"]


def test_a_file_that_is_there_stays_unless_it_may_be_replaced(tmp_path):
    path = tmp_path / "worker.toml"
    path.write_text("mine")
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="exists already: --force replaces it"):
        worker_file.write(path, FULL.text())
    assert path.read_text() == "mine"
    worker_file.write(path, FULL.text(), force=True)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == (FULL.text(), 0o600)


def test_what_another_has_just_put_there_stays(tmp_path, monkeypatch):
    path, make = tmp_path / "worker.toml", tempfile.mkstemp

    def slowly(**options):
        path.write_text("mine")
        return make(**options)

    monkeypatch.setattr(tempfile, "mkstemp", slowly)
    with pytest.raises(ConfigurationError, match="exists already"):
        worker_file.write(path, FULL.text())
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("worker.toml", "mine")]


def test_a_link_that_leads_nowhere_is_a_file_that_is_there(tmp_path):
    path = tmp_path / "worker.toml"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="exists already"):
        worker_file.write(path, FULL.text())


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"worker.toml cannot be written: "):
        worker_file.write(tmp_path / "file" / "worker.toml", FULL.text())


def test_it_goes_where_it_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLEET_CONFIG", raising=False)
    assert worker_file.place(None) == tmp_path / "fleet" / "worker.toml"
    monkeypatch.setenv("FLEET_CONFIG", "~/mine.toml")
    assert worker_file.place(None) == tmp_path / "mine.toml"
    assert worker_file.place("here.toml") == tmp_path / "here.toml"


def test_a_folder_that_it_creates_is_of_this_user_only(tmp_path):
    before = os.umask(0)
    try:
        worker_file.write(tmp_path / "fleet" / "worker.toml", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "fleet").stat().st_mode) == 0o700


def test_no_repr_has_a_secret():
    instance = worker_file.WorkerInstance(serve="x --api-key hush --port {port}")
    file = worker_file.WorkerFile("redis://:hush@mini-1/0", instances={"local": instance}, more="key = 'hush'")
    settings = worker_file.ExplicitSettings(broker_url=file.broker_url, instances={"local": {"serve": instance.serve}})
    assert not [text for text in map(repr, (file, instance, settings)) if "hush" in text]
