import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.broker.topology import slug
from fleet_worker.errors import ModelNotServed, UnsupportedCapability
from fleet_worker.mlx.offering import (
    ALIASES,
    FEATURES,
    Feature,
    features_of,
    no_offerings_advice,
    offering_for,
    offerings_of,
)
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.settings import Instance, Model, Settings

SECRET = "swordfish"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def offerings(*reported, provider=None, **instance):
    return offerings_of(Settings(instances={"local": instance}).instances["local"], provider or {}, reported)


def request(model, operation="chat", **params):
    body = {"input": "a"} if operation == "embed" else {"messages": [{"role": "user", "content": SECRET}]}
    return FleetRequest.build(
        {
            "protocol_version": 2,
            "request_id": "r-1",
            "correlation_id": "r-1",
            "idempotency_key": "r-1",
            "attempt": 1,
            "operation": operation,
            "provider": "mlx",
            "provider_instance": "any",
            "model": model,
            "params": {**body, **params},
            "reply_to": "llm.fleet.reply.mini-7.0123456789ab.120",
            "message_context": {},
            "caller": {},
            "trace_context": {},
            "signed_token": None,
            "timeout_seconds": 300.0,
            "expires_at": 2_000_000_000.0,
            "priority": "normal",
        }
    )


# --- What an instance offers


def test_a_listed_model_is_offered_by_its_public_name_and_asked_for_by_its_backend():
    offered = offerings(models={"qwen3-14b": {"backend": "default_model", "context_window": 32768}})["qwen3-14b"]
    assert (offered.model, offered.backend) == ("qwen3-14b", "default_model")
    assert offered.settings.context_window == 32768


def test_a_listed_model_without_backend_has_one_name():
    assert offerings(models={"qwen3-14b": {}})["qwen3-14b"].backend == "qwen3-14b"


def test_with_models_listed_what_the_server_reports_is_nothing():
    assert set(offerings("other", models={"qwen3-14b": {}})) == {"qwen3-14b"}


def test_with_none_listed_what_the_server_reports_is_offered():
    offered = offerings("qwen3-14b", "all-minilm-l6-v2")
    assert {name: each.backend for name, each in offered.items()} == {name: name for name in offered}
    assert set(offered) == {"qwen3-14b", "all-minilm-l6-v2"}


def test_a_model_that_is_reported_by_its_path_has_the_last_part_as_public_name():
    """mlx_lm.server reports its own model so, and would reload it if it was written otherwise."""
    offered = offerings("/Users/me/models/SmolLM2-135M")
    assert {name: each.backend for name, each in offered.items()} == {"SmolLM2-135M": "/Users/me/models/SmolLM2-135M"}


def test_a_model_that_is_reported_by_owner_and_name_keeps_its_owner():
    """Otherwise two models of a disk cache become one, and whitelist and blacklist cannot name an owner."""
    offered = offerings("mlx-community/Qwen3-14B", "someone/Qwen3-14B")
    assert set(offered) == {"mlx-community/Qwen3-14B", "someone/Qwen3-14B"}


def test_a_list_may_name_the_owner_of_reported_models():
    offered = offerings("mlx-community/Qwen3-14B", "someone/Llama-3", model_whitelist=["mlx-community/"])
    assert [each.backend for each in offered.values()] == ["mlx-community/Qwen3-14B"]


def test_lists_let_reported_models_pass():
    reported = ["Qwen3-14B", "Qwen3-draft", "Llama-3"]
    assert set(offerings(*reported, model_whitelist=["qwen"], model_blacklist=["DRAFT"])) == {"Qwen3-14B"}


def test_listed_models_win_over_the_lists_for_reported_ones():
    assert set(offerings(models={"qwen3-14b": {}}, model_blacklist=["qwen"])) == {"qwen3-14b"}


def test_nothing_reported_is_nothing_offered():
    assert offerings() == {}


def test_a_model_is_offered_for_what_it_can_do_and_the_instance_may():
    names = ["qwen3-14b", "all-minilm-l6-v2"]
    whole = {name: each.capabilities for name, each in offerings(*names).items()}
    assert whole == {"qwen3-14b": ("chat", "stream_chat"), "all-minilm-l6-v2": ("embed",)}
    assert offerings(*names, fleet={"capabilities": ["chat"]})["qwen3-14b"].capabilities == ("chat",)
    assert set(offerings(*names, usage={"inference": False})) == {"all-minilm-l6-v2"}
    assert offerings(*names, usage={"inference": False, "embedding": False}) == {}


