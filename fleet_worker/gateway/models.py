"""`/v1/models`: what a key may use, as the registry knows it now. No node is asked."""

from __future__ import annotations

from typing import Any

from fleet_worker.errors import ModelUnavailable
from fleet_worker.gateway.accounts.key import Key
from fleet_worker.registry.absence import described, is_absent
from fleet_worker.registry.alternatives import nearest
from fleet_worker.registry.offered import Offered
from fleet_worker.registry.view import Registry

OWNER = "fleet"
"""Of each model, as OpenAI's clients are told."""
LONGEST_NAME = 200
"""Characters. No model of the fleet has a longer name, and each chunk of a stream repeats it."""
MOST_LISTED = 8
"""Names in the text of an error."""
_WORK = {"embed": "embeddings", "chat": "chats", "stream_chat": "chats"}
"""By capability, in the words of clients."""


def listing(registry: Registry, key: Key) -> list[dict[str, Any]]:
    """Return an object of OpenAI's and Anthropic's for each model and alias of this key, sorted."""
    offered = by_model(registry)
    return [
        _object(name, [each for model in key.models_for(name) for each in offered.get(model, ())])
        for name in sorted(key.visible(offered))
    ]


def page(registry: Registry, key: Key) -> dict[str, Any]:
    """Return the whole list, as OpenAI and as Anthropic write it."""
    data = listing(registry, key)
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": False, **ends}


def details(registry: Registry, key: Key, name: str) -> dict[str, Any]:
    """Return the object of one model; raises `ModelUnavailable` as `require` does."""
    require(registry, key, name)
    offered = by_model(registry)
    return _object(name, [each for model in key.models_for(name) for each in offered.get(model, ())])


def require(registry: Registry, key: Key, name: str, capability: str | None = None) -> list[str]:
    """Return the models that may answer a request for `name`; those only that have the capability. The first choice is
    the first, but those that no node is ready for now are the last: a request would wait there, and not fail.

    Raises:
        ModelUnavailable: this key has no such model. Only names are told that it may use.
    """
    models = key.models_for(name) if len(name) <= LONGEST_NAME else []
    there = [model for model in models if registry.offerings(model)]
    able = [model for model in there if registry.offerings(model, capability=capability)]
    if able or (models and not registry.instances()):  # without a registry node nothing is known, and nodes may serve
        if len(able) > 1:
            able.sort(key=lambda model: not _is_ready(registry, model))
        return able or models
    if capability and there:
        raise _not_for(capability, registry, key)
    close = nearest(name, key.visible(registry.models())) if len(name) <= LONGEST_NAME else []
    advice = f"; did you mean {close[0]}?" if close else "; GET /v1/models lists those of this key"
    raise ModelUnavailable(f"the model does not exist, or this key may not use it{advice}", param="model")


def _is_ready(registry: Registry, model: str) -> bool:
    return any(each.ready for each in registry.offerings(model))


def _not_for(capability: str, registry: Registry, key: Key) -> ModelUnavailable:
    """Return the error for a model that is for other requests. The router would name all models that are for this."""
    able = {each.model for each in registry.offerings(capability=capability)}
    own = sorted(name for name in key.visible(registry.models()) if able.intersection(key.models_for(name)))
    advice = f"those of this key that are: {', '.join(own[:MOST_LISTED])}" if own else "this key has none that is"
    return ModelUnavailable(f"the model is not for {_WORK.get(capability, capability)}; {advice}", param="model")


def by_model(registry: Registry) -> dict[str, list[Offered]]:
    """Return all that is offered, by the name of the model."""
    offered: dict[str, list[Offered]] = {}
    for each in registry.offerings():
        offered.setdefault(each.model, []).append(each)
    return offered


def _object(name: str, offered: list[Offered]) -> dict[str, Any]:
    lengths = [each.limits.get("context_window") for each in offered]
    known = [length for length in lengths if isinstance(length, int)]
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": OWNER,
        "type": "model",
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
        "context_length": min(known) if known else None,
        "capabilities": sorted({capability for each in offered for capability in each.capabilities}),
        "features": sorted({feature for each in offered for feature in each.features}),
        "ready": any(each.ready for each in offered),
        "not_ready_because": described(offered) if is_absent(offered) else None,
    }
