"""`/api/tags`, `/api/ps`, `/api/show` and `/api/version`: what Ollama's clients ask before they chat."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fleet_worker.gateway import models
from fleet_worker.gateway.accounts.key import Key
from fleet_worker.gateway.dialects.client_body import read
from fleet_worker.gateway.dialects.dialect import refused
from fleet_worker.gateway.dialects.ollama_request import WAYS_OUT, ShowRequest
from fleet_worker.registry.view import Registry

VERSION = "0.13.0"
"""Of Ollama's API that this is like. Some clients refuse to talk to older ones."""
_LONG_AGO = "1970-01-01T00:00:00Z"
_NEVER = "9999-12-31T23:59:59Z"
_DETAILS = {
    "parent_model": "",
    "format": "mlx",
    "family": "",
    "families": [],
    "parameter_size": "",
    "quantization_level": "",
}
_CAPABILITIES = {"tools": "tools", "vision": "vision", "thinking": "thinking"}
"""By feature of the fleet."""


def look_up(what: str, body: Mapping[str, Any], registry: Registry, key: Key) -> dict[str, Any] | None:
    """Return the answer to a request, as in "GET /api/tags"; None if there is none.

    Raises:
        InvalidRequest: the body of `/api/show` is not valid.
        ModelUnavailable: this key has no such model.
    """
    match what:
        case "GET /api/version":
            return {"version": VERSION}
        case "GET /api/tags":
            return {"models": [{**_named(each), "modified_at": _LONG_AGO} for each in models.listing(registry, key)]}
        case "GET /api/ps":
            ready = (each for each in models.listing(registry, key) if each["ready"])
            return {"models": [{**_named(each), **_loaded(each)} for each in ready]}
        case "POST /api/show":
            return _details(models.details(registry, key, _shown(body)))
    return None


def _shown(body: Mapping[str, Any]) -> str:
    given = read(ShowRequest, body, WAYS_OUT)
    if not (name := given.model or given.name):
        raise refused("model", "must be the name of a model: GET /api/tags lists them")
    return name


def _details(model: Mapping[str, Any]) -> dict[str, Any]:
    length = {"fleet.context_length": model["context_length"]} if model["context_length"] else {}
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _DETAILS,
        "model_info": {"general.architecture": "fleet", "general.basename": model["id"], **length},
        "capabilities": _capabilities(model),
        "modified_at": _LONG_AGO,
    }


def _named(model: Mapping[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(model["id"].encode()).hexdigest()
    return {"name": model["id"], "model": model["id"], "size": 0, "digest": digest, "details": _DETAILS}


def _loaded(model: Mapping[str, Any]) -> dict[str, Any]:
    return {"expires_at": _NEVER, "size_vram": 0, "context_length": model["context_length"] or 0}


def _capabilities(model: Mapping[str, Any]) -> list[str]:
    chats = ["completion"] if {"chat", "stream_chat"} & {*model["capabilities"]} else []
    embeds = ["embedding"] if "embed" in model["capabilities"] else []
    return [*chats, *embeds, *(name for feature, name in _CAPABILITIES.items() if feature in model["features"])]
