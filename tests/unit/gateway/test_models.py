"""Which models a key gets: those that can do what is asked, and no word of any other."""

import time
from types import SimpleNamespace

import pytest

from fleet_worker.errors import ModelUnavailable
from fleet_worker.gateway.accounts.key import Key
from fleet_worker.gateway.dialects.dialect import ChatAsked, CountAsked, EmbedAsked, capability
from fleet_worker.gateway.models import LONGEST_NAME, require

CHATS = ("chat", "stream_chat")


class Fleet:
    """A registry."""

    def __init__(self, *, unready=(), **models):
        self._offered = [
            SimpleNamespace(model=name.replace("_", "-"), capabilities=can, ready=name not in unready)
            for name, can in models.items()
        ]

    def models(self):
        return sorted(each.model for each in self._offered)

    def instances(self):
        return ["local"]

    def offerings(self, model=None, *, capability=None):
        of_model = [each for each in self._offered if model in (None, each.model)]
        return [each for each in of_model if capability is None or capability in each.capabilities]


FLEET = Fleet(my_chat=CHATS, my_vectors=["embed"], secret_chat=CHATS, secret_vectors=["embed"])


def refused(key, name, capability):
    with pytest.raises(ModelUnavailable) as raised:
        require(FLEET, key, name, capability)
    return raised.value.message


@pytest.mark.parametrize(
    ("name", "capability"), [("my-chat", "embed"), ("my-vectors", "chat"), ("secret-chat", "chat")]
)
def test_an_error_names_no_model_of_others(name, capability):
    assert "secret" not in refused(Key(name="alice", models=("my-*",)), name, capability)


def test_an_error_names_what_the_key_has_instead():
    own = Key(name="alice", models=("my-chat",), aliases={"ada": ("secret-vectors",)})
    assert refused(own, "my-chat", "embed") == ("the model is not for embeddings; those of this key that are: ada")
    assert refused(own, "ada", "stream_chat").endswith("is not for chats; those of this key that are: my-chat")
    assert refused(Key(name="bob", models=("my-chat",)), "my-chat", "embed").endswith("this key has none that is")


def test_only_models_of_an_alias_that_can_do_it_are_tried():
    key = Key(name="alice", models=(), aliases={"any": ("my-vectors", "my-chat")})
    assert require(FLEET, key, "any", "chat") == ["my-chat"]
    assert require(FLEET, key, "any", "embed") == ["my-vectors"]
    assert require(FLEET, key, "any") == ["my-vectors", "my-chat"]


def test_a_model_that_no_node_is_ready_for_is_tried_last():
    key = Key(name="alice", aliases={"any": ("large", "small")}, fallbacks={"large": ("small", "tiny")})
    fleet = Fleet(unready=("large",), large=CHATS, small=CHATS, tiny=CHATS)
    assert require(fleet, key, "large", "chat") == ["small", "tiny", "large"]
    assert require(fleet, key, "any", "chat") == ["small", "tiny", "large"]
    assert require(Fleet(large=CHATS, small=CHATS), key, "large", "chat") == ["large", "small"]
    assert require(Fleet(unready=("large", "small"), large=CHATS, small=CHATS), key, "any") == ["large", "small"]


def test_a_name_that_no_model_can_have_costs_no_time_and_is_no_alias():
    """A stream would repeat it in each chunk."""
    key = Key(name="alice", aliases={"*": ("my-chat",)})
    assert require(FLEET, key, "x" * LONGEST_NAME, "chat") == ["my-chat"]
    began = time.process_time()
    refused(key, "my-chat" * 10**6, "chat")
    assert time.process_time() - began < 0.1


def test_what_a_model_must_be_able_to_do():
    asked = [ChatAsked("m", {}, stream, None) for stream in (False, True)]
    assert [*map(capability, asked)] == ["chat", "stream_chat"]
    assert capability(EmbedAsked("m", {}, None)) == "embed"
    assert capability(CountAsked("m", {}, None)) is None
