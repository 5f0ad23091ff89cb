"""The instances that this host can have now: of the MLX servers that run, or of a model in its cache."""

from __future__ import annotations

from collections.abc import Sequence

from fleet_worker.errors import ConfigurationError
from fleet_worker.setup.found_instances import PROGRAM, found_instances, has_program, memory
from fleet_worker.setup.local_models import LocalModel, local_models
from fleet_worker.setup.local_servers import LocalServer, local_servers
from fleet_worker.setup.worker_file import WorkerInstance

_EXAMPLE = "mlx-community/Qwen3-4B-Instruct-2507-4bit"


def local_instances(model: str | None = None) -> dict[str, WorkerInstance]:
    """Return an instance by name for each MLX server that runs on this host; without any, one that `up` starts, with
    the model of that name, or with the largest one in the local Hugging Face cache that fits into the memory.

    Raises:
        ConfigurationError: there is nothing. It says what to do.
    """
    servers = local_servers()
    models = [] if servers else local_models()
    found = found_instances(servers, models, memory(), model=model)
    if not found:
        raise ConfigurationError(_unknown(servers[0]) if servers else _nothing(models, model))
    return found


def _unknown(server: LocalServer) -> str:
    if server.wants_key:
        return f"the server at {server.url} wants a key: write the file by fleet-worker init, and the key into it"
    return f"the server at {server.url} does not say which model it was started with: add --model NAME"


def _nothing(models: Sequence[LocalModel], model: str | None) -> str:
    if model or any(each.kind == "chat" for each in models):
        if not has_program():
            return f"no MLX server runs on this host, and {PROGRAM} is not installed: pip install mlx-lm"
        return (
            "no MLX server runs on this host, and each model in its cache needs more memory than it has: --model NAME"
        )
    return (
        "no MLX server runs on this host, and its Hugging Face cache has no model for one. Start a server, or download "
        f"a model and run this again:\n\n  pip install mlx-lm huggingface_hub\n  hf download {_EXAMPLE}\n\n"
        "fleet-worker quickstart --simulated tries it with a simulated server"
    )


def described(instance: WorkerInstance) -> str:
    """Return a short description, for a terminal."""
    models = ", ".join(list(instance.models)[:5])
    return f"{models} at {instance.base_url}" if instance.base_url else f"{models}, whose server fleet-worker up starts"
