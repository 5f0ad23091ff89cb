"""What a caller is told who asks for something that nobody offers: what does not fit, and what there is instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from fleet_worker.errors import ModelUnavailable
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry.offered import Offered

NEAREST = 3
"""Names that are told as the nearest."""
MOST_LISTED = 8
"""Names that the text of a refusal lists."""


def refusal(
    offered: Sequence[Offered],
    instances: Iterable[InstanceStatus],
    *,
    model: str,
    capability: str,
    instance: str,
    node: str | None,
) -> ModelUnavailable:
    """Return why a request is refused that nothing fits, of all that is `offered` and of all `instances`."""
    of_model = [each for each in offered if each.model == model]
    able = [each for each in of_model if capability in each.capabilities]
    fitting = [each for each in able if instance in ("any", each.instance.name)]
    if node and fitting:
        known = node in {each.node for each in instances}
        why = f"that node does not offer {capability} with {model}" if known else "no node of that name is known"
        return _no_such("node", node, why, {each.node for each in fitting})
    if able:
        known = instance in {each.name for each in instances}
        why = f"no instance of that name offers {capability} with {model}" if known else "no instance has that name"
        return _no_such("instance", instance, why, {each.instance.name for each in able})
    others = {each.model for each in offered if capability in each.capabilities}
    if of_model:
        return _not_for(capability, model, {each for offer in of_model for each in offer.capabilities}, others)
    text = f"no instance offers {capability} with that model"
    return no_such_model(model, others, text, "; fleet-worker status lists all models")


def no_such_model(model: str, others: Iterable[str], why: str, see: str = "") -> ModelUnavailable:
    """Return the error with the nearest names, which are in its text and its metadata."""
    near = nearest(model, others)
    names = f"; the nearest that exist: {', '.join(near)}" if near else ""
    return ModelUnavailable(f"{why}{names}{see}", nearest=near, param="model")


def _no_such(param: str, name: str, why: str, able: set[str]) -> ModelUnavailable:
    text = f"{why}; {param}s that offer it: {_listed(able)}"
    return ModelUnavailable(text, nearest=nearest(name, able), param=param)


def _not_for(capability: str, model: str, its_own: set[str], others: set[str]) -> ModelUnavailable:
    listed = f"; for {capability} there are: {_listed(others)}" if others else f", and no model is for {capability}"
    text = f"{model} is in the fleet, but only for: {', '.join(sorted(its_own))}{listed}"
    return ModelUnavailable(text, nearest=nearest(model, others, at_least=0.0), param="model")


def nearest(name: str, existing: Iterable[str], *, at_least: float = 0.5) -> list[str]:
    """Return the names most like this one, in any case, at most three: those that contain it or are contained in it
    first. Never the name itself."""
    wanted = name.lower()
    others = {each.lower(): each for each in sorted(existing) if each != name}
    parts = [lower for lower in others if min(len(lower), len(wanted)) > 2 and (wanted in lower or lower in wanted)]
    alike = difflib.get_close_matches(wanted, others, n=NEAREST, cutoff=at_least)
    return [others[lower] for lower in dict.fromkeys([*parts, *alike])][:NEAREST]


def _listed(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more
