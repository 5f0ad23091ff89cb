"""Which models of the local Hugging Face cache an MLX server can be started with."""

import json

import pytest

from fleet_worker.hugging_face import hub_folder
from fleet_worker.setup.local_models import local_models, that_fits

QWEN = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "quantization": {"bits": 4, "group_size": 64}}
BERT = {"model_type": "bert", "architectures": ["BertModel"]}
CHAT = {"config.json": QWEN, "tokenizer.json": {}, "tokenizer_config.json": {"chat_template": "{{ messages }}"}}
COMMIT = "0123456789abcdef"


@pytest.fixture
def hub(tmp_path):
    """A cache as huggingface_hub makes it: blobs, and links to them from the snapshot of a commit."""

    def add(name, files, weights=(("model.safetensors", 1000),), revision=COMMIT):
        model = tmp_path / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(revision)
        (model / "blobs").mkdir()
        for number, (file, content) in enumerate([*files.items(), *weights]):
            blob = model / "blobs" / str(number)
            if content is not None:
                blob.write_bytes(b"x" * content if isinstance(content, int) else json.dumps(content).encode())
            (snapshot / file).parent.mkdir(exist_ok=True)
            (snapshot / file).symlink_to(blob)
        return snapshot

    add.folder = tmp_path
    return add


def found(hub):
    return [(each.name, each.kind, each.size) for each in local_models(hub.folder)]


def sharded(*names):
    return {"model.safetensors.index.json": {"weight_map": {f"layer.{n}": name for n, name in enumerate(names)}}}


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_models_for_chats_and_embeddings_are_found_the_largest_first(hub):
    hub("mlx-community/all-MiniLM-L6-v2", {"config.json": BERT, "tokenizer.json": {}}, [("model.safetensors", 50)])
    hub("mlx-community/Qwen3-14B-4bit", CHAT)
    assert found(hub) == [
        ("mlx-community/Qwen3-14B-4bit", "chat", 1000),
        ("mlx-community/all-MiniLM-L6-v2", "embedding", 50),
    ]


def test_the_sizes_of_all_files_of_weights_are_added_each_once(hub):
    hub("org/a", CHAT | sharded(ONE, TWO, TWO), [(ONE, 10), (TWO, 20)])
    assert found(hub) == [("org/a", "chat", 30)]


INCOMPLETE = {
    "no weights": (CHAT, ()),
    "the last file of weights": (CHAT | sharded(ONE, TWO), [(ONE, 10)]),
    "the last file and the index": (CHAT, [(ONE, 10)]),
    "the blob behind a link": (CHAT, [("model.safetensors", None)]),
    "a configuration": ({k: v for k, v in CHAT.items() if k != "config.json"}, [("model.safetensors", 10)]),
    "a tokenizer": ({"config.json": QWEN, "chat_template.jinja": ""}, [("model.safetensors", 10)]),
    "weights in this format": (CHAT, [("pytorch_model.bin", 10)]),
    "a list of weights that is one": (CHAT | {"model.safetensors.index.json": []}, ()),
}


@pytest.mark.parametrize(("files", "weights"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_a_model_that_lacks_something_is_left_out(files, weights, hub):
    hub("org/a", files, weights)
    assert found(hub) == []


def test_a_snapshot_of_another_revision_is_left_out(hub):
    hub("org/a", CHAT, revision="fedcba")
    assert found(hub) == []


def config(**changes):
    return CHAT | {"config.json": QWEN | changes}


KINDS = {
    "a chat template in a file": (
        {"config.json": QWEN, "tokenizer.json": {}, "chat_template.jinja": "{{ messages }}"},
        "org/a",
        "chat",
    ),
    "an embedding model with a chat template": (CHAT, "mlx-community/Qwen3-Embedding-0.6B", "embedding"),
    "a sentence transformer": (CHAT | {"modules.json": []}, "org/a", "embedding"),
    "a base model": ({"config.json": QWEN, "tokenizer.json": {}}, "org/a", None),
    "a reranker": (CHAT, "Qwen/Qwen3-Reranker-4B", None),
    "speech": (config(architectures=["WhisperForConditionalGeneration"], model_type="whisper"), "org/a", None),
    "GPTQ": (config(quantization_config={"quant_method": "gptq"}), "org/a", None),
    "MLX's own quantisation": (config(quantization_config={"bits": 4, "group_size": 64}), "org/a", "chat"),
    "a configuration that is none": (CHAT | {"config.json": [1]}, "org/a", None),
    "architectures that are none": (config(architectures=None), "org/a", None),
}


@pytest.mark.parametrize(("files", "name", "kind"), KINDS.values(), ids=KINDS)
def test_the_kind_of_a_model(files, name, kind, hub):
    hub(name, files)
    assert [each.kind for each in local_models(hub.folder)] == ([kind] if kind else [])


def test_other_things_in_a_cache_are_left_alone(hub):
    (hub.folder / "datasets--org--a").mkdir()
    (hub.folder / "models--org--empty").mkdir()
    (hub.folder / "models--org--file").write_text("")
    (hub.folder / "version.txt").write_text("1")
    assert found(hub) == []
    assert local_models(hub.folder / "nowhere") == []


def test_the_largest_chat_model_that_leaves_memory_for_others_is_proposed(hub):
    for name, size in {"a": 4_000, "b": 8_000, "c": 30_000}.items():
        hub(f"org/{name}", CHAT, [("model.safetensors", size)])
    hub("org/embed", CHAT, [("model.safetensors", 7_000)])
    models = local_models(hub.folder)
    needed = {each.name: each.memory for each in models}
    assert that_fits(models, 16 * 10**9).name == "org/c"
    assert that_fits(models, int(needed["org/b"] * 1.5) + 2).name == "org/b"
    assert that_fits(models, int(needed["org/a"] * 1.5) - 2) is None


VARIABLES = {
    "nothing": ({}, "/home/me/.cache/huggingface/hub"),
    "HF_HUB_CACHE": ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
    "its older name": ({"HUGGINGFACE_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
    "HF_HOME": ({"HF_HOME": "~/b", "XDG_CACHE_HOME": "/c"}, "/home/me/b/hub"),
    "XDG_CACHE_HOME": ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
}


@pytest.mark.parametrize(("variables", "folder"), VARIABLES.values(), ids=VARIABLES)
def test_the_folder_is_that_of_huggingface_hub(variables, folder, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert str(hub_folder()) == folder
