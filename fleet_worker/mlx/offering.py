"""What an instance offers: its models under their public names, with what each can do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from fleet_worker.errors import ModelNotServed, UnsupportedCapability
from fleet_worker.mlx.chat_templates import ChatTemplate, chat_template
from fleet_worker.mlx.features import NEEDED, Feature, features_of, serves
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.settings import Capability, Instance, Model


@dataclass(frozen=True, slots=True)
class Offering:
    """One model of one instance. `backend` is the one string ever sent to that server as `model`."""

    model: str
    backend: str
    settings: Model
    features: Mapping[str, Feature]
    capabilities: tuple[Capability, ...]
    template: ChatTemplate | None = field(default=None, repr=False)
    """The model's own, if this machine has it."""


def offerings_of(instance: Instance, provider: Mapping[str, bool], reported: Iterable[str]) -> dict[str, Offering]:
    """Return the offerings by public name: the configured models, else what the server reports and the lists let pass.

    Only a hint is reported: mlx_lm.server lists the disk cache of its host, or an absolute path, of which only the
    last part becomes the public name.
    """
    reported = list(reported)
    found = {_public_name(backend): Model(backend=backend) for backend in reported}
    models = instance.models or {name: model for name, model in found.items() if instance.allows(name)}
    offerings = {}
    for name, model in models.items():
        features = features_of(name, model, instance, provider)
        capabilities = tuple(each for each in instance.capabilities if serves(features, each))
        if capabilities:
            backend = model.backend or name
            template = chat_template(model, backend, reported)
            offerings[name] = Offering(name, backend, model, features, capabilities, template)
    return offerings


def no_offerings_advice(table: str, instance: Instance) -> str:
    """What to do about an instance without offerings; `table` is its place, as in `instances.local`."""
    if not instance.capabilities:
        return "fleet.capabilities names nothing that usage allows: correct one of them"
    if not instance.models:
        return f"list its models under [{table}.models], or check model_whitelist and model_blacklist"
    names, capabilities = ", ".join(map(repr, instance.models)), ", ".join(instance.capabilities)
    features = ", ".join(f"{NEEDED[each]} = true" for each in instance.capabilities)
    first = next(iter(instance.models))
    return (
        f"by their names and features the models that it lists ({names}) do not serve what it offers ({capabilities}): "
        f'set features = {{ {features} }} under [{table}.models."{first}"], or correct fleet.capabilities or usage'
    )


def _public_name(reported: str) -> str:
    path = PurePath(reported)
    return path.name if path.is_absolute() else reported


def offering_for(request: FleetRequest, offerings: Mapping[str, Offering]) -> Offering:
    """Return what serves this request.

    Raises:
        ModelNotServed: no offering has exactly that name; lanes of two models may collide, so the name decides.
        UnsupportedCapability: the model is served, but not for this.
    """
    offering = offerings.get(request.model)
    if offering is None:
        raise ModelNotServed("this instance does not serve the requested model", served=sorted(offerings)[:20])
    if request.operation not in offering.capabilities:
        raise UnsupportedCapability(f"{offering.model} is served here for {', '.join(offering.capabilities)} only")
    if isinstance(request.params, ChatParams):
        _check_features(request.params, offering)
    return offering


def _check_features(params: ChatParams, offering: Offering) -> None:
    # vllm-mlx and mlx-openai-server drop images for a text model silently and answer 200.
    if params.has_images and not offering.features["vision"].value:
        raise UnsupportedCapability(f"{offering.model} does not take images; if it does, set its feature vision = true")
    tools = offering.features["tools"]
    if params.tools and not tools.value and tools.source != "default":
        raise UnsupportedCapability(f"{offering.model} is configured without tools")
