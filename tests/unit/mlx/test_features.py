import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.mlx.features import ALIASES, FEATURES, Feature, features_of, serves
from fleet_worker.settings import Instance, Model

SOURCES = ["model", "instance", "provider", "metadata", "catalog", "probe"]
"""From the strongest to the weakest; the catalog is what a model's name tells."""


def features(name="some-model", **said):
    return features_of(
        name,
        Model(features=said.get("model", {})),
        Instance(features=said.get("instance", {})),
        said.get("provider", {}),
        metadata=said.get("metadata"),
        probe=said.get("probe"),
    )


@pytest.mark.parametrize(
    "name",
    [
        "text-embedding-3-small",
        "nomic-embed-text-v1.5",
        "mlx-community/bge-m3",
        "BAAI/BGE-small-en",
        "intfloat/multilingual-e5-large",
        "e5",
        "gte-Qwen2-7B-instruct",
        "Alibaba/gte_large",
        "all-MiniLM-L6-v2",
        "Qwen3-Embedding-0.6B",
    ],
)
def test_a_name_tells_an_embedding_model(name):
    resolved = features(name)
    assert resolved["embedding"] == Feature(True, "catalog")
    assert not resolved["completion"].value
    assert not resolved["streaming"].value
    assert not resolved["vision"].value


@pytest.mark.parametrize(
    "name",
    [
        "qwen3-14b",
        "Llama-3.2-1B",
        "sha-3f2e5a90",
        "sha-90f4e5",
        "longgte-7b",
        "mistral-4e5f",
        "model-0gte1",
        "integer-9b",
        "SmolLM2-135M-Instruct",
    ],
)
def test_a_name_tells_a_chat_model(name):
    resolved = features(name)
    assert not resolved["embedding"].value
    assert resolved["completion"] == Feature(True, "catalog")
    assert resolved["streaming"] == Feature(True, "catalog")


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2.5-VL-7B",
        "qwen2-vl",
        "llava-1.6",
        "pixtral-12b",
        "SmolVLM-Instruct",
        "Llama-3.2-11B-Vision",
        "gemma-3-27b-it",
    ],
)
def test_a_name_tells_a_model_that_sees(name):
    assert features(name)["vision"] == Feature(True, "catalog")


@pytest.mark.parametrize("name", ["gemma-3-1b-it", "gemma-3-270m", "gemma-3n-E4B", "gemma-2-9b", "qwen3-14b"])
def test_a_name_tells_a_model_that_does_not_see(name):
    assert not features(name)["vision"].value


@pytest.mark.parametrize("source", ["model", "instance", "provider", "metadata"])
def test_what_is_configured_or_measured_beats_what_a_name_tells(source):
    assert features("gemma-3-27b", **{source: {"vision": False}})["vision"] == Feature(False, source)
    assert features("gemma-2-9b", **{source: {"vision": True}})["vision"] == Feature(True, source)


def test_what_a_name_tells_beats_a_probe():
    assert features("gemma-3-27b", probe={"vision": False})["vision"] == Feature(True, "catalog")


@given(st.dictionaries(st.sampled_from([*SOURCES[:4], "probe"]), st.booleans()))
def test_the_first_source_that_says_something_decides(said):
    expected = next((Feature(said[source], source) for source in SOURCES if source in said), Feature(False, "default"))
    assert features(**{source: {"tools": value} for source, value in said.items()})["tools"] == expected


@given(st.dictionaries(st.sampled_from(SOURCES[:4]), st.booleans()))
def test_a_source_that_is_silent_on_a_feature_changes_nothing(said):
    assert features(**{source: {"tools": value} for source, value in said.items()})["thinking"] == Feature(
        False, "default"
    )


def test_every_feature_has_an_answer_and_a_source():
    resolved = features()
    assert tuple(resolved) == FEATURES
    assert {feature.source for feature in resolved.values()} == {"catalog", "default"}


@pytest.mark.parametrize("alias", ALIASES)
def test_a_feature_may_have_another_name(alias):
    assert features(model={alias: True})[ALIASES[alias]] == Feature(True, "model")
    assert ALIASES[alias] in FEATURES


def test_a_name_is_corrected_by_the_configuration():
    resolved = features("my-e5", instance={"embedding": False, "completion": True, "streaming": True})
    assert resolved["embedding"] == Feature(False, "instance")
    assert serves(resolved, "chat")


@pytest.mark.parametrize(
    ("name", "expected"), [("qwen3-14b", ["chat", "stream_chat"]), ("all-minilm-l6-v2", ["embed"])]
)
def test_a_model_belongs_on_the_lanes_of_what_it_can_do(name, expected):
    assert [each for each in ("chat", "stream_chat", "embed") if serves(features(name), each)] == expected


def test_a_model_that_does_not_stream_has_no_stream_lane():
    resolved = features(model={"streaming": False})
    assert serves(resolved, "chat")
    assert not serves(resolved, "stream_chat")