def test_an_offering_carries_the_template_of_its_model(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(SECRET, "utf-8")
    offered = offerings(str(tmp_path), models={"m": {"backend": "default_model"}, "other": {}})
    assert (offered["m"].template.default, offered["other"].template) == (SECRET, None)
    assert SECRET not in repr(offered["m"])


def test_features_come_from_model_instance_and_provider():
    offered = offerings(models={"m": {"features": ["tools"]}}, features=["vision"], provider={"thinking": True})["m"]
    sources = {name: feature.source for name, feature in offered.features.items() if feature.value}
    assert sources["tools"] == "model"
    assert sources["vision"] == "instance"
    assert sources["thinking"] == "provider"


def test_a_model_that_is_listed_with_dimensions_embeds_whatever_its_name_is():
    offered = offerings(models={"e1": {"dimensions": 8}, "c1": {}})
    assert {name: each.capabilities for name, each in offered.items()} == {
        "e1": ("embed",),
        "c1": ("chat", "stream_chat"),
    }


@pytest.mark.parametrize("only", [{"usage": {"inference": False}}, {"fleet": {"capabilities": ["embed"]}}])
def test_whoever_lists_a_model_for_an_instance_that_only_embeds_knows_that_it_does(only):
    assert offerings(models={"e1": {}}, **only)["e1"].capabilities == ("embed",)
    assert offerings("e1", **only) == {}  # a server may report anything
    assert offerings(models={"e1": {"features": {"embedding": False}}}, **only) == {}


NOTHING = {
    "models that do something else": (
        {"models": {"bge-talks": {}}, "fleet": {"capabilities": ["chat", "stream_chat"]}},
        ["'bge-talks'", 'features = { completion = true, streaming = true } under [instances.one.models."bge-talks"]'],
    ),
    "models that are said to do nothing": (
        {"models": {"e1": {"features": {"embedding": False}}}, "usage": {"inference": False}},
        ["'e1'", "(embed)", 'features = { embedding = true } under [instances.one.models."e1"]'],
    ),
    "no capability": (
        {"models": {"m": {}}, "usage": {"inference": False}, "fleet": {"capabilities": ["chat"]}},
        ["fleet.capabilities names nothing that usage allows"],
    ),
    "no model": ({}, ["[instances.one.models]", "model_whitelist"]),
}


@pytest.mark.parametrize(("instance", "words"), NOTHING.values(), ids=NOTHING)
def test_whoever_offers_nothing_is_told_what_to_set(instance, words):
    configured = Settings(instances={"one": instance}).instances["one"]
    assert offerings_of(configured, {}, ()) == {}
    advice = no_offerings_advice("instances.one", configured)
    assert [word for word in words if word not in advice] == []


# --- What serves a request


@pytest.mark.parametrize(
    ("model", "operation"), [("qwen3-14b", "chat"), ("qwen3-14b", "stream_chat"), ("all-minilm-l6-v2", "embed")]
)
def test_a_request_finds_its_offering(model, operation):
    assert offering_for(request(model, operation), offerings("qwen3-14b", "all-minilm-l6-v2")).model == model


@pytest.mark.parametrize("model", ["qwen3_14b", "QWEN3-14B", "qwen3-14b ", "default_model", "gpt-4o"])
def test_the_exact_name_decides(model):
    """Two models may share a lane, and an MLX server may load or download a model that it does not know."""
    served = offerings(models={"qwen3-14b": {"backend": "default_model"}})
    with pytest.raises(ModelNotServed) as caught:
        offering_for(request(model), served)
    assert caught.value.metadata == {"served": ["qwen3-14b"]}
    assert not caught.value.retryable


def test_the_exact_name_decides_between_models_of_one_lane():
    served = offerings("qwen3-14b", "Qwen3.14B")
    assert len({slug(name) for name in served}) == 1
    assert offering_for(request("Qwen3.14B"), served).backend == "Qwen3.14B"


def test_a_model_that_is_not_served_is_not_repeated():
    with pytest.raises(ModelNotServed) as caught:
        offering_for(request(SECRET), offerings(*[f"model-{number}" for number in range(100)]))
    assert SECRET not in f"{caught.value!r} {caught.value.metadata}"
    assert len(caught.value.metadata["served"]) == 20


@pytest.mark.parametrize(
    ("model", "operation"), [("qwen3-14b", "embed"), ("all-minilm-l6-v2", "chat"), ("all-minilm-l6-v2", "stream_chat")]
)
def test_a_model_is_served_for_what_it_can_do_only(model, operation):
    with pytest.raises(UnsupportedCapability, match=f"{model} is served here for"):
        offering_for(request(model, operation), offerings("qwen3-14b", "all-minilm-l6-v2"))


def test_a_capability_that_the_host_did_not_opt_in_for_is_refused():
    with pytest.raises(UnsupportedCapability):
        offering_for(request("qwen3-14b", "stream_chat"), offerings("qwen3-14b", fleet={"capabilities": ["chat"]}))


def test_images_are_refused_for_a_model_that_does_not_see():
    """vllm-mlx and mlx-openai-server would drop them and answer without them."""
    images = request("qwen3-14b", messages=[{"role": "user", "content": [IMAGE]}])
    with pytest.raises(UnsupportedCapability, match="vision"):
        offering_for(images, offerings("qwen3-14b"))
    assert offering_for(images, offerings(models={"qwen3-14b": {"features": ["vision"]}}))
    assert offering_for(request("qwen2-vl", messages=[{"role": "user", "content": [IMAGE]}]), offerings("qwen2-vl"))


def test_tools_are_refused_only_where_the_configuration_says_so():
    """The name of a model does not tell whether it supports tools."""
    tools = request("m", tools=[{"type": "function", "function": {"name": "f"}}])
    assert offering_for(tools, offerings("m"))
    assert offering_for(tools, offerings(models={"m": {"features": ["tools"]}}))
    assert offering_for(request("m", tools=[]), offerings(models={"m": {"features": {"tools": False}}}))
    with pytest.raises(UnsupportedCapability, match="without tools"):
        offering_for(tools, offerings(models={"m": {"features": {"tools": False}}}))


# --- Features

SOURCES = ["model", "instance", "provider"]
"""From the strongest to the weakest; the weakest of all, `catalog`, is the name of the model."""


def features(name="some-model", **said):
    return features_of(
        name,
        Model(features=said.get("model", {})),
        Instance(features=said.get("instance", {})),
        said.get("provider", {}),
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


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_configured_beats_what_a_name_tells(source):
    assert features("gemma-3-27b", **{source: {"vision": False}})["vision"] == Feature(False, source)
    assert features("gemma-2-9b", **{source: {"vision": True}})["vision"] == Feature(True, source)


@given(st.dictionaries(st.sampled_from(SOURCES), st.booleans()))
def test_the_first_source_that_says_something_decides(said):
    expected = next((Feature(said[source], source) for source in SOURCES if source in said), Feature(False, "default"))
    assert features(**{source: {"tools": value} for source, value in said.items()})["tools"] == expected


@given(st.dictionaries(st.sampled_from(SOURCES), st.booleans()))
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
    assert resolved["completion"] == Feature(True, "instance")


@pytest.mark.parametrize(
    ("name", "expected"), [("qwen3-14b", ["chat", "stream_chat"]), ("all-minilm-l6-v2", ["embed"])]
)
def test_a_model_belongs_on_the_lanes_of_what_it_can_do(name, expected):
    assert list(offerings(models={name: {}})[name].capabilities) == expected


def test_a_model_that_does_not_stream_has_no_stream_lane():
    assert offerings(models={"m": {"features": {"streaming": False}}})["m"].capabilities == ("chat",)


def test_a_catalogue_is_not_offered_as_a_whole():
    """10,000 models would be 20,000 lanes. What is listed, or left by the whitelist, is offered."""
    catalogue = [f"org/model-{at}" for at in range(10_000)]
    assert offerings(*catalogue) == {}
    assert offerings(*catalogue, model_whitelist=["model-77"]).keys() == {each for each in catalogue if "-77" in each}
    assert offerings(*catalogue, models={"mine": {"backend": catalogue[-1]}}).keys() == {"mine"}
    assert len(offerings(*catalogue[:1000])) == 1000


def test_a_model_without_a_name_is_not_offered():
    assert offerings("/", "/models/a").keys() == {"a"}
