"""A simulated fleet and its gateway, for clients that are given none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from fleet_worker.testing import SimulatedMLX, embedded_broker, running_host
from tests.clients.client import Client
from tests.gateways import running_gateway

TEXT = "sim-text"
THOUGHTS = ("The", " user", " asks", ".")


@contextmanager
def own_fleet(clients: Sequence[Client]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the URL of a gateway, and the models by their roles: each client has one that calls its tools."""
    with ExitStack() as stack:
        instances, models = {}, {"text": TEXT, "json": TEXT}
        calls = {"text": (TEXT, ()), **{each.name: (f"sim-{each.name}", each.tool_calls) for each in clients}}
        calls |= {model: (model, tool_calls) for each in clients for model, tool_calls in each.also.items()}
        for role, (model, tool_calls) in calls.items():
            thinks = () if role == "text" else THOUGHTS
            mlx = stack.enter_context(
                SimulatedMLX(flavour="vllm_batched", models=[model], tool_calls=tool_calls, reasoning=thinks)
            )
            features = {"tools": True, "vision": True}
            instances[role] = {
                "base_url": mlx.base_url,
                "limits": {"concurrency": 8},
                "models": {model: {"context_window": 131_072, "features": features}},
            }
            models[role] = model
        broker = stack.enter_context(embedded_broker())
        stack.enter_context(running_host(broker, instances))
        yield stack.enter_context(running_gateway(broker)).url, models
