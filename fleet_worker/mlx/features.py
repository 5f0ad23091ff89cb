"""What a model can do, and who says so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fleet_worker.settings import Capability, Instance, Model

FEATURES = (
    "completion",
    "embedding",
    "streaming",
    "tools",
    "vision",
    "thinking",
    "structured_output",
    "moderation",
    "image",
    "audio_transcription",
    "audio_speech",
)
ALIASES = {
    "chat": "completion",
    "function_calling": "tools",
    "functions": "tools",
    "tool_use": "tools",
    "tool_calls": "tools",
    "stream": "streaming",
    "stream_chat": "streaming",
    "embed": "embedding",
    "embeddings": "embedding",
    "reasoning": "thinking",
}
NEEDED: dict[Capability, str] = {"chat": "completion", "stream_chat": "streaming", "embed": "embedding"}
"""The feature without which a model does not serve that capability."""
_EMBEDS = {"completion": False, "streaming": False, "embedding": True}

# `e5` and `gte` only as words of their own: both occur inside hashes.
_EMBEDDING = re.compile(r"embed|bge|nomic|minilm|(?<![a-z0-9])(?:e5|gte)(?![a-z0-9])", re.IGNORECASE)
_VISION = re.compile(r"vlm|vision|llava|pixtral|qwen.*vl|gemma-3(?!n|-1b|-270m)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Feature:
    """Whether, and which of the sources said so (`model`, `instance`, `provider`, `listed`, `metadata`, ...)."""

    value: bool
    source: str


def features_of(
    name: str,
    model: Model,
    instance: Instance,
    provider: Mapping[str, bool],
    *,
    metadata: Mapping[str, bool] | None = None,
    probe: Mapping[str, bool] | None = None,
) -> dict[str, Feature]:
    """Resolve every feature of a model; the first source that has a word on it decides."""
    sources = {
        "model": canonical(model.features),
        "instance": canonical(instance.features),
        "provider": canonical(provider),
        "listed": listed(name, model, instance),
        "metadata": canonical(metadata or {}),
        "catalog": catalog(name),
        "probe": canonical(probe or {}),
        "envelope": {"streaming": True},
    }
    return {feature: _first_word(feature, sources) for feature in FEATURES}


def _first_word(feature: str, sources: Mapping[str, Mapping[str, bool]]) -> Feature:
    for source, values in sources.items():
        if feature in values:
            return Feature(values[feature], source)
    return Feature(False, "default")


def canonical(features: Mapping[str, bool]) -> dict[str, bool]:
    return {ALIASES.get(name, name): value for name, value in features.items()}


def listed(name: str, model: Model, instance: Instance) -> dict[str, bool]:
    """What follows from how a model is listed: one with dimensions embeds, and so does one of an instance that does
    nothing else.
    """
    only_embeds = name in instance.models and instance.capabilities == ("embed",)
    return _EMBEDS if model.dimensions or only_embeds else {}


def catalog(name: str) -> dict[str, bool]:
    """What a model's name tells."""
    embedding = bool(_EMBEDDING.search(name))
    return {
        "completion": not embedding,
        "streaming": not embedding,
        "embedding": embedding,
        "vision": not embedding and bool(_VISION.search(name)),
    }


def serves(features: Mapping[str, Feature], capability: Capability) -> bool:
    """Tell whether a model with these features belongs on the lanes of that capability."""
    return features[NEEDED[capability]].value
