"""What a node offers, when its configuration and its server's list of models change, also at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.mlx.offering import offerings_of
from fleet_worker.node import offered_models as module
from fleet_worker.node.offered_models import OfferedModels
from fleet_worker.settings import Settings


def settings(**instance):
    opted_in = {"enabled": True, "respond_to_requests": True}
    return Settings(instances={"one": {"base_url": "http://127.0.0.1:1", "fleet": opted_in, **instance}})


def models_of(*reported, server="openai", **instance):
    return OfferedModels(settings(**instance), "one", server, reported)


def reloaded(models):
    models.follow_settings(settings(model_blacklist=["b"]))


def listed(models):
    models.follow_server(["a", "b", "c"])


@pytest.mark.parametrize(("first", "second"), [(reloaded, listed), (listed, reloaded)])
def test_what_is_offered_follows_the_newest_configuration_and_the_newest_list(first, second, monkeypatch):
    """The first one is slow until the second one has ended, or has to wait."""
    begun, ended = threading.Event(), threading.Event()

    def slow_at_first(*known):
        offerings = offerings_of(*known)
        if not begun.is_set():
            begun.set()
            ended.wait(0.3)
        return offerings

    models = models_of("a", "b")
    monkeypatch.setattr(module, "offerings_of", slow_at_first)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first, models)
        assert begun.wait(5)
        other = pool.submit(second, models)
        other.add_done_callback(lambda _: ended.set())
    assert one.exception() is other.exception() is None
    assert set(models.by_name) == {"a", "c"}


def test_settings_that_offer_nothing_are_refused_and_the_old_ones_stay():
    models = models_of("a", "b")
    with pytest.raises(ConfigurationError, match="instance one has nothing to offer"):
        models.follow_settings(settings(model_whitelist=["z"]))
    models.follow_server(["a", "z"])
    assert set(models.by_name) == {"a", "z"}


def test_a_server_that_lists_nothing_changes_nothing():
    models = models_of("a")
    models.follow_server([])
    assert set(models.available) == {"a"}


def test_a_model_that_the_server_lacks_leaves_the_others_alone_until_it_may_be_another_server():
    models = models_of("a", "b")
    models.lacks("a")
    assert (set(models.by_name), set(models.available), models.for_canary().model) == ({"a", "b"}, {"b"}, "b")
    models.lacks("b")
    assert (models.available, models.for_canary()) == ({}, None)
    models.forget_missing()
    assert set(models.available) == {"a", "b"}


def test_new_settings_offer_a_missing_model_again():
    models = models_of("a", "b")
    models.lacks("a")
    models.follow_settings(settings())
    assert set(models.available) == {"a", "b"}


@pytest.mark.parametrize(("server", "available"), [("vllm_mlx", {"a"}), ("mlx_lm", {"a", "b"})])
def test_a_configured_model_is_missing_if_a_server_that_lists_all_its_models_does_not_list_it(server, available):
    configured = {name: {"features": {"chat": True}} for name in ("a", "b")}
    models = models_of("a", "b", server=server, models=configured)
    models.follow_server(["a"])
    assert set(models.available) == available
    models.follow_server(["a", "b"])
    assert set(models.available) == {"a", "b"}
