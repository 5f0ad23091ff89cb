"""`/api/tags`, `/api/ps`, `/api/show` and `/api/version`: what Ollama's clients ask before they chat."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from fleet_worker.gateway.client_body import read
from fleet_worker.gateway.dialect import refused
from fleet_worker.gateway.ollama_request import WAYS_OUT, ShowRequest

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


def tags(models: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the list of models. `models` are objects of OpenAI's list, as the next functions take them."""
    return {"models": [{**_named(model), "modified_at": _LONG_AGO} for model in models]}


def running(models: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the models that are ready now."""
    ready = (model for model in models if model["ready"])
    return {"models": [{**_named(model), **_loaded(model)} for model in ready]}


def version() -> dict[str, Any]:
    return {"version": VERSION}


def shown(body: Mapping[str, Any]) -> str:
    """Return the name of the model that the body of `/api/show` asks for."""
    given = read(ShowRequest, body, WAYS_OUT)
    name = given.model or given.name
    if not name:
        raise refused("model", "must be the name of a model: GET /api/tags lists them")
    return name


def details(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `/api/show` tells of a model."""
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
