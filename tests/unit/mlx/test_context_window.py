"""How many tokens a model takes: what is found beside it, and that a server cannot have anything else read."""

import json

import pytest

from fleet_worker.mlx.context_window import find_context_window
from fleet_worker.mlx.offering import offerings_of
from fleet_worker.registry.status_socket import model_status
from fleet_worker.settings import Instance, Model


def of(backend, reported=(), **model):
    return find_context_window(Model(**model), str(backend), reported)


def folder_with(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), "utf-8")
    return folder


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"max_position_embeddings": 40960}, 40960),
        ({"n_positions": 1024}, 1024),
        ({"seq_length": 2048, "max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 131072}, "vision_config": {"max_position_embeddings": 5}}, 131072),
        ({"model_type": "gemma3", "text_config": {"hidden_size": 5}}, None),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 8}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": "8"}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        ({"max_position_embeddings": 10**30}, None),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": "4096"}, None),
        ("", None),
        ("[]", None),
        ("{", None),
        ("[" * 100_000, None),
        ('{"text_config": 5}', None),
    ],
)
def test_it_is_what_the_configuration_of_the_model_says(tmp_path, config, window):
    assert of(folder_with(tmp_path, config)) == window


def test_it_is_found_where_the_model_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--somebody--some-model"
    folder = folder_with(model / "snapshots" / "abc", {"max_position_embeddings": 4096})
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc", "utf-8")
    assert of("somebody/some-model") == 4096
    assert of("default_model", [str(folder)]) == 4096
    assert of("default_model", chat_template="somebody/some-model") == 4096
    assert of("default_model") is None
    assert of("somebody/another") is None
    assert of("/dev/zero") is None


def test_it_is_published_and_the_settings_come_first(tmp_path):
    folder = str(folder_with(tmp_path, {"max_position_embeddings": 4096}))
    models = {"found": Model(backend=folder), "told": Model(backend=folder, context_window=2048), "unknown": Model()}
    offered = offerings_of(Instance(base_url="http://127.0.0.1:1", models=models), {}, ())
    windows = {name: model_status(each, "available").limits.get("context_window") for name, each in offered.items()}
    assert windows == {"found": 4096, "told": 2048, "unknown": None}
