"""What an instance offers: its models under their public names, with the capabilities and features of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from fleet_worker.errors import ModelNotServed, UnsupportedCapability
from fleet_worker.mlx.chat_templates import ChatTemplate, find_chat_template
from fleet_worker.mlx.context_window import find_context_window
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.request import FleetRequest
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
"""Other names of features in the settings."""
_MOST_REPORTED = 1000
"""A lane of its own for each is too much for a broker, and no mini serves so many."""
_REQUIRED_FEATURE: dict[Capability, str] = {"chat": "completion", "stream_chat": "streaming", "embed": "embedding"}

# `e5` and `gte` only as separate words: both occur inside hashes.
_EMBEDDING = re.compile(r"embed|bge|nomic|minilm|(?<![a-z0-9])(?:e5|gte)(?![a-z0-9])", re.IGNORECASE)
_VISION = re.compile(r"vlm|vision|llava|pixtral|qwen.*vl|gemma-3(?!n|-1b|-270m)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Feature:
    """Whether a model has a feature, and the source of that: model, instance, provider, listed, catalog or default."""

    value: bool
    source: str


@dataclass(frozen=True, slots=True)
class Offering:
    """One model of one instance. `backend` is the only string that is ever sent to that server as `model`."""

    model: str
    backend: str
    settings: Model
    features: Mapping[str, Feature]
    capabilities: tuple[Capability, ...]
    template: ChatTemplate | None = field(default=None, repr=False)
    """The model's own chat template, if this machine has it."""
    context_window: int | None = None
    """Tokens of a prompt and its answer together, if that is known."""

    @property
    def reasons(self) -> bool:
        """True if it is known to write reasoning before its answer."""
        return self.settings.starts_in_reasoning or self.features["thinking"].value


def offerings_of(instance: Instance, provider: Mapping[str, bool], reported: Iterable[str]) -> dict[str, Offering]:
    """Return the offerings by public name: the configured models, or else those that the server reported and the model
    lists of the instance allow. `provider` are features of all models.

    What a server reports is only a hint: mlx_lm.server lists the disk cache of its host, or an absolute path, of which
    only the last part becomes the public name. Of a catalogue of more than 1,000 models, none is offered.
    """
    reported = list(reported)
    found = {_public_name(backend): Model(backend=backend) for backend in reported if _public_name(backend)}
    allowed = {name: model for name, model in found.items() if instance.allows(name)}
    models = instance.models or (allowed if len(allowed) <= _MOST_REPORTED else {})
    offerings = {}
    for name, model in models.items():
        features = features_of(name, model, instance, provider)
        capabilities = tuple(each for each in instance.capabilities if features[_REQUIRED_FEATURE[each]].value)
        if capabilities:
            backend = model.backend or name
            template = find_chat_template(model, backend, reported)
            window = model.context_window or find_context_window(model, backend, reported)
            offerings[name] = Offering(name, backend, model, features, capabilities, template, window)
    return offerings


def _public_name(reported: str) -> str:
    path = PurePath(reported)
    return path.name if path.is_absolute() else reported


def features_of(name: str, model: Model, instance: Instance, provider: Mapping[str, bool]) -> dict[str, Feature]:
    """Return every feature of a model, decided by the first source that has a value for it."""
    is_embedding = embeds(name)
    only_embeds = name in instance.models and instance.capabilities == ("embed",)
    sources = {
        "model": _canonical(model.features),
        "instance": _canonical(instance.features),
        "provider": _canonical(provider),
        "listed": _text_features(embeds=True) if model.dimensions or only_embeds else {},
        "catalog": {**_text_features(embeds=is_embedding), "vision": not is_embedding and bool(_VISION.search(name))},
    }
    features = dict.fromkeys(FEATURES, Feature(False, "default"))
    for source, values in reversed(sources.items()):
        features |= {feature: Feature(value, source) for feature, value in values.items() if feature in features}
    return features


def embeds(name: str) -> bool:
    """Tell whether a model of this name makes embeddings, as far as a name can tell."""
    return bool(_EMBEDDING.search(name))


def _canonical(features: Mapping[str, bool]) -> dict[str, bool]:
    return {ALIASES.get(name, name): value for name, value in features.items()}


def _text_features(*, embeds: bool) -> dict[str, bool]:
    return {"completion": not embeds, "streaming": not embeds, "embedding": embeds}


def no_offerings_advice(table: str, instance: Instance) -> str:
    """Return what to change if an instance has no offerings. `table` is its place in the file: `instances.local`."""
    if not instance.capabilities:
        return "fleet.capabilities names nothing that usage allows: correct one of them"
    if not instance.models:
        return (
            f"list its models under [{table}.models], or check model_whitelist and model_blacklist: they should leave "
            f"between 1 and {_MOST_REPORTED:,} of the models that the server reports"
        )
    names, capabilities = ", ".join(map(repr, instance.models)), ", ".join(instance.capabilities)
    features = ", ".join(f"{_REQUIRED_FEATURE[each]} = true" for each in instance.capabilities)
    first = next(iter(instance.models))
    return (
        f"by their names and features the models that it lists ({names}) do not serve what it offers ({capabilities}): "
        f'set features = {{ {features} }} under [{table}.models."{first}"], or correct fleet.capabilities or usage'
    )


def offering_for(request: FleetRequest, offerings: Mapping[str, Offering]) -> Offering:
    """Return the offering that serves this request.

    Raises:
        ModelNotServed: no offering has exactly that name. (Two models may share a lane, so the name decides.)
        UnsupportedCapability: the model is served, but not for this operation or these parameters.
    """
    offering = offerings.get(request.model)
    if offering is None:
        raise ModelNotServed("this instance does not serve the requested model", served=sorted(offerings)[:20])
    if request.operation not in offering.capabilities:
        text = f"{offering.model} is served here for {', '.join(offering.capabilities)} only"
        raise UnsupportedCapability(text, param="model")
    if not isinstance(params := request.params, ChatParams):
        return offering
    # vllm-mlx and mlx-openai-server silently drop images for a text model and answer 200.
    if params.has_images and not offering.features["vision"].value:
        text = f"{offering.model} does not take images; if it does, set its feature vision = true"
        raise UnsupportedCapability(text, param="messages")
    tools = offering.features["tools"]
    if params.tools and not tools.value and tools.source != "default":
        raise UnsupportedCapability(f"{offering.model} is configured without tools", param="tools")
    return offering
