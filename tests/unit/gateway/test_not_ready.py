"""What a gateway tells of models for which no instance is ready: the same everywhere."""

from types import SimpleNamespace

import pytest

from fleet_worker.gateway import models
from fleet_worker.gateway.accounts.key import Key
from fleet_worker.gateway.health import readiness
from fleet_worker.registry.view import Registry
from tests.unit.registry.test_view import about_instance, about_model, say


@pytest.fixture
def registry():
    """`busy` has an instance that is ready, `closed` none."""
    registry = Registry()
    say(
        registry,
        about_instance("one", status="away", error="a user is at it"),
        about_instance("two"),
        about_model("busy", instance="one", status="away"),
        about_model("closed", instance="one", status="away"),
        about_model("busy", instance="two"),
    )
    return registry


def test_the_list_of_models_tells_why_one_is_not_ready(registry):
    key = Key(name="alice", aliases={"any": ("closed", "busy"), "best": ("closed",)})
    told = {each["id"]: (each["ready"], each["not_ready_because"]) for each in models.page(registry, key)["data"]}
    because = "its only instance is away (a user is at it)"
    assert told == {"any": (True, None), "best": (False, because), "busy": (True, None), "closed": (False, because)}
    assert models.details(registry, key, "closed")["not_ready_because"] == because


def ready(registry):
    return readiness(SimpleNamespace(registry=registry, broker_is_away=False), draining=False)


def test_readiness_counts_what_is_not_ready_and_tells_nobody_where_a_user_is(registry):
    absent = {"closed": {"away": 1}}
    known = {"status": "ready", "instances": 2, "ready": 1, "models": ["busy"], "not_ready": absent}
    assert ready(registry) == (200, known)


def test_without_any_instance_that_is_ready_the_gateway_is_not(registry):
    say(registry, about_instance("two", status="drained"), about_model("busy", instance="two", status="drained"))
    absent = {"busy": {"away": 1, "drained": 1}, "closed": {"away": 1}}
    known = {"status": "no instance is ready", "instances": 2, "ready": 0, "not_ready": absent}
    assert ready(registry) == (503, known)
